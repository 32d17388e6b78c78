"""A receipt's own command, run again: equal rows pass, and what nothing else in the receipt shows is found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crossval
from crossval.api import rerun
from crossval.api.rerun import Rerun
from crossval.receipts import file
from crossval.receipts.file import Receipt, seal
from crossval.traces.read import Trace
from tests.support import receipt_samples as samples
from tests.support.strangers import PROMPT, error_line, run

PROMPTS = (PROMPT, "One two", "Three")
Record = Callable[..., Path]


@pytest.fixture(scope="module")
def again(model_path: Path, record: Record) -> Rerun:
    return Rerun(model=model_path, reference=str(record()))


@pytest.fixture(scope="module")
def made(model_path: Path, record: Record, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A layers, a diff and a greedy receipt of this machine, of parity but the last, with the specification."""
    folder = tmp_path_factory.mktemp("receipts")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    ids = ",".join(map(str, Trace.open(record()).info.prompt_ids))
    options = ("--model", model_path, "--reference", record())
    words: dict[str, tuple[str | Path, ...]] = {
        "layers": ("layers", "--prompt", PROMPT, *options),
        "diff": ("diff", record("other"), record(), "--model", model_path),
        "greedy": ("greedy", "--prompt", PROMPT, "--steps", "3", *options),
        "ids": ("greedy", "--tokens", ids, "--steps", "2", *options),
        "spec": ("greedy", "--prompts", prompts, "--steps", "2", "--model", model_path, "--reference", "spec"),
    }
    for name, command in words.items():
        assert run(*command, "--receipt", folder / f"{name}.json").exit_code in (0, int(name == "spec")), name
    return {name: folder / f"{name}.json" for name in words}


def detail(receipt: Receipt, how: Rerun) -> tuple[bool, str]:
    (check,) = how.checks(receipt)
    return check.passed, check.detail


@pytest.mark.parametrize(
    ("name", "fraction", "expected"),
    [
        ("layers", 1.0, "3 of 3 passes"),
        ("layers", 0.5, "2 of 3 passes"),
        ("ids", 1.0, "1 of 1 prompts, 2 of 2 steps: equal"),
        ("greedy", 1.0, "1 of 1 prompts, 3 of 3 steps: equal"),
        ("greedy", 0.5, "1 of 1 prompts, 2 of 3 steps: equal"),
    ],
)
def test_the_same_command_gives_the_same_rows(
    name: str, fraction: float, expected: str, made: dict[str, Path], again: Rerun
) -> None:
    how = Rerun(fraction, again.model, None, again.reference)
    passed, text = detail(file.read(made[name]), how)
    assert passed, text
    assert text.startswith(expected)
    assert text.endswith("equal")


def test_traces_are_compared_again(made: dict[str, Path], again: Rerun, record: Record) -> None:
    how = Rerun(1.0, again.model, str(record("other")), again.reference)
    assert detail(file.read(made["diff"]), how)[0]
    swapped = Rerun(1.0, again.model, again.reference, str(record("other")))
    assert detail(file.read(made["diff"]), swapped)[1].startswith("another candidate is here")


def test_a_sample_of_prompts_is_compared(made: dict[str, Path], model_path: Path) -> None:
    receipt, how = file.read(made["spec"]), Rerun(0.5, model_path)
    assert detail(receipt, how) == (True, "2 of 3 prompts, 2 of 2 steps: equal")
    assert not detail(seal({**receipt, "prompt": {**receipt["prompt"], "token_ids": [1]}}), how)[0]


def test_the_sample_follows_from_the_digest(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    receipt, asked = file.read(made["spec"]), []
    monkeypatch.setattr(crossval, "greedy", lambda texts, *_, **__: asked.append(tuple(texts)) or receipt)
    monkeypatch.setattr(rerun, "file_sha256", lambda path: receipt["model"]["sha256"])
    for digest in [*"abcdefghijklmnop", *"aaa"]:
        list(Rerun(0.5).checks(Receipt({**receipt, "digest": digest})))
    assert {texts[0] for texts in asked} == {PROMPTS[0]}  # the one that is audited
    assert {texts[1] for texts in asked} == set(PROMPTS[1:])
    assert len({asked[0], *asked[-3:]}) == 1


EDITS: dict[str, Any] = {
    "results.rows.1.max_abs": lambda receipt: receipt["results"]["rows"][1].update(max_abs=0.25),
    "audit.candidate.rows.0.flips": lambda receipt: receipt["audit"]["candidate"]["rows"][0].update(note="x"),
    "compute.kernels.0.calls": lambda receipt: receipt["compute"]["kernels"][0].update(calls=1),
    "the verdict": lambda receipt: receipt.update(verdict="incomplete"),
    "another reference": lambda receipt: receipt["reference"].update(trace_digest="0" * 64),
    "another candidate": lambda receipt: receipt["candidate"].update(library_digest="0" * 64),
    "the model here": lambda receipt: receipt["model"].update(sha256="0" * 64),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_found(name: str, made: dict[str, Path], again: Rerun) -> None:
    forged = copy.deepcopy(dict(file.read(made["layers"])))
    EDITS[name](forged)
    assert not detail(seal(forged), again)[0]


def test_a_part_says_nothing_of_the_verdict_of_everything(made: dict[str, Path], again: Rerun) -> None:
    """It may rest on a step that was left out: a near tie, an operation that is wrong later."""
    other = seal({**file.read(made["greedy"]), "verdict": "near_ties"})
    assert detail(other, Rerun(0.5, again.model, None, again.reference))[0]
    assert not detail(other, Rerun(1.0, again.model, None, again.reference))[0]


def test_what_cannot_be_rerun_is_said(again: Rerun) -> None:
    assert detail(samples.smoke_receipt(), again) == (
        False,
        "a smoke receipt cannot be rerun; only layers, diff, greedy can",
    )


def test_the_command(made: dict[str, Path], again: Rerun) -> None:
    words = ("--model", again.model, "--reference", again.reference)
    assert run("gate", made["greedy"], *words, "--rerun").exit_code == 0
    assert run("gate", "--rerun", "0.5", made["greedy"], *words).exit_code == 0
    assert "for --rerun" in run("gate", made["greedy"], *words).stderr
    both = run("gate", made["layers"], made["greedy"], *words, "--min-token-match", "1", "--rerun", "--json")
    judged = json.loads(both.stdout)["receipts"]
    assert [[one["name"] for one in each["checks"]].count("rerun") for each in judged] == [1, 1]
    missing = run("gate", made["greedy"], "--model", again.model, "--reference", "none", "--rerun")
    assert missing.exit_code == 4
    assert "reference 'none' is neither" in error_line(missing)


def test_a_receipt_made_with_an_override_is_rerun_with_it(again: Rerun, tmp_path: Path) -> None:
    out, other = tmp_path / "made.json", ("--override", "tokenizer.ggml.add_bos_token=false")
    words = ("--model", again.model)
    command = ("greedy", "--prompt", PROMPT, "--steps", "2", "--reference", "spec", "--receipt", out)
    made = run(*command, *words, *other)
    assert made.exit_code == 0, made.output
    judged = ("gate", out, *words, "--reference-name", "specification")
    rerun_of = {given: run(*judged, *given, "--rerun") for given in ((), other)}
    assert "prompt_ids" in rerun_of[()].output
    assert rerun_of[()].exit_code == 1
    assert rerun_of[other].exit_code == 0, rerun_of[other].output
    assert run(*judged, *other).exit_code == 2
