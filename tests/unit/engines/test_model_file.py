from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGUFFile
from crossval.engines.model_file import check_model, missing_tokens, tokenizer_digest
from crossval.terms import SEPARATE_OUTPUT_NOTE

MakeModel = Callable[..., Path]


def test_facts_of_a_tied_model(make_model: MakeModel) -> None:
    path = make_model()
    model = check_model(path)
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.facts["file_name"] == path.name
    assert model.facts["size_bytes"] == path.stat().st_size
    assert model.facts["separate_output"] is False
    assert model.notes == ()
    shape = model.facts["shape"]
    assert (shape["n_layers"], shape["dim"], shape["vocab_size"]) == (2, 128, model.tokenizer["vocab_size"])
    assert model.tokenizer["model"] == "gpt2"


def test_a_separate_output_is_noted(make_model: MakeModel) -> None:
    model = check_model(make_model(untied_head=True))
    assert model.facts["separate_output"] is True
    assert model.notes == (SEPARATE_OUTPUT_NOTE,)
    assert "output.weight" in SEPARATE_OUTPUT_NOTE
    assert "bitnet.cpp ignores" in SEPARATE_OUTPUT_NOTE


def test_llama_uses_a_separate_output(make_model: MakeModel) -> None:
    """Bitnet.cpp ignores it in the architectures of BitNet only."""
    model = check_model(make_model(arch="llama", untied_head=True))
    assert model.facts["separate_output"] is True
    assert model.notes == ()


def test_every_weight_is_looked_at(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    with GGUFFile.open(source) as gguf:
        held = bytes(gguf.data("token_embd.weight"))
    data = bytearray(source.read_bytes())
    last = data.find(held) + len(held) - 2
    data[last : last + 2] = np.float16("nan").tobytes()
    broken = tmp_path / "nan.gguf"
    broken.write_bytes(data)
    with pytest.raises(ModelError, match=r"token_embd\.weight.*finite"):
        check_model(broken)


def test_the_tokenizer_digest_is_as_documented() -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["a", "é"],
        "general.name": "not part of it",
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.scores": np.array([0.5, 1.0], np.float32),
    }
    lines = [
        ["tokenizer.ggml.bos_token_id", 1],
        ["tokenizer.ggml.scores", [0.5, 1.0]],
        ["tokenizer.ggml.tokens", ["a", "é"]],
    ]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    assert tokenizer_digest(metadata) == hashlib.sha256(text.encode("ascii")).hexdigest()
    assert tokenizer_digest({**metadata, "tokenizer.ggml.tokens": ["a", "e"]}) != tokenizer_digest(metadata)


def test_missing_tokens(make_model: MakeModel) -> None:
    path = make_model()
    with GGUFFile.open(path) as gguf:
        known = gguf.metadata["tokenizer.ggml.tokens"][3]
    assert missing_tokens(path, (known, "<|no such token|>")) == ["<|no such token|>"]
    assert missing_tokens(path, ()) == []


@pytest.mark.parametrize("projections", ["i2_s", "tq2_0", "f16", "f32"])
def test_the_type_of_the_matrices_is_that_of_the_file(make_model, projections):
    model = check_model(make_model(arch="bitnet", dim=256, hidden_dim=256, projections=projections))
    assert model.facts["quantization"] == projections.upper()
    floating = [note for note in model.notes if "in floating point" in note]
    assert len(floating) == (projections in ("f16", "f32"))
    assert all(projections.upper() in note for note in floating)
