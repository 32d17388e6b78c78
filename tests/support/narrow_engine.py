"""An engine in NumPy that computes in bfloat16, binary16 or binary32, right or wrong on purpose.

Every elementwise step is rounded to its format, sums are carried in binary32 and rounded once, weights are held in
the format: what NumPy's own float16 does, and PyTorch's bfloat16. It shares the reader of model files with
``examples/third_engine.py`` and no code with the harness but the writer of traces.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray
from crossval.traces.read import TraceModel
from crossval.traces.write import TraceWriter

Array = npt.NDArray[np.float32]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_engine.py"


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("third_engine", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_file(path: Path) -> Any:
    """Return a model file opened by the example's reader."""
    return _example().File(path)


def _f32(x: npt.ArrayLike) -> Array:
    return np.asarray(x, np.float32)


def _f16(x: npt.ArrayLike) -> Array:
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def _bf16(x: npt.ArrayLike) -> Array:
    wide = np.array(x, np.float32)
    finite = np.isfinite(wide)
    step = np.ldexp(1.0, np.maximum(np.frexp(np.where(finite, wide, 1))[1] - 8, -133))
    return np.where(finite, np.rint(wide / step) * step, wide).astype(np.float32)


ROUND: dict[str, Callable[[npt.ArrayLike], Array]] = {"f32": _f32, "f16": _f16, "bf16": _bf16}


@dataclass(frozen=True)
class Style:
    """How an engine of this format does what formats leave open."""

    compute: str = "bf16"
    kv: str | None = None
    scale: str = "wide"
    """Of the quantiser: ``wide`` (binary32), ``narrow`` (scale and scaled values in the format), ``fake``
    (activations dequantised into the format before they are multiplied)."""
    norm: str = "wide"
    """Statistics of norms and exponentials in binary32 (``wide``), or every step in the format (``narrow``)."""
    states: bool = False
    """Whether its traces state the formats."""


@dataclass(frozen=True)
class Mistake:
    """``name`` in layer ``layer``; None: in all."""

    name: str
    layer: int | None = 2

    def at(self, layer: int, name: str) -> bool:
        return self.name == name and self.layer in (None, layer)


class NarrowEngine:
    """A live runner."""

    status = "live"
    plan = None

    def __init__(self, model: Path, style: Style, mistake: Mistake | None = None) -> None:
        self.file = of_file(model)
        self.style, self.mistake = style, mistake
        arch = self.file.metadata["general.architecture"]

        def number(key: str) -> float:
            value: float = self.file.metadata[f"{arch}.{key}"]
            return value

        self.n_layers, self.n_heads = int(number("block_count")), int(number("attention.head_count"))
        self.n_kv_heads, self.dim = int(number("attention.head_count_kv")), int(number("embedding_length"))
        self.hidden_dim, self.head_dim = int(number("feed_forward_length")), self.dim // self.n_heads
        self.eps, self.base = number("attention.layer_norm_rms_epsilon"), number("rope.freq_base")
        self.round = ROUND[style.compute]
        self.stored = ROUND[style.kv or style.compute]
        self.inside = self.round if style.norm == "narrow" else _f32
        self.embedding = self.round(self.file.tensor("token_embd.weight"))
        self.reset()

    @property
    def identity(self) -> EngineIdentity:
        stated = Numerics(compute_dtype=self.style.compute, kv_dtype=self.style.kv)  # type: ignore[arg-type]
        return EngineIdentity("narrow engine", numerics=stated if self.style.states else Numerics())

    def __enter__(self) -> NarrowEngine:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        raise NotImplementedError

    def reset(self) -> None:
        self.n_past = 0
        empty = np.empty((0, self.n_kv_heads, self.head_dim), np.float32)
        self.keys, self.values = [empty] * self.n_layers, [empty] * self.n_layers

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        start, n = self.n_past, len(token_ids)
        plan = PassPlan("decode" if start and n == 1 else "prefill", tuple(token_ids), start)
        self.n_past += n
        with np.errstate(all="ignore"):
            found = self._forward(list(token_ids), start)
        rows = {"result_norm": (n - 1,), "result_output": (n - 1,)}
        given = {
            name: TapArray(np.ascontiguousarray(found[name]), rows.get(name)) for name in found if name in select
        }
        return PassRecord(plan, given)

    # --- the model --------------------------------------------------------------------------------------------

    def _is(self, layer: int, name: str) -> bool:
        return self.mistake is not None and self.mistake.at(layer, name)

    def _forward(self, tokens: list[int], start: int) -> dict[str, Array]:
        taps: dict[str, Array] = {}
        self._taps = taps
        x = taps["inp_embd"] = self.embedding[tokens]
        for layer in range(self.n_layers):
            x = self._put(layer, "ffn_inp", self.round(x + self._attention(layer, x, start)))
            x = self._put(layer, "l_out", self.round(x + self._feed_forward(layer, x)))
        taps["result_norm"] = self._norm("output_norm", x[-1:], self.eps)
        taps["result_output"] = self.round(taps["result_norm"] @ self.embedding.T)
        return taps

    def _put(self, layer: int, name: str, value: Array) -> Array:
        self._taps[f"blk.{layer}.{name}"] = value
        return value

    def _norm(self, name: str, x: Array, eps: float) -> Array:
        inside, weight = self.inside, self.round(self.file.tensor(f"{name}.weight"))
        mean = inside(inside(x * x).mean(axis=-1, keepdims=True, dtype=np.float32))
        root = inside(np.sqrt(inside(mean + inside(eps))))
        return self.round(self.round(x / root) * weight)

    def _linear(self, layer: int, name: str, x: Array, levels: float = 127.0) -> Array:
        signs = self.file.tensor(f"blk.{layer}.{name}.weight")
        wide_scale = np.float32(np.abs(signs).max())
        signs, narrow = np.sign(signs), self.style.scale == "narrow"
        step = self.round if narrow else _f32
        scale = step(np.float32(levels) / np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-5)))
        codes = np.clip(np.rint(step(x * scale)), -128, 127)
        if self._is(layer, f"truncation {name}"):
            codes = np.trunc(step(x * scale))
        if self.style.scale == "fake":
            return self.round(self.round(self.round(codes / scale) @ signs.T) * self.round(wide_scale))
        if narrow:
            return self.round(self.round(self.round(codes @ signs.T) / scale) * self.round(wide_scale))
        return self.round(codes @ signs.T * (wide_scale / scale))

    def _rope(self, x: Array, start: int) -> Array:
        half = self.head_dim // 2
        angles = (start + np.arange(len(x)))[:, None] * float(self.base) ** (-np.arange(half) / half)
        cos, sin = self.inside(np.cos(angles))[:, None], self.inside(np.sin(angles))[:, None]
        a, b, r = x[..., :half], x[..., half:], self.inside
        return self.round(np.concatenate([r(a * cos) - r(b * sin), r(a * sin) + r(b * cos)], axis=-1))

    def _attention(self, layer: int, x: Array, start: int) -> Array:
        n = len(x)
        normed = self._put(layer, "attn_norm", self._named(layer, "attn_norm", x))
        parts = {}
        for part in ("q", "k", "v"):
            levels = 128.0 if self._is(layer, "128 levels") else 127.0
            rows = self._linear(layer, f"attn_{part}", normed, levels).reshape(n, -1, self.head_dim)
            parts[part] = self._put(layer, part, rows)
        q = self._put(layer, "q_rope", self._rope(parts["q"], start))
        k = self._put(layer, "k_rope", self._rope(parts["k"], start))
        self.keys[layer] = np.concatenate([self.keys[layer], self.stored(k)])
        self.values[layer] = np.concatenate([self.values[layer], self.stored(parts["v"])])
        groups = np.repeat(np.arange(self.n_kv_heads), self.n_heads // self.n_kv_heads)
        keys, values = self.keys[layer][:, groups], self.values[layer][:, groups]
        scores = np.einsum("qhd,khd->hqk", q, keys)
        if self._is(layer, "kq nudged"):
            scores[1, :, 0] *= np.float32(1.01)
        scores = self._put(layer, "kq", self.round(scores))
        scale = np.sqrt(2 / self.head_dim) if self._is(layer, "kq scale") else 1 / np.sqrt(self.head_dim)
        r = self.inside
        scaled = r(scores * r(scale))
        scaled[:, np.arange(len(keys))[None, :] > start + np.arange(n)[:, None]] = -np.inf
        weights = r(np.exp(r(scaled - scaled.max(axis=-1, keepdims=True))))
        weights = self._put(layer, "kq_soft_max", self.round(weights / r(weights.sum(axis=-1, keepdims=True))))
        joined = self.round(np.einsum("hqk,khd->qhd", weights, values).reshape(n, self.dim))
        joined = self._put(layer, "kqv_out", joined)
        joined = self._put(layer, "attn_sub_norm", self._named(layer, "attn_sub_norm", joined))
        return self._put(layer, "attn_o_out", self._linear(layer, "attn_output", joined))

    def _named(self, layer: int, name: str, x: Array) -> Array:
        """Norm with the weight of that name, unless that is where the mistake is."""
        if self._is(layer, f"{name} skipped"):
            return x
        eps = self.eps * 1000 if self._is(layer, f"{name} eps") else self.eps
        other = {"ffn_norm": "attn_norm", "attn_norm": "ffn_norm"}.get(name, name)
        weight = other if self._is(layer, f"{name} of another") else name
        return self._norm(f"blk.{layer}.{weight}", x, eps)

    def _feed_forward(self, layer: int, x: Array) -> Array:
        normed = self._put(layer, "ffn_norm", self._named(layer, "ffn_norm", x))
        gate, up = (self._put(layer, f"ffn_{p}", self._linear(layer, f"ffn_{p}", normed)) for p in ("gate", "up"))
        act = gate / (1 + np.exp(-gate)) if self._is(layer, "SiLU") else np.maximum(gate, 0) ** 2
        act = self._put(layer, "ffn_act", self.round(act))
        out = self._put(layer, "ffn_out", self.round(act * up))
        out = self._put(layer, "ffn_sub_norm", self._named(layer, "ffn_sub_norm", out))
        return self._put(layer, "ffn_down", self._linear(layer, "ffn_down", out))


def plans(prompt: Sequence[int], decoded: Sequence[int]) -> list[PassPlan]:
    """Return the passes of a prompt and tokens decoded after it."""
    found = [PassPlan("prefill", tuple(prompt), 0)]
    return found + [PassPlan("decode", (token,), len(prompt) + i) for i, token in enumerate(decoded)]


def write_trace(
    engine: NarrowEngine, out: Path, passes: Sequence[PassPlan], *, text: str | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> Path:  # fmt: skip
    """Write what the engine computes in these passes as a trace."""
    model = TraceModel(
        sha256=hashlib.sha256(engine.file.bytes).hexdigest(),
        n_layers=engine.n_layers, n_heads=engine.n_heads, n_kv_heads=engine.n_kv_heads, head_dim=engine.head_dim,
        dim=engine.dim, hidden_dim=engine.hidden_dim, vocab_size=len(engine.embedding),
    )  # fmt: skip
    engine.reset()
    with TraceWriter(out, model) as writer:
        for plan in passes:
            everything = engine.eval(plan.token_ids, _Everything())
            writer.add_pass(replace(everything, taps={n: t for n, t in everything.taps.items() if keep(n)}))
        writer.finish(engine=engine.identity, prompt_ids=passes[0].token_ids, prompt_text=text)
    return out


class _Everything(Collection[str]):
    """Selects every tap."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(())

    def __len__(self) -> int:
        return 1
