"""An engine's results in memory: run one, copy it, find where two differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model import taps
from crossval.passes import EngineIdentity, PassKind, PassPlan, PassRecord, TapArray
from tests.zoo.models import SHAPE, SPECIAL_TOKEN

PROMPT = (1, 17, SPECIAL_TOKEN, 255, 42, 9, 133)
"""Seven tokens: a batch with a remainder modulo 4."""
DECODED = (SPECIAL_TOKEN,)
PLANS = (
    PassPlan("prefill", PROMPT, 0),
    *(PassPlan("decode", (token,), len(PROMPT) + i) for i, token in enumerate(DECODED)),
)


@dataclass
class Recording:
    """All passes of an engine with all its taps."""

    identity: EngineIdentity
    passes: list[PassRecord]

    def first_pass(self, kind: PassKind) -> int:
        """Return the index of the first pass of a kind."""
        return next(i for i, record in enumerate(self.passes) if record.plan.kind == kind)

    def array(self, index: int, tap: str) -> np.ndarray:
        """Return a recorded array; changing it changes the recording."""
        return self.passes[index].taps[tap].array

    def copy(self) -> Recording:
        """Return a copy whose arrays can be changed."""
        passes = [
            replace(p, taps={name: TapArray(t.array.copy(), t.rows) for name, t in p.taps.items()})
            for p in self.passes
        ]
        return Recording(self.identity, passes)


def record(model: Path, kernel: str | None = None) -> Recording:
    """Run the engine that is loaded over ``PLANS`` with all taps; one thread; ``kernel``: not the usual family."""
    with BitnetPyRunner(model, n_threads=1, kernel=kernel) as runner:
        names = taps.all_taps(runner.model.config.n_layers)
        passes = [runner.eval(plan.token_ids, names) for plan in PLANS]
        assert [p.plan for p in passes] == list(PLANS)
        return Recording(runner.identity, passes)


@dataclass(frozen=True)
class Difference:
    """Where two recordings first differ in bits."""

    tap: str
    pass_kind: PassKind
    pass_index: int


def first_difference(healthy: Recording, faulty: Recording) -> Difference | None:
    """Return the first array in execution order that differs in bits, shape or presence, or in what it was fed."""
    for index, (a, b) in enumerate(zip(healthy.passes, faulty.passes, strict=True)):
        if a.plan != b.plan:
            return Difference(taps.INPUT_TAPS[0], a.plan.kind, index)  # the first operation reads the tokens
        names = sorted(a.taps.keys() | b.taps.keys(), key=lambda n: taps.execution_index(n, SHAPE.n_layers))
        for name in names:
            if not (name in a.taps and name in b.taps and _same_bits(a.taps[name], b.taps[name])):
                return Difference(name, a.plan.kind, index)
    return None


def _same_bits(a: TapArray, b: TapArray) -> bool:
    return a.rows == b.rows and a.array.shape == b.array.shape and a.array.tobytes() == b.array.tobytes()
