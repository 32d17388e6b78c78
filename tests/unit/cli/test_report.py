"""``crossval report``, ``show`` and ``history``."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from click.testing import CliRunner

import crossval
from crossval.cli import cli

RECEIPT = Path(__file__).parents[3] / "receipts/greedy-shipped.json"


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, arguments)
    return done.exit_code, done.stdout, done.stderr


def test_show_prints_what_the_command_printed_and_tables_as_csv() -> None:
    code, out, _ = run("show", str(RECEIPT))
    assert code == 0
    assert "PARITY" in out
    code, out, _ = run("show", str(RECEIPT), "--csv", "steps")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    steps = crossval.open_receipt(RECEIPT).frame("steps")
    assert len(rows) == len(steps)
    assert [int(row["reference_token"]) for row in rows] == list(steps["reference_token"])


def test_errors_are_one_line(tmp_path: Path) -> None:
    assert run("show", str(RECEIPT), "--csv", "nothing")[0] == 2
    for arguments in (
        ("show", "absent.json"),
        ("history", "absent.json"),
        ("report", "absent.json", "--html", "x"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (4, "")
        assert err.count("\n") == 1
    code, _, err = run("report", str(RECEIPT), "--html", str(tmp_path))
    assert code not in (0, 1)
    assert err.count("\n") == 1


def test_history_prints_a_line_per_receipt_and_every_column_as_csv() -> None:
    code, out, _ = run("history", str(RECEIPT), str(RECEIPT))
    assert code == 0
    assert "2 receipts, 1 comparisons, 0 changes" in out
    code, out, _ = run("history", str(RECEIPT), str(RECEIPT.parent / "selftest.json"), "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert sorted(row["kind"] for row in rows) == ["greedy", "selftest"]
    assert {"verdict", "change", "worst_ratio"} <= set(rows[0])
