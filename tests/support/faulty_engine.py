"""The NumPy engine of ``examples/`` with more ways to be wrong, its traces held in memory.

It shares no code with the harness: what a mistake is here is written once more, from the model's definition.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from crossval.passes import EngineIdentity, PassPlan, PassRecord, TapArray

ROOT = Path(__file__).parents[2]
F32 = np.float32


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("third_engine", ROOT / "examples" / "third_engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = _example()

FAULTS = {
    "no attention sub-norm": "attn_sub_norm",
    "no feed-forward sub-norm": "ffn_sub_norm",
    "SiLU": "ffn_act",
    "gate and up swapped": "ffn_out",
    "RoPE base 10000": "q_rope",
    "no score scale": "kq_soft_max",
    "four codes in a row": "q",
    "LayerNorm": "attn_norm",
    "another norm's weight": "attn_norm",
    "mask sees the next": "kq_soft_max",
    "128 levels": "q",
    "float activations": "q",
    "truncation": "q",
    "no attention residual": "ffn_inp",
    "no feed-forward residual": "l_out",
}
"""What can be wrong, and the first operation in which it is."""


class FaultyEngine(EXAMPLE.Engine):  # type: ignore[name-defined,misc]
    """The example's engine, wrong in some layers (all unless given)."""

    def __init__(self, file, fault: str | None = None, layers: Collection[int] | None = None) -> None:
        super().__init__(file)
        assert fault is None or fault in FAULTS, fault
        self.fault, self.faulty_layers = fault, layers
        self._tensors: dict[str, np.ndarray] = {}
        self._held = file.tensor
        self.file = self

    def tensor(self, name: str) -> np.ndarray:
        """Keep decoded tensors: each is read in every pass."""
        if name not in self._tensors:
            self._tensors[name] = self._held(name)
        return self._tensors[name]

    def _wrong(self, layer: int, fault: str) -> bool:
        return self.fault == fault and (self.faulty_layers is None or layer in self.faulty_layers)

    def _norm(self, name: str, x):
        layer = int(name.split(".")[1]) if name.startswith("blk.") else self.n_layers
        if name.endswith("attn_norm") and self._wrong(layer, "another norm's weight"):
            name = name.replace("attn_norm", "ffn_norm")
        if name.endswith("attn_sub_norm") and self._wrong(layer, "no attention sub-norm"):
            return x
        if name.endswith("ffn_sub_norm") and self._wrong(layer, "no feed-forward sub-norm"):
            return x
        if self._wrong(layer, "LayerNorm"):
            x = x - x.mean(axis=-1, keepdims=True)
        return super()._norm(name, x)

    def _linear(self, layer: int, name: str, x):
        if self._wrong(layer, "gate and up swapped") and name in ("ffn_gate", "ffn_up"):
            name = "ffn_up" if name == "ffn_gate" else "ffn_gate"
        weight = self.tensor(f"blk.{layer}.{name}.weight")
        if self._wrong(layer, "four codes in a row"):
            scale = np.abs(weight).max()
            codes = np.rint(weight / scale).astype(np.int64).reshape(-1, 4, 32) + 1
            stored = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
            read = np.stack([stored >> shift & 3 for shift in (6, 4, 2, 0)], axis=-1)
            weight = ((read - 1) * scale).astype(F32).reshape(weight.shape)
        if self._wrong(layer, "float activations"):
            return x @ weight.T
        levels = F32(128 if self._wrong(layer, "128 levels") else 127)
        scale = levels / np.maximum(np.abs(x).max(axis=-1, keepdims=True), F32(1e-5))
        rounded = np.trunc(x * scale) if self._wrong(layer, "truncation") else np.rint(x * scale)
        return np.minimum(rounded, F32(127)) @ weight.T / scale

    def _rope(self, layer: int, x, start: int):
        right = self.base
        if self._wrong(layer, "RoPE base 10000"):
            self.base = 10000.0
        turned = super()._rope(layer, x, start)
        self.base = right
        return turned

    def forward(self, tokens):
        self.taps = {}
        x = self._tap("inp_embd", self.embedding[tokens])
        for layer in range(self.n_layers):
            branch = self._attention(layer, x)
            x = self._tap("ffn_inp", branch if self._wrong(layer, "no attention residual") else x + branch, layer)
            branch = self._feed_forward(layer, x)
            x = self._tap("l_out", branch if self._wrong(layer, "no feed-forward residual") else x + branch, layer)
        normed = self._tap("result_norm", self._norm("output_norm", x[-1:]))
        self._tap("result_output", normed @ self.embedding.T)
        return self.taps

    def _attention(self, layer: int, x):
        start, n = len(self.keys[layer]), len(x)
        normed = self._tap("attn_norm", self._norm(f"blk.{layer}.attn_norm", x), layer)
        q, k, v = (
            self._tap(part, self._linear(layer, f"attn_{part}", normed).reshape(n, -1, self.head_dim), layer)
            for part in ("q", "k", "v")
        )
        q = self._tap("q_rope", self._rope(layer, q, start), layer)
        k = self._tap("k_rope", self._rope(layer, k, start), layer)
        self.keys[layer] = np.concatenate([self.keys[layer], k])
        self.values[layer] = np.concatenate([self.values[layer], v])
        groups = np.repeat(np.arange(self.n_kv_heads), self.n_heads // self.n_kv_heads)
        keys, values = self.keys[layer][:, groups], self.values[layer][:, groups]
        scores = self._tap("kq", np.einsum("qhd,khd->hqk", q, keys), layer)
        if not self._wrong(layer, "no score scale"):
            scores = scores / F32(np.sqrt(self.head_dim))
        ahead = self._wrong(layer, "mask sees the next")
        hidden = np.arange(len(keys))[None, :] > start + np.arange(n)[:, None] + ahead
        scores = np.where(hidden, F32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = self._tap("kq_soft_max", weights / weights.sum(axis=-1, keepdims=True), layer)
        joined = np.einsum("hqk,khd->qhd", weights, values).reshape(n, self.dim)
        joined = self._tap("kqv_out", joined, layer)
        joined = self._tap("attn_sub_norm", self._norm(f"blk.{layer}.attn_sub_norm", joined), layer)
        return self._tap("attn_o_out", self._linear(layer, "attn_output", joined), layer)

    def _feed_forward(self, layer: int, x):
        normed = self._tap("ffn_norm", self._norm(f"blk.{layer}.ffn_norm", x), layer)
        gate = self._tap("ffn_gate", self._linear(layer, "ffn_gate", normed), layer)
        up = self._tap("ffn_up", self._linear(layer, "ffn_up", normed), layer)
        act = gate / (1 + np.exp(-gate)) if self._wrong(layer, "SiLU") else np.maximum(gate, 0) ** 2
        out = self._tap("ffn_out", self._tap("ffn_act", act, layer) * up, layer)
        out = self._tap("ffn_sub_norm", self._norm(f"blk.{layer}.ffn_sub_norm", out), layer)
        return self._tap("ffn_down", self._linear(layer, "ffn_down", out), layer)


class FaultyRunner:
    """A faulty engine that gives only some taps."""

    status = "live"
    plan = None
    identity = EngineIdentity("third engine")

    def __init__(
        self,
        model: Path,
        fault: str | None = None,
        layers: Collection[int] | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        self._make = lambda: FaultyEngine(EXAMPLE.File(model), fault, layers)

        self._only = only
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self._engine = self._make()
        self._start = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run the next tokens."""
        kind = "decode" if len(token_ids) == 1 and self._start > 0 else "prefill"
        plan = PassPlan(kind, tuple(token_ids), self._start)
        with np.errstate(all="ignore"):
            found = self._engine.forward(list(token_ids))
        self._start += len(token_ids)
        last = (len(token_ids) - 1,)
        return PassRecord(
            plan,
            {
                name: TapArray(np.ascontiguousarray(tap, F32), last if name.startswith("result") else None)
                for name, tap in found.items()
                if name in select and (self._only is None or name in self._only)
            },
        )

    def tokenize(self, text: str, **options: bool) -> list[int]:
        """Refuse: it has no tokenizer."""
        raise NotImplementedError

    def __enter__(self) -> FaultyRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
