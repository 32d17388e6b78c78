"""Measured floors: how far one engine is from itself when it does the same work another way.

A correct engine still gives slightly different numbers for the same tokens fed at once or one by one, or by
another number of threads. The largest such difference per tap is its *floor*: a smaller difference from another
engine says nothing (``crossval.repeat.margins`` expresses results in multiples of it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from crossval.capture import run
from crossval.compare.rerun import Chunks, Names, OpenRunner, at_once, compare_runs, one_by_one, require_live
from crossval.compare.rows import Skip, TapRow, row_status
from crossval.errors import BadInputError, CrossvalError
from crossval.model import taps
from crossval.model.tolerance import tolerance_for
from crossval.passes import PassRecord, Runner
from crossval.terms import LOGITS, Progress

PREFILL_DECODE = "at once / one by one"
CAPTURE = "with / without capture"


@dataclass(frozen=True)
class Floor:
    """The largest difference of one tap over all prompts, for one way of running the engine differently."""

    tap: str
    variation: str
    rel_l2: float
    """``|a - b| / |b|`` over the whole tap; 0.0 when all bits were equal."""
    worst_token_rel_l2: float
    """The same for the worst single token."""
    n_elements: int
    n_different: int
    """Elements whose bits differ."""


@dataclass(frozen=True)
class FloorTable:
    """Floors of one engine. ``unmeasured`` lists (tap, variation, why) for what could not be compared."""

    engine: str
    n_layers: int
    n_tokens: tuple[int, ...]
    """Length of every prompt that was run."""
    floors: tuple[Floor, ...]
    unmeasured: tuple[tuple[str, str, str], ...] = ()

    def of(self, tap: str, variation: str | None = None) -> Floor | None:
        """Return the largest floor of a tap over all variations (or of one); None when never measured."""
        found = [f for f in self.floors if f.tap == tap and variation in (None, f.variation)]
        return max(found, key=lambda f: (f.rel_l2, f.worst_token_rel_l2), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        return {
            **asdict(self),
            "n_tokens": list(self.n_tokens),
            "floors": [asdict(floor) for floor in self.floors],
            "unmeasured": [list(item) for item in self.unmeasured],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FloorTable:
        """Return the table of a receipt that is valid by the schema."""
        return cls(
            engine=data["engine"],
            n_layers=data["n_layers"],
            n_tokens=tuple(data["n_tokens"]),
            floors=tuple(Floor(**floor) for floor in data["floors"]),
            unmeasured=tuple((tap, variation, why) for tap, variation, why in data["unmeasured"]),
        )


# --- measuring ------------------------------------------------------------------------------------------------


def measure_floors(
    open_runner: OpenRunner,
    prompts: Sequence[Sequence[int]],
    *,
    n_layers: int,
    n_decode: int = 2,
    thread_counts: Sequence[int] = (),
    progress: Progress | None = None,
) -> FloorTable:
    """Measure one engine against itself on every tap, as many per run as memory allows.

    ``prompts``: token ids. Each is fed at once and one by one; for the other variations all but the last
    ``n_decode`` tokens at once and these one by one.
    ``thread_counts``: ``open_runner(n_threads=...)`` against ``open_runner()``.

    Raises:
        BadInputError: no prompt, one too short, or a recorded trace.
        CrossvalError: a run gave NaN or infinity: an engine that fails has no floor. Anything from a runner.
    """
    if not prompts or n_layers < 1 or n_decode < 0:
        raise BadInputError("floors need at least one prompt, one layer, and no negative number of decoded tokens")
    if min(map(len, prompts)) < n_decode + 2:
        raise BadInputError(f"prompts of at least {n_decode + 2} tokens are needed, got {min(map(len, prompts))}")
    with ExitStack() as stack:
        base = stack.enter_context(open_runner())
        require_live(base)
        variants = {f"{n} threads": stack.enter_context(open_runner(n_threads=n)) for n in thread_counts}
        work = _Measuring(base, variants, n_layers)
        names = Names.of(base, n_layers, int(prompts[0][0]))
        groups = list(names.groups(names.all, *(at_once(base, ids) for ids in prompts)))
        report = progress or (lambda *_: None)
        for n_done, group in enumerate(groups):
            report("measuring floors", n_done, len(groups))
            for ids in prompts:
                work.measure(tuple(ids), n_decode, group)
        report("measuring floors", len(groups), len(groups))
        for ids in prompts:
            work.measure_capture(tuple(ids), n_decode)
    return FloorTable(
        engine=base.identity.name,
        n_layers=n_layers,
        n_tokens=tuple(map(len, prompts)),
        floors=tuple(work.sorted_floors()),
        unmeasured=tuple((tap, variation, why) for (tap, variation), why in work.unmeasured.items()),
    )


@dataclass
class _Measuring:
    """One engine, the same engine with other numbers of threads, and the largest differences so far."""

    base: Runner
    variants: Mapping[str, Runner]
    n_layers: int
    floors: dict[tuple[str, str], Floor] = field(default_factory=dict)
    unmeasured: dict[tuple[str, str], str] = field(default_factory=dict)

    def measure(self, ids: tuple[int, ...], n_decode: int, names: Sequence[str]) -> None:
        whole = run(self.base, at_once(self.base, ids), names)
        self._note(PREFILL_DECODE, run(self.base, one_by_one(ids), names), whole, names)
        if self.variants:
            chunks = self._prompt_then_decode(ids, n_decode)
            usual = run(self.base, chunks, names)
            for variation, runner in self.variants.items():
                self._note(variation, run(runner, chunks, names), usual, names)

    def measure_capture(self, ids: tuple[int, ...], n_decode: int) -> None:
        chunks = self._prompt_then_decode(ids, n_decode)
        everything = [LOGITS, *taps.layer_taps(0), *taps.outline_taps(self.n_layers)]
        captured, plain = run(self.base, chunks, everything), run(self.base, chunks, [LOGITS])
        self._note(CAPTURE, captured, plain, [LOGITS])

    def _note(
        self, variation: str, one: Sequence[PassRecord], usual: Sequence[PassRecord], names: Sequence[str]
    ) -> None:
        for name in names:
            key = (name, variation)
            row = compare_runs(name, one, usual, tolerance_for(name, self.n_layers, "independent"))
            if isinstance(row, Skip):
                if not _model_lacks(name, [*one, *usual]):
                    self.unmeasured[key] = row.why
                continue
            if row_status(row) == "invalid":
                raise CrossvalError(f"{self.base.identity.name} has no floor: {name}, {variation}: {row.note}")
            if row.nmse is None or row.worst_token_nmse is None:
                self.unmeasured[key] = "a token's row is all zeros one way and not the other"
                continue
            found = _as_floor(row, variation)
            before = self.floors.get(key)
            self.floors[key] = found if before is None else _worse(before, found)

    def _prompt_then_decode(self, ids: tuple[int, ...], n_decode: int) -> Chunks:
        n_prompt = len(ids) - n_decode
        return at_once(self.base, ids[:n_prompt]) + one_by_one(ids[n_prompt:])

    def sorted_floors(self) -> list[Floor]:
        return sorted(
            self.floors.values(), key=lambda f: (taps.execution_index(f.tap, self.n_layers), f.variation)
        )


def _model_lacks(name: str, records: Sequence[PassRecord]) -> bool:
    """Tell whether this is a tap of a tensor that the model does not have."""
    return taps.is_optional(name) and not any(name in record.taps for record in records)


def _as_floor(row: TapRow, variation: str) -> Floor:
    assert row.nmse is not None
    assert row.worst_token_nmse is not None
    rate = row.exact_match_rate or 0.0
    n_different = row.n_elements - round(rate * row.n_elements)
    return Floor(
        row.tap, variation, math.sqrt(row.nmse), math.sqrt(row.worst_token_nmse), row.n_elements, n_different
    )


def _worse(a: Floor, b: Floor) -> Floor:
    return Floor(
        a.tap,
        a.variation,
        max(a.rel_l2, b.rel_l2),
        max(a.worst_token_rel_l2, b.worst_token_rel_l2),
        a.n_elements + b.n_elements,
        a.n_different + b.n_different,
    )
