"""Every fault of the zoo on every choice of taps: the results when less was recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from crossval.audit.checks import OpCheck
from crossval.cli.exits import EXIT_OF_VERDICT
from crossval.compare.greedy import compare_greedy
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.spec import SpecRunner
from crossval.examine import greedy_receipt
from crossval.examine.greedy_audit import audit_prompt
from crossval.model.config import SpecConfig
from crossval.model.graphs import op_table
from crossval.model.taps import token_axis
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, PassRecord, Runner
from tests.support.judged import Judged, judge
from tests.support.numpy_bitnet.recorded import only
from tests.support.recordings import NORMS, RECORDINGS, answers
from tests.zoo.catalogue import CASES
from tests.zoo.detect import Replay
from tests.zoo.engine import Select
from tests.zoo.fault import Case, TraceFault
from tests.zoo.recording import PROMPT, Recording
from tests.zoo.world import World, is_about_tokens

Place = Literal[
    "found", "recording", "elsewhere", "other side", "differs", "open", "parity", "no trace", "not recorded"
]
"""``recording``: of a fault in the trace, which the recording of that tensor is blamed for; ``differs``: the
engines differ, where is not said; ``open``: exit code 3; ``no trace``: parity, and all that is recorded is as the
right engine computes it, up to rounding; ``not recorded``: what was changed in a trace is not in this recording,
and what is left of it is right."""
Array = npt.NDArray[Any]
ROUNDING = 32 * 2.0**-24
"""Relative L2 distance of a token between correct arithmetics: 2e-6."""
WRONG: tuple[Place, ...] = ("parity", "elsewhere", "other side")
"""What must not happen."""
GREEDY = "greedy"
GREEDY_STEPS = 4
COLUMNS = (*(kept.name for kept in RECORDINGS), GREEDY)


EVERYWHERE = {"file-eps-1e-6": NORMS | {"result_norm"}, "file-rope-base-10000": frozenset({"q_rope", "k_rope"})}
"""Faults of the file that are in these operations of every layer: none of them is the wrong place."""


@dataclass(frozen=True)
class Cell:
    """One fault at one place, as one recording shows it."""

    fault: str
    id: str
    """The fault in its place."""
    recording: str
    place: Place
    verdict: str
    said: str = ""
    """Where the harness found it."""


@dataclass
class References:
    """What the specification computes over the passes of a case, made once."""

    world: World
    _made: dict[tuple[str, tuple[PassPlan, ...]], Recording] = field(default_factory=dict)

    def over(self, base: str, plans: tuple[PassPlan, ...]) -> Recording:
        """Return every tap of the correct model over these passes."""
        key = base, plans
        if key not in self._made:
            with SpecRunner(self.world.model(base)) as runner:
                names = set(self.world.healthy(base).passes[0].taps)
                passes = [runner.eval(plan.token_ids, names) for plan in plans]
                held = [PassRecord(one.plan, dict(one.taps)) for one in passes]
                self._made[key] = Recording(runner.identity, held)
        return self._made[key]


def cells(world: World, cases: Sequence[Case], recordings: Collection[str] = COLUMNS) -> Iterator[Cell]:
    """Run every case through engine and harness, with each recording; C faults first.

    The other party is the specification (``greedy``: the right engine): its arithmetic is not the engine's, so the
    direct comparison allows what independent engines may differ by.
    """
    references = References(world)
    told = [case for case in cases if not is_about_tokens(case)]
    with world.engine_faults():
        for case in told:
            if case.fault.how == "c":
                yield from _cells(world, references, case, recordings)
    for case in told:
        if case.fault.how != "c":
            yield from _cells(world, references, case, recordings)


def first_places() -> list[Case]:
    """Return one case of every fault."""
    seen: dict[str, Case] = {}
    for case in CASES:
        seen.setdefault(case.fault.name, case)
    return list(seen.values())


def _cells(world: World, references: References, case: Case, recordings: Collection[str]) -> Iterator[Cell]:
    base = case.fault.base
    faulty = world.faulty(case)
    config = world.weights(base).config
    plans = tuple(one.plan for one in faulty.passes)
    for kept in RECORDINGS:
        if kept.name not in recordings:
            continue
        if isinstance(case.fault, TraceFault) and not kept.keeps(case.tap):
            yield Cell(case.fault.name, case.id, kept.name, "not recorded", "")
            continue
        found = judge(
            Replay(only(faulty, kept.keeps)), Replay(references.over(base, plans)), plans[0].token_ids,
            world.model(base), n_decode=len(plans) - 1, diagnosed=False,
        )  # fmt: skip
        place = placed(
            found, true_places(case, config), case.pass_kind, kept.keeps, config,
            in_trace=isinstance(case.fault, TraceFault),
        )  # fmt: skip
        if place == "parity" and leaves_no_trace(world.healthy(base), faulty, kept.keeps):
            place = "no trace"
        yield Cell(case.fault.name, case.id, kept.name, place, found.verdict, said(found.guilty))
    if GREEDY in recordings:
        yield _greedy(world, case)


def true_places(case: Case, config: SpecConfig) -> list[str]:
    """Return the taps of the operations that a case makes wrong by themselves."""
    ops = EVERYWHERE.get(case.fault.name, ())
    return [case.tap, *(op.output for op in op_table(config) if op.name in ops)]


def placed(
    found: Judged,
    places: Iterable[str],
    pass_kind: str,
    keeps: Callable[[str], bool],
    config: SpecConfig,
    *,
    in_trace: bool = False,
) -> Place:
    """Classify a verdict on an engine that is wrong at ``places``, first in this kind of pass.

    ``in_trace``: the engine is right, the recording is wrong.
    """
    blamed = {name for one in found.found.audits["candidate"].misrecorded for name in one.taps}
    if found.exit_code == 3 and blamed:
        return "recording" if in_trace and not blamed.isdisjoint(places) else "elsewhere"
    if found.exit_code != 1:
        return "parity" if found.exit_code == 0 else "open"
    if found.verdict == "divergence":
        return "differs"
    if found.verdict != "candidate_defect" or found.guilty is None:
        return "other side"
    later = pass_kind == "prefill" or found.guilty.pass_kind == "decode"
    right = any(found.guilty.tap in answers(config, tap, keeps) for tap in places)
    return "found" if later and right else "elsewhere"


def leaves_no_trace(healthy: Recording, faulty: Recording, keeps: Callable[[str], bool]) -> bool:
    """Return whether all that a faulty engine recorded is what the correct one computes, up to rounding."""
    return [one.plan for one in healthy.passes] == [one.plan for one in faulty.passes] and all(
        _distance(right.taps[name].array, tap.array, token_axis(name)) <= ROUNDING
        for right, wrong in zip(healthy.passes, faulty.passes, strict=True)
        for name, tap in wrong.taps.items()
        if keeps(name)
    )


def _distance(right: Array, wrong: Array, axis: int) -> float:
    """Return the relative L2 distance of the worst token."""
    if right.shape != wrong.shape:
        return math.inf
    a, b = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float64) for x in (right, wrong))
    size = np.maximum(np.linalg.norm(a, axis=-1), np.finfo(np.float32).tiny)
    worst = float(np.max(np.linalg.norm(a - b, axis=-1) / size))
    return worst if math.isfinite(worst) else math.inf


def said(check: OpCheck | None) -> str:
    """Return where a finding is."""
    return "" if check is None else f"{check.tap}, {check.pass_kind}"


class _Faulty(BitnetPyRunner):
    """The build with all faults, one of them switched on while this engine computes."""

    def __init__(self, *arguments: object, switch: Select, selection: str) -> None:
        super().__init__(*arguments, n_threads=1)  # type: ignore[arg-type]
        self._switch, self._selection = switch, selection

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        self._switch(self._selection)
        try:
            return super().eval(token_ids, select)
        finally:
            self._switch("")


def _greedy(world: World, case: Case) -> Cell:
    """Compare tokens with the correct engine, which states the same arithmetic."""
    fault = case.fault
    if isinstance(fault, TraceFault):
        return Cell(fault.name, case.id, GREEDY, "not recorded", "")
    right = world.model(fault.base)
    if fault.how == "c":
        make = partial(_Faulty, right, switch=world.select, selection=case.selection)
    else:
        make = partial(BitnetPyRunner, world.damaged(case), n_threads=1)
    with ExitStack() as stack:
        candidate = stack.enter_context(make())
        reference = stack.enter_context(BitnetPyRunner(right, n_threads=1))
        weights = world.weights(fault.base)
        verdict, place, where = judged_greedy(
            candidate, reference, PROMPT, weights, true_places(case, weights.config)
        )
    return Cell(fault.name, case.id, GREEDY, place, verdict, where)


def judged_greedy(
    candidate: Runner, reference: Runner, prompt: Sequence[int], weights: SpecWeights, places: Sequence[str]
) -> tuple[str, Place, str]:
    """Return the result of ``crossval greedy`` on two entered engines: verdict, its classification, and where."""
    result = compare_greedy(candidate, reference, prompt, GREEDY_STEPS, n_layers=weights.config.n_layers)
    audited = audit_prompt(candidate, reference, result.prompts[0], weights)
    examined = greedy_receipt.GreedyExamined(result, audited.audits)
    verdict = greedy_receipt.verdict(examined, greedy_receipt.summarize(examined))
    check = next((one.check for one in audited.findings if one.side == "candidate"), None)
    if verdict != "candidate_defect" or check is None:
        kinds: dict[int, Place] = {0: "parity", 3: "open"}
        return (
            verdict,
            kinds.get(EXIT_OF_VERDICT[verdict], "differs" if verdict == "divergence" else "other side"),
            "",
        )
    return verdict, "found" if check.tap in places else "elsewhere", said(check)
