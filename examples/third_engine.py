"""A third engine: BitNet b1.58 in NumPy and the standard library, with a trace for ``crossval``.

It shares no code with ``bitnet_py`` or ``crossval``, and not bitnet.cpp's order of operations
(float32 sums as NumPy computes them, no rounding to binary16). To the harness it is like any
third-party engine in any language. ``--mistake`` breaks one layer on purpose, to show what the
harness reports.

    python examples/third_engine.py models/bitnet-qa.gguf --tokens 1019,277,271,220,17,10,17,30 --out trace
    crossval layers --prompt "What is 2+2?" --candidate trace
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = np.float32
Array = npt.NDArray[np.float32]
MISTAKES = (
    "interleaved-rope",
    "no-ffn-sub-norm",
    "no-attn-sub-norm",
    "silu",
    "swapped-kv-heads",
    "truncating-quantiser",
)
RECORDED = {
    "few": ("l_out", "result_output"),
    "outline": ("inp_embd", "l_out", "result_norm", "result_output"),
    "all": ("",),
}
"""Suffixes of the recorded taps: enough to find the layer, for a parity verdict too, and to find the operation."""
BLOCK = 128


class File:
    """A GGUF file: metadata, and tensors by name (F32, F16 and I2_S)."""

    def __init__(self, path: Path) -> None:
        self.bytes = path.read_bytes()
        self.at = 8  # magic and version
        n_tensors, n_values = self._take("<QQ")
        self.metadata = {self._text(): self._value(self._take("<I")[0]) for _ in range(n_values)}
        self.infos = {}
        for _ in range(n_tensors):
            name, (n_dims,) = self._text(), self._take("<I")
            self.infos[name] = (self._take(f"<{n_dims}Q")[::-1], *self._take("<IQ"))
        alignment = self.metadata.get("general.alignment", 32)
        self.data = -(-self.at // alignment) * alignment

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.bytes, self.at)
        self.at += struct.calcsize(form)
        return values

    def _text(self) -> str:
        (size,) = self._take("<Q")
        self.at += size
        return self.bytes[self.at - size : self.at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            of, count = self._take("<IQ")
            return [self._value(of) for _ in range(count)]
        return self._take("<" + "BbHhIif?__QqdS"[kind])[0]

    def tensor(self, name: str) -> Array:
        """Return a tensor as float32 ``shape``; a ternary one as -1, 0 and +1 times its scale."""
        shape, kind, offset = self.infos[name]
        start, count = self.data + offset, int(np.prod(shape))
        if kind == 0:
            return np.frombuffer(self.bytes, "<f4", count, start).reshape(shape)
        if kind == 1:
            return np.frombuffer(self.bytes, "<f2", count, start).astype(F32).reshape(shape)
        packed = np.frombuffer(self.bytes, np.uint8, count // 4, start).reshape(-1, 1, BLOCK // 4)
        # a block of 128 weights is 32 bytes: byte j holds weights j, j + 32, j + 64, j + 96, high bits first
        codes = packed >> np.array([6, 4, 2, 0], np.uint8)[None, :, None] & 3
        (scale,) = struct.unpack_from("<f", self.bytes, start + count // 4)
        return (codes.astype(F32) - 1).reshape(shape) * F32(scale)


class Engine:
    """The model and its KV cache; ``forward`` processes the next tokens."""

    def __init__(self, file: File, mistake: str | None = None, layer: int = 0) -> None:
        arch = file.metadata["general.architecture"]

        def number(key: str) -> Any:
            return file.metadata[f"{arch}.{key}"]

        self.file, self.mistake, self.broken_layer = file, mistake, layer
        self.n_layers, self.dim = number("block_count"), number("embedding_length")
        self.n_heads, self.n_kv_heads = number("attention.head_count"), number("attention.head_count_kv")
        self.hidden_dim, self.head_dim = number("feed_forward_length"), self.dim // self.n_heads
        self.eps, self.base = number("attention.layer_norm_rms_epsilon"), number("rope.freq_base")
        self.embedding = file.tensor("token_embd.weight")
        self.keys: list[Array] = [np.empty((0, self.n_kv_heads, self.head_dim), F32)] * self.n_layers
        self.values = list(self.keys)

    def forward(self, tokens: list[int]) -> dict[str, Array]:
        """Return every tap; those of the LM head for the last token only."""
        self.taps: dict[str, Array] = {}
        x = self._tap("inp_embd", self.embedding[tokens])
        for layer in range(self.n_layers):
            x = self._tap("ffn_inp", x + self._attention(layer, x), layer)
            x = self._tap("l_out", x + self._feed_forward(layer, x), layer)
        normed = self._tap("result_norm", self._norm("output_norm", x[-1:]))
        self._tap("result_output", normed @ self.embedding.T)
        return self.taps

    def _tap(self, name: str, value: Array, layer: int | None = None) -> Array:
        self.taps[name if layer is None else f"blk.{layer}.{name}"] = value
        return value

    def _is(self, layer: int, mistake: str) -> bool:
        return self.mistake == mistake and layer == self.broken_layer

    def _norm(self, name: str, x: Array) -> Array:
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + F32(self.eps))
        normed: Array = x / root * self.file.tensor(f"{name}.weight")
        return normed

    def _linear(self, layer: int, name: str, x: Array) -> Array:
        """Multiply by a ternary matrix, with the input quantised to 8 bits: its largest magnitude becomes 127."""
        scale = F32(127) / np.maximum(np.abs(x).max(axis=-1, keepdims=True), F32(1e-5))
        codes = np.trunc(x * scale) if self._is(layer, "truncating-quantiser") else np.rint(x * scale)
        product: Array = codes @ self.file.tensor(f"blk.{layer}.{name}.weight").T / scale
        return product

    def _rope(self, layer: int, x: Array, start: int) -> Array:
        half = self.head_dim // 2
        angles = (start + np.arange(len(x)))[:, None] * float(self.base) ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None].astype(F32), np.sin(angles)[:, None].astype(F32)
        if self._is(layer, "interleaved-rope"):
            a, b = x[..., ::2], x[..., 1::2]
            pairs = np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
            return pairs.reshape(x.shape)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def _attention(self, layer: int, x: Array) -> Array:
        start, n = len(self.keys[layer]), len(x)
        normed = self._tap("attn_norm", self._norm(f"blk.{layer}.attn_norm", x), layer)
        q, k, v = (
            self._tap(part, self._linear(layer, f"attn_{part}", normed).reshape(n, -1, self.head_dim), layer)
            for part in ("q", "k", "v")
        )
        q, k = (
            self._tap(f"{part}_rope", self._rope(layer, rows, start), layer) for part, rows in (("q", q), ("k", k))
        )
        self.keys[layer] = np.concatenate([self.keys[layer], k])
        self.values[layer] = np.concatenate([self.values[layer], v])
        groups = np.repeat(np.arange(self.n_kv_heads), self.n_heads // self.n_kv_heads)
        if self._is(layer, "swapped-kv-heads"):
            groups = groups[::-1]
        keys, values = self.keys[layer][:, groups], self.values[layer][:, groups]
        scores = self._tap("kq", np.einsum("qhd,khd->hqk", q, keys), layer) / F32(np.sqrt(self.head_dim))
        hidden = np.arange(len(keys))[None, :] > start + np.arange(n)[:, None]
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = self._tap("kq_soft_max", weights / weights.sum(axis=-1, keepdims=True), layer)
        joined = np.einsum("hqk,khd->qhd", weights, values).reshape(n, self.dim)
        joined = self._tap("kqv_out", joined, layer)
        if not self._is(layer, "no-attn-sub-norm"):
            joined = self._norm(f"blk.{layer}.attn_sub_norm", joined)
        self._tap("attn_sub_norm", joined, layer)
        return self._tap("attn_o_out", self._linear(layer, "attn_output", joined), layer)

    def _feed_forward(self, layer: int, x: Array) -> Array:
        normed = self._tap("ffn_norm", self._norm(f"blk.{layer}.ffn_norm", x), layer)
        gate, up = (
            self._tap(f"ffn_{part}", self._linear(layer, f"ffn_{part}", normed), layer) for part in ("gate", "up")
        )
        act = gate / (1 + np.exp(-gate)) if self._is(layer, "silu") else np.maximum(gate, 0) ** 2
        out = self._tap("ffn_out", self._tap("ffn_act", act, layer) * up, layer)
        if not self._is(layer, "no-ffn-sub-norm"):
            out = self._norm(f"blk.{layer}.ffn_sub_norm", out)
        self._tap("ffn_sub_norm", out, layer)
        return self._tap("ffn_down", self._linear(layer, "ffn_down", out), layer)


def write_pass(out: Path, index: int, start: int, tokens: list[int], taps: dict[str, Array]) -> dict[str, Any]:
    """Write one pass file (safetensors) and return its entry of ``trace.json``."""
    header, data, entries = {}, b"", []
    for name, tap in taps.items():
        raw = np.ascontiguousarray(tap, "<f4").tobytes()
        header[f"p{index}.{name}"] = {
            "dtype": "F32", "shape": tap.shape, "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
        entry: dict[str, Any] = {"name": name, "dtype": "F32", "shape": tap.shape}
        if name.startswith("result_"):
            entry["rows"] = [len(tokens) - 1]
        entries.append(entry)
    text = json.dumps(header).encode()
    blob = struct.pack("<Q", len(text)) + text + data
    file = f"pass-{index:04}.safetensors"
    (out / file).write_bytes(blob)
    kind = "decode" if start and len(tokens) == 1 else "prefill"
    facts = {"kind": kind, "start": start, "token_ids": tokens, "file": file}
    return {**facts, "sha256": hashlib.sha256(blob).hexdigest(), "taps": entries}


def main(arguments: list[str]) -> None:
    """Run a prompt and a few greedy tokens, and write the trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", required=True, help="prompt as token ids: 1019,16,11")
    parser.add_argument("--out", type=Path, required=True, help="directory of the trace; must not exist")
    parser.add_argument("--decode", type=int, default=4, help="greedy tokens after the prompt")
    parser.add_argument("--taps", choices=tuple(RECORDED), default="outline", help="what to record")
    parser.add_argument("--mistake", choices=MISTAKES)
    parser.add_argument("--layer", type=int, default=0, help="layer with the mistake")
    asked = parser.parse_args(arguments)

    file, prompt = File(asked.model), [int(token) for token in asked.tokens.split(",")]
    engine = Engine(file, asked.mistake, asked.layer)
    asked.out.mkdir(parents=True)
    passes, tokens, start = [], prompt, 0
    for index in range(1 + asked.decode):
        taps = engine.forward(tokens)
        taps = {name: tap for name, tap in taps.items() if name.endswith(RECORDED[asked.taps])}
        passes.append(write_pass(asked.out, index, start, tokens, taps))
        start, tokens = start + len(tokens), [int(taps["result_output"][-1].argmax())]
    model = {
        "sha256": hashlib.sha256(file.bytes).hexdigest(),
        "n_layers": engine.n_layers, "n_heads": engine.n_heads, "n_kv_heads": engine.n_kv_heads,
        "head_dim": engine.head_dim, "dim": engine.dim, "hidden_dim": engine.hidden_dim,
        "vocab_size": len(engine.embedding),
    }  # fmt: skip
    trace = {
        "format": "crossval-trace", "format_version": 1, "engine": {"name": "third engine"},
        "model": model, "prompt": {"token_ids": prompt}, "passes": passes,
    }  # fmt: skip
    (asked.out / "trace.json").write_text(json.dumps(trace), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
