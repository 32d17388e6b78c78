"""Pure functions from measurements to figures, ratios and verdict; receipts are written and judged with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bitnet_py.bench import spread
from crossval.bench.measures import MEASURES, Measure, Work
from crossval.bench.search import Search
from crossval.bench.steady import below_one_thread, two_speeds
from crossval.model.tolerance import PolicyName
from crossval.passes import Numerics
from crossval.receipts.party import Party
from crossval.terms import SIDES, PassFail, Side

Flag = Literal["two_speeds", "below_one_thread"]
"""Why a measure of an engine makes no ratio (``bench.steady``)."""


@dataclass(frozen=True)
class Taken:
    """Raw values of one measure: seconds or bytes of each engine, in order, and the passes compared."""

    raw: Mapping[Side, tuple[float, ...]]
    n_compared: int
    n_equal: int
    """Passes whose results are finite and bit-identical."""
    reads: Mapping[str, int]
    """Operation -> bytes of weights the candidate read for all of ``raw``, by its own counters."""
    n_within: int = 0
    """Passes whose logits differ and are within the bounds of engines that state different arithmetic."""


@dataclass(frozen=True)
class Further:
    """A second or later reference: its word, the engine, and how the candidate computed beside it."""

    word: str
    reference: Party
    candidate: Numerics


@dataclass(frozen=True)
class Pair:
    """The candidate against one reference.

    ``search``: how each engine was placed; None in receipts of versions that ran all engines with the same
    threads. ``policy``: whether equal bits are required. ``further``: the engines, where the reference is not the
    first one, which the receipt itself states.
    """

    taken: Mapping[str, Taken]
    """By name of the measure."""
    policy: PolicyName
    search: Mapping[Side, Search] | None = None
    further: Further | None = None


@dataclass(frozen=True)
class BenchFindings:
    """Everything that a receipt of kind ``bench`` is made from."""

    work: Work
    kernel: str | None
    """Kernel family requested of the candidate."""
    pairs: tuple[Pair, ...]
    """One per reference."""
    read_bytes: int
    read_s: tuple[float, ...]
    """Fastest streaming read of the buffer, per round."""
    min_ratios: Mapping[str, float | None]
    """By name of the measure, to every reference; None: no minimum."""


def figures(measure: Measure, work: Work, raw: Sequence[float]) -> list[float]:
    """Return the raw values in the measure's unit."""
    return [measure.n_tokens(work) / value for value in raw] if measure.unit == "tok/s" else list(raw)


def flags(measure: Measure, pair: Pair, side: Side) -> list[Flag]:
    """Return why an engine's values of a measure make no ratio; nothing is known of older receipts."""
    if pair.search is None or measure.scope != "round":
        return []
    search, raw = pair.search[side], pair.taken[measure.name].raw[side]
    found: list[Flag] = []
    if two_speeds(raw) is not None:
        found.append("two_speeds")
    setting = search.chosen(measure.name)
    more_threads = setting is not None and setting.n_threads > 1
    if more_threads and below_one_thread(raw, search.one_thread(measure.name)):
        found.append("below_one_thread")
    return found


def ratios(measure: Measure, pair: Pair) -> list[float]:
    """Return, round by round, how many times better the candidate is: 2 means half the time or memory.

    Empty where an engine's values are flagged.
    """
    if any(flags(measure, pair, side) for side in SIDES):
        return []
    raw = pair.taken[measure.name].raw
    return [
        reference / candidate for candidate, reference in zip(raw["candidate"], raw["reference"], strict=False)
    ]


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
    return sum(measure.n_compared(findings.work, pair.policy) for pair in findings.pairs for measure in MEASURES)


def all_taken(findings: BenchFindings) -> list[Taken]:
    """Return every measure of every pair."""
    return [taken for pair in findings.pairs for taken in pair.taken.values()]


def complete(findings: BenchFindings) -> bool:
    """Return whether every value was measured and every pass compared, at least one."""
    work = findings.work
    whole = all(
        len(values) == measure.n_values(work)
        and pair.taken[measure.name].n_compared == measure.n_compared(work, pair.policy)
        for pair in findings.pairs
        for measure in MEASURES
        for values in pair.taken[measure.name].raw.values()
    )
    return whole and len(findings.read_s) == work.n_rounds and n_required(findings) > 0


def median_ratio(measure: Measure, pair: Pair) -> float | None:
    """Return the median of the ratios, None where there are none."""
    found = spread(ratios(measure, pair))
    return None if found is None else found.median


def missed(findings: BenchFindings) -> list[str]:
    """Describe the measures whose median ratio is below the minimum required."""
    return [
        f"{what}: ratio {ratio:.3f}, {least:g} required"
        for what, ratio, least in _required(findings)
        if ratio is not None and ratio < least
    ]


def unshown(findings: BenchFindings) -> list[str]:
    """Describe the measures of which a minimum ratio is required and which make no ratio."""
    return [f"{what}: no ratio, {least:g} required" for what, ratio, least in _required(findings) if ratio is None]


def _required(findings: BenchFindings) -> list[tuple[str, float | None, float]]:
    """Return measure, median ratio and minimum ratio, for every reference."""
    several = len(findings.pairs) > 1
    return [
        (f"{name} beside reference {index}" if several else name, median_ratio(measure, pair), least)
        for index, pair in enumerate(findings.pairs, 1)
        for measure in MEASURES
        for name, least in findings.min_ratios.items()
        if name == measure.name and least is not None
    ]


def decide(findings: BenchFindings) -> PassFail:
    """Return the verdict.

    A result that does not agree fails, whatever the speed; missing measurements, and a required ratio that the
    measurements do not give, are incomplete.
    """
    if any(one.n_equal + one.n_within != one.n_compared for one in all_taken(findings)):
        return "fail"
    if not complete(findings):
        return "incomplete"
    if missed(findings):
        return "fail"
    return "incomplete" if unshown(findings) else "pass"
