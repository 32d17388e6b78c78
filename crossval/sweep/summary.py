"""The summary of a sweep: what was to be compared, and one row per cell with its receipt's digest and verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crossval.errors import BadInputError, UnavailableError
from crossval.files import STREAM, utc_now
from crossval.receipts import provenance
from crossval.receipts.columns import unpack
from crossval.receipts.file import Receipt, digest, read_bytes, write
from crossval.schema import parse_json, validate_sweep
from crossval.sweep.plan import FOLDER, Cell, Sweep
from crossval.terms import PassFail

KIND = "sweep"
NAME = "sweep.json"
GOOD = ("parity", "near_ties")
"""Verdicts with which a cell's own command ends with 0."""
OPEN = ("incomplete", "agrees_within")
"""Verdicts of cells that show neither parity nor a defect."""


@dataclass(frozen=True)
class Row:
    """One cell as the summary states it; of a cell without a receipt only its error is known."""

    model: int
    prompt: int
    candidate: int
    kernel: str | None
    file: str | None
    digest: str | None
    verdict: str | None
    required: int
    compared: int
    exact_match_rate: float | None
    error: Mapping[str, Any] | None
    """``exit_code`` and ``message`` of its command."""

    @classmethod
    def of(cls, cell: Cell, file: str, receipt: Receipt) -> Row:
        """Return the row of a cell's receipt."""
        coverage, rate = receipt["coverage"], receipt["parity"]["exact_match_rate"]
        counts = (coverage["required"], coverage["compared"])
        return cls(**asdict(cell), **_facts(file, receipt["digest"], receipt["verdict"], counts, rate), error=None)

    @classmethod
    def failed(cls, cell: Cell, exit_code: int, message: str) -> Row:
        """Return the row of a cell whose command made no receipt."""
        return cls(
            **asdict(cell),
            **_facts(None, None, None, (0, 0), None),
            error={"exit_code": exit_code, "message": message},
        )


def _facts(
    file: str | None, found: str | None, verdict: str | None, counts: tuple[int, int], rate: float | None
) -> dict[str, Any]:
    required, compared = counts
    return {
        "file": file,
        "digest": found,
        "verdict": verdict,
        "required": required,
        "compared": compared,
        "exact_match_rate": rate,
    }


def build(sweep: Sweep, rows: Sequence[Row]) -> Receipt:
    """Return the sealed summary, valid by its schema.

    Raises:
        BadInputError: it cannot be written as JSON (a lone surrogate in a prompt).
    """
    plain = [asdict(row) for row in rows]
    made = {
        "schema_version": 1,
        "kind": KIND,
        "created_at": utc_now(),
        "host": provenance.host_facts(),
        "kernels": sorted({row.kernel for row in rows if row.kernel is not None}),
        **sweep.stated,
        "rows": plain,
        **derived(plain),
    }
    made["digest"] = digest(made)
    validate_sweep(made, "summary of a sweep")
    return Receipt(made)


def other_inputs(stated: Mapping[str, Any], cell: Cell, receipt: Receipt) -> list[str]:
    """Return in what a receipt is not one of this cell; ``stated``: a summary, or ``Sweep.stated``.

    Of a receipt that lacked an engine, the prompt, its template and the kernels were not read.
    """
    asked, found = stated["settings"], receipt["settings"]
    pairs = {
        "kind": (stated["command"], receipt["kind"]),
        "model": (stated["models"][cell.model]["sha256"], receipt["model"]["sha256"]),
        "candidate": (stated["candidates"][cell.candidate], found["candidate"]),
        "reference": (stated["reference"], found["reference"]),
        "tool": (stated["tool"], receipt["tool"]),
        "n_threads": (asked["n_threads"], found["n_threads"]),
    }
    pairs |= {name: (asked[name], found[name]) for name in ("n_decode", "n_steps") if asked[name] is not None}
    if receipt["thresholds"] is not None:
        pairs["prompt"] = (stated["prompts"][cell.prompt], receipt["prompt"]["text"])
        pairs["template"] = (asked["template"], receipt["prompt"]["template"])
        if cell.kernel is not None:
            pairs["kernel"] = (cell.kernel, receipt["candidate"]["settings"].get("kernel"))
    return [name for name, (expected, is_there) in pairs.items() if expected != is_there]


def derived(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what follows from the rows: the verdict, and how many cells ended how."""
    counts = Counter(row["verdict"] or "error" for row in rows)
    return {"verdict": verdict(rows), "counts": dict(sorted(counts.items()))}


def verdict(rows: Iterable[Mapping[str, Any]]) -> PassFail:
    """Return ``pass`` where every cell shows parity, ``fail`` where one shows that it has none."""
    found = {row["verdict"] for row in rows}
    if found - {*GOOD, *OPEN, None}:
        return "fail"
    return "pass" if found and found <= set(GOOD) else "incomplete"


def exit_code(summary: Mapping[str, Any]) -> int:
    """Return the largest code of cells that ended with an error, else what the verdict means.

    That a cell shows a divergence is said before that another lacked an engine.
    """
    worst = max((row["error"]["exit_code"] for row in summary["rows"] if row["error"] is not None), default=0)
    if summary["verdict"] == "fail" and worst <= UnavailableError.exit_code:
        return 1
    return max(worst, {"pass": 0, "fail": 1, "incomplete": UnavailableError.exit_code}[summary["verdict"]])


def receipts_in(path: Path) -> Path:
    """Return the folder of the cells' receipts where a path is a sweep's folder, else the path."""
    return path / FOLDER if (path / NAME).is_file() else path


def is_summary(path: Path) -> bool:
    """Return whether a file is the summary of a sweep; one that cannot be read is none, and stdin is not tried."""
    if path == STREAM:
        return False
    try:
        data = parse_json(read_bytes(path), str(path))
    except BadInputError:
        return False
    return isinstance(data, dict) and data.get("kind") == KIND


def read(path: Path) -> Receipt:
    """Return the summary in a file, valid by its schema.

    Raises:
        BadInputError: unreadable, not JSON, against the schema, or a row of something that is not listed.
    """
    data = read_bytes(path, "summary")
    summary = unpack(parse_json(data, str(path)), len(data), str(path))
    validate_sweep(summary, str(path))
    for name in ("model", "prompt", "candidate"):
        if max(row[name] for row in summary["rows"]) >= len(summary[f"{name}s"]):
            raise BadInputError(f"{path}: a row names a {name} that is not listed")
    return Receipt(summary)


def save(folder: Path, summary: Receipt) -> Path:
    """Write the summary into a sweep's folder, atomically; return its path.

    Raises:
        BadInputError: it cannot be written.
    """
    write(folder / NAME, summary)
    return folder / NAME


def build_name(summary: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return what to call the candidate of a row: its word, and its kernels where they were chosen."""
    word = str(summary["candidates"][row["candidate"]])
    return word if row["kernel"] is None else f"{word} {row['kernel']}"
