"""The Python API: what the commands do, without a command line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crossval
from crossval.cli import cli
from crossval.compare.layers import Comparison
from crossval.errors import BadInputError, CrossvalError, UnavailableError, UsageError
from tests.support.strangers import PROMPT, Fault, run

Record = Callable[..., Path]


def lasting(made: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name not in ("created_at", "digest")}


def test_a_function_gives_the_receipt_of_its_command(model_path: Path, golden: Path) -> None:
    made = crossval.compare_engines(PROMPT, model_path, reference=str(golden), n_threads=1, full=True)
    words = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--threads", "1", "--full")
    assert lasting(made) == lasting(json.loads(run("layers", *words, "--json").stdout))


def test_a_trace_is_audited_without_another_engine(model_path: Path, record: Record) -> None:
    made = crossval.audit_trace(record(), model_path)
    assert (made["verdict"], made["reference"]["name"]) == ("parity", "specification")
    assert made["prompt"]["text"] == PROMPT
    made = crossval.audit_trace(record(fault=Fault(rolled_from="0/ffn_sub_norm")), model_path)
    assert made["verdict"] == "candidate_defect"
    assert made["audit"]["candidate"]["first_guilty"]["tap"].startswith("blk.0.ffn")
    with pytest.raises(BadInputError, match="not a directory with a trace"):
        crossval.audit_trace("spec", model_path)


@pytest.mark.usefixtures("no_bitnet_cpp")
def test_an_engine_that_is_not_there_is_an_error_with_a_receipt(model_path: Path) -> None:
    for call in (
        lambda: crossval.compare_engines(PROMPT, model_path, reference="bitnet.cpp"),
        lambda: crossval.smoke_test(model_path, engine="reference"),
        lambda: crossval.metamorphic(model_path, engine="both"),
        lambda: crossval.bench_engines(model_path, n_prompt=4, n_decode=1, n_rounds=1),
    ):
        with pytest.raises(UnavailableError, match="make fetch-cpp") as caught:
            call()
        assert caught.value.receipt is not None
        assert caught.value.receipt["verdict"] == "incomplete"
        assert caught.value.receipt["reference"]["status"] == "unavailable"
    with pytest.raises(UnavailableError) as caught:
        crossval.record(PROMPT, "unused", model_path)
    assert caught.value.receipt is None


def test_what_contradicts_itself_is_a_usage_error(model_path: Path) -> None:
    with pytest.raises(UsageError, match="live engine as the reference") as caught:
        crossval.compare_engines(PROMPT, model_path, reference="spec", floors=True)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="only bitnet_py has kernel families"):
        crossval.metamorphic(model_path, engine="reference", kernels=("scalar",))


@pytest.mark.parametrize("prompt", ["", "bad \udcff byte"])
def test_a_prompt_is_checked_before_anything_runs(prompt: str) -> None:
    for call in (
        crossval.compare_engines,
        crossval.greedy,
        lambda text, model: crossval.record(text, "unused", model),
    ):
        with pytest.raises(BadInputError, match=r"the prompt is (empty|not valid UTF-8 at character 4)"):
            call(prompt, "no-such-model.gguf")
    with pytest.raises(CrossvalError, match="comparing nothing"):
        crossval.greedy([], "no-such-model.gguf")


def test_every_command_has_its_function_with_the_same_options() -> None:
    functions = {"layers": "compare_engines", "triage": "compare_engines", "diff": "compare_traces"}
    functions |= {
        "smoke": "smoke_test",
        "selftest": "self_test",
        "bench": "bench_engines",
        "weights": "check_weights",
        "tokens": "compare_tokens",
        "score": "score_text",
        "fetch-model": "fetch_model",
        "printed": "compare_printed",
        "import-dump": "import_dump",
    }
    for name, command in cli.commands.items():
        if name in ("gate", "doctor", "engines", "report", "show", "history", "sign", "sweep"):
            continue
        known = set(inspect.signature(getattr(crossval, functions.get(name, name))).parameters)
        given = {str(param.name) for param in command.params if param.expose_value} - {"receipt_path", "as_json"}
        renamed = {
            "text_path",
            "environment",
            "prompts_path",
            "prompt",
            "tokens",
            "trace_a",
            "trace_b",
            "path",
        } | {one for one in given if one.endswith("_ratio")}
        assert given - renamed <= known, name


def test_the_api_needs_no_command_line() -> None:
    code = "import sys; from crossval import *; print('click' in sys.modules, 'crossval.cli' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_operations_that_nobody_compared_are_missing(
    model_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that skips a stage must not look like a comparison of everything."""
    monkeypatch.setattr(Comparison, "operations", lambda *_: None)
    made = crossval.compare_engines(PROMPT, model_path, reference=str(golden), n_threads=1, full=True)
    assert made.verdict == "incomplete"
    assert {skip["why"] for skip in made["coverage"]["skipped"]} == {"it was not compared"}
