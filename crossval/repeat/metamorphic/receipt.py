"""Receipts of kind ``metamorphic``: checks as JSON and back, and what must follow from them."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from crossval.compare.rerun import Element
from crossval.model import taps
from crossval.model.taps import token_axis
from crossval.passes import Numerics, PassPlan
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.once import once
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import number, vocabulary_conflicts
from crossval.repeat.metamorphic.cases import (
    RELATIONS,
    MetamorphicOptions,
    PlannedCheck,
    Relation,
    place,
    required,
)
from crossval.repeat.metamorphic.notebook import (
    MetamorphicCheck,
    MetamorphicResult,
    MetamorphicVerdict,
    check_status,
)
from crossval.repeat.metamorphic.scope import GATHERED, Form, TapScope, compared_taps, n_values
from crossval.terms import SIDES, PassFail, Side
from crossval.traces.read import TraceModel, expected_shape

MAX_LAYERS = 10_000
"""Upper limit on a model's layers, so that a forged receipt cannot make us enumerate millions of taps."""
_WHERE = re.compile(r"(?P<tap>(?:blk\.(?:0|[1-9][0-9]{0,5})\.)?[a-z_]{1,20})(?:, token (?P<token>[0-9]{1,9})"
                    r"(?P<passes>, pass(?:es)? [0-9]{1,9}(?: and [0-9]{1,9})?)?)?")  # fmt: skip
STATES = ("ok", "failed", "unchecked")


@dataclass(frozen=True)
class MetamorphicFindings:
    """What was asked for, and the results of one or both engines in the order of ``SIDES``."""

    options: MetamorphicOptions
    results: tuple[MetamorphicResult, ...]


def verdict_of(verdicts: list[MetamorphicVerdict]) -> PassFail:
    """Return the verdict on all engines: one that violates a relation fails; nothing checked is not a pass."""
    if "violated" in verdicts:
        return "fail"
    return "pass" if verdicts and set(verdicts) == {"holds"} else "incomplete"


def criterion(findings: MetamorphicFindings) -> dict[str, Any]:
    """Return what was asked for, as the receipt's ``thresholds``."""
    options = findings.options
    return {
        "lengths": list(options.lengths),
        "thread_counts": list(options.thread_counts),
        "kernels": list(options.kernels),
        "n_decode": options.n_decode,
        "taps": "all",
    }


def to_json(findings: MetamorphicFindings) -> dict[str, Any]:
    """Return the fields of the receipt that hold the checks."""
    rows = [_row(check) for result in findings.results for check in result.checks]
    return {"thresholds": criterion(findings), "results": {"rows": rows, **derived(findings)}}


def _row(check: MetamorphicCheck) -> dict[str, Any]:
    element = None
    if check.element is not None:
        one = check.element
        values = [number(value) for value in one.values]
        element = {"token": one.position, "index": list(one.index), "values": values}
    data = {**asdict(check), "missing": list(check.missing), "element": element}
    data["party"] = data.pop("side")
    return data


def check_from_json(row: Mapping[str, Any]) -> MetamorphicCheck:
    """Return the check in a row of a valid receipt; its status is as stated."""
    element = None
    if row["element"] is not None:
        first, second = (math.nan if value is None else value for value in row["element"]["values"])
        element = Element(row["element"]["token"], tuple(row["element"]["index"]), (first, second))
    data = {name: value for name, value in row.items() if name != "party"}
    return MetamorphicCheck(**{**data, "side": row["party"], "missing": tuple(row["missing"]), "element": element})


def derived(findings: MetamorphicFindings) -> dict[str, Any]:
    """Return how many checks of each engine are in which state."""
    return {
        "summary": {
            result.side: {
                "verdict": result.verdict,
                **{state: sum(check_status(check) == state for check in result.checks) for state in STATES},
            }
            for result in findings.results
        }
    }


def summarize(findings: MetamorphicFindings) -> Summary:
    """Return verdict and coverage."""
    results = findings.results
    return Summary(
        status=verdict_of([result.verdict for result in results]),
        required=sum(result.n_required for result in results),
        compared=sum(check_status(check) != "unchecked" for result in results for check in result.checks),
    )


# --- checks ---------------------------------------------------------------------------------------------------


@once
def from_json(receipt: Receipt) -> MetamorphicFindings:
    """Return the findings of a valid ``metamorphic`` receipt; how many checks there must be is computed."""
    held = receipt["thresholds"]
    options = MetamorphicOptions(
        tuple(held["lengths"]), tuple(held["thread_counts"]), tuple(held["kernels"]), held["n_decode"]
    )
    rows = [check_from_json(row) for row in receipt["results"]["rows"]]
    results = []
    for side in _asked(receipt):
        checks = tuple(row for row in rows if row.side == side)
        n_required = len(_required(receipt, side, options))
        results.append(MetamorphicResult(side, receipt[side]["name"], checks, n_required))
    return MetamorphicFindings(options, tuple(results))


def _asked(receipt: Receipt) -> list[Side]:
    return [side for side in SIDES if receipt[side]["status"] != "unused"]


def _form(receipt: Receipt, side: Side) -> Form:
    model, numerics = receipt["model"], Numerics.from_json(receipt[side]["numerics"])
    return Form.of(model["shape"]["n_heads"], numerics, model["architecture"], model.get("input_norms", False))


def _required(receipt: Receipt, side: Side, options: MetamorphicOptions) -> list[PlannedCheck]:
    numerics = receipt[side]["numerics"]
    stated = numerics["simd_width"] is not None and numerics["fused_quantizer"] is not None
    kernels = options.kernels if "kernels" in relations_of(receipt[side]["name"]) else ()
    only = MetamorphicOptions(options.lengths, options.thread_counts, kernels, options.n_decode)
    return list(required(only, stated=stated, scores_vary=_form(receipt, side).scores_vary))


def structure(receipt: Receipt) -> list[str]:
    """Check engines, prompt, and that the rows are those of the checks asked for, in their order."""
    findings = from_json(receipt)
    options, asked = findings.options, _asked(receipt)
    complaints = []
    if not asked:
        complaints.append("no engine was checked")
    complaints += [
        f"the {side} is {receipt[side]['status']}; only a live engine can be run in other ways"
        for side in asked
        if receipt[side]["status"] != "live"
    ]
    ids = receipt["prompt"]["token_ids"]
    if len(ids) != options.n_tokens:
        complaints.append(f"prompt.token_ids has {len(ids)} tokens, these checks read {options.n_tokens}")
    complaints += vocabulary_conflicts(receipt)
    found = [(r["party"], r["name"], r["case"], r["expectation"]) for r in receipt["results"]["rows"]]
    wanted = [(side, *one.key) for side in asked for one in _required(receipt, side, options)]
    if len(found) != len(wanted):
        complaints.append(f"{len(found)} rows, what is asked for needs {len(wanted)}")
    complaints += [
        f"row {index} ({row[1]}, {row[2]}) is not the check that belongs there: {', '.join(right)}"
        for index, (row, right) in enumerate(zip(found, wanted, strict=False))
        if row != right
    ]
    return complaints


def rows(receipt: Receipt) -> list[str]:
    """Check every row: its status must follow from its numbers, and these must be possible."""
    complaints = []
    for index, data in enumerate(receipt["results"]["rows"]):
        check = check_from_json(data)
        where = f"row {index} ({check.name}, {check.case})"
        if check.status != check_status(check):
            complaints.append(f"{where}: status is {check.status}, its numbers say {check_status(check)}")
        if check.n_different > check.n_compared:
            complaints.append(f"{where}: {check.n_different} of {check.n_compared} elements differ")
        bits_equal = check.expectation == "bits" and check.n_different == 0 and not check.n_invalid
        if bits_equal and (check.worst or check.where):
            complaints.append(f"{where}: all bits are equal, but a largest difference is named")
        if check.n_different and check.where is None:
            complaints.append(f"{where}: elements differ, and no place is named")
        if check.n_compared and not check.n_different and not check.n_invalid and check.worst:
            complaints.append(f"{where}: no value differs, but worst is {check.worst}")
        if check.element is not None and check_status(check) != "failed":
            complaints.append(f"{where}: an element is shown, but the check has not failed")
        if check.note is not None and check_status(check) == "ok":
            complaints.append(f"{where}: a note, but the check is ok")
    return complaints


def values(receipt: Receipt) -> list[str]:
    """Check that every value was compared that the model's shape and the passes give, and places and elements."""
    findings, model = from_json(receipt), TraceModel.of_receipt(receipt)
    scope: TapScope = receipt["thresholds"].get("taps", "outline")  # older receipts do not say
    if not 0 < model.n_layers <= MAX_LAYERS:
        return [f"a model of {model.n_layers} layers"]
    complaints = []
    for result in findings.results:
        cases, form = _required(receipt, result.side, findings.options), _form(receipt, result.side)
        pairs = list(zip(result.checks, cases, strict=False))
        for check, case in pairs:
            where = f"{result.side}, {check.name}, {check.case}"
            complaints += [f"{where}: {what}" for what in _place_conflicts(check, case, model, form, scope)]
        whole = [(check, case) for check, case in pairs if _is_whole(check)]
        if not any(
            all(
                check.n_compared == n_values(case, model, gathered, form, sub_norms=sub, scope=scope)
                for check, case in whole
            )
            for gathered, sub in product(GATHERED, (True, False))
        ):
            complaints.append(f"{result.side}: n_compared is not what the model's shape and the passes give")
    return complaints


def _is_whole(check: MetamorphicCheck) -> bool:
    """Tell whether nothing kept a check from comparing everything."""
    return check_status(check) != "unchecked" and not check.missing and check.n_invalid == 0


def _place_conflicts(
    check: MetamorphicCheck, case: PlannedCheck, model: TraceModel, form: Form, scope: TapScope
) -> Iterator[str]:
    """Check what is named; with a narrow scope a failed check may name an operation recorded in a second run."""
    names = compared_taps(case, model.n_layers, form, scope)
    if not set(check.missing) <= set(names):
        yield "a tap is missing that is not compared"
    if check.where is None:
        if check.element is not None:
            yield "an element without a place"
        return
    found = _WHERE.fullmatch(check.where)
    known = None if found is None else _tap(found["tap"])
    if found is None or known is None or (known.layer or 0) >= model.n_layers:
        yield f"{check.where!r} is not a place in this model"
        return
    if str(known) not in names and not (known.layer and check_status(check) == "failed"):
        yield f"{known} is not compared"
    token = None if found["token"] is None else int(found["token"])
    if token is not None and token >= min(sum(case.one), sum(case.other)):
        yield f"token {token} is not in both runs"
    elif found["passes"] and check.where != place(str(known), token, case.one, case.other):
        yield f"{check.where!r} is not the pass of token {token}"
    if check.element is not None:
        yield from _element_conflicts(check, check.element, str(known), token, case, model)


def _tap(name: str) -> taps.TapName | None:
    try:
        return taps.parse(name)
    except ValueError:
        return None


def _element_conflicts(
    check: MetamorphicCheck, element: Element, tap: str, token: int | None, case: PlannedCheck, model: TraceModel
) -> Iterator[str]:
    width = max(sum(case.one), sum(case.other))
    shape = expected_shape(tap, model, PassPlan("prefill", (0,) * width, 0), None)
    dims = [n for axis, n in enumerate(shape) if axis != token_axis(tap)]
    outside = len(element.index) != len(dims) or any(i >= n for i, n in zip(element.index, dims, strict=False))
    if element.position != token or outside:
        yield f"{tap} has no element {list(element.index)} of token {element.position} there"
    if check.n_invalid == 0 and struct.pack("<d", element.values[0]) == struct.pack("<d", element.values[1]):
        yield "the two values shown are equal"


def unproved(receipt: Receipt, side: Side) -> list[str]:
    """Return the relations that a receipt does not show, of those that an engine can be asked for."""
    findings = from_json(receipt)
    result = next((one for one in findings.results if one.side == side), None)
    shown = {check.name for check in result.checks if check_status(check) == "ok"} if result else set()
    missing: list[str] = [name for name in relations_of(receipt[side]["name"]) if name not in shown]
    usual = receipt[side]["settings"].get("n_threads")
    if "threads" in shown and not set(findings.options.thread_counts) - {usual}:
        missing.append(f"threads (only {usual}, with which everything else was run)")
    return missing


def relations_of(engine: str) -> Sequence[Relation]:
    """Return the relations that an engine of this name can be asked for: only ours has kernels to choose."""
    return [name for name in RELATIONS if name != "kernels" or engine == "bitnet_py"]


def amount(receipt: Receipt) -> Amount:
    """Return how many elements were compared, over how many tokens."""
    checks, n_tokens = receipt["results"]["rows"], len(receipt["prompt"]["token_ids"])
    n_elements = sum(check["n_compared"] for check in checks)
    return Amount(n_elements, n_tokens, f"{len(checks)} checks, {n_elements} elements, {n_tokens} tokens")


def demands(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check that every relation of each engine is shown, whatever the command itself was asked for."""
    for side in _asked(receipt):
        missing = unproved(receipt, side)
        detail = f"not shown: {', '.join(missing)}" if missing else "all of them"
        yield GateCheck(f"relations of the {side}", not missing, detail)


METAMORPHIC = Kind[MetamorphicFindings](
    name="metamorphic",
    counted=None,
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    derived=derived,
    same_tokens=False,
    one_sided=True,
    checks={"structure": structure, "row status": rows, "values": values},
    amount=amount,
    demands=demands,
)
