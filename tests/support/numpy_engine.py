"""A small deterministic transformer-shaped engine in NumPy, with faults to inject; a stand-in for real engines."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Literal

import numpy as np

from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray, pass_kind
from crossval.traces.read import TraceModel

MODEL = TraceModel(
    sha256="ab" * 32,
    n_layers=3,
    n_heads=2,
    n_kv_heads=1,
    head_dim=4,
    dim=8,
    hidden_dim=12,
    vocab_size=40,
    file_name="numpy.gguf",
    architecture="numpy",
)

CONFIG = SpecConfig(
    3, 2, 1, head_dim=4, dim=8, hidden_dim=12, vocab_size=40, context_length=64, rope_base=1e4, rms_eps=1e-5
)
"""The same shape, for code that needs the sizes of tensors."""

Fault = Callable[[str, np.ndarray, PassPlan], np.ndarray]
"""Called with every tap as it is computed; the engine continues with what it returns."""


def fault(
    tap: str, change: Callable[[np.ndarray], np.ndarray], kind: str | None = None, token: int | None = None
) -> Fault:
    """Return a fault at one tap, optionally of one kind of pass, or of one token (position in the sequence)."""

    def apply(name: str, array: np.ndarray, plan: PassPlan) -> np.ndarray:
        if name != tap or (kind is not None and plan.kind != kind):
            return array
        if token is None:
            return change(array)
        if token not in plan.positions:
            return array
        array = array.copy()
        row = plan.positions.index(token)
        array[row] = change(array[row])
        return array

    return apply


class NumpyRunner:
    """Every tap of the vocabulary, float32, no int8; attention over a cache, as real engines have."""

    status: Literal["live", "recorded"] = "live"
    plan: tuple[PassPlan, ...] | None = None

    def __init__(
        self,
        fault: Fault | None = None,
        *,
        lacks: Collection[str] = (),
        last_rows: bool = False,
        simd_width: int | None = 8,
        name: str = "numpy",
        sub_norms: bool = True,
        reshape: dict[str, tuple[int, ...]] | None = None,
        seed: int = 7,
    ) -> None:
        self.identity = EngineIdentity(name, numerics=Numerics(simd_width, None if simd_width is None else False))
        self._fault = fault
        self._lacks = frozenset(lacks)
        self._last_rows = last_rows
        self._sub_norms = sub_norms
        self._reshape = reshape or {}
        self._seed = seed
        self.evals: list[tuple[tuple[int, ...], frozenset[str]]] = []
        self._sequence: list[int] = []
        self._cache: dict[str, list[np.ndarray]] = {}

    def weight(self, name: str, *shape: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        return [1, *(byte % MODEL.vocab_size for byte in text.encode())]

    def reset(self) -> None:
        self._sequence, self._cache = [], {}

    def __enter__(self) -> NumpyRunner:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        start = len(self._sequence)
        plan = PassPlan(pass_kind(len(token_ids), start), tuple(token_ids), start)
        self.evals.append((plan.token_ids, frozenset(select)))
        self._sequence += token_ids
        with np.errstate(invalid="ignore", over="ignore"):  # injected infinities travel on
            computed = self._forward(plan)
        kept = {}
        for name, array in computed.items():
            if name not in select or name in self._lacks:
                continue
            rows = None
            gathered = taps.parse(name).layer == MODEL.n_layers - 1 and taps.LAYER_TAPS.index(
                taps.parse(name).tap
            ) >= taps.LAYER_TAPS.index("ffn_inp")
            if name == "result_output" or (self._last_rows and (gathered or name == "result_norm")):
                array, rows = array[-1:], (len(token_ids) - 1,)
            if name in self._reshape:
                array = array.reshape(self._reshape[name])
            kept[name] = TapArray(np.ascontiguousarray(array, dtype=np.float32), rows)
        return PassRecord(plan, kept, 0.001)

    def _forward(self, plan: PassPlan) -> dict[str, np.ndarray]:
        m, out = MODEL, {}

        def put(name: str, array: np.ndarray) -> np.ndarray:
            array = array.astype(np.float32)
            if self._fault is not None:
                array = self._fault(name, array, plan)
            out[name] = array
            return array

        n = len(plan.token_ids)
        positions = np.asarray(plan.positions)
        x = put("inp_embd", self.weight("embd", m.vocab_size, m.dim)[list(plan.token_ids)])
        for layer in range(m.n_layers):
            b = f"blk.{layer}."

            def matmul(name: str, a: np.ndarray, rows: int, b: str = b) -> np.ndarray:
                return a @ self.weight(b + name, rows, a.shape[-1]).T

            h = put(b + "attn_norm", _norm(x))
            q = put(b + "q", matmul("q", h, m.n_heads * m.head_dim).reshape(n, m.n_heads, m.head_dim))
            k = put(b + "k", matmul("k", h, m.n_kv_heads * m.head_dim).reshape(n, m.n_kv_heads, m.head_dim))
            v = put(b + "v", matmul("v", h, m.n_kv_heads * m.head_dim).reshape(n, m.n_kv_heads, m.head_dim))
            turn = np.cos(positions * 0.1)[:, None, None] + 1.5
            q, k = put(b + "q_rope", q * turn), put(b + "k_rope", k * turn)
            self._cache.setdefault(b + "k", []).extend(k)
            self._cache.setdefault(b + "v", []).extend(v)
            keys, values = np.stack(self._cache[b + "k"])[:, 0], np.stack(self._cache[b + "v"])[:, 0]
            kq = put(b + "kq", np.einsum("thd,kd->htk", q, keys))
            mask = np.arange(len(keys))[None, :] <= positions[:, None]
            weights = np.where(mask, np.exp(np.where(mask, kq / 2, 0)), 0)
            p = put(b + "kq_soft_max", weights / weights.sum(-1, keepdims=True))
            o = put(b + "kqv_out", np.einsum("htk,kd->thd", p, values).reshape(n, -1))
            if self._sub_norms:
                o = put(b + "attn_sub_norm", _norm(o))
            o = put(b + "attn_o_out", matmul("o", o, m.dim))
            x = put(b + "ffn_inp", x + o)
            h = put(b + "ffn_norm", _norm(x))
            gate = put(b + "ffn_gate", matmul("gate", h, m.hidden_dim))
            up = put(b + "ffn_up", matmul("up", h, m.hidden_dim))
            act = put(b + "ffn_act", np.maximum(gate, 0) ** 2)
            f = put(b + "ffn_out", act * up)
            if self._sub_norms:
                f = put(b + "ffn_sub_norm", _norm(f))
            f = put(b + "ffn_down", matmul("down", f, m.dim))
            x = put(b + "l_out", x + f)
        h = put("result_norm", _norm(x))
        put("result_output", h @ self.weight("head", m.vocab_size, m.dim).T)
        return out


def _norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-5)
