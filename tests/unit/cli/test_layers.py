"""``crossval layers`` by exact exit code, with real engines: ours, the specification, and recorded traces."""

from __future__ import annotations

import json

import pytest

from bitnet_py import _native
from bitnet_py.gguf import GGUFFile
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.receipts import file as receipt
from tests.support.gguf_bytes import string
from tests.support.strangers import PROMPT, Fault, error_line, run

# Exit 0


def test_a_recorded_reference(layers, golden, out):
    result = layers("--receipt", out)
    assert result.exit_code == 0, result.output
    assert "PARITY  bitnet_py against bitnet.cpp (recorded): 15 of 15 comparisons, all bits equal" in result.stdout
    assert str(out) in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""
    made = receipt.read(out)
    assert made["verdict"] == "parity"
    assert made["parity"] == {
        "cosine_similarity": 1.0,
        "exact_match_rate": 1.0,
        "logits_exact_match_rate": 1.0,
        "cpp_available": True,
        "status": "parity",
    }
    assert made["compute"]["path"] == "real"
    assert any("i2s" in kernel["name"] and kernel["calls"] > 0 for kernel in made["compute"]["kernels"])
    assert made["settings"]["reference"] == golden.name
    assert str(golden.parent) not in out.read_text()
    assert run("gate", out).exit_code == 0


def test_json_mode_prints_the_receipt_and_nothing_else(layers, out):
    result = layers("--receipt", out, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == receipt.read(out)
    assert result.stderr == ""


def test_full_compares_every_operation(layers, out):
    assert layers("--receipt", out, "--full").exit_code == 0
    assert len(receipt.read(out)["results"]["rows"]) == 3 * 43
    assert run("gate", out).exit_code == 0


def test_the_specification_as_reference(layers, out):
    result = layers("--decode", "1", "--receipt", out, reference="spec")
    assert result.exit_code == 0, result.output
    assert "against bitnet.cpp" not in result.stdout
    made = receipt.read(out)
    assert made["parity"]["cpp_available"] is False
    assert made["parity"]["exact_match_rate"] < 1.0
    assert made["thresholds"]["policy"] == "independent"
    assert run("gate", out).exit_code == 1
    assert run("gate", out, "--reference-name", "specification").exit_code == 0


def test_the_specification_as_candidate_needs_the_policys_consent(layers, out):
    assert layers("--receipt", out, "--candidate", "spec").exit_code == 0
    assert run("gate", out).exit_code == 1
    assert run("gate", out, "--allow-compute", "specification").exit_code == 0


# Exit 1


@pytest.mark.parametrize("layer", [0, 1])
def test_a_broken_operation_is_named(layers, record, layer, out):
    golden = record(fault=Fault(rolled_from=f"{layer}/ffn_sub_norm"))
    table, as_json = layers("--receipt", out, reference=golden), layers("--json", reference=golden)
    assert (table.exit_code, as_json.exit_code) == (1, 1)
    assert f"first divergence: layer {layer}, op ffn_sub_norm (pass 0, prefill" in table.stdout
    made = json.loads(as_json.stdout)
    assert (made["verdict"], made["parity"]["status"]) == ("reference_defect", "divergence")
    place = made["first_divergence"]
    assert (place["layer"], place["tap"]) == (layer, f"blk.{layer}.ffn_sub_norm")
    result = run("gate", out)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout


def test_a_tokenizer_that_disagrees_is_a_divergence(layers, monkeypatch, out):
    honest = BitnetPyRunner.tokenize
    monkeypatch.setattr(BitnetPyRunner, "tokenize", lambda self, text, **options: honest(self, text)[::-1])
    result = layers("--receipt", out)
    assert result.exit_code == 1
    assert "the tokenizers disagree at token 0" in result.stdout
    assert receipt.read(out)["tokenizer"]["engines_agree"] is False
    assert run("gate", out).exit_code == 1


# Exit 3


@pytest.mark.usefixtures("no_bitnet_cpp")
@pytest.mark.parametrize("command", ["layers", "greedy"])
@pytest.mark.parametrize("word", ["auto", "bitnet.cpp"])
def test_no_reference_is_exit_3_with_something_to_do(command, word, model_path, out):
    args = (command, "--prompt", PROMPT, "--model", model_path, "--reference", word)
    result = run(*args)
    assert result.exit_code == 3
    assert "make fetch-cpp" in error_line(result)
    assert result.stdout == ""
    result = run(*args, "--json", "--receipt", out)
    assert result.exit_code == 3
    made = json.loads(result.stdout)
    assert made == receipt.read(out)
    assert (made["verdict"], made["reference"]["status"]) == ("incomplete", "unavailable")
    assert made["parity"]["exact_match_rate"] is made["parity"]["cosine_similarity"] is None
    assert run("gate", out).exit_code == 1


def test_a_trace_that_ends_too_early_is_incomplete(layers, out):
    result = layers("--decode", "4", "--receipt", out)
    assert result.exit_code == 3
    assert "INCOMPLETE" in result.stdout
    assert "not compared: pass 3 inp_embd: only 3 of 5 passes are recorded alike" in result.stdout
    assert run("gate", out).exit_code == 1


# Exit 4


def with_damage(damage, model):
    """The bytes of a model file, corrupted in one way."""
    data = bytearray(model.read_bytes())
    with GGUFFile.open(model) as gguf:
        tokens = b"".join(map(string, gguf.metadata["tokenizer.ggml.tokens"][20:30]))
        embedding = data.find(bytes(gguf.data("token_embd.weight")[:64]), gguf.tensors["token_embd.weight"].offset)
    if damage == "magic":
        data[:4] = b"GGML"
    elif damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    elif damage == "token":
        data[data.index(tokens) + 8] = 0xFF
    else:
        data[embedding + 10 : embedding + 12] = b"\x00\x7e"
    return data


@pytest.mark.parametrize("damage", ["magic", "truncated", "empty", "token", "nan"])
def test_a_damaged_model(damage, layers, model_path, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(with_damage(damage, model_path))
    result = layers("--json", model=broken, reference="spec")
    assert result.exit_code == 4
    assert "broken.gguf" in error_line(result)
    assert damage != "token" or "key 'tokenizer.ggml.tokens', string 20 " in error_line(result)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        pytest.param({"model": "none.gguf"}, "none.gguf", id="no model"),
        pytest.param({"prompt": "bad \udcff byte"}, "UTF-8", id="prompt not UTF-8"),
        pytest.param({"prompt": "Something else"}, "other tokens", id="trace of another prompt"),
    ],
)
def test_what_cannot_be_compared(layers, asked, complaint):
    result = layers(**asked)
    assert result.exit_code == 4
    assert complaint in error_line(result)


def test_a_prompt_longer_than_the_context(layers, make_model):
    result = layers(prompt="many words " * 60, model=make_model(context_length=64), reference="spec")
    assert result.exit_code == 4
    assert "context holds 64" in error_line(result)


def test_a_trace_of_another_model(layers, make_model):
    result = layers(model=make_model(n_layers=3))
    assert result.exit_code == 4
    assert "another model" in error_line(result)


def test_a_template_whose_tokens_the_model_lacks(layers, model_path, tmp_path):
    data = model_path.read_bytes()
    assert b"<|eot_id|>" in data
    model = tmp_path / "renamed.gguf"
    model.write_bytes(data.replace(b"<|eot_id|>", b"<|eot_xx|>"))
    words = ("--decode", "0", "--template", "bitnet")
    assert layers(*words, reference="spec").exit_code == 0
    result = layers(*words, reference="spec", model=model)
    assert result.exit_code == 4
    assert "no token '<|eot_id|>', which template bitnet needs" in error_line(result)


def test_a_receipt_that_cannot_be_written(layers, tmp_path):
    result = layers("--receipt", tmp_path)
    assert result.exit_code == 4
    assert "cannot write the receipt" in error_line(result)


def test_a_forced_kernel_that_does_not_exist(layers, monkeypatch):
    monkeypatch.setenv("BITNET_KERNEL", "nope")
    result = layers()
    assert result.exit_code == 4
    assert "nope" in error_line(result)


# The compute path


def test_a_kernel_that_was_asked_for_is_no_fallback(layers, monkeypatch, out):
    monkeypatch.setenv("BITNET_KERNEL", "scalar")
    assert layers("--receipt", out).exit_code == 0
    made = receipt.read(out)
    assert made["candidate"]["settings"]["kernel"] == "scalar"
    assert made["compute"]["fallback"] is False
    assert {kernel["name"].rpartition("_")[2] for kernel in made["compute"]["kernels"]} == {"scalar"}


def test_a_fallback_fails_the_gate(layers, monkeypatch, out):
    families = [_native.KernelFamily("faster still", "", True), *_native.kernel_families()]
    monkeypatch.setattr(_native, "kernel_families", lambda: families)
    assert layers("--receipt", out).exit_code == 0
    assert run("gate", out).exit_code == 1
    assert run("gate", out, "--allow-fallback").exit_code == 0
