"""The specification as a runner: slow, exact, and the model's definition itself."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from bitnet_py.arithmetic import Generation
from crossval.engines.file_tokenizer import FileTokenizer
from crossval.errors import BadInputError
from crossval.model import graphs
from crossval.model.graphs import op_table
from crossval.model.kinds import FloatArray
from crossval.model.op import KVState, Op, forward
from crossval.model.weights import SpareWeights, SpecWeights
from crossval.passes import EngineIdentity, PassPlan, PassRecord, TapArray, pass_kind


class SpecRunner:
    """Runs ``crossval.model.graphs`` on a GGUF file, with a cache of keys and values in float64.

    Every tap covers all tokens of the pass, except ``result_norm`` and ``result_output``: the last
    one. Taps are rounded to float32 on the way out; inside, nothing is. It has no tokenizer: text is read by
    ``bitnet_py``'s, by the rules of a generation of bitnet.cpp (``passes.tokenizer_rules``).
    """

    status: Literal["live", "recorded"] = "live"
    plan: tuple[PassPlan, ...] | None = None

    def __init__(self, model_path: str | os.PathLike[str], rules: Generation = "march") -> None:
        self._path = Path(model_path)
        self._weights: SpecWeights | None = None
        self._table: tuple[Op, ...] = ()
        self._state = KVState()
        self._tokenizer = FileTokenizer(self._path, rules)

    @property
    def identity(self) -> EngineIdentity:
        """Name, and a digest of the package that defines the arithmetic."""
        digest = hashlib.sha256()
        for file in sorted(Path(graphs.__file__).parents[1].rglob("*.py")):
            digest.update(file.read_bytes())
        return EngineIdentity(
            name="specification",
            source_digest=digest.hexdigest(),
            settings={
                "arithmetic": "float64; int8 activations in BitLinear; no float16",
                "numpy": np.__version__,
                "container_check": "bitnet_py.gguf and bitnet_py.config",
                "tokenizer": "bitnet_py.tokenizer (the specification has none of its own)",
                "tokenizer_rules": self._tokenizer.rules,
            },
        )

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return token ids by ``bitnet_py``'s tokenizer; the specification has none of its own.

        Raises:
            BadInputError: the model's tokenizer metadata is missing or unusable.
        """
        return self._tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def reset(self) -> None:
        """Forget all keys and values; the next ``eval`` starts at position 0."""
        self._state = KVState()

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass and return the selected taps as float32.

        Raises:
            BadInputError: no tokens, a token outside the vocabulary, more tokens than the context
                holds, or weights that make an activation infinite or NaN.
        """
        weights = self._loaded()
        start = self._state.n_tokens
        self._check_tokens(weights, token_ids)
        plan = PassPlan(pass_kind(len(token_ids), start), tuple(int(t) for t in token_ids), start)
        selected = frozenset(select)
        taps: dict[str, TapArray] = {}
        began = time.perf_counter()
        for op, output in self._forward(weights, plan):
            if not np.isfinite(output).all():
                raise BadInputError(
                    f"{self._path}: {op.output}: expected finite values, found NaN or infinity; the first such "
                    f"tensor, so one of its weights is unusable ({', '.join(op.weights) or 'none of its own'})"
                )
            if op.output in selected:
                rows = (len(plan.token_ids) - 1,) if op.last_row_only else None
                taps[op.output] = TapArray(np.ascontiguousarray(output, dtype=np.float32), rows)
        return PassRecord(plan, taps, time.perf_counter() - began)

    def _forward(self, weights: SpecWeights, plan: PassPlan) -> Iterator[tuple[Op, FloatArray]]:
        # On a busy machine BLAS threads wait for each other, which can take a hundred times longer.
        with threadpool_limits(1, user_api="blas"):
            yield from forward(self._table, SpareWeights(weights), plan.token_ids, self._state)

    def _check_tokens(self, weights: SpecWeights, token_ids: Sequence[int]) -> None:
        config = weights.config
        if len(token_ids) == 0:
            raise BadInputError("expected at least one token, found none; give a prompt that is not empty")
        for token in token_ids:
            if not 0 <= token < config.vocab_size:
                raise BadInputError(
                    f"expected token ids from 0 to {config.vocab_size - 1}, found {token}; "
                    "the tokens were made for another model"
                )
        end = self._state.n_tokens + len(token_ids)
        if end > config.context_length:
            raise BadInputError(
                f"expected at most {config.context_length} positions (the model's context), found {end}; "
                "give a shorter prompt"
            )

    def _loaded(self) -> SpecWeights:
        if self._weights is None:
            raise RuntimeError("SpecRunner is not entered: use it as a context manager")
        return self._weights

    def __enter__(self) -> SpecRunner:
        """Map the model and list its operations.

        Raises:
            BadInputError: missing, malformed or unsupported model.
        """
        self._weights = SpecWeights(self._path)
        self._table = op_table(self._weights.config)
        self.reset()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Release the model and the cache."""
        self._weights = None
        self._table = ()
        self.reset()
