"""The table of docs/trust.md: every forgery is made, and judged under every defence."""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossval import registry
from crossval.receipts import file, gate
from crossval.receipts.file import Receipt, seal
from crossval.receipts.policy import Policy, policy_of, read_policy
from crossval.receipts.trusted import policy_text
from crossval.receipts.yaml_text import parse_yaml

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/trust.md").read_text(encoding="utf-8")
DEFENCES = ("default", "strict", "list")


def table() -> dict[str, dict[str, str]]:
    """Return attack -> defence -> what the page says: ``stopped`` or ``passes``."""
    lines = PAGE.split("<!-- forgeries -->")[1].splitlines()
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")
    ]
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


def all_rows(good: Receipt) -> Receipt:
    return edited(good, candidate={"library_digest": "b" * 64})


def recorded(good: Receipt, digest: str) -> Receipt:
    return edited(good, reference={"status": "recorded", "trace_digest": digest})


def shim(good: Receipt, source: str | None) -> Receipt:
    return edited(good, reference={"library_digest": "5" * 64, "source_digest": source})


ATTACKS: dict[str, Callable[[Receipt], Receipt]] = {
    "guilty audit rows replaced by clean ones": clean_audit_rows,
    "all rows of a guilty receipt replaced by those of a good one": all_rows,
    "a good receipt under the sha256 of a model that is not listed": lambda good: edited(
        good, model={"sha256": "f" * 64}
    ),
    "a receipt of another model under the sha256 of a listed one": lambda good: edited(
        good, model={"file_name": "other.gguf"}
    ),
    "an old receipt with a new date": lambda good: edited(good, created_at=good["created_at"]),
    "a recorded reference relabelled as live": lambda good: edited(
        recorded(good, "e" * 64), reference={"status": "live", "trace_digest": None}
    ),
    "a trace of another engine that says it is bitnet.cpp's": lambda good: recorded(good, "e" * 64),
    "an edited golden": lambda good: edited(
        committed("greedy-shipped"), reference={"status": "recorded", "trace_digest": "d" * 64}
    ),
    "a shim library as live bitnet.cpp, with a manifest of its own": lambda good: shim(good, None),
    "the same in a forged build directory": lambda good: shim(good, good["reference"]["source_digest"]),
    "another kind in place of layers": lambda good: committed("selftest"),
}


def policy(defence: str, good: Receipt) -> Policy:
    """``list``: made by ``--init`` of the good receipt, with the library under test."""
    if defence == "default":
        return Policy()
    if defence == "strict":
        return read_policy("strict")
    text = policy_text(good).replace("# candidate_library_digest", "candidate_library_digest")
    return policy_of(parse_yaml(text.encode(), "here"), "here")


def test_the_page_lists_every_attack() -> None:
    assert list(table()) == list(ATTACKS)


@pytest.mark.parametrize("defence", DEFENCES)
def test_what_is_no_forgery_passes(defence: str, good: Receipt) -> None:
    assert gate.passed(registry.judge(good, policy(defence, good)))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("defence", DEFENCES)
def test_what_the_page_says_of_a_forgery_is_so(attack: str, defence: str, good: Receipt) -> None:
    checks = registry.judge(ATTACKS[attack](good), policy(defence, good))
    assert ("passes" if gate.passed(checks) else "stopped") == table()[attack][defence]
