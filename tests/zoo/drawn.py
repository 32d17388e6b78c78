"""The harness's results on faults drawn at random: ``python -m tests.zoo --drawn N --seed S``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from bitnet_py.synth import SynthConfig, write_model
from crossval.engines.bitnet_py import BitnetPyRunner
from tests.support.healthy_recordings import ours
from tests.support.judged import judge
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.recorded import record
from tests.zoo.detect import Replay
from tests.zoo.draw import SHAPES, VOCAB_SIZE, Drawn, draw
from tests.zoo.recording import Recording, first_difference

VISIBLE = 1e-3
"""Least relative L2 distance, of the worst token, that a fault must make: more than any rounding."""
ATTEMPTS = 20


Naming = Literal["right", "listed", "undetermined", "wrong"]
"""``listed``: undetermined, and the truth is among the explanations that are given as equal."""


@dataclass(frozen=True)
class DrawnOutcome:
    """One drawn fault and its result."""

    fault: Drawn
    verdict: str
    side: bool
    layer: bool
    op: bool
    naming: Naming
    said: str

    @property
    def detected(self) -> bool:
        """Whether the harness detected anything."""
        return self.verdict not in ("parity", "incomplete", "agrees_within")


def outcomes(n: int, seed: int, folder: Path, *, first: int = 0) -> Iterator[DrawnOutcome]:
    """Draw and judge ``n`` faults, each on the first attempt that shows at its place without the harness."""
    models: dict[str, Model] = {}
    with ExitStack() as stack:
        references: dict[str, BitnetPyRunner] = {}
        for shape, size in SHAPES.items():
            path = folder / f"drawn-{len(models)}.gguf"
            config = SynthConfig(vocab_size=VOCAB_SIZE, seed=len(models), **size)  # type: ignore[arg-type]
            write_model(path, config)
            models[shape] = Model(path)
            references[shape] = stack.enter_context(BitnetPyRunner(path, n_threads=1))
        for number in range(first, first + n):
            fault, faulty = placed(seed, number, models)
            yield _judged(fault, faulty, models[fault.shape], references[fault.shape])


def placed(seed: int, number: int, models: dict[str, Model]) -> tuple[Drawn, Recording]:
    """Return fault ``number`` and what its engine computes; it shows first where it was put.

    Raises:
        AssertionError: no attempt showed there.
    """
    for attempt in range(ATTEMPTS):
        fault = draw(seed, number, attempt)
        model = models[fault.shape]
        faulty = record(model, fault.prompt, fault.n_decode, fault.style, [fault.mistake])
        decoded = [one.plan.token_ids[0] for one in faulty.passes[1:]]
        healthy = record(model, fault.prompt, fault.n_decode, fault.style, forced=decoded)
        shown = first_difference(healthy, faulty)
        in_place = shown is not None and (shown.tap, shown.pass_kind) == (fault.tap, fault.pass_kind)
        if in_place and _distance(healthy, faulty, shown.pass_index, shown.tap) > VISIBLE:
            return fault, faulty
    raise AssertionError(f"no attempt at drawn fault {seed}:{number} shows where it was put")


def _distance(healthy: Recording, faulty: Recording, index: int, tap: str) -> float:
    a, b = (one.array(index, tap).astype(np.float64) for one in (healthy, faulty))
    if not np.isfinite(b).all():
        return float("inf")
    rows = range(len(a)) if not tap.endswith(("kq", "kq_soft_max")) else [slice(None)]
    return max(float(np.linalg.norm(a[row] - b[row]) / max(np.linalg.norm(a[row]), 1e-30)) for row in rows)


def _judged(fault: Drawn, faulty: Recording, model: Model, reference: BitnetPyRunner) -> DrawnOutcome:
    reference.reset()
    right = ours(reference, [one.plan for one in faulty.passes], model.n_layers)
    found = judge(Replay(faulty), Replay(right), fault.prompt, model.path, n_decode=fault.n_decode)
    guilty = found.guilty
    diagnosis = found.finding.diagnosis if found.finding else None
    said, naming = "nothing", "undetermined"
    if diagnosis is not None:
        listed = "; ".join(f"{one.name}: {one.sentence}" for one in diagnosis.candidates)
        said = f"{diagnosis.name}: {diagnosis.explanation}; {listed}"
        fits = fault.right.fits(said if diagnosis.determined else listed)
        naming = ("right" if fits else "wrong") if diagnosis.determined else "listed" if fits else "undetermined"
    return DrawnOutcome(
        fault,
        found.verdict,
        side=found.verdict == "candidate_defect",
        layer=guilty is not None and guilty.tap.rpartition(".")[0] == fault.tap.rpartition(".")[0],
        op=guilty is not None and (guilty.tap, guilty.pass_kind) == (fault.tap, fault.pass_kind),
        naming=cast(Naming, naming),
        said=said,
    )


def report(results: Sequence[DrawnOutcome]) -> list[str]:
    """Return the counts, by family, and every fault that was not named correctly."""
    names = ("detected", "side", "layer", "op")
    lines = [
        f"| family | faults | {' | '.join(names)} | named right | among equals | undetermined | wrong name |",
        "|---" * (len(names) + 6) + "|",
    ]
    families = [*dict.fromkeys(one.fault.family for one in results), None]
    for family in families:
        mine = [one for one in results if family in (None, one.fault.family)]
        naming = Counter(one.naming for one in mine)
        counts = [sum(getattr(one, name) for one in mine) for name in names]
        cells = [len(mine), *counts, *(naming[one] for one in ("right", "listed", "undetermined", "wrong"))]
        lines.append(f"| {family or 'all'} | {' | '.join(map(str, cells))} |")
    lines.append("")
    named = {one.fault.family: one for one in results if one.naming == "right"}
    lines += [f"- right, {one.fault.id}: {one.said}".replace("\n", " ") for one in named.values()]
    for one in results:
        if not (one.detected and one.side and one.op and one.naming == "right"):
            lines.append(f"- `{one.fault.id}`: {one.verdict}, {one.naming}: {one.said}".replace("\n", " "))
    return lines
