"""Compare the tensors of a model file with those of its checkpoint, value by value, one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from bitnet_py.checkpoint_model import CheckpointModel, Source, permute
from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGMLType, GGUFFile, TensorInfo
from bitnet_py.layouts import I2_S
from bitnet_py.tensor_facts import FLOATS, TensorFacts, float_values, packed_codes, tensor_facts
from bitnet_py.ternarise import Ternary, absmean
from crossval.formats import BF16, F16, F32
from crossval.terms import Progress
from crossval.weights.blocks import CRITERIA, Tally
from crossval.weights.readings import Stored, Targets, find_matches
from crossval.weights.rows import Compared, Expected, Match, TensorRow
from crossval.weights.scales import summation_error

HEAD, EMBEDDING = "output.weight", "token_embd.weight"
_ROWS = 1024


def read_file(gguf: GGUFFile, progress: Progress) -> list[TensorRow]:
    """Return a row per tensor of a file without a checkpoint to compare it with."""
    rows = []
    for done, facts in enumerate(tensor_facts(gguf)):
        progress("reading tensors", done, len(gguf.tensors))
        rows.append(TensorRow(facts.name, facts, None))
    return rows


def compare_tensors(gguf: GGUFFile, model: CheckpointModel, progress: Progress) -> list[TensorRow]:
    """Return a row per tensor of the file and of the checkpoint, in the order of the checkpoint's graph.

    Raises:
        ModelError: values of the checkpoint that cannot be used.
    """
    return _Comparison(gguf, model, progress).run()


@dataclass
class _Comparison:
    gguf: GGUFFile
    model: CheckpointModel
    progress: Progress
    targets: Targets = field(default_factory=Targets)
    norms: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def run(self) -> list[TensorRow]:
        facts = {row.name: row.facts for row in read_file(self.gguf, self.progress)}
        sources = {source.target: source for source in self.model.sources}
        for source in sources.values():
            if source.role == "norm":
                self.norms[source.target] = self.model.norm(source)
        rows = []
        for done, source in enumerate(sources.values()):
            self.progress("comparing tensors", done, len(sources))
            rows.append(self.row(source, facts.get(source.target)))
        rows += [self.extra(name, found) for name, found in facts.items() if name not in sources]
        return [self.explained(row, sources.get(row.name)) for row in rows]

    def row(self, source: Source, facts: TensorFacts | None) -> TensorRow:
        """Return the row of a tensor of the checkpoint, without what explains a difference."""
        dtype = self.model.checkpoint.dtype(source.name)
        expected = Expected(source.name, source.role, source.shape, dtype)
        if source.role == "matrix":
            ternary = self.model.ternary(source)
            self.targets.add(source.target, ternary.codes)
            expected = replace(expected, scale=ternary.scale, largest=self.largest(source, ternary))
            row = TensorRow(source.target, facts, expected)
            return row if facts is None else self.matrix(row, source, ternary)
        row = TensorRow(source.target, facts, expected)
        if facts is None:
            return row
        return self.norm(row) if source.role == "norm" else self.table(row, source)

    def largest(self, source: Source, ternary: Ternary) -> float | None:
        """Return the largest absolute weight of a matrix of float weights."""
        if ternary.dtype == "uint8":
            return None
        return float(np.abs(self.model.checkpoint.tensor(source.name)).max())

    def matrix(self, row: TensorRow, source: Source, ternary: Ternary) -> TensorRow:
        assert row.facts is not None
        n_values = ternary.codes.size
        if row.facts.shape != ternary.codes.shape:
            return replace(row, compared=Compared(n_values, n_values, 0))
        try:
            codes = stored_codes(self.gguf, self.gguf.tensors[row.name])
        except ModelError as error:
            return replace(row, skipped=str(error))
        different = codes != ternary.codes
        n_different = int(np.count_nonzero(different))
        compared = Compared(n_values, n_different, 0)
        if n_different and ternary.dtype != "uint8":
            compared = self.of_masters(row.name, compared, codes, different, source)
        return replace(row, compared=compared)

    def of_masters(
        self,
        name: str,
        compared: Compared,
        codes: npt.NDArray[np.uint8],
        different: npt.NDArray[np.bool_],
        source: Source,
    ) -> Compared:
        """Count differences at rounding ties, and try other ways to quantise the checkpoint's float weights."""
        values = np.asarray(self.model.checkpoint.tensor(source.name), np.float32)
        heads = source.permuted_heads
        if heads is not None:
            values = permute(values, heads)
        inverse = np.float32(1) / np.float32(absmean(values)[1])
        near = np.abs(np.abs(values[different].astype(np.float64) * inverse) - 0.5) <= summation_error(values.size)
        n_at_ties = int(np.count_nonzero(near))
        if n_at_ties == compared.n_different:
            return replace(compared, n_at_ties=n_at_ties)
        found = [how for how, other in _other_quantisers(values, inverse) if np.array_equal(other, codes)]
        return replace(compared, n_at_ties=n_at_ties, matches=tuple(Match(name, (how,)) for how in sorted(found)))

    def norm(self, row: TensorRow) -> TensorRow:
        assert row.facts is not None
        info, right = self.gguf.tensors[row.name], self.norms[row.name]
        if info.type not in FLOATS:
            return replace(row, skipped=f"values of type {info.type.name} are not compared")
        if info.shape != right.shape:
            return replace(row, compared=Compared(right.size, right.size, 0))
        values = float_values(self.gguf, info, slice(None)).astype(np.float32)
        held = _as_held(right, info.type)
        n_different = int(np.count_nonzero(values.view(np.uint32) != held.view(np.uint32)))
        if not n_different:
            return replace(row, compared=Compared(right.size, 0, 0))
        found = [Match(row.name, (how,)) for how, other in _other_values(right) if np.array_equal(values, other)]
        found += [Match(name, ()) for name, other in self.norms.items() if np.array_equal(values, other)]
        return replace(row, compared=Compared(right.size, n_different, 0, tuple(sorted(found))))

    def table(self, row: TensorRow, source: Source) -> TensorRow:
        """Compare the embedding or a head with the checkpoint's, rounded to the file's type."""
        assert row.facts is not None
        info = self.gguf.tensors[row.name]
        n_values = int(np.prod(source.shape))
        if info.type not in FLOATS and info.type.name not in CRITERIA:
            return replace(row, skipped=f"values of type {info.type.name} are not compared")
        if info.shape != source.shape:
            return replace(row, compared=Compared(n_values, n_values, 0))
        other = {HEAD: "model.embed_tokens.weight", EMBEDDING: "lm_head.weight"}[row.name]
        if info.type.name in CRITERIA:
            return replace(row, compared=self.in_blocks(info, source, other))
        candidates: dict[Match, str] = {
            Match(row.name, (how,)): source.name for how in ("in bfloat16", "in float16")
        }
        if other in self.model.checkpoint:
            candidates[Match(EMBEDDING if row.name == HEAD else HEAD, ())] = other
        n_different, left = self.count_different(info, source, candidates)
        return replace(
            row, compared=Compared(n_values, n_different, 0, tuple(sorted(left)) if n_different else ())
        )

    def in_blocks(self, info: TensorInfo, source: Source, other: str) -> Compared:
        """Compare a table in blocks with the checkpoint's, and where it differs with the other table there."""
        names = [source.name, *([other] if other in self.model.checkpoint else [])]
        kind = GGMLQuantizationType(int(info.type))
        tallies = {name: Tally(kind) for name in names}
        stored = self.gguf.data(info.name).reshape(info.shape[0], -1)
        for first in range(0, info.shape[0], _ROWS):
            some = slice(first, min(first + _ROWS, info.shape[0]))
            for name, tally in tallies.items():
                tally.add(stored[some], self.model.checkpoint.rows(name, some).astype(np.float32))
        criterion, n_different = tallies[source.name].outcome
        holds = [name for name in names[1:] if n_different and not tallies[name].outcome[1]]
        matches = tuple(Match(EMBEDDING if info.name == HEAD else HEAD, ()) for _ in holds)
        return Compared(int(np.prod(info.shape)), n_different, 0, matches, criterion)

    def count_different(
        self, info: TensorInfo, source: Source, candidates: dict[Match, str]
    ) -> tuple[int, list[Match]]:
        """Return how many values differ, and which candidates give every value, over chunks of rows."""
        checkpoint, left, n_different = self.model.checkpoint, list(candidates), 0
        rounds = {"in bfloat16": BF16, "in float16": F16}
        for first in range(0, info.shape[0], _ROWS):
            some = slice(first, min(first + _ROWS, info.shape[0]))
            with np.errstate(over="ignore"):
                stored = float_values(self.gguf, info, some).astype(np.float32)
                right = checkpoint.rows(source.name, some).astype(np.float32)
                n_different += int(np.count_nonzero(stored != _as_held(right, info.type)))
                for match in list(left):
                    name = candidates[match]
                    values = right if name == source.name else checkpoint.rows(name, some).astype(np.float32)
                    narrow = rounds[match.how[0]].round(values) if match.how else values
                    if not np.array_equal(stored, _as_held(narrow, info.type)):
                        left.remove(match)
        return n_different, left

    def extra(self, name: str, facts: TensorFacts | None) -> TensorRow:
        """Return the row of a tensor that the checkpoint lacks; a head may be a copy of the embedding."""
        row = TensorRow(name, facts, None)
        embedding = self.gguf.tensors.get(EMBEDDING)
        info = self.gguf.tensors[name]
        if name != HEAD or embedding is None or (info.type, info.shape) != (embedding.type, embedding.shape):
            return row
        same = np.array_equal(self.gguf.data(name), self.gguf.data(EMBEDDING))
        return replace(row, copy_of=EMBEDDING if same else None)

    def explained(self, row: TensorRow, source: Source | None) -> TensorRow:
        """Return the row of a matrix with the readings that explain its codes, once all matrices are known."""
        compared = row.compared
        if source is None or source.role != "matrix" or compared is None or compared.matches:
            return row
        if compared.n_different == compared.n_at_ties:
            return row
        info = self.gguf.tensors[row.name]
        if len(info.shape) != 2:
            return row
        header = self.model.header
        heads = {"attn_q": header.n_heads, "attn_k": header.n_kv_heads}.get(row.name.split(".")[2])
        packed = None
        if info.type is GGMLType.I2_S:
            packed = packed_codes(self.gguf, info)[0]
        stored = Stored(
            row.name,
            (info.shape[0], info.shape[1]),
            (source.shape[0], source.shape[1]),
            packed,
            stored_codes(self.gguf, info),
            heads,
            source.permuted_heads is not None,
        )
        return replace(row, compared=replace(compared, matches=find_matches(stored, self.targets)))


def stored_codes(gguf: GGUFFile, info: TensorInfo) -> npt.NDArray[np.uint8]:
    """Return the codes of a ternary matrix of a file, 0 to 3, ``(rows, cols)``, as its type is defined.

    Raises:
        ModelError: no ternary matrix.
    """
    rows, cols = info.shape
    return I2_S.unpack(packed_codes(gguf, info)[0], rows, cols)


def _as_held(values: npt.NDArray[Any], ggml_type: GGMLType) -> npt.NDArray[np.float32]:
    """Return values as a tensor of a type of single numbers holds them, widened to float32 again."""
    rounded = {GGMLType.F16: F16, GGMLType.BF16: BF16}.get(ggml_type, F32).round(values)
    return rounded.astype(np.float32)


def _other_quantisers(
    values: npt.NDArray[np.float32], inverse: np.float32
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Yield the codes that other ways to quantise give."""
    for how, kind in (("absmean in bfloat16", BF16), ("absmean in float16", F16)):
        rounded = np.float32(kind.round(np.array([1 / np.float64(inverse)]))[0])
        yield how, (np.clip(np.rint(values / rounded), -1, 1) + 1).astype(np.uint8)
    yield "signs", (np.where(np.abs(values) < np.float32(1e-6), 0, np.sign(values)) + 1).astype(np.uint8)
    yield "truncated", (np.clip(np.trunc(values * inverse), -1, 1) + 1).astype(np.uint8)


def _other_values(right: npt.NDArray[np.float32]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the values that known mistakes make of a norm's weights."""
    yield "plus one", right + np.float32(1)
    yield "minus one", right - np.float32(1)
    yield "negative", -right
    yield "all ones", np.ones_like(right)
    yield "in bfloat16", BF16.round(right).astype(np.float32)
    yield "in float16", F16.round(right).astype(np.float32)
