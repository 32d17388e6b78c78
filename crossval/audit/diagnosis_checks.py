"""The diagnoses in a receipt checked for consistency with its audits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from crossval.model import taps
from crossval.receipts.file import Receipt
from crossval.terms import SIDES

UNDETERMINED = "undetermined"
_PLACE = ("tap", "layer", "op", "pass_index", "pass_kind")


def complaints(receipt: Receipt) -> Iterator[str]:
    """Check that each wrong engine has one diagnosis, of its first wrong operation, and that it fits."""
    firsts = {side: audit["first_guilty"] for side in SIDES if (audit := receipt["audit"][side]) is not None}
    expected = [side for side, first in firsts.items() if first is not None]
    found = receipt["diagnosis"] or []
    if [one["party"] for one in found] != expected:
        yield f"diagnosis is of {[one['party'] for one in found]}, wrong are {expected}"
        return
    for one in found:
        where, first = f"diagnosis of the {one['party']}", firsts[one["party"]]
        if one.get("segment") != first.get("segment"):
            yield f"{where}: its segment is not that of the first wrong operation"
        for name in _PLACE:
            if one[name] != first[name]:
                yield f"{where}: {name} is {one[name]}, the first wrong operation's is {first[name]}"
        ratio, right = one["ratio"], one["specification_ratio"]
        fits = None not in (ratio, right) and 0.0 <= ratio < right
        named = one["name"] != UNDETERMINED
        if named and not (fits and one["candidates"]):
            yield f"{where}: it names {one['name']}, which fits no better than the specification"
        if (one["runner_up"] is None) != (one["runner_up_ratio"] is None):
            yield f"{where}: only one of runner-up and its ratio is given"
        if named and one["runner_up_ratio"] is not None and not one["runner_up_ratio"] > (ratio or 0.0):
            yield f"{where}: its runner-up fits as well"
        yield from (f"{where}: {what}" for what in _segment_ops(one, first))
        yield from (f"{where}: {what}" for what in _further(one, receipt["audit"][one["party"]]))
        if named and one["family"] is None and len({c["family"] for c in one["candidates"]}) == 1:
            yield f"{where}: it names no family"


def _further(one: Mapping[str, Any], audit: Mapping[str, Any]) -> Iterator[str]:
    """Check that the other operation it names comes later and gave values that are not finite."""
    other = one.get("further")
    if other is None:
        return
    row = next((row for row in audit["rows"] if row["tap"] == other["tap"]), None)
    if row is None or not row["n_invalid"] or other["name"] == UNDETERMINED:
        yield f"{other['tap']} is named, too, which the audit does not show to be invalid"
    elif (other["pass_index"], taps.execution_index(other["tap"])) <= (
        one["pass_index"],
        taps.execution_index(one["tap"]),
    ):
        yield f"{other['tap']} is named, too, which comes first"


def _segment_ops(one: Mapping[str, Any], first: Mapping[str, Any]) -> Iterator[str]:
    """Check which operations inside a segment a diagnosis names."""
    inside, named = one.get("segment_ops", []), one["name"] != UNDETERMINED
    if inside and not (named and first["n_ops"] > 1):
        yield f"it names {inside[0]} inside a segment, but no bug or there is no segment"
    if named and first["n_ops"] > 1 and not inside:
        yield "it names a bug inside a segment, but no operation"
    order = [taps.execution_index(name) for name in inside]
    if order and (order != sorted(set(order)) or order[-1] > taps.execution_index(one["tap"])):
        yield "the operations it names are not in order of execution, up to the wrong one"
