"""A PyTorch model run pass by pass, with what its modules compute as taps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossval.errors import BadInputError
from crossval.formats import Dtype
from crossval.passes import Numerics, PassPlan, PassRecord, TapArray, pass_kind
from crossval.terms import LOGITS
from crossval.torch.cached import CachedModel, keys_name
from crossval.torch.hooks import Hooks, dtype_name
from crossval.traces.read import TraceModel, expected_shape
from crossval.traces.tap_map import Entry, TapMap, WrongShape, counted, resolve

Forward = Callable[[Sequence[int], int], Any]
"""Runs a model over the token ids of a pass, of which the first has the given position; returns the logits."""
_STATED: dict[str, Dtype] = {"f32": "f32", "bf16": "bf16", "f16": "f16"}


class HookedModel:
    """Hooks on a model that is called through ``forward``; use as a context manager.

    ``model`` is neither copied nor changed. ``shape``: of the GGUF file that holds the same model.
    """

    def __init__(
        self, model: Any, tap_map: TapMap, shape: TraceModel, forward: Forward | CachedModel | None = None
    ) -> None:
        """Raise ``BadInputError`` where the model cannot be recorded."""
        if model.training:
            raise BadInputError(
                "the model is in training mode, where modules such as dropout act: call model.eval()"
            )
        self._forward = CachedModel(model) if forward is None else forward
        self._map, self._shape = tap_map, shape
        self._paths = [path for path, _ in model.named_modules() if path]
        self._hooks = Hooks(model, lambda name: bool(self._targets(name)))
        self._selections: dict[frozenset[str], frozenset[str]] = {}
        self._n_past = 0
        self._kv: set[str | None] = set()

    def __enter__(self) -> HookedModel:
        """Put the hooks on the model.

        Raises:
            BadInputError: the tap map fits none of its modules.
        """
        self._hooks.__enter__()
        if not self._hooks.names:
            raise BadInputError(
                f"tap map {self._map.name} fits no module of this model, whose modules are "
                + ", ".join(counted(self._paths)[:12])
            )
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._hooks.__exit__(exc_type, exc, tb)

    def reset(self) -> None:
        """Begin a new sequence with the next pass."""
        self._n_past = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str] | None = None) -> PassRecord:
        """Run one pass and return its taps (``select``: only these); logits are the last token's.

        Raises:
            BadInputError: the tap map does not fit the model, or the model does not fit the GGUF file.
        """
        plan = PassPlan(pass_kind(len(token_ids), self._n_past), tuple(map(int, token_ids)), self._n_past)
        bad = next((token for token in plan.token_ids if not 0 <= token < self._shape.vocab_size), None)
        if bad is not None:
            raise BadInputError(f"token id {bad} is outside the vocabulary of {self._shape.vocab_size} tokens")
        self._hooks.selected = None if select is None else self._names_of(frozenset(select))
        with torch.no_grad(), self._hooks.calls:
            logits = self._forward(plan.token_ids, plan.start)
        self._n_past += len(plan.token_ids)
        if isinstance(self._forward, CachedModel):
            for name, tensor in self._forward.cached():
                self._hooks.keep(name, tensor)
                self._kv.add(dtype_name(tensor))
        arrays = self._taps(self._hooks.take(), plan)
        if LOGITS not in arrays:
            arrays[LOGITS] = self._logits(logits, plan)
        return PassRecord(plan, {name: tap for name, tap in arrays.items() if select is None or name in select})

    def numerics(self) -> Numerics:
        """Return the format that the tensors of the passes so far had, where they all had one."""
        return Numerics(compute_dtype=_only(set(self._hooks.dtypes.values())), kv_dtype=_only(self._kv))

    def dtypes(self) -> dict[str, int]:
        """Return in how many tensors each format was seen."""
        used = list(self._hooks.dtypes.values())
        return {name: used.count(name) for name in sorted(set(used))}

    def _names_of(self, select: frozenset[str]) -> frozenset[str]:
        """Return what is to be copied for some taps."""
        if select not in self._selections:
            names = [*self._hooks.names, *map(keys_name, range(self._shape.n_layers))]
            self._selections[select] = frozenset(
                name for name in names if not select.isdisjoint(self._targets(name))
            )
        return self._selections[select]

    def _targets(self, name: str) -> list[str]:
        return [tap for tap, _, _ in self._map.targets(name, self._shape.architecture)]

    def _taps(self, taken: dict[str, npt.NDArray[np.float32]], plan: PassPlan) -> dict[str, TapArray]:
        try:
            found = resolve(taken, self._map, self._shape.architecture).found
            return {tap: self._tap(tap, name, entry, taken[name], plan) for tap, (name, entry) in found.items()}
        except ValueError as error:
            raise BadInputError(f"tap map {self._map.name}: {error}") from error

    def _tap(self, tap: str, name: str, entry: Entry, array: npt.NDArray[np.float32], plan: PassPlan) -> TapArray:
        """Return a tap of all tokens, or of the last one where the model computed no others."""
        last = (len(plan.token_ids) - 1,)
        expected = expected_shape(tap, self._shape, plan, None)
        try:
            try:
                made, rows = entry.apply(array, expected, self._shape), None
            except WrongShape:
                rows = last
                made = entry.apply(array, expected_shape(tap, self._shape, plan, rows), self._shape)
        except ValueError as error:
            raise ValueError(
                f"{tap} of module {name}: {list(array.shape)} gives {error}, "
                f"the GGUF file's model {list(expected)}"
            ) from error
        if tap == LOGITS:
            made, rows = made[-1:], last
        return TapArray(np.ascontiguousarray(made, dtype=np.float32), rows)

    def _logits(self, logits: Any, plan: PassPlan) -> TapArray:
        if not isinstance(logits, torch.Tensor) or logits.shape[-1:] != (self._shape.vocab_size,):
            raise BadInputError(
                f"neither the tap map nor the model's result gives logits of {self._shape.vocab_size} tokens"
            )
        flat = logits.detach().to("cpu", torch.float32, copy=True).numpy().reshape(-1, self._shape.vocab_size)
        return TapArray(np.ascontiguousarray(flat[-1:]), (len(plan.token_ids) - 1,))


def _only(used: Collection[str | None]) -> Dtype | None:
    """Return the one format in use, if it is one that can be stated."""
    return _STATED.get(next(iter(used)) or "") if len(used) == 1 else None
