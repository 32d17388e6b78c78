"""The gate believes no row of a summary: its cells are looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossval.receipts import file
from crossval.receipts.columns import unpack
from crossval.sweep import job, summary
from tests.support.signing import keys
from tests.support.strangers import error_line, run
from tests.support.sweeping import GATE, KERNELS, PROMPTS, in_process, written


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


def test_the_table_of_a_summary_is_packed_and_read_back(finished: Path) -> None:
    text = (finished / summary.NAME).read_bytes()
    assert b'"$rows":2' in text.replace(b" ", b"")
    assert unpack(json.loads(text), len(text), "x") == summary.read(finished / summary.NAME)
