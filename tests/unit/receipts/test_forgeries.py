"""The table of docs/trust.md: every forgery is made, and judged under every defence."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crossval.cli.gate as gate_command
from crossval import registry
from crossval.api.rerun import Rerun
from crossval.receipts import file, gate, signature
from crossval.receipts.file import Receipt, seal
from crossval.receipts.policy import Policy, policy_of, read_policy
from crossval.receipts.trusted import policy_text
from crossval.receipts.yaml_text import parse_yaml
from tests.support.signing import keys
from tests.support.strangers import PROMPT, run

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/trust.md").read_text(encoding="utf-8")


def table() -> dict[str, dict[str, str]]:
    """Return attack -> defence -> what the page says: ``stopped`` or ``passes``."""
    lines = PAGE.split("<!-- forgeries -->")[1].splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    head, _, *body = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def committed(name: str) -> Receipt:
    made = file.read(ROOT / f"receipts/{name}.json")
    today = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(minutes=1)
    return seal({**made, "created_at": today.strftime("%Y-%m-%dT%H:%M:%SZ")})


@pytest.fixture(scope="module")
def good() -> Receipt:
    """A receipt of parity on the shipped model, live."""
    return committed("layers-shipped")


def edited(made: Receipt, **changes: Any) -> Receipt:
    """The receipt with members of its objects replaced, and sealed again."""
    forged = copy.deepcopy(dict(made))
    for name, value in changes.items():
        forged[name] = {**forged[name], **value} if isinstance(value, dict) else value
    return seal(forged)


def clean_audit_rows(good: Receipt) -> Receipt:
    guilty = committed("main/layers-shipped-main-defect")
    assert guilty["verdict"] == "reference_defect"
    forged = copy.deepcopy(dict(guilty))
    forged["audit"]["reference"] = copy.deepcopy(forged["audit"]["candidate"])
    forged["diagnosis"] = []
    return seal(forged)


def recorded(good: Receipt) -> Receipt:
    return edited(good, reference={"status": "recorded", "trace_digest": "e" * 64})


def relabelled(good: Receipt) -> Receipt:
    return edited(recorded(good), reference={"status": "live", "trace_digest": None})


def shim(source: str | None) -> Callable[[Receipt], Receipt]:
    return lambda good: edited(
        good,
        reference={
            "status": "live",
            "trace_digest": None,
            "library_digest": "5" * 64,
            "source_digest": source and good["reference"]["source_digest"],
        },
    )


def another_second(date: str) -> str:
    return f"{date[:-3]}{(int(date[-3:-1]) + 1) % 60:02}Z"


ATTACKS: dict[str, Callable[[Receipt], Receipt]] = {
    "guilty audit rows replaced by clean ones": clean_audit_rows,
    "all rows of a guilty receipt replaced by those of a good one": lambda good: edited(
        good, candidate={"library_digest": "b" * 64}
    ),
    "a good receipt under the sha256 of a model that is not listed": lambda good: edited(
        good, model={"sha256": "f" * 64}
    ),
    "a receipt of another model under the sha256 of a listed one": lambda good: edited(
        good, model={"file_name": "other.gguf"}
    ),
    "an old receipt with a new date": lambda good: edited(good, created_at=another_second(good["created_at"])),
    "a recorded reference relabelled as live": relabelled,
    "a trace of another engine, or an edited golden, as bitnet.cpp's": recorded,
    "a shim library as live bitnet.cpp, with a manifest of its own": shim(None),
    "the same in a forged build directory": shim("forged"),
    "another kind in place of layers": lambda good: committed("selftest"),
}
BEFORE_THE_RUN = list(ATTACKS)[-4:]
"""What the harness itself would write, given forged inputs: whoever signs the run signs that, too."""


def policy(defence: str, good: Receipt) -> Policy:
    """``list``: made by ``--init`` of the good receipt, with the library under test."""
    if defence == "strict":
        return read_policy("strict")
    text = policy_text(good).replace("# candidate_library_digest", "candidate_library_digest")
    return Policy() if defence == "default" else policy_of(parse_yaml(text.encode(), "here"), "here")


def said(judged: gate_command.Judged) -> str:
    return "passes" if judged.passed else "stopped"


def test_the_page_lists_every_attack() -> None:
    assert list(table()) == list(ATTACKS)


@pytest.mark.parametrize("defence", ["default", "strict", "list"])
def test_what_policies_stop(defence: str, good: Receipt) -> None:
    asked = policy(defence, good)
    assert gate.passed(registry.judge(good, asked))
    found = {name: gate.passed(registry.judge(attack(good), asked)) for name, attack in ATTACKS.items()}
    expected = {name: row[defence] for name, row in table().items()}
    assert {name: "passes" if passed else "stopped" for name, passed in found.items()} == expected


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def layers_of(record: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return ``layers_of(model) -> receipt``, of parity with a recorded reference, made on this machine."""

    def make(model: Path) -> Path:
        out = tmp_path_factory.mktemp("receipts") / "made.json"
        words = ("--prompt", PROMPT, "--model", model, "--reference", record(model=model), "--decode", "1")
        assert run("layers", *words, "--receipt", out).exit_code == 0
        return out

    return make


@pytest.fixture(scope="module")
def made_here(layers_of: Make, model_path: Path) -> Path:
    return layers_of(model_path)


def test_what_running_it_again_stops(
    made_here: Path, model_path: Path, record: Make, make_model: Make, layers_of: Make, tmp_path: Path
) -> None:
    good, again = file.read(made_here), Rerun(model=model_path, reference=str(record()))
    assert gate_command.judged(made_here, Policy(), again=again).passed
    other = file.read(layers_of(make_model(seed=77)))
    same_engines = {name: good[name] for name in ("candidate", "reference", "model")}
    forged = {name: attack(good) for name, attack in ATTACKS.items()}
    forged["a receipt of another model under the sha256 of a listed one"] = edited(other, **same_engines)
    found = {}
    for name, made in forged.items():
        file.write(tmp_path / "forged.json", made)
        found[name] = said(gate_command.judged(tmp_path / "forged.json", Policy(), again=again))
    assert found == {name: row["--rerun"] for name, row in table().items()}


def test_what_signatures_stop(made_here: Path, tmp_path: Path) -> None:
    """The signer signs what the harness wrote; the forger has no key."""
    pytest.importorskip("securesystemslib", reason="needs securesystemslib: pip install -e '.[sign]'")
    good, path = file.read(made_here), tmp_path / "receipt.json"
    private, public = keys(tmp_path, "signer")
    file.write(path, good)
    assert run("sign", path, "--key", private).exit_code == 0
    assert gate_command.judged(path, Policy(), (public,)).passed
    found = {}
    for name, attack in ATTACKS.items():
        file.write(path, attack(good))
        if name in BEFORE_THE_RUN:
            signature.sign(path, file.read(path), private)
        found[name] = said(gate_command.judged(path, Policy(), (public,)))
    assert found == {name: row["signature"] for name, row in table().items()}
