"""What CI checks of a sweep: every cell has a receipt that says what its row says, and passes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_py.errors import listed
from crossval.errors import BadInputError
from crossval.receipts import file, gate
from crossval.receipts.file import Receipt
from crossval.receipts.policy import GateCheck, Policy
from crossval.sweep.plan import Cell
from crossval.sweep.summary import Row, build_name, derived, other_inputs

MAX_SHOWN = 5
Judge = Callable[[Receipt, Policy], Sequence[GateCheck]]


def judge(path: Path, summary: Receipt, policy: Policy, judge_cell: Judge) -> list[GateCheck]:
    """Return every check of a summary; ``judge_cell`` makes those of a cell's receipt.

    The receipts are looked for beside the summary. One that is missing is a failure: what the rows
    say of a cell is proved by its receipt alone.
    """
    opened = _opened(path, summary)
    return [*_own_checks(summary, opened), *_cells(summary, opened, policy, judge_cell)]


def contradictions(path: Path, summary: Receipt) -> list[str]:
    """Return in what a summary contradicts itself or the receipts beside it, whatever these say."""
    checks = _own_checks(summary, _opened(path, summary))
    return [f"{check.name}: {check.detail}" for check in checks if not check.passed]


def _own_checks(summary: Receipt, opened: Sequence[Receipt | str]) -> list[GateCheck]:
    same = file.digest(summary) == summary["digest"]
    return [
        GateCheck("digest", same, summary["digest"][:16] if same else "the contents give another: edited"),
        _check("cells", _plan(summary), f"{len(summary['rows'])} of {len(summary['rows'])}"),
        _check("summary", _summary(summary), "recomputed, as stated"),
        _check("receipts", list(_receipts(summary, opened)), f"{len(opened)} beside the summary, as stated"),
    ]


def _check(name: str, complaints: Sequence[str], good: str) -> GateCheck:
    return GateCheck(name, not complaints, listed(complaints, MAX_SHOWN, "; ") or good)


def _plan(summary: Receipt) -> list[str]:
    """Check that there is one row per combination; a candidate has every kernel family or none."""
    sizes = [range(len(summary[name])) for name in ("models", "prompts", "candidates")]
    found = [(row["model"], row["prompt"], row["candidate"], row["kernel"]) for row in summary["rows"]]
    chosen = {candidate: {place[3] for place in found if place[2] == candidate} for candidate in sizes[2]}
    kernels = set(summary["kernels"])
    expected = {
        (model, prompt, candidate, kernel)
        for model in sizes[0]
        for prompt in sizes[1]
        for candidate in sizes[2]
        for kernel in chosen[candidate]
    }
    complaints = [
        f"candidate {n} ran with other kernels"
        for n, has in chosen.items()
        if not has or has not in ({None}, kernels)
    ]
    if len(found) != len(set(found)) or set(found) != expected or not found:
        complaints.append("rows are missing or repeated: one per model, prompt, candidate and kernel family")
    return complaints


def _summary(summary: Receipt) -> list[str]:
    expected = derived(summary["rows"])
    return [f"{name} is {summary[name]}, the rows give {value}" for name, value in expected.items()
            if summary[name] != value]  # fmt: skip


def _opened(path: Path, summary: Receipt) -> list[Receipt | str]:
    return [_open(path.parent, row) for row in summary["rows"]]


def _open(folder: Path, row: Mapping[str, Any]) -> Receipt | str:
    """Return the receipt of a row, or why there is none."""
    if row["error"] is not None:
        return f"no receipt: exit code {row['error']['exit_code']}, {row['error']['message']}"
    try:
        return file.read(folder / row["file"])
    except BadInputError as error:
        return str(error)


def _receipts(summary: Receipt, opened: Sequence[Receipt | str]) -> Iterator[str]:
    """Check every receipt that is there against its row and what the summary says was compared."""
    for row, found in zip(summary["rows"], opened, strict=True):
        where = _name(summary, row)
        if isinstance(found, str):
            yield f"{where}: {found}"
            continue
        cell = Cell(row["model"], row["prompt"], row["candidate"], row["kernel"])
        if Row.of(cell, row["file"], found) != Row(**row):
            yield f"{where}: the row and the receipt contradict each other"
        yield from (f"{where}: its receipt is of other {name}" for name in other_inputs(summary, cell, found))


def _cells(
    summary: Receipt, opened: Sequence[Receipt | str], policy: Policy, judge_cell: Judge
) -> Iterator[GateCheck]:
    """Yield one check per check of the cells' receipts, over all of them."""
    named = [
        (_name(summary, row), found)
        for row, found in zip(summary["rows"], opened, strict=True)
        if isinstance(found, Receipt)
    ]
    judged = gate.together([list(judge_cell(found, policy)) for _, found in named])
    failed: dict[str, list[str]] = {}
    for (where, _), checks in zip(named, judged, strict=True):
        for one in checks:
            failed.setdefault(one.name, []).extend([] if one.passed else [f"{where}: {one.detail}"])
    for name, complaints in failed.items():
        yield _check(f"cells: {name}", complaints, f"{len(named)} cells")


def _name(summary: Receipt, row: Mapping[str, Any]) -> str:
    model = summary["models"][row["model"]]["file_name"]
    return f"{model}, prompt {row['prompt']}, {build_name(summary, row)}"
