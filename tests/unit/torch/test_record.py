"""Recording PyTorch models: right ones are parity in every mode, broken ones are found where they were broken."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import crossval
from bitnet_py.gguf import GGUFFile
from bitnet_py.quantize import quantize
from bitnet_py.synth import SynthConfig, write_model
from bitnet_py.tokenizer import Tokenizer
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import Numerics
from crossval.traces.read import TraceInfo
from tests.support.checkpoints import Small
from tests.support.edited_gguf import EditedGGUF
from tests.support.torch_models import fused_model, need

need("torch", "transformers")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from crossval.torch import record  # noqa: E402
from crossval.torch.huggingface import from_gguf  # noqa: E402

PROMPT = "abc abc"
SHAPE = SynthConfig(n_layers=3, dim=128, hidden_dim=256, context_length=64)
ARCHITECTURES = {"bitnet-b1.58": SHAPE, "llama": SynthConfig(**{**vars(SHAPE), "arch": "llama", "biases": True})}


@pytest.fixture(autouse=True)
def _not_compiled() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")  # compiling costs a minute, and nothing is measured here
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.gguf"
    write_model(path, ARCHITECTURES[request.param])
    return path


@pytest.fixture(scope="module")
def bitnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "bitnet.gguf"
    write_model(path, SHAPE)
    return path


def ids_of(path: Path) -> list[int]:
    with GGUFFile.open(path) as gguf:
        return Tokenizer.from_gguf(gguf).encode(PROMPT)


def recorded(model: Any, path: Path, out: Path, **options: Any) -> TraceInfo:
    return record(model, ids_of(path), path, out, steps=1, **options)


def receipt_of(path: Path, out: Path) -> dict[str, Any]:
    return dict(crossval.compare_engines(PROMPT, path, candidate=str(out), reference="spec"))


def assert_checked_one_by_one(receipt: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    audit = receipt["audit"]["candidate"]
    assert receipt["verdict"] == "parity", (audit["first_guilty"], receipt["coverage"])
    assert {row["tap"].rpartition(".")[2] for row in audit["rows"] if row["n_segments"]} == set(but)
    assert audit["n_ops"] == audit["n_covered"]


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_packed_weights_of_both_classes_are_parity(
    model_file: Path, tmp_path: Path, dtype: str, linear_class: str
) -> None:
    path = model_file
    if linear_class == "autobitlinear" and path.stem == "llama":  # which scales biases, and is refused for it
        path = tmp_path / "llama.gguf"
        write_model(path, SynthConfig(**{**vars(ARCHITECTURES["llama"]), "biases": False}))
    info = recorded(from_gguf(path, dtype, linear_class), path, tmp_path / "trace")
    assert (info.engine.numerics.compute_dtype, info.engine.numerics.kv_dtype) == (dtype, dtype)
    assert "torch 2" in str(info.engine.version)
    assert [one.plan.kind for one in info.passes] == ["prefill", "decode"]
    assert_checked_one_by_one(receipt_of(path, tmp_path / "trace"))


@pytest.mark.parametrize("family", ["2b-4t", "llama"])
@pytest.mark.parametrize("packed", [None, "bitlinear", "autobitlinear"])
def test_checkpoints_that_transformers_loads_itself(family: str, packed: str | None, tmp_path: Path) -> None:
    """None: master weights, quantised online at every call."""
    need("accelerate")
    checkpoint = Small(family, packed=packed)
    checkpoint.config["model_type"] = {"2b-4t": "bitnet", "llama": "llama"}[family]
    if packed is None:
        online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
        checkpoint.config["quantization_config"] = online
    folder = checkpoint.write(tmp_path / "checkpoint")
    quantize(folder, tmp_path / "m.gguf")
    # transformers 5.24 keeps the other parameters of this class in bfloat16, and then runs in bfloat16 only
    dtype = torch.bfloat16 if packed == "autobitlinear" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    recorded(model, tmp_path / "m.gguf", tmp_path / "trace")
    assert_checked_one_by_one(receipt_of(tmp_path / "m.gguf", tmp_path / "trace"))


def test_fused_attention_hides_scores_and_weights_only(bitnet_file: Path, tmp_path: Path) -> None:
    model = from_gguf(bitnet_file)
    model.config._attn_implementation = "sdpa"
    info = recorded(model, bitnet_file, tmp_path / "trace")
    taps = {name.rpartition(".")[2] for name in info.passes[0].taps}
    assert "q_rope" in taps
    assert "k_rope" in taps
    assert not taps & {"kq", "kq_soft_max"}
    assert_checked_one_by_one(receipt_of(bitnet_file, tmp_path / "trace"), but=("kqv_out",))


def test_the_fused_model_of_the_gpu_folder_is_recorded_by_its_own_map(bitnet_file: Path, tmp_path: Path) -> None:
    model, forward = fused_model(bitnet_file)
    out = tmp_path / "trace"
    info = recorded(model, bitnet_file, out, tap_map="bitnet-gpu", forward=forward)
    assert info.engine.numerics == Numerics(compute_dtype="f32")
    receipt = receipt_of(bitnet_file, out)
    hidden = ("kqv_out", "ffn_out")  # what no module there computes is checked together with these
    assert_checked_one_by_one(receipt, but=hidden)
    twice = lambda *asked: [forward(*asked), forward(*asked)][0]  # noqa: E731
    with pytest.raises(BadInputError, match="tok_embeddings was called more than once in one pass"):
        recorded(model, bitnet_file, tmp_path / "twice", tap_map="bitnet-gpu", forward=twice)


def test_the_shipped_model_in_binary16_is_parity(shipped_model: Path, tmp_path: Path) -> None:
    recorded(from_gguf(shipped_model, "f16"), shipped_model, tmp_path / "trace")
    assert_checked_one_by_one(receipt_of(shipped_model, tmp_path / "trace"))


def test_binary16_that_overflows_is_wrong_there_and_said_to_overflow(bitnet_file: Path, tmp_path: Path) -> None:
    """A gate beyond 256, squared; and a quotient 127 / max|x| beyond 65504, which makes products zero."""
    for factor, linear_class, tap, said in (
        (400, None, "blk.1.ffn_act", "values are not finite: overflow of binary16 (F16)"),
        (1e-3, "autobitlinear", None, ""),
        (1e-4, "bitlinear", "blk.1.ffn_gate", "overflow of binary16 (F16) inside: at 7 of 7 tokens a scale"),
    ):
        edited = EditedGGUF(Path(shutil.copy(bitnet_file, tmp_path / "m.gguf")))
        edited.norm("blk.1.ffn_norm.weight")[:] *= factor
        path = edited.save()
        record(from_gguf(path, "f16", linear_class), ids_of(path), path, tmp_path / "trace", overwrite=True)
        receipt = receipt_of(path, tmp_path / "trace")
        guilty = receipt["audit"]["candidate"]["first_guilty"]
        assert (guilty and guilty["tap"]) == tap
        assert said in (guilty or {"note": ""})["note"]
        assert receipt["verdict"] == ("candidate_defect" if tap else "parity")


@pytest.mark.parametrize(("layer", "dtype"), [(0, "f32"), (2, "f16")])
def test_a_skipped_norm_is_named_with_its_layer(model_file: Path, tmp_path: Path, layer: int, dtype: str) -> None:
    model = from_gguf(model_file, dtype)
    model.model.layers[layer].post_attention_layernorm = torch.nn.Identity()
    recorded(model, model_file, tmp_path / "trace")
    receipt = receipt_of(model_file, tmp_path / "trace")
    assert receipt["verdict"] == "candidate_defect"
    assert receipt["audit"]["candidate"]["first_guilty"]["tap"] == f"blk.{layer}.ffn_norm"
    assert receipt["diagnosis"][0]["name"] == "norm skipped"


def test_the_model_is_left_as_it_was(bitnet_file: Path, tmp_path: Path) -> None:
    model = from_gguf(bitnet_file)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    recorded(model, bitnet_file, tmp_path / "trace")
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_recorded_says_why(model_file: Path, tmp_path: Path) -> None:
    model = from_gguf(model_file)
    out = tmp_path / "trace"

    def fails(text: str, model: Any = model, ids: tuple[int, ...] = (1, 2), **options: Any) -> None:
        with pytest.raises(BadInputError, match=text):
            record(model, ids, options.pop("file", model_file), out, **options)
        assert not (out / "trace.json").exists()

    fails("no tokens", ids=())
    fails("must not be negative", steps=-1)
    fails("token id 512 is outside the vocabulary of 512", ids=(1, 512))
    fails("fits no module of this model, whose modules are model", tap_map="bitnet-gpu")
    fails("neither a file nor one of", tap_map="no-such-map")
    fails("Linear is not a causal model of transformers: give `forward`", torch.nn.Linear(2, 2).eval())
    fails(r"call model\.eval\(\)", torch.nn.Linear(2, 2))
    write_model(tmp_path / "other.gguf", SynthConfig(n_layers=3, dim=256, hidden_dim=256, context_length=64))
    fails(r"inp_embd of module model\.embed_tokens: .*the GGUF file's model", file=tmp_path / "other.gguf")


def test_what_transformers_has_no_model_of_is_unavailable(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", SynthConfig(n_layers=1, arch="llama", rope_freqs=True))
    with pytest.raises(UnavailableError, match=r"rope_freqs\.weight"):
        from_gguf(tmp_path / "m.gguf")
    write_model(tmp_path / "b.gguf", SynthConfig(n_layers=1, arch="llama", biases=True))
    with pytest.raises(UnavailableError, match="multiplies the bias"):
        from_gguf(tmp_path / "b.gguf", linear_class="autobitlinear")
    write_model(tmp_path / "w.gguf", SynthConfig(n_layers=1, head_dim=128))
    with pytest.raises(UnavailableError, match="the width of the model"):
        from_gguf(tmp_path / "w.gguf")


def test_logits_that_are_not_finite_end_the_recording(bitnet_file: Path, tmp_path: Path) -> None:
    model = from_gguf(bitnet_file)
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BadInputError, match="pass 0: the logits of the last token are not finite"):
        recorded(model, bitnet_file, tmp_path / "trace")
