"""Sweeps: every cell once, resumed by its inputs, no more at a time than fit; the gate believes no row."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from bitnet_py import _native
from crossval.errors import BadInputError
from crossval.receipts import file
from crossval.receipts.columns import unpack
from crossval.report.states import STATES
from crossval.sweep import cluster, job, memory, page, plan, summary
from crossval.sweep import run as running
from crossval.sweep.plan import Sweep
from tests.support.signing import keys
from tests.support.strangers import error_line, run

KERNELS = [family.name for family in _native.kernel_families() if family.available][-2:]
PROMPTS = ("Hello there", "Where is it?")
GATE = ("--reference-name", "specification")
Asked = list[Sequence[str]]


def in_process(arguments: Sequence[str], environment: dict[str, str]) -> job.Outcome:
    """Do what ``job.run`` does, but in this process, and the same only once."""
    return _once(tuple(arguments), tuple(sorted(environment.items())))


@functools.cache
def _once(arguments: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> job.Outcome:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment:
            patch.setenv(name, value)
        done = run(*arguments)
    return job.Outcome(done.exit_code, done.stdout_bytes, done.stderr.strip().removeprefix("error: "))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Run cells in this process; which, in order."""
    made: Asked = []

    def record(arguments: Sequence[str], environment: dict[str, str]) -> job.Outcome:
        made.append(arguments)
        return in_process(arguments, environment)

    monkeypatch.setattr(job, "run", record)
    return made


@pytest.fixture
def sweep(tmp_path: Path, model_path: Path) -> Callable[..., Result]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ("--models", model_path, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    chosen = [word for kernel in KERNELS for word in ("--kernels", kernel)]
    return lambda *more: run("sweep", *words, *chosen, "--reference", "spec", "--decode", "0", *more)


def written(folder: Path) -> file.Receipt:
    return summary.read(folder / "out" / summary.NAME)


def stable(made: dict[str, Any]) -> dict[str, Any]:
    """Return a summary without what differs between two runs of the same: times, and digests over them."""
    rows = [{**row, "digest": None} for row in made["rows"]]
    return {**made, "rows": rows, "created_at": None, "digest": None}


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


def test_a_summary_is_signed_unless_a_receipt_beside_it_differs(sweep, asked, tmp_path: Path) -> None:
    pytest.importorskip("securesystemslib", reason="needs securesystemslib: pip install -e '.[sign]'")
    sweep()
    path, (private, public) = tmp_path / "out" / summary.NAME, keys(tmp_path, "signer")
    assert run("gate", path, "--reference-name", "specification", "--require-signature", public).exit_code == 1
    assert run("sign", path, "--key", private).exit_code == 0
    judged = run("gate", path, "--reference-name", "specification", "--require-signature", public)
    assert "signature" in judged.stdout
    assert "signature" not in "".join(line for line in judged.stdout.splitlines() if "FAIL" in line)
    (tmp_path / "out" / written(tmp_path)["rows"][0]["file"]).unlink()
    refused = run("sign", path, "--key", private)
    assert refused.exit_code == 4
    assert "contradicts itself: receipts:" in error_line(refused)


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


def test_the_kernel_of_the_environment_is_an_input(model_path: Path, monkeypatch) -> None:
    made = Sweep((model_path,), ("a",), reference="spec")
    before = made.file(made.cells[0])
    monkeypatch.setenv("BITNET_KERNEL", "scalar")
    assert made.file(made.cells[0]) != before


def test_a_library_in_another_folder_of_the_build_is_an_input(tmp_path: Path) -> None:
    """A tree as CMake leaves it: the kernels are in ggml's folder."""
    for name in ("src/libllama.so", "ggml/src/libggml.so", "ggml/src/ggml-cpu/libggml-cpu.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = {path.name for path in plan._parts(tmp_path / "src/libllama.so")}
    assert found == {"libllama.so", "libggml.so", "libggml-cpu.so"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """Return the folder of a sweep over two prompts, which is not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run", in_process)
        done = run(
            "sweep", "--models", model_path, "--prompts", folder / "prompts.txt", "--out", folder / "out",
            "--kernels", KERNELS[0], "--reference", "spec", "--decode", "0",
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder / "out"


def gated(folder: Path, made: dict[str, Any], *more: str) -> dict[str, bool]:
    """Return the gate's checks of a summary in a sweep's folder, under a digest that fits."""
    made["digest"] = file.digest(made)
    path = folder / "changed.json"
    path.write_text(json.dumps(made))
    done = run("gate", path, *GATE, *more, "--json")
    assert "Traceback" not in done.output
    return {check["name"]: check["passed"] for check in json.loads(done.stdout)["receipts"][0]["checks"]}


def test_the_gate_checks_the_cells_too(finished: Path) -> None:
    done = run("gate", finished / summary.NAME, *GATE)
    assert done.exit_code == 0, done.stdout
    assert all(gated(finished, summary.read(finished / summary.NAME), "--min-logit-match", "0").values())
    checks = gated(finished, summary.read(finished / summary.NAME), "--max-age-days", "1e-9")
    assert [name for name, passed in checks.items() if not passed] == ["cells: age"]
    assert run("gate", finished / summary.NAME).exit_code == 1  # the specification is not bitnet.cpp


def _drop_row(made: dict[str, Any]) -> None:
    del made["rows"][1]
    made["counts"] = {"parity": 1}


def _repeat_row(made: dict[str, Any]) -> None:
    made["rows"][1] = made["rows"][0]


def _other_verdict(made: dict[str, Any]) -> None:
    made["rows"][0]["verdict"] = "incomplete"
    made |= summary.derived(made["rows"])


def _other_receipt(made: dict[str, Any]) -> None:
    first, second = made["rows"]
    first["file"], second["file"] = second["file"], first["file"]


def _both_moved(made: dict[str, Any]) -> None:
    first, second = made["rows"]
    for name in ("file", "digest"):
        first[name], second[name] = second[name], first[name]


def _missing(made: dict[str, Any]) -> None:
    made["rows"][0]["file"] = "cells/a.b." + "0" * 24 + ".json"


def _candidate_left_out(made: dict[str, Any]) -> None:
    made["kernels"] = []
    made["candidates"].append("llama.cpp:other")
    for row in made["rows"]:
        row["kernel"] = None


def _other_kernels(made: dict[str, Any]) -> None:
    made["kernels"] = ["amx"]
    for row in made["rows"]:
        row["kernel"] = "amx"


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a row is dropped": (_drop_row, "cells"),
    "a row is repeated": (_repeat_row, "cells"),
    "a count": (lambda made: made["counts"].update(parity=3), "summary"),
    "the verdict": (lambda made: made.update(verdict="fail"), "summary"),
    "a row's verdict": (_other_verdict, "receipts"),
    "a row's digest": (lambda made: made["rows"][0].update(digest="0" * 64), "receipts"),
    "a row's rate": (lambda made: made["rows"][0].update(exact_match_rate=0.5), "receipts"),
    "files of two cells": (_other_receipt, "receipts"),
    "receipts of two cells": (_both_moved, "receipts"),
    "a receipt that is not there": (_missing, "receipts"),
    "a prompt": (lambda made: made["prompts"].__setitem__(0, "Another"), "receipts"),
    "the model": (lambda made: made["models"][0].update(sha256="0" * 64), "receipts"),
    "the reference": (lambda made: made.update(reference="auto"), "receipts"),
    "the candidate": (lambda made: made["candidates"].__setitem__(0, "spec"), "receipts"),
    "the command": (lambda made: made.update(command="greedy"), "receipts"),
    "the template": (lambda made: made["settings"].update(template="llama3"), "receipts"),
    "the threads": (lambda made: made["settings"].update(n_threads=3), "receipts"),
    "the decoded tokens": (lambda made: made["settings"].update(n_decode=3), "receipts"),
    "the version": (lambda made: made["tool"].update(version="9"), "receipts"),
    "a kernel": (lambda made: made["rows"][0].update(kernel=None), "cells"),
    "a candidate without a cell": (_candidate_left_out, "cells"),
    "all kernels": (_other_kernels, "receipts"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_gate_sees_a_changed(finished: Path, what: str) -> None:
    change, seen_by = CHANGES[what]
    made = summary.read(finished / summary.NAME)
    change(made)
    checks = gated(finished, made)
    assert not checks[seen_by]


@pytest.mark.parametrize("harm", [
    lambda made: made["rows"][0].update(prompt=7),
    lambda made: made["rows"][0].update(file="../../secret.json"),
    lambda made: made["rows"][0].update(error={"exit_code": 5, "message": "crashed"}),
    lambda made: made.update(rows=[]),
    lambda made: made.update(more=1),
])  # fmt: skip
def test_a_malformed_summary_is_refused_in_one_line(finished: Path, harm: Callable[[Any], Any]) -> None:
    made = summary.read(finished / summary.NAME)
    harm(made)
    path = finished / "malformed.json"
    path.write_text(json.dumps(made))
    for command in (("gate", path), ("show", path), ("report", path, "--html", finished / "x.html")):
        done = run(*command)
        assert done.exit_code == 4, done.output
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.output


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


def test_a_cell_that_cannot_fit_is_refused_before_anything_runs(sweep, asked, tmp_path: Path) -> None:
    done = sweep("--memory", "0.1")
    assert done.exit_code == 4
    assert "takes up to" in done.stderr
    assert not asked
    assert not (tmp_path / "out").exists()


def test_memory_grows_with_the_model_and_the_prompt(model_path: Path, five_layers: Path) -> None:
    small = memory.needed_bytes(model_path, "a", 4)
    assert memory.PROCESS_BYTES < small < memory.needed_bytes(model_path, "a" * 500, 4)
    assert small < memory.needed_bytes(five_layers, "a", 4)
    assert 0 < memory.available_bytes() < 1 << 50


def test_the_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "max").write_text("5000000\n")
    (tmp_path / "used").write_text("1000000\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", ((str(tmp_path / "max"), str(tmp_path / "used")),))
    assert memory.available_bytes() == 4_000_000
    (tmp_path / "max").write_text("max\n")
    assert memory.available_bytes() > 4_000_000


@pytest.mark.parametrize(
    "words",
    [
        {"prompts": ("a", "a")},
        {"prompts": ("a\0b",)},
        {"prompts": ("a" * 100_001,)},
        {"prompts": ()},
        {"prompts": ("a",), "candidates": ("nothing",)},
        {"prompts": ("a",), "candidates": ("llama.cpp:/old/llama.cpp", "llama.cpp:/new/llama.cpp")},
    ],
)
def test_what_is_no_sweep(model_path: Path, words: dict[str, Any]) -> None:
    with pytest.raises(BadInputError):
        Sweep((model_path,), **words)


def test_candidates_without_kernels_are_compared_once(model_path: Path) -> None:
    made = Sweep((model_path,), ("a",), ("bitnet_py", "spec"), ("scalar", "avx2"))
    assert [(cell.candidate, cell.kernel) for cell in made.cells] == [(0, "scalar"), (0, "avx2"), (1, None)]


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


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs Dask: pip install 'bitnet-parity[dask]'"
)
def test_a_cluster_of_two_workers_gives_the_same(sweep, tmp_path: Path) -> None:
    import distributed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run", in_process)
        sweep()
    local = written(tmp_path)
    for path in (tmp_path / "out/cells").glob("*.json"):
        path.unlink()
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as made:
        done = sweep("--dask", made.scheduler_address)
    assert done.exit_code == 0, done.output
    assert stable(written(tmp_path)) == stable(local)


def _worker(**more: Any) -> dict[str, Any]:
    return {"nthreads": 2, "memory_limit": 1000, "resources": {}, **more}


def test_workers_take_no_more_than_fits() -> None:
    assert cluster._fits({"a": _worker()}, 500) is False
    assert cluster._fits({"a": _worker(resources={"MEMORY": 600}), "b": _worker()}, 501) is True
    with pytest.raises(BadInputError, match="2 cells of up to"):
        cluster._fits({"a": _worker()}, 501)
    with pytest.raises(BadInputError, match="largest worker"):
        cluster._fits({"a": _worker(resources={"MEMORY": 400})}, 401)


def test_a_cell_runs_in_a_process_of_its_own() -> None:
    done = job.run(["show", "nothing.json"], {})
    assert done.exit_code == 4
    assert done.printed == b""
    assert done.message.startswith("cannot read receipt nothing.json")


def test_the_table_of_a_summary_is_packed_and_read_back(finished: Path) -> None:
    text = (finished / summary.NAME).read_bytes()
    assert b'"$rows":2' in text.replace(b" ", b"")
    assert unpack(json.loads(text), len(text), "x") == summary.read(finished / summary.NAME)
