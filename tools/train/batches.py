"""Training batches: questions drawn by family, packed into rows and masked from each other. NumPy only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitnet_py.tokenizer import Tokenizer
from tools.train.families import FAMILIES, Question


@dataclass(frozen=True)
class Example:
    """Token ids of one question and its answer: BOS, prompt, answer, EOS."""

    ids: npt.NDArray[np.int64]
    n_prompt: int


@dataclass(frozen=True)
class Batch:
    """``ids`` and ``document`` (n_rows, row_length); ``rows``: flat positions that ``targets`` follow."""

    ids: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    """Index of the example that each token belongs to; -1 for padding."""
    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    n_examples: int


def encode(tokenizer: Tokenizer, question: Question) -> Example:
    """Return the ids of a question as inference sees them: prompt and answer are encoded separately."""
    prompt = tokenizer.encode(question.prompt)
    answer = tokenizer.encode(f" {question.answer}", add_bos=False)
    eos_id = tokenizer.vocabulary.eos_id
    if eos_id is None:
        raise ValueError("expected a vocabulary with an end-of-text token, found none")
    return Example(np.array([*prompt, *answer, eos_id], np.int64), len(prompt))


def pack(examples: Sequence[Example], n_rows: int, row_length: int) -> Batch:
    """Pack ``examples`` in order, each into the emptiest row, until one does not fit.

    Raises ``ValueError`` when not even the first one fits.
    """
    ids = np.zeros((n_rows, row_length), np.int64)
    document = np.full((n_rows, row_length), -1, np.int64)
    used = np.zeros(n_rows, np.int64)
    rows: list[npt.NDArray[np.int64]] = []
    n_packed = 0
    for example in examples:
        size = len(example.ids)
        row = int(np.argmin(used))
        start = int(used[row])
        if start + size > row_length:
            break
        ids[row, start : start + size] = example.ids
        document[row, start : start + size] = n_packed
        used[row] += size
        rows.append(row * row_length + start + np.arange(example.n_prompt - 1, size - 1))
        n_packed += 1
    if not n_packed:
        raise ValueError(
            f"expected an example of at most {row_length} tokens, found one of {len(examples[0].ids)}"
        )
    targets = np.concatenate([example.ids[example.n_prompt :] for example in examples[:n_packed]])
    return Batch(ids, document, np.concatenate(rows), targets, n_packed)


def split(batch: Batch, n_parts: int) -> list[Batch]:
    """Return the rows of ``batch`` in ``n_parts`` batches, in order; ``n_examples`` stays that of the whole."""
    n_rows, row_length = batch.ids.shape
    edges = [n_rows * part // n_parts for part in range(n_parts + 1)]
    parts = []
    for first, last in itertools.pairwise(edges):
        mine = (batch.rows >= first * row_length) & (batch.rows < last * row_length)
        parts.append(
            Batch(
                batch.ids[first:last],
                batch.document[first:last],
                batch.rows[mine] - first * row_length,
                batch.targets[mine],
                batch.n_examples,
            )
        )
    return parts


class Sampler:
    """Draws batches; batch ``step`` depends only on the seed and ``step``, so a resumed run sees the same ones."""

    def __init__(
        self,
        groups: dict[str, list[Example]],
        *,
        n_rows: int,
        row_length: int,
        seed: int,
        weights: Sequence[float],
    ) -> None:
        self.groups = list(groups.values())
        self.n_rows, self.row_length, self.seed = n_rows, row_length, seed
        share = np.array(weights, np.float64)
        self.share = share / share.sum()

    def batch(self, step: int) -> Batch:
        """Return batch number ``step``."""
        rng = np.random.default_rng([self.seed, step])
        # More than fit: an example has at least eight tokens.
        count = self.n_rows * self.row_length // 8
        examples = []
        for group in rng.choice(len(self.groups), size=count, p=self.share):
            members = self.groups[group]
            examples.append(members[rng.integers(len(members))])
        return pack(examples, self.n_rows, self.row_length)


def family_weights() -> list[float]:
    """Return the families' training weights, in their order."""
    return [family.weight for family in FAMILIES]
