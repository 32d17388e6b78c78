"""An engine wrapped: it computes the same, but records other values or fewer tensors, or states other numerics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crossval.passes import Numerics, PassPlan, PassRecord, Runner, TapArray

Array = np.ndarray[Any, Any]
Change = Callable[[Array], Array]


class Wrapped:
    """A runner that hands on what another one gives."""

    status = "live"
    plan: tuple[PassPlan, ...] | None = None

    def __init__(
        self,
        runner: Runner,
        *,
        at: Mapping[tuple[int, str], Change] | None = None,
        ops: Mapping[str, Change] | None = None,
        every: Change | None = None,
        only: Collection[str] | None = None,
        numerics: Numerics | None = None,
    ) -> None:
        """Change arrays ``at`` a pass index and full tap name, of operations in all layers, or ``every`` one.

        ``only``: the taps it gives, None: all; ``numerics``: what it states, None: what the engine does.
        """
        self._runner, self._at, self._ops, self._every, self._only = runner, at or {}, ops or {}, every, only
        self._index = 0
        self.identity = runner.identity if numerics is None else replace(runner.identity, numerics=numerics)

    def reset(self) -> None:
        self._runner.reset()
        self._index = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        record = self._runner.eval(token_ids, [n for n in select if self._only is None or n in self._only])
        given = dict(record.taps)
        for name, tap in given.items():
            change = self._every or self._at.get((self._index, name)) or self._ops.get(name.rpartition(".")[2])
            if change is not None:
                given[name] = TapArray(np.ascontiguousarray(change(tap.array.copy()), np.float32), tap.rows)
        self._index += 1
        return PassRecord(record.plan, given)
