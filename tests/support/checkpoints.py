"""Small Hugging Face checkpoints with random weights, written from the formats' definitions, no project code but
the vocabulary."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_py.synth_vocab import build_vocab

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pre-tokenizer, as its tokenizer.json has it."""
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_FALCON = [{"type": "Punctuation", "behavior": "Contiguous"}, {**_BYTES, "use_regex": True}]
PRE_TOKENIZERS = {
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
        {**_BYTES, "use_regex": False},
    ],
    "falcon3": [*_FALCON, {"type": "Digits", "individual_digits": True}],
    "falcon_e": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False},
        {**_BYTES, "use_regex": False},
    ],
}
"""Steps of a tokenizer.json's pre-tokenizer, by the name that bitnet.cpp's converter has for such a one; that of
Falcon-E reads some texts otherwise than bitnet.cpp, as the real one is said to do."""
PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
"""What an added token of a tokenizer.json does not do."""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FAMILIES = {
    "2b-4t": ("BitNetForCausalLM", "relu2", "self_attn.attn_sub_norm", "mlp.ffn_sub_norm"),
    "large": ("BitnetForCausalLM", "silu", "self_attn.inner_attn_ln", "mlp.ffn_layernorm"),
    "llama": ("LlamaForCausalLM", "silu", None, None),
}
MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bits of float32 values rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Numbers:
    """Random numbers that are the same in every NumPy version and on every platform."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)

    def uniform(self, low: float, high: float, shape: tuple[int, ...] | int | None = None) -> Any:
        return low + (high - low) * self.state.random_sample(shape)

    def bell(self, width: float, shape: tuple[int, ...]) -> np.ndarray:
        """Sums of four uniform numbers: about normal, with this standard deviation."""
        return (self.state.random_sample((4, *shape)).sum(0) - 2) * (width * 3**0.5)


@dataclass
class Small:
    """A checkpoint: change ``config`` or ``tensors`` (name -> dtype, array) before ``write``."""

    family: str = "2b-4t"
    seed: int = 0
    dtype: str = "BF16"
    rule: str = "llama-bpe"
    """Key of ``PRE_TOKENIZERS``."""
    packed: str | None = None
    """``linear_class`` of a checkpoint with packed matrices."""
    tied: bool = True
    n_layers: int = 2
    dim: int = 256
    n_heads: int = 2
    n_kv_heads: int = 1
    hidden: int = 384
    vocab: int = 300
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name, activation, attn_sub, ffn_sub = FAMILIES[self.family]
        rng = Numbers(self.seed)
        self.config = {
            "architectures": [name],
            "hidden_act": activation,
            "hidden_size": self.dim,
            "intermediate_size": self.hidden,
            "max_position_embeddings": 512,
            "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocab,
        }
        if self.packed is not None:
            quantization = {"quant_method": "bitnet", "linear_class": self.packed, "quantization_mode": "offline"}
            self.config["quantization_config"] = quantization
        head_dim = self.dim // self.n_heads
        kv_dim = self.n_kv_heads * head_dim
        self._add("model.embed_tokens.weight", rng.bell(0.5, (self.vocab, self.dim)))
        for index in range(self.n_layers):
            layer = f"model.layers.{index}."
            for norm, width in (
                ("input_layernorm", self.dim),
                ("post_attention_layernorm", self.dim),
                (attn_sub, self.dim),
                (ffn_sub, self.hidden),
            ):
                if norm is not None:
                    self._add(f"{layer}{norm}.weight", rng.uniform(0.5, 1.5, width))
            for matrix, (rows, cols) in {
                "self_attn.q_proj": (self.dim, self.dim),
                "self_attn.k_proj": (kv_dim, self.dim),
                "self_attn.v_proj": (kv_dim, self.dim),
                "self_attn.o_proj": (self.dim, self.dim),
                "mlp.gate_proj": (self.hidden, self.dim),
                "mlp.up_proj": (self.hidden, self.dim),
                "mlp.down_proj": (self.dim, self.hidden),
            }.items():
                self._matrix(f"{layer}{matrix}.weight", rng, rows, cols)
        self._add("model.norm.weight", rng.uniform(0.5, 1.5, self.dim))
        if not self.tied:
            self._add("lm_head.weight", rng.bell(0.5, (self.vocab, self.dim)))

    def _add(self, name: str, values: np.ndarray) -> None:
        narrow = {"BF16": to_bfloat16, "F16": np.float16, "F32": np.float32}[self.dtype]
        self.tensors[name] = self.dtype, np.asarray(narrow(values.astype(np.float32)))

    def _matrix(self, name: str, rng: Numbers, rows: int, cols: int) -> None:
        width = 0.02 * rng.uniform(0.6, 1.6)
        if self.packed is None:
            # Columns differ in size, as trained ones do.
            self._add(name, rng.bell(width, (rows, cols)) * rng.uniform(0.5, 1.5, cols))
            return
        codes = np.searchsorted([0.3, 0.7], rng.uniform(0, 1, (rows, cols))).astype(np.uint8)
        packed = np.zeros((rows // 4, cols), np.uint8)
        for quarter in range(4):
            packed |= codes[quarter * (rows // 4) : (quarter + 1) * (rows // 4)] << (2 * quarter)
        self.tensors[name] = "U8", packed
        mean = np.float32(width)
        value = mean if self.packed == "autobitlinear" else np.float32(1) / mean
        self.tensors[f"{name}_scale"] = "BF16", to_bfloat16(np.array([value]))

    def values(self, name: str) -> np.ndarray:
        dtype, array = self.tensors[name]
        return from_bfloat16(array) if dtype == "BF16" else array

    def write(self, folder: Path, *, shards: int = 1) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        write_tokenizer(folder, self.vocab, self.rule)
        names = list(self.tensors)
        if shards == 1:
            write_safetensors(folder / "model.safetensors", self.tensors)
            return folder
        places = {
            name: f"model-{1 + i * shards // len(names):05}-of-{shards:05}.safetensors"
            for i, name in enumerate(names)
        }
        for file in set(places.values()):
            part = {name: self.tensors[name] for name in names if places[name] == file}
            write_safetensors(folder / file, part)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return folder


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header, at = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())


def write_tokenizer(folder: Path, vocab_size: int, rule: str) -> None:
    """Write tokenizer.json and tokenizer_config.json; but for llama-bpe they add no BOS and name none."""
    vocab = build_vocab(vocab_size, 0)
    special = [i for i, kind in enumerate(vocab.token_types) if kind == 3]
    bos = vocab.tokens[vocab.bos_id]
    with_bos = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [vocab.bos_id], "tokens": [bos]}},
    }
    is_llama = rule == "llama-bpe"
    data = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": vocab.tokens[i], "special": True, **PLAIN} for i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[rule]},
        "post_processor": with_bos if is_llama else None,
        "model": {
            "type": "BPE",
            "ignore_merges": is_llama,
            "vocab": {token: i for i, token in enumerate(vocab.tokens) if i not in special},
            "merges": list(vocab.merges),
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    eos = {"eos_token": vocab.tokens[vocab.eos_id], "chat_template": TEMPLATE}
    config = (
        {**eos, "bos_token": bos}
        if is_llama
        else {**eos, "pad_token": {"__type": "AddedToken", "content": vocab.tokens[special[-1]], **PLAIN}}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
