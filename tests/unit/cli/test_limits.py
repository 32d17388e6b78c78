"""Limits that are known beforehand are checked before anything is computed."""

from __future__ import annotations

import time

import pytest
from click.testing import CliRunner

from bitnet_py.cli import main as bitnet
from bitnet_py.model import Model
from crossval.engines.bitnet_py import BitnetPyRunner
from tests.support.strangers import PROMPT, error_line, run


@pytest.fixture
def nothing_computed(monkeypatch):
    """Fail when an engine computes anything."""

    def computes(*_, **__):
        raise AssertionError("computed before its limits were checked")

    monkeypatch.setattr(Model, "forward", computes)
    monkeypatch.setattr(BitnetPyRunner, "eval", computes)


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize(
    "words",
    [
        ("layers", "--decode", "300", "--reference", "spec"),
        ("layers", "--decode", "100000", "--reference", "spec"),
        ("greedy", "--steps", "400", "--reference", "spec"),
        ("record", "--engine", "bitnet_py", "--decode", "300", "--out", "trace"),
    ],
    ids=" ".join,
)
def test_more_tokens_than_the_context_holds(words, make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(words[0], "--prompt", PROMPT, "--model", make_model(context_length=256), *words[1:])
    assert result.exit_code == 4
    assert "are to follow, the model's context holds 256" in error_line(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_computed")
@pytest.mark.parametrize("words", [("--prompt-tokens", "999999999"), ("--decode", "999999999")], ids="".join)
def test_more_tokens_than_the_engine_alone_can_bench(words):
    begun = time.process_time()
    result = CliRunner().invoke(bitnet, ["bench", *words])
    assert result.exit_code == 4
    assert "context holds" in result.stderr
    assert time.process_time() - begun < 2  # the ids alone take longer to draw


def test_as_many_as_it_holds_are_computed(make_model, tmp_path):
    """The last generated token is not read again; a decoded one is."""
    model = make_model(context_length=8)
    words = ("--prompt", "a", "--model", model, "--reference", "spec")
    n_prompt = len(run_ids(model))
    for command, option, most in (("layers", "--decode", 8 - n_prompt), ("greedy", "--steps", 9 - n_prompt)):
        assert run(command, *words, option, str(most)).exit_code in (0, 1, 3)
        assert run(command, *words, option, str(most + 1)).exit_code == 4


def run_ids(model):
    with Model.from_gguf(model, n_threads=1) as opened:
        return opened.tokenizer.encode("a")
