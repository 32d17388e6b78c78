"""Print a benchmark's receipt: one line per measure, the bandwidth, the passes compared, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from crossval.bench.measures import MEASURES, Measure
from crossval.console import new_table, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.show import show_verdict
from crossval.terms import SIDES


def show_bench(out: Console, receipt: Receipt) -> None:
    """Print what was measured, and the verdict."""
    results = receipt["results"]
    work = results["work"]
    tokens = f"{work['n_prompt']} + {work['n_decode']} tokens, {work['n_threads']} threads"
    fresh = f"{work['n_processes']} fresh processes each on {work['n_first']} tokens"
    show_line(out, f"work       {tokens}; {work['n_rounds']} rounds, alternately; {fresh}")
    show_line(out, "\nMedian and range; ratio: how many times faster, or smaller, bitnet_py is, round by round.")
    out.print(measures_table(receipt))
    for measure in MEASURES:
        text = _reads(measure, results)
        if text:
            show_line(out, text)
    verdict, parity, coverage = receipt["verdict"], receipt["parity"], receipt["coverage"]
    equal = sum(one["passes"]["equal"] for one in results["measures"].values())
    bits = "all logits bit-identical" if parity["exact_match_rate"] == 1.0 else f"{equal} with equal logits"
    show_verdict(out, verdict, f"{coverage['compared']} of {coverage['required']} passes compared, {bits}")
    for text in results["missed"]:
        show_line(out, f"missed: {text}")


def measures_table(receipt: Receipt) -> Table:
    """Return one line per measure, both engines and their ratio."""
    table = new_table()
    names = (receipt[side]["name"] for side in SIDES)
    for name in ("measure", "unit", *map(plain, names), "ratio", "what"):
        table.add_column(name, justify="left" if name in ("measure", "unit", "what") else "right", no_wrap=True)
    for measure in MEASURES:
        found = receipt["results"]["measures"][measure.name]
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
