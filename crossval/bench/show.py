"""Print a benchmark's receipt: a line per measure, threads, what is flagged, bandwidth, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from crossval.bench.measures import MEASURES, TRIED, Measure
from crossval.bench.steady import two_speeds
from crossval.console import new_table, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.party import names_of
from crossval.receipts.show import show_verdict
from crossval.terms import SIDES, Side

Results = Mapping[str, Any]
"""``results`` of a receipt, or one of its ``references``: the candidate beside one reference."""


def show_bench(out: Console, receipt: Receipt) -> None:
    """Print what was measured, and the verdict."""
    results = receipt["results"]
    work = results["work"]
    tokens = f"{work['n_prompt']} + {work['n_decode']} tokens, {_threads(receipt)}"
    fresh = f"{work['n_processes']} fresh processes each on {work['n_first']} tokens"
    show_line(out, f"work       {tokens}; {work['n_rounds']} rounds, in turn; {fresh}")
    names = names_beside(receipt)
    ours = names[0]["candidate"]
    show_line(out, f"\nMedian and range; ratio: how many times faster, or smaller, {ours} is, round by round.")
    for named, pair in zip(names, beside(receipt), strict=True):
        if len(names) > 1:
            show_line(out, f"\nbeside {named['reference']}")
        out.print(measures_table(named, pair))
        for text in (*_placed(named, pair), *_flagged(named, pair), *_different(pair)):
            show_line(out, text)
    for measure in MEASURES:
        read = _reads(measure, results)
        if read:
            show_line(out, read)
    verdict, parity, coverage = receipt["verdict"], receipt["parity"], receipt["coverage"]
    equal = sum(one["passes"]["equal"] for pair in beside(receipt) for one in pair["measures"].values())
    bits = "all logits bit-identical" if parity["exact_match_rate"] == 1.0 else f"{equal} with equal logits"
    show_verdict(out, verdict, f"{coverage['compared']} of {coverage['required']} passes compared, {bits}")
    for text in results["missed"]:
        show_line(out, f"missed: {text}")


def beside(receipt: Receipt) -> list[Results]:
    """Return the results beside each reference."""
    return [receipt["results"], *receipt["results"].get("references", ())]


def names_beside(receipt: Receipt) -> list[dict[Side, str]]:
    """Return what to call candidate and reference in each of ``beside``."""
    first = names_of(receipt)
    found = [first]
    for one in receipt["results"].get("references", ()):
        found.append({"candidate": first["candidate"], "reference": one["word"]})
    return found


def measures_table(names: Mapping[Side, str], results: Results) -> Table:
    """Return one line per measure, both engines and their ratio."""
    table = new_table()
    for name in ("measure", "unit", *(plain(names[side]) for side in SIDES), "ratio", "what"):
        table.add_column(name, justify="left" if name in ("measure", "unit", "what") else "right", no_wrap=True)
    for measure in MEASURES:
        found = results["measures"][measure.name]
        cells = [spread_cell(found[side]["figure"], measure.unit) for side in SIDES]
        ratio = spread_cell(found["ratio"], "ratio")
        table.add_row(label(measure, found), unit_of(measure), *cells, ratio, measure.meaning)
    return table


def label(measure: Measure, found: Mapping[str, Any]) -> str:
    """Return a measure's name and, for speeds, its number of tokens."""
    words = measure.name.replace("_", " ")
    return f"{words} {found['n_tokens']}" if measure.unit == "tok/s" else words


_FORMS = {"tok/s": (1.0, "tok/s"), "s": (1e3, "ms"), "bytes": (1e-6, "MB"), "ratio": (1.0, "")}
"""Unit of a figure -> factor and unit shown."""


def unit_of(measure: Measure) -> str:
    """Return the unit shown."""
    return _FORMS[measure.unit][1]


def spread_cell(spread: Mapping[str, float] | None, unit: str) -> str:
    """Return a median with its range, in the unit shown."""
    if spread is None:
        return "-"
    median, low, high = (_digits(spread[name] * _FORMS[unit][0], unit) for name in ("median", "min", "max"))
    return median if spread["min"] == spread["max"] else f"{median} ({low} to {high})"


def _digits(value: float, unit: str) -> str:
    return f"{value:.2f}" if unit == "ratio" else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def setting_words(tried: Sequence[Mapping[str, Any]], chosen: int | None) -> str:
    """Return with how many threads a measure was taken, and where they ran."""
    if chosen is None:
        return "not tried"
    if chosen >= len(tried):  # the gate refuses such a receipt; it is shown all the same
        return f"setting {chosen} of {len(tried)} that were tried"
    n, cores = tried[chosen]["n_threads"], tried[chosen]["cores"]
    count = "1 thread" if n == 1 else f"{n} threads"
    return f"{count} pinned to {', '.join(map(str, cores))}" if cores else count


def placed(search: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return setting in words -> the measures of an engine that were taken in it."""
    found: dict[str, list[str]] = {}
    for measure in TRIED:
        words = setting_words(search["tried"], search["chosen"][measure.name])
        found.setdefault(words, []).append(measure.name.replace("_", " "))
    return found


_IDLE = {
    "sleeps": "its threads sleep while others are measured",
    "stopped": "it was stopped while others were measured",
    "unseen": "whether its threads sleep while others are measured cannot be seen here",
}


def _placed(names: Mapping[Side, str], results: Results) -> Iterator[str]:
    """Describe the threads of each engine."""
    for side in SIDES if "search" in results else ():
        search = results["search"][side]
        parts = [f"{words} for {' and '.join(measures)}" for words, measures in placed(search).items()]
        not_pinned = [] if search["not_pinned"] is None else [f"not pinned: {search['not_pinned']}"]
        yield "; ".join([f"{names[side]}: {', '.join(parts)}", *not_pinned, _IDLE[search["idle"]]])


def _flagged(names: Mapping[Side, str], results: Results) -> Iterator[str]:
    """Say why a measure makes no ratio."""
    for measure in MEASURES:
        found = results["measures"][measure.name]
        for side in SIDES:
            for flag in found[side].get("flags", ()):
                what = _FLAGGED[flag](measure, found, side, results)
                yield f"{measure.name.replace('_', ' ')}: {names[side]} {what}: no ratio"


def _two_speeds(measure: Measure, found: Mapping[str, Any], side: Side, results: Results) -> str:
    times = sorted(found[side]["raw"])
    n_fast = two_speeds(times) or 0
    fast, slow = (f"{_range(found, part)} in {len(part)} rounds" for part in (times[:n_fast], times[n_fast:]))
    return f"has two speeds, {fast} and {slow}"


def _below_one_thread(measure: Measure, found: Mapping[str, Any], side: Side, results: Results) -> str:
    tried = results["search"][side]["tried"]
    alone = [value for one in tried if one["n_threads"] == 1 for value in one["measures"][measure.name]["raw"]]
    return f"may be slower than its single thread, {_range(found, sorted(alone))} before the rounds"


_FLAGGED = {"two_speeds": _two_speeds, "below_one_thread": _below_one_thread}


def _range(found: Mapping[str, Any], times: Sequence[float]) -> str:
    """Return sorted times as a range of speeds."""
    low, high = (_digits(found["n_tokens"] / time, "tok/s") for time in (times[-1], times[0]))
    return f"{low} to {high} tok/s"


def _different(results: Results) -> Iterator[str]:
    """Say how many passes do not have equal bits."""
    passes = [one["passes"] for one in results["measures"].values()]
    within = sum(one.get("within", 0) for one in passes)
    compared = sum(one["compared"] for one in passes)
    n = compared - within - sum(one["equal"] for one in passes)
    if within:
        yield f"{within} passes differ in bits, within the bounds of engines that state different arithmetic"
    if n:
        yield f"{n} of {compared} passes do not agree; crossval layers shows where and why"


def _threads(receipt: Receipt) -> str:
    """Return how many threads the engines had."""
    n = receipt["results"]["work"]["n_threads"]
    fixed = "search" not in receipt["results"] or receipt["settings"]["n_threads"] is not None
    return f"{n} threads" if fixed or n == 1 else f"1 to {n} threads"


def _reads(measure: Measure, results: Mapping[str, Any]) -> str | None:
    """Describe the candidate's weight bandwidth, if it was measured."""
    reads, machine = results["measures"][measure.name]["reads"], results["machine"]["bytes_per_s"]
    if reads is None or reads["share"] is None or machine is None:
        return None
    return (
        f"{measure.name} reads {reads['bytes_per_token'] / 1e6:.2f} MB of weights per token: "
        f"{reads['bytes_per_s']['median'] / 1e9:.2f} GB/s, {reads['share']['median']:.0%} of the "
        f"{machine['median'] / 1e9:.2f} GB/s that {results['work']['n_threads']} threads read from memory here"
    )
