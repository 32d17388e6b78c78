"""``crossval engines``: a table, JSON, and exit 0 when something can be run."""

from __future__ import annotations

import json

import pytest

from crossval.engines import available
from crossval.engines.available import Available
from crossval.passes import Numerics
from tests.support.strangers import run

OURS = Available("bitnet_py", "ours", where="/somewhere/lib.so", library_digest="ab" * 32)
MAIN = Available("bitnet.cpp", "real", source_commit="c" * 40, numerics=Numerics(8, False, generation="main"))
MISSING = Available("llama.cpp", "mainline", why_not="not installed: run this")
SPEC = Available("spec", "the definition")
RECORDED = Available("auto", "recordings", recorded=True)


def listed(monkeypatch: pytest.MonkeyPatch, *found: Available) -> None:
    monkeypatch.setattr(available, "collect", lambda: list(found))


def test_the_table_says_what_each_is_and_why_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    listed(monkeypatch, OURS, MAIN, MISSING, SPEC, RECORDED)
    result = run("engines")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "main, 8 lanes" in text
    assert "commit cccccccccccc" in text
    assert "llama.cpp not here" in text
    assert "llama.cpp: mainline: not installed: run this" in text
    assert "bitnet_py: ours: /somewhere/lib.so" in text
    assert "auto recorded" in text


def test_json_holds_every_engine_and_nothing_else_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed(monkeypatch, OURS, MISSING)
    result = run("engines", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (0, True)
    assert [(one["word"], one["ok"]) for one in report["engines"]] == [("bitnet_py", True), ("llama.cpp", False)]


@pytest.mark.parametrize("found", [(SPEC, RECORDED), (SPEC, MISSING), ()])
def test_exit_3_when_nothing_but_the_specification_can_be_run(
    found: tuple[Available, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(monkeypatch, *found)
    assert run("engines").exit_code == 3


def test_what_is_really_here_can_be_listed(no_bitnet_cpp: None) -> None:
    result = run("engines")
    assert result.exit_code == 0, result.output
    assert "bitnet_py" in result.stdout
