"""Receipts of kind ``selftest``: results as JSON and back, and what must follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from crossval.audit.checks import AuditVerdict
from crossval.examine.verdict import AGREEMENT, Verdict, arbitrate
from crossval.passes import PassKind
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.once import once
from crossval.receipts.party import REFERENCE_NAME
from crossval.receipts.values import vocabulary_conflicts
from crossval.selftest import catalogue
from crossval.selftest.catalogue import Case, Shape
from crossval.terms import PassFail


@dataclass(frozen=True)
class Found:
    """What the harness reported for one case."""

    comparison: str
    """The direct comparison: ``parity``, ``divergence`` or ``incomplete``."""
    candidate_audit: AuditVerdict
    reference_audit: AuditVerdict
    verdict: Verdict
    layer: int | None = None
    op: str | None = None
    pass_kind: PassKind | None = None
    name: str | None = None
    """The diagnosis; None: nothing is wrong."""


@dataclass(frozen=True)
class Row:
    """One case and its result."""

    case: Case
    found: Found

    @property
    def ok(self) -> bool:
        """Whether verdict, place and name are as expected; for a healthy run, whether nothing was found."""
        expected, found = self.case.expected, self.found
        names = expected.names or (None,)
        return found.name in names and all(
            getattr(found, name) == getattr(expected, name) for name in ("verdict", "layer", "op", "pass_kind")
        )


@dataclass(frozen=True)
class SelftestResult:
    """All rows, and the shape of the model they belong to."""

    rows: tuple[Row, ...]
    shape: Shape

    @property
    def verdict(self) -> PassFail:
        """``pass`` when every case of the catalogue ran with the expected result."""
        cases = tuple(row.case for row in self.rows)
        kinds = {case.side is None for case in cases}
        complete = cases == catalogue.cases(self.shape) and kinds == {True, False}
        return "pass" if complete and all(row.ok for row in self.rows) else "fail"


def criterion(shape: Shape) -> dict[str, int]:
    """Return how many faults and healthy runs are required, as the receipt's ``thresholds``."""
    cases = catalogue.cases(shape)
    n_healthy = sum(case.side is None for case in cases)
    return {"n_faults": len(cases) - n_healthy, "n_healthy": n_healthy}


def to_json(result: SelftestResult) -> dict[str, Any]:
    """Return the fields of the receipt that hold the results."""
    rows = [{**_case_to_json(row.case), "found": asdict(row.found), "ok": row.ok} for row in result.rows]
    return {"thresholds": criterion(result.shape), "results": {"rows": rows, **derived(result)}}


def _case_to_json(case: Case) -> dict[str, Any]:
    data = asdict(case)
    data["expected"]["names"] = list(case.expected.names)
    return data


def derived(result: SelftestResult) -> dict[str, Any]:
    """Return how many faults and healthy runs there are, and how many of them have the expected result."""
    faults = [row for row in result.rows if row.case.side is not None]
    healthy = [row for row in result.rows if row.case.side is None]
    counts = {"faults": faults, "healthy": healthy}
    return {
        "summary": {name: {"n": len(rows), "ok": sum(row.ok for row in rows)} for name, rows in counts.items()}
    }


def summarize(result: SelftestResult) -> Summary:
    """Return verdict and coverage."""
    return Summary(result.verdict, required=len(catalogue.cases(result.shape)), compared=len(result.rows))


@once
def from_json(receipt: Receipt) -> SelftestResult:
    """Return the result in a valid ``selftest`` receipt; which rows are correct is recomputed, not read."""
    return SelftestResult(tuple(map(_row_from_json, receipt["results"]["rows"])), receipt["model"]["shape"])


def _row_from_json(row: Mapping[str, Any]) -> Row:
    data = {name: value for name, value in row.items() if name not in ("found", "ok")}
    expected = {**row["expected"], "names": tuple(row["expected"]["names"])}
    return Row(Case(**{**data, "expected": catalogue.Expected(**expected)}), Found(**row["found"]))


def thresholds(receipt: Receipt) -> list[str]:
    """Check that the receipt requires what this version requires of a model of this shape."""
    expected = criterion(receipt["model"]["shape"])
    return [
        f"thresholds.{name} is {receipt['thresholds'][name]}, this version requires {value}"
        for name, value in expected.items()
        if receipt["thresholds"][name] != value
    ]


def structure(receipt: Receipt) -> list[str]:
    """Check engines, prompt, and that the rows are those of the catalogue: faults, sides and what is expected."""
    shape = receipt["model"]["shape"]
    complaints = []
    if (receipt["candidate"]["name"], receipt["candidate"]["status"]) != ("bitnet_py", "live"):
        complaints.append("the faults are injected into live bitnet_py; another candidate is named")
    if (receipt["reference"]["name"], receipt["reference"]["status"]) != (REFERENCE_NAME, "unused"):
        complaints.append("no reference takes part; one is named")
    ids = receipt["prompt"]["token_ids"]
    if len(ids) != catalogue.prompt_length(shape):
        complaints.append(
            f"prompt.token_ids has {len(ids)} tokens, not as many as the longest prompt of this version"
        )
    complaints += vocabulary_conflicts(receipt)
    found = [row.case for row in from_json(receipt).rows]
    required = catalogue.cases(shape)
    if len(found) != len(required):
        complaints.append(f"{len(found)} rows, this version runs {len(required)} on a model of this shape")
    complaints += [
        f"row {index} ({case.fault or case.what}) is not what this version runs, or expects, there"
        for index, (case, right) in enumerate(zip(found, required, strict=False))
        if case != right
    ]
    return complaints


def rows(receipt: Receipt) -> list[str]:
    """Check every row: verdict, finding and correctness must follow from what was found."""
    complaints = []
    for index, (row, data) in enumerate(zip(from_json(receipt).rows, receipt["results"]["rows"], strict=True)):
        where, found = f"row {index} ({row.case.fault or row.case.what})", row.found
        verdict = arbitrate(AGREEMENT[found.comparison], found.candidate_audit, found.reference_audit)
        if found.verdict != verdict:
            complaints.append(f"{where}: verdict is {found.verdict}, comparison and audits say {verdict}")
        guilty = "guilty" in (found.candidate_audit, found.reference_audit)
        if any((value is not None) != guilty for value in (found.op, found.pass_kind, found.name)):
            complaints.append(f"{where}: a finding requires a wrong engine, and a wrong engine requires a finding")
        if data["ok"] != row.ok:
            complaints.append(f"{where}: ok is {data['ok']}, expected and found say {row.ok}")
    return complaints


def amount(receipt: Receipt) -> Amount:
    """Return how many comparisons were made, over how many tokens."""
    found = receipt["results"]["rows"]
    n_tokens = sum(row["n_prompt"] + row["n_decode"] for row in found)
    return Amount(len(found), n_tokens, f"{len(found)} comparisons, {n_tokens} tokens")


SELFTEST = Kind[SelftestResult](
    name="selftest",
    counted=None,
    one_sided=True,
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    derived=derived,
    checks={"thresholds": thresholds, "structure": structure, "row status": rows},
    amount=amount,
)
