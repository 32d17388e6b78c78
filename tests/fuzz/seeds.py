"""What every search begins with: small valid inputs, made by the builders that the other tests use."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crossval import schema
from crossval.child.protocol import encode_prefix
from crossval.engines.tap_maps import MAPS
from crossval.formats import Dtype
from crossval.passes import EngineIdentity, PassPlan, PassRecord, TapArray
from crossval.receipts import columns
from crossval.receipts import file as receipt
from crossval.receipts.policy import POLICIES
from crossval.smoke.suite import DATA_DIR
from crossval.traces.read import TraceModel, expected_shape
from crossval.traces.write import TraceWriter
from tests.support import receipt_samples, vocabularies, weights_samples
from tests.support.checkpoints import Small, write_tokenizer
from tests.support.gguf_bytes import ARRAY, F32, STRING, U32, Container, model_container, small_container

SHAPE_FIELDS = (
    *("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "hidden_dim", "vocab_size", "context_length"),
    *("rope_base", "rms_eps", "rope_scale"),
)
"""Fields that the engine and the specification read of a file's header, each with code of its own."""
JOURNAL_HEADER = {"run": 1}
DATA = Path(__file__).parents[1] / "data"


# --- model files ----------------------------------------------------------------------------------------------


def header(container: Container) -> bytes:
    """Return a container's bytes up to its tensor data."""
    whole, sizes = container.to_bytes(), [len(tensor.data) for tensor in container.tensors]
    padded = [-(-size // container.alignment) * container.alignment for size in sizes[:-1]]
    return whole[: len(whole) - sum(padded) - sum(sizes[-1:])]


MODEL_DATA = model_container().to_bytes()[len(header(model_container())) :]


def model_headers() -> list[bytes]:
    """Return headers of whole models, one of every architecture and tokenizer, and of a file of all types."""
    plain = [model_container(arch=arch) for arch in ("bitnet-b1.58", "bitnet", "llama", "qwen3", "gemma3")]
    rope = ("rope.scaling.type", STRING, "linear"), ("rope.scaling.factor", F32, 4.0), ("pooling_type", U32, 1)
    given = model_container()
    for key, kind, item in rope:
        given = given.with_key(f"bitnet-b1.58.{key}", kind, item)
    return [
        *map(header, [*plain, small_container(), given]),
        *(header(_with_tokenizer(kind)) for kind in ("llama-bpe", "gemma-like", "sentencepiece, both ends")),
    ]


def _with_tokenizer(kind: str) -> Container:
    made = model_container()
    for key, value in vocabularies.metadata(kind).items():
        name = key.removeprefix("tokenizer.ggml.")
        if isinstance(value, list):
            element = STRING if isinstance(value[0], str) else F32 if name == "scores" else 5
            made = made.with_key(key, ARRAY, (element, value[:300]))
        else:
            made = made.with_key(
                key, 7 if isinstance(value, bool) else STRING if isinstance(value, str) else U32, value
            )
    return made.with_key("tokenizer.chat_template", STRING, "{{ messages[0]['content'] }}")


def checkpoint() -> bytes:
    """Return the files of a checkpoint as one JSON object: by name; ``header`` is that of the safetensors."""
    small, at, tensors = Small(n_layers=1, dim=128, hidden=128), 0, {}
    for name, (dtype, array) in small.tensors.items():
        tensors[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), small.vocab, "llama-bpe")
        parts = {path.name: json.loads(path.read_text()) for path in Path(folder).iterdir()}
    return json.dumps({**parts, "config.json": small.config, "header": tensors}).encode()


CHECKPOINT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")


def write_checkpoint(folder: Path, parts: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint; the tensors hold zeros, 256 KiB in all."""
    folder.mkdir(exist_ok=True)
    for name in CHECKPOINT_FILES:
        (folder / name).unlink(missing_ok=True)
        if name in parts:
            (folder / name).write_text(json.dumps(parts[name]))
    text = json.dumps(parts.get("header", {})).encode()
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(1 << 18))


def sentencepiece() -> list[bytes]:
    """Return ``tokenizer.model`` files: one piece of every kind, and one file with other fields."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    pieces = (
        field(1, field(1, f"t{kind}".encode()) + b"\x15" + struct.pack("<f", -kind) + bytes([3 << 3, kind]))
        for kind in range(1, 7)
    )
    return [b"".join(pieces), field(1, field(1, "▁a".encode())) + field(2, b"abc") + b"\x19" + bytes(8)]


# --- receipts -------------------------------------------------------------------------------------------------


@functools.cache
def receipts() -> list[receipt.Receipt]:
    """Return one good receipt of every kind."""
    made: list[Callable[[], receipt.Receipt]] = [
        receipt_samples.layers_receipt,
        receipt_samples.greedy_receipt,
        receipt_samples.smoke_receipt,
        receipt_samples.tokens_receipt,
        receipt_samples.selftest_receipt,
        receipt_samples.metamorphic_receipt,
        receipt_samples.bench_receipt,
        receipt_samples.score_receipt,
        weights_samples.weights_receipt,
    ]
    return [one() for one in made]


def policies() -> list[bytes]:
    """Return policies that set every field there is."""
    examples: dict[str, Any] = {"number": 0.5, "array": ["ab" * 32], "boolean": True}
    fields = schema.load("policy.v1")["properties"]
    every = {name: one.get("default") or examples.get(one.get("type"), 1) for name, one in fields.items()}
    every |= {"kinds": ["layers", "greedy"], "per_kind": {"layers": {"min_cosine": 0.9}}}
    every |= {"taps": {"l_out": {"max_nmse": 1e-9}, "blk.0.q": {"min_exact_match": 1.0}}, "tolerance": "same"}
    every |= {"allow_precision": ["bf16"], "allow_deviation": ["weights_f16"], "allow_compute_paths": ["recorded"]}
    every["reference_generation"] = ["main"]
    found = [every, *({"schema_version": 1, name: value} for name, value in every.items())]
    return [json.dumps(one).encode() for one in found]


def yaml_policies() -> list[bytes]:
    """Return policies in YAML: the shipped one, and what only YAML has."""
    flow = b"schema_version: 1\nper_kind:\n  layers: {min_cosine: 0.9}\ntaps: {l_out: {max_abs: 0.001}}\n"
    return [(POLICIES / "strict.yaml").read_bytes(), flow, b"%YAML 1.1\n---\n? schema_version\n: 1\n..."]


# --- traces ---------------------------------------------------------------------------------------------------

TRACE_MODEL = TraceModel("0" * 64, 2, 2, 1, 64, 128, 256, 300)
_PLAN = PassPlan("prefill", (1, 2, 3), 0)
TENSOR_NAMES = (
    *("inp_embd", "attn_norm-0", "Qcur-0", "blk.0.q", "blk.1.l_out", "model.layers.1.mlp.down_proj"),
    *("result_output", "model.layers.0.self_attn.o_proj.input", "l_out-1", "x" * 60),
)


def engine_pass() -> PassRecord:
    """Return a pass of an engine over three tokens: values by the tap's place, so that no two taps are alike."""
    names = (
        "inp_embd",
        "blk.0.attn_norm",
        "blk.0.q",
        "blk.0.ffn_out",
        "blk.0.l_out",
        "result_norm",
        "result_output",
    )
    arrays = {name: np.zeros(expected_shape(name, TRACE_MODEL, _PLAN, None), np.float32) for name in names}
    return PassRecord(_PLAN, {name: TapArray(array + i, None) for i, (name, array) in enumerate(arrays.items())})


def trace(dtype: Dtype = "f32") -> tuple[bytes, bytes]:
    """Return ``trace.json`` and the pass file of a trace, whose tensors are all of a type."""
    small = TraceModel("0" * 64, 2, 2, 1, 2, 4, 6, 9)
    names = ("inp_embd", "blk.0.q", "blk.1.l_out", "result_norm")
    ones = {name: np.ones(expected_shape(name, small, _PLAN, None), np.float32) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "t"
        with TraceWriter(out, small) as writer:
            writer.add_pass(
                PassRecord(_PLAN, {name: TapArray(one, None, dtype) for name, one in ones.items()}, 0.5)
            )
            writer.finish(engine=EngineIdentity("x", version="1"), prompt_ids=(1, 2, 3), prompt_text="abc")
        return (out / "trace.json").read_bytes(), (out / "pass-0000.safetensors").read_bytes()


@functools.cache
def trace_json_of(dtype: Dtype) -> str:
    """Return a ``trace.json`` in which the digest of the pass file is zeros."""
    text, data = trace(dtype)
    return text.decode().replace(hashlib.sha256(data).hexdigest(), "0" * 64)


def pass_files() -> list[bytes]:
    """Return pass files, each after the number of its type."""
    return [bytes([number]) + trace(dtype)[1] for number, dtype in enumerate(DTYPES)]


DTYPES: tuple[Dtype, ...] = ("f32", "f16", "bf16")


# --- the table ------------------------------------------------------------------------------------------------


def _lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def _frames() -> list[bytes]:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    given: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"ok": True, "result": {}}, {}),
        ({"ok": True}, {"a": array}),
    ]
    return [
        encode_prefix(head, arrays) + b"".join(one.tobytes() for one in arrays.values()) for head, arrays in given
    ]


def _printed() -> list[bytes]:
    tensors = (DATA / "printed" / "march.txt").read_text().split("ggml_debug:")[1:8]
    return [b"".join(f"ggml_debug:{one}".encode() for one in tensors[:n]) for n in (1, 7)]


MANIFEST: dict[str, Any] = {
    "version": 1,
    "compiler": {"version": "clang 18"},
    "cmake": {"flags": "-O3", "cache": {"A": "ON"}},
    "libraries": {"libllama.so": "0" * 64},
    "source": {"commit": None, "digest": "1" * 64, "path": "/source"},
}
_TEMPLATES = (
    b"{% for m in messages %}{{ m['role'] ~ ': ' ~ m.content|trim }}{% endfor %}",
    b"{%- if add_generation_prompt -%}{{ bos }}{% set x = namespace(a=[1, 2]) %}{% else %}{# c #}{%- endif -%}",
    b"{% macro f(a, b=1) %}{{ a[b:2] }}{% endmacro %}{{ f(1) if x is defined else raise_exception('no') }}",
)
SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "gguf": model_headers,
    "gguf-spec": model_headers,
    "weights": model_headers,
    "checkpoint": lambda: [checkpoint()],
    "tokenizer-json": lambda: [json.dumps(json.loads(checkpoint())["tokenizer.json"]).encode()],
    "tokenizer-model": sentencepiece,
    "template": lambda: list(_TEMPLATES),
    "receipt": lambda: [columns.to_text(one).encode() for one in receipts()],
    "policy": policies,
    "policy-yaml": yaml_policies,
    "journal": lambda: [_lines({"run": JOURNAL_HEADER}, {"entry": {"a": [1]}}).replace(b" ", b""), b'{"run":{"r'],
    "trace": lambda: [trace()[0]],
    "trace-pass": pass_files,
    "tap-map": lambda: [(MAPS / f"{name}.json").read_bytes() for name in ("huggingface", "bitnet-gpu")],
    "printed": _printed,
    "logits": lambda: [struct.pack("<3i", 1, 2, 3)],
    "suite": lambda: [
        (DATA_DIR / "fixed-10.jsonl").read_bytes(),
        _lines({"id": "a", "prompt": "x", "pattern": "y+", "stop": "newline", "seen": True, "family": "f"}),
    ],
    "prompts": lambda: [b"a\nb c\r\n", _lines("a", {"prompt": "b"})],
    "frame": _frames,
    "manifest": lambda: [json.dumps(MANIFEST).encode()],
}
"""By target."""
