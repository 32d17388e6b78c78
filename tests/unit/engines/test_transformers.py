"""transformers as an engine: what its word says, what is missing and, with PyTorch, the way through a process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import crossval
from bitnet_py.synth import SynthConfig, write_model
from crossval.engines import transformers
from crossval.engines.registry import find_word, open_candidate, open_reference
from crossval.engines.transformers import TransformersRunner, parse_choices
from crossval.errors import BadInputError, EngineCrashError, UnavailableError
from tests.support.torch_models import HOW_TO_GET

has_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in transformers.PACKAGES),
    reason=f"torch and transformers {HOW_TO_GET}",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    write_model(path, SynthConfig(n_layers=2, dim=128, hidden_dim=256, context_length=64))
    return path


def test_the_word_says_format_and_class_of_ternary_matrices() -> None:
    assert parse_choices(None) == ("f32", None)
    assert parse_choices("bf16") == ("bf16", None)
    assert parse_choices("f32+autobitlinear") == ("f32", "autobitlinear")
    assert parse_choices("f16+bitlinear") == ("f16", "bitlinear")
    for text in ("f64", "+bitlinear", "bf16+linear", "bf16+"):
        with pytest.raises(BadInputError, match=r"expected f32 or bf16 or f16, alone or with \+bitlinear"):
            parse_choices(text)


def test_both_sides_open_it_with_what_the_word_says(model: Path) -> None:
    made = open_candidate(find_word("candidate", "transformers:bf16+bitlinear"), model, n_threads=3)
    assert isinstance(made, TransformersRunner)
    assert made._asked == {"dtype": "bf16", "linear_class": "bitlinear", "n_threads": 3}
    assert made.identity.numerics.compute_dtype == made.identity.numerics.kv_dtype == "bf16"
    made = open_reference(find_word("reference", "transformers"), model)
    assert isinstance(made, TransformersRunner)
    assert made._asked == {"dtype": "f32", "linear_class": None, "n_threads": 2}
    with pytest.raises(BadInputError, match="expected f32 or bf16 or f16"):
        open_candidate(find_word("candidate", "transformers:f8"), model)


@pytest.mark.parametrize("missing", transformers.PACKAGES)
def test_a_missing_package_is_named_with_what_to_do(
    missing: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(UnavailableError, match=rf"{missing} is not installed; run `pip install .*\[hf\]'"):
        TransformersRunner(model).__enter__()


def test_text_is_read_by_the_tokenizer_of_the_file(model: Path) -> None:
    ours = open_candidate(find_word("candidate", "bitnet_py"), model)
    with ours:
        assert TransformersRunner(model).tokenize("What is 2+2?") == ours.tokenize("What is 2+2?")


@has_torch
def test_every_operation_is_within_its_bound_and_the_bits_are_not_ours(model: Path) -> None:
    receipt = crossval.compare_engines("abc abc", model, candidate="transformers", reference="spec", n_decode=1)
    assert receipt["verdict"] == "parity"
    audit = receipt["audit"]["candidate"]
    assert audit["n_ops"] == audit["n_covered"] == receipt["audit"]["reference"]["n_ops"]
    assert all(row["n_segments"] == 0 for row in audit["rows"])
    party = receipt["candidate"]
    assert party["name"] == "transformers"
    assert party["numerics"]["compute_dtype"] == "f32"
    assert party["settings"]["linear_classes"] == "AutoBitLinear, Linear"
    assert receipt["compute"]["path"] == "library"
    assert party["library_digest"]


@has_torch
def test_a_process_that_was_closed_says_so_and_bad_tokens_are_bad_input(model: Path) -> None:
    with TransformersRunner(model, dtype="bf16") as runner:
        with pytest.raises(BadInputError, match="token id 512 is outside the vocabulary of 512"):
            runner.eval([512], ["result_output"])
        with pytest.raises(BadInputError, match="at least one token"):
            runner.eval([], ["result_output"])
        runner.reset()
        given = runner.eval([1, 2, 3], ["result_output", "blk.1.l_out"])
        assert {name: tap.rows for name, tap in given.taps.items()} == {"blk.1.l_out": None, "result_output": (2,)}
        assert runner.eval([4], ["result_output"]).plan.kind == "decode"
        each = runner.eval_each([5, 6])
        runner.reset()
        again = runner.eval([1, 2, 3, 4, 5, 6], ["result_output"]).taps["result_output"].array
        assert again.argmax() == each[-1].taps["result_output"].array.argmax()
    with pytest.raises(EngineCrashError, match="closed"):
        runner.eval([1], [])
