"""Results of the self-test as a receipt's JSON, and that receipt held against itself.

The checks return complaints, empty when all is well, as in ``crossval.receipts.consistency``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from crossval.audit.checks import AuditVerdict
from crossval.examine.verdict import COMPARISON, Verdict, arbitrate
from crossval.passes import PassKind
from crossval.receipts.file import Receipt
from crossval.selftest import catalogue
from crossval.selftest.catalogue import Case, Shape

ResultVerdict = Literal["pass", "fail"]


@dataclass(frozen=True)
class Found:
    """What the harness said about one case."""

    comparison: str
    """The direct comparison: ``parity``, ``divergence`` or ``incomplete``."""
    candidate_audit: AuditVerdict
    reference_audit: AuditVerdict
    verdict: Verdict
    layer: int | None = None
    op: str | None = None
    pass_kind: PassKind | None = None
    name: str | None = None
    """The diagnosis; None: nothing is guilty."""


@dataclass(frozen=True)
class Row:
    """One case and what became of it."""

    case: Case
    found: Found

    @property
    def ok(self) -> bool:
        """Whether the right thing was found in the right place under a right name, or rightly nothing."""
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
    def verdict(self) -> ResultVerdict:
        """``pass`` when every case of the catalogue ran and every one is as it has to be."""
        cases = tuple(row.case for row in self.rows)
        kinds = {case.side is None for case in cases}
        complete = cases == catalogue.cases(self.shape) and kinds == {True, False}
        return "pass" if complete and all(row.ok for row in self.rows) else "fail"


def criterion(shape: Shape) -> dict[str, int]:
    """Return what has to be run, all of it rightly answered, as the receipt's ``thresholds``."""
    cases = catalogue.cases(shape)
    n_healthy = sum(case.side is None for case in cases)
    return {"n_faults": len(cases) - n_healthy, "n_healthy": n_healthy}


def to_json(result: SelftestResult) -> dict[str, Any]:
    """Return the receipt's ``results``."""
    rows = [{**_case_to_json(row.case), "found": asdict(row.found), "ok": row.ok} for row in result.rows]
    return {"rows": rows, "summary": count(result)}


def _case_to_json(case: Case) -> dict[str, Any]:
    data = asdict(case)
    data["expected"]["names"] = list(case.expected.names)
    return data


def count(result: SelftestResult) -> dict[str, Any]:
    """Return how many faults and healthy runs there are, and how many of them are as they have to be."""
    faults = [row for row in result.rows if row.case.side is not None]
    healthy = [row for row in result.rows if row.case.side is None]
    return {
        "faults": {"n": len(faults), "ok": sum(row.ok for row in faults)},
        "healthy": {"n": len(healthy), "ok": sum(row.ok for row in healthy)},
    }


def summarize(result: SelftestResult) -> dict[str, Any]:
    """Return the receipt's summary fields."""
    return {
        "first_divergence": None,
        "first_inexact": None,
        "coverage": {
            "required": len(catalogue.cases(result.shape)),
            "compared": len(result.rows),
            "skipped": [],
        },
        "parity": {
            "cosine_similarity": None,
            "exact_match_rate": None,
            "logits_exact_match_rate": None,
            "cpp_available": False,
            "status": result.verdict,
        },
        "verdict": result.verdict,
    }


def from_json(receipt: Receipt) -> SelftestResult:
    """Return the result in a valid ``selftest`` receipt; what is right is recomputed, not read."""
    return SelftestResult(tuple(map(_row_from_json, receipt["results"]["rows"])), receipt["model"]["shape"])


def _row_from_json(row: Mapping[str, Any]) -> Row:
    data = {name: value for name, value in row.items() if name not in ("found", "ok")}
    expected = {**row["expected"], "names": tuple(row["expected"]["names"])}
    return Row(Case(**{**data, "expected": catalogue.Expected(**expected)}), Found(**row["found"]))


def recompute(receipt: Receipt) -> dict[str, Any]:
    """Return summary fields and counts as the receipt's own rows give them."""
    result = from_json(receipt)
    return {**summarize(result), "results": {"summary": count(result)}}


def thresholds(receipt: Receipt) -> list[str]:
    """Check that everything was required that this version requires of a model of this shape."""
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
        complaints.append("the faults are put into bitnet_py, live; another candidate is named")
    if receipt["reference"]["status"] != "unused":
        complaints.append("no reference takes part; one is named")
    ids = receipt["prompt"]["token_ids"]
    if len(ids) != catalogue.prompt_length(shape):
        complaints.append(
            f"prompt.token_ids has {len(ids)} tokens, the longest prompt of this version another number"
        )
    if any(token >= shape["vocab_size"] for token in ids):
        complaints.append(f"a token id is outside the vocabulary of {shape['vocab_size']}")
    if receipt["tokenizer"]["vocab_size"] != shape["vocab_size"]:
        complaints.append("tokenizer.vocab_size is not the model's")
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
    """Check every row: verdict, finding and whether it is right must follow from what was found."""
    complaints = []
    for index, (row, data) in enumerate(zip(from_json(receipt).rows, receipt["results"]["rows"], strict=True)):
        where, found = f"row {index} ({row.case.fault or row.case.what})", row.found
        verdict = arbitrate(COMPARISON[found.comparison], found.candidate_audit, found.reference_audit)
        if found.verdict != verdict:
            complaints.append(f"{where}: verdict is {found.verdict}, comparison and audits say {verdict}")
        guilty = "guilty" in (found.candidate_audit, found.reference_audit)
        if any((value is not None) != guilty for value in (found.op, found.pass_kind, found.name)):
            complaints.append(f"{where}: a finding needs a guilty engine, and a guilty engine a finding")
        if data["ok"] != row.ok:
            complaints.append(f"{where}: ok is {data['ok']}, expected and found say {row.ok}")
    return complaints


CHECKS: Mapping[str, Callable[[Receipt], list[str]]] = {
    "thresholds": thresholds,
    "structure": structure,
    "row status": rows,
}
"""Name of a check -> function; the summary is checked with every other kind's."""
