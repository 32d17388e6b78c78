"""Every cell once, resumed by its inputs, no more at a time than fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crossval.receipts import file
from crossval.report.states import STATES
from crossval.sweep import job, page, summary
from crossval.sweep import run as running
from crossval.sweep.plan import Sweep
from tests.support.strangers import run
from tests.support.sweeping import GATE, KERNELS, PROMPTS, in_process, stable, written


def test_every_cell_is_compared_and_kept(sweep, asked, tmp_path: Path) -> None:
    done = sweep("--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    made = written(tmp_path)
    assert [(row["prompt"], row["kernel"]) for row in made["rows"]] == [(p, k) for p in (0, 1) for k in KERNELS]
    assert made["verdict"] == "pass"
    assert made["counts"] == {"parity": 4}
    cells = [file.read(tmp_path / "out" / row["file"]) for row in made["rows"]]
    assert [cell["candidate"]["settings"]["kernel"] for cell in cells] == KERNELS * 2
    assert [cell["prompt"]["text"] for cell in cells] == [text for text in PROMPTS for _ in KERNELS]
    assert "PASS  4 cells: 4 parity" in done.stdout
    html = (tmp_path / "page.html").read_text()
    assert "4 cells: 4 parity" in html
    assert html.count("prompt 0: parity") == len(KERNELS)
    shown = run("show", tmp_path / "out/sweep.json")
    assert shown.exit_code == 0
    assert shown.stdout in done.stdout
    run("report", tmp_path / "out/sweep.json", "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html
    listed = run("history", tmp_path / "out")
    assert (listed.exit_code, listed.stdout) == (0, run("history", tmp_path / "out/cells").stdout)
    assert "4 receipts" in listed.stdout
    assert run("report", tmp_path / "out", "--html", tmp_path / "cells.html").exit_code == 0


def test_what_is_there_is_not_run_again(sweep, asked, tmp_path: Path) -> None:
    sweep()
    before, n_run = written(tmp_path), len(asked)
    done = sweep("--jobs", "3")
    assert len(asked) == n_run == 4
    assert done.stderr == "4 of 4 cells are there already\n"
    assert {**written(tmp_path), "created_at": 0, "digest": 0} == {**before, "created_at": 0, "digest": 0}


@pytest.mark.parametrize("harm", ["cut", "edited", "swapped", "gone"])
def test_a_receipt_that_is_not_the_cells_is_made_again(sweep, asked, tmp_path: Path, harm: str) -> None:
    sweep()
    before = written(tmp_path)
    first, second = (tmp_path / "out" / before["rows"][n]["file"] for n in (0, 2))
    if harm == "cut":
        first.write_bytes(first.read_bytes()[:-100])
    elif harm == "edited":
        text = first.read_text()
        assert '"n_threads":null' in text.replace(" ", "")
        first.write_text(text.replace("parity", "divergence", 1))
    elif harm == "swapped":
        first.write_bytes(second.read_bytes())
    else:
        first.unlink()
    assert sweep().exit_code == 0
    assert len(asked) == 5
    assert stable(written(tmp_path)) == stable(before)


def test_other_inputs_are_other_cells(sweep, asked, tmp_path: Path, monkeypatch) -> None:
    sweep()
    sweep("--threads", "1")
    assert len(asked) == 8
    monkeypatch.setattr("crossval.sweep.plan.engine_digest", lambda word, model: "another build")
    sweep()
    assert len(asked) == 12
    monkeypatch.setattr("crossval.sweep.plan.code_digest", lambda: "edited since")
    sweep()
    assert len(asked) == 16


def test_a_cell_that_fails_is_an_error_of_this_cell(sweep, tmp_path: Path, monkeypatch) -> None:
    def some(arguments: Sequence[str], environment: dict[str, str]) -> job.Outcome:
        if f"--prompt={PROMPTS[1]}" in arguments:
            return job.Outcome(-9, b"", "")
        return in_process(arguments, environment)

    monkeypatch.setattr(job, "run", some)
    done = sweep()
    assert done.exit_code == 5
    made = written(tmp_path)
    assert made["counts"] == {"error": 2, "parity": 2}
    assert made["verdict"] == "incomplete"
    assert made["rows"][2]["error"] == {"exit_code": 5, "message": "ended with -9 and no receipt"}
    assert "ended with -9" in done.stdout
    assert run("gate", tmp_path / "out/sweep.json", *GATE).exit_code == 1
    monkeypatch.setattr(job, "run", in_process)
    assert sweep().exit_code == 0  # and only what failed is run again


def test_what_is_no_receipt_is_an_error_of_its_cell(sweep, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(job, "run", lambda *_: job.Outcome(0, b'{"kind": "layers"}', ""))
    assert sweep().exit_code == 5
    assert all("required" in row["error"]["message"] for row in written(tmp_path)["rows"])


def test_a_receipt_of_something_else_is_no_cell(sweep, tmp_path: Path, monkeypatch) -> None:
    def other(arguments: Sequence[str], environment: dict[str, str]) -> job.Outcome:
        return in_process([word.replace(PROMPTS[0], PROMPTS[1]) for word in arguments], environment)

    monkeypatch.setattr(job, "run", other)
    assert sweep().exit_code == 5
    assert {row["error"]["message"] for row in written(tmp_path)["rows"] if row["error"]} == {
        "the receipt is of another comparison: other prompt"
    }


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["parity", "parity"], "pass"),
        (["parity", "agrees_within"], "incomplete"),
        (["parity", None], "incomplete"),
        (["incomplete", "candidate_defect"], "fail"),
        (["parity", "deviates"], "fail"),
        (["parity", "near_ties"], "pass"),
    ],
)
def test_the_verdict_of_cells(verdicts: list[str | None], expected: str) -> None:
    assert summary.verdict([{"verdict": verdict} for verdict in verdicts]) == expected
    rows = [{"verdict": "parity", "exact_match_rate": 1.0}, {"verdict": None}, {"verdict": "agrees_within"}]
    assert [page._state(row) for row in rows] == ["exact", "not checked", "within, not settled"]
    assert page._state({"verdict": "reference_defect"}) in STATES


@pytest.mark.parametrize(
    ("verdicts", "codes", "expected"),
    [
        (["parity"], [], 0),
        (["parity"], [3], 3),
        (["candidate_defect"], [3], 1),
        (["candidate_defect"], [3, 4], 4),
        (["incomplete"], [], 3),
    ],
)
def test_the_exit_code_of_a_sweep(verdicts: list[str], codes: list[int], expected: int) -> None:
    rows: list[dict[str, Any]] = [{"verdict": one, "error": None} for one in verdicts]
    rows += [{"verdict": None, "error": {"exit_code": code}} for code in codes]
    assert summary.exit_code({"rows": rows, "verdict": summary.verdict(rows)}) == expected


def test_no_more_cells_at_a_time_than_fit(model_path: Path, tmp_path: Path, monkeypatch) -> None:
    sweep = Sweep((model_path,), tuple("abcdef"))
    lock, now, most = threading.Lock(), 0, 0

    def cell(arguments: Sequence[str], environment: dict[str, str]) -> job.Outcome:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return job.Outcome(4, b"", "no")

    monkeypatch.setattr(job, "run", cell)
    monkeypatch.setattr(running, "needed_bytes", lambda *asked: 100)
    for memory_bytes, n_jobs, expected in ((250, 5, 2), (1000, 3, 3), (199, 4, 1)):
        most = 0
        with ThreadPoolExecutor(8) as pool:
            rows = running.run(
                sweep, tmp_path, executor_of=lambda _: pool, n_jobs=n_jobs, memory_bytes=memory_bytes,
                progress=lambda *_: None, say=print,
            )  # fmt: skip
        assert most == expected
        assert len(rows) == 6


@pytest.mark.long
def test_a_sweep_that_was_killed_resumes_to_the_same_summary(sweep, asked, tmp_path: Path, model_path) -> None:
    """SIGKILL once the first receipt is there: nothing half-written stays, and the rest is run."""
    arguments = [
        "sweep", "--models", model_path, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out",
        *[word for kernel in KERNELS for word in ("--kernels", kernel)], "--reference", "spec", "--decode", "0",
    ]  # fmt: skip
    sweep("--json")
    whole = written(tmp_path)
    for path in [*(tmp_path / "out").rglob("*.json")]:
        path.unlink()
    process = subprocess.Popen([sys.executable, "-m", "crossval", *map(str, arguments)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not (found := sorted((tmp_path / "out/cells").glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out/sweep.json").exists()
    found = sorted((tmp_path / "out/cells").glob("*.json"))
    kept = {path.name: file.read(path)["digest"] for path in found}
    asked.clear()
    assert sweep().exit_code == 0
    assert len(asked) == 4 - len(kept) < 4
    resumed = written(tmp_path)
    assert stable(resumed) == stable(whole)
    digests = {Path(row["file"]).name: row["digest"] for row in resumed["rows"]}
    assert {name: digests[name] for name in kept} == kept


def test_a_cell_runs_in_a_process_of_its_own() -> None:
    done = job.run(["show", "nothing.json"], {})
    assert done.exit_code == 4
    assert done.printed == b""
    assert done.message.startswith("cannot read receipt nothing.json")
