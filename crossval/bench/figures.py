"""Pure functions from measurements to figures, ratios and verdict; receipts are written and judged with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitnet_py.bench import spread
from crossval.bench.measures import MEASURES, Measure, Work
from crossval.terms import PassFail, Side


@dataclass(frozen=True)
class Taken:
    """Raw values of one measure: seconds or bytes of each engine, in order, and the passes compared."""

    raw: Mapping[Side, tuple[float, ...]]
    n_compared: int
    n_equal: int
    """Passes whose results are finite and bit-identical."""
    reads: Mapping[str, int]
    """Operation -> bytes of weights the candidate read for all of ``raw``, by its own counters."""


@dataclass(frozen=True)
class BenchFindings:
    """Everything that a receipt of kind ``bench`` is made from."""

    work: Work
    kernel: str | None
    """Kernel family requested of the candidate."""
    taken: Mapping[str, Taken]
    """By name of the measure."""
    read_bytes: int
    read_s: tuple[float, ...]
    """Fastest streaming read of the buffer, per round."""
    min_ratios: Mapping[str, float | None]
    """By name of the measure; None: no minimum."""


def figures(measure: Measure, work: Work, raw: Sequence[float]) -> list[float]:
    """Return the raw values in the measure's unit."""
    return [measure.n_tokens(work) / value for value in raw] if measure.unit == "tok/s" else list(raw)


def ratios(taken: Taken) -> list[float]:
    """Return, round by round, how many times better the candidate is: 2 means half the time or memory."""
    pairs = zip(taken.raw["candidate"], taken.raw["reference"], strict=False)
    return [reference / candidate for candidate, reference in pairs]


def bytes_per_token(measure: Measure, work: Work, taken: Taken) -> float | None:
    """Return the bytes of weights that the candidate read per token."""
    n_tokens = measure.n_tokens(work) * len(taken.raw["candidate"])
    return sum(taken.reads.values()) / n_tokens if measure.reads and n_tokens else None


def read_rates(measure: Measure, work: Work, taken: Taken) -> list[float]:
    """Return, round by round, the bytes of weights that the candidate read per second."""
    per_token = bytes_per_token(measure, work, taken)
    return (
        [] if per_token is None else [per_token * rate for rate in figures(measure, work, taken.raw["candidate"])]
    )


def machine_rates(findings: BenchFindings) -> list[float]:
    """Return, round by round, the bytes per second of a streaming read."""
    return [findings.read_bytes / seconds for seconds in findings.read_s]


def n_required(findings: BenchFindings) -> int:
    """Return how many passes have to be compared."""
    return sum(measure.n_compared(findings.work) for measure in MEASURES)


def complete(findings: BenchFindings) -> bool:
    """Return whether every value was measured and every pass compared, at least one."""
    work = findings.work
    whole = all(
        len(values) == measure.n_values(work)
        and findings.taken[measure.name].n_compared == measure.n_compared(work)
        for measure in MEASURES
        for values in findings.taken[measure.name].raw.values()
    )
    return whole and len(findings.read_s) == work.n_rounds and n_required(findings) > 0


def missed(findings: BenchFindings) -> list[str]:
    """Describe the measures whose median ratio is below the minimum required."""
    found = []
    for name, least in findings.min_ratios.items():
        ratio = spread(ratios(findings.taken[name]))
        if least is not None and ratio is not None and ratio.median < least:
            found.append(f"{name}: ratio {ratio.median:.3f}, {least:g} required")
    return found


def decide(findings: BenchFindings) -> PassFail:
    """Return the verdict: a different result fails, whatever the speed; missing measurements are incomplete."""
    if any(one.n_equal != one.n_compared for one in findings.taken.values()):
        return "fail"
    if not complete(findings):
        return "incomplete"
    return "fail" if missed(findings) else "pass"
