"""The NumPy engine in bfloat16, binary16 or binary32: every elementwise step is rounded to the format.

Sums are carried in binary32 and rounded once, weights are held in the format: what NumPy's own float16 does, and
PyTorch's bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crossval.model import taps
from crossval.model.taps import all_taps
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray
from tests.support.numpy_bitnet import engine as numpy_bitnet
from tests.support.numpy_bitnet.engine import Call, Quantised, to_bf16, to_f16
from tests.support.numpy_bitnet.mistakes import MISTAKES, silu, skipped
from tests.support.numpy_bitnet.model import EXAMPLE, Matrix, Model
from tests.support.numpy_bitnet.runner import NumpyBitnetRunner
from tests.support.numpy_bitnet.styles import Array
from tests.zoo.recording import Recording

of_file = EXAMPLE.File
ROUND: dict[str, Callable[[Any], Array]] = {"f32": np.asarray, "f16": to_f16, "bf16": to_bf16}


@dataclass(frozen=True)
class Style:
    """Choices of an engine that its format leaves open."""

    compute: str = "bf16"
    kv: str | None = None
    scale: str = "wide"
    """Of the quantiser: ``wide`` (binary32), ``narrow`` (scale and scaled values in the format), ``fake``
    (activations dequantised into the format before they are multiplied)."""
    norm: str = "wide"
    """Statistics of norms and exponentials in binary32 (``wide``), or every step in the format (``narrow``)."""
    states: bool = False
    """Whether its traces state the formats."""
    activations: str = "int8"
    """``int8``, or ``none``: they are multiplied as they are."""
    weights: str = "packed"
    """``packed``, or the format of weights that are brought back to their size before they are multiplied."""
    stored: str = "f32"
    """What every tensor is rounded to when it is recorded, and stored in."""
    ops: tuple[tuple[str, str], ...] = ()
    """Operations, or kinds, that compute in another format; they round what they read to it first."""

    def format_of(self, op: str) -> str:
        """Return what an operation computes in."""
        own = dict(self.ops)
        return own.get(op, own.get(taps.OPS[op].kind_name, self.compute) if op in taps.OPS else self.compute)

    @property
    def numerics(self) -> Numerics:
        """What it states, if it does."""
        if not self.states:
            return Numerics()
        choice: dict[str, Any] = {"compute_dtype": self.compute, "kv_dtype": self.kv}
        if self.activations != "int8":
            choice["activation_quantization"] = self.activations
        if self.weights != "packed":
            choice["weights"] = self.weights
        if self.ops:
            choice["op_dtypes"] = self.ops
        return Numerics(**choice)


@dataclass(frozen=True)
class Mistake:
    """``name`` in layer ``layer``; None: in all."""

    name: str
    layer: int | None = 2

    def made(self) -> numpy_bitnet.Mistake:
        """Return it as the NumPy engine makes it: ``SiLU``, ``kq scale``, ``ffn_norm skipped`` and the like."""
        first, _, rest = self.name.partition(" ")
        whole = {
            "SiLU": (("ffn_act",), silu),
            "kq scale": (("kq_soft_max",), MISTAKES["KQ scale x sqrt 2"].code),
            "kq nudged": (("kq",), _nudged),
            "128 levels": (("q", "k", "v"), partial(_quantised, levels=128)),
            "truncation ffn_gate": (("ffn_gate",), partial(_quantised, rounding=np.trunc)),
        }
        of_a_norm = {"skipped": skipped, "eps": _eps, "of another": MISTAKES["another norm's weight"].code}
        ops, code = whole[self.name] if self.name in whole else ((first,), of_a_norm[rest])
        layers = None if self.layer is None else frozenset({self.layer})
        return numpy_bitnet.Mistake(self.name, ops, code, layers)


def _nudged(call: Call) -> Array:
    scores = call.right(*call.inputs)
    scores[1, :, 0] *= np.float32(1.01)
    return scores


def _eps(call: Call) -> Array:
    return call.right(*call.inputs, eps=1000 * call.engine.model.eps)


def _quantised(call: Call, **options: Any) -> Array:
    return call.right(*call.inputs, quantise=partial(call.engine.quantise, **options))


class _RoundedModel(Model):
    """A model whose weights are held in the format."""

    def __init__(self, path: Path, rounding: Callable[[Any], Array]) -> None:
        super().__init__(path)
        self._round, self._rounded = rounding, {}

    def vector(self, name: str) -> Array:
        if name not in self._rounded:
            self._rounded[name] = self._round(super().vector(name))
        return self._rounded[name]


@dataclass
class _Engine(numpy_bitnet.Engine):
    """The forward pass with its roundings."""

    narrow: Style = field(default_factory=Style)

    def __post_init__(self) -> None:
        self.round, self.stored = ROUND[self.narrow.compute], ROUND[self.narrow.kv or self.narrow.compute]
        self.inside = self.round if self.narrow.norm == "narrow" else ROUND["f32"]

    def _do(self, op: str, layer: int | None, right: Callable[..., Array], *inputs: Any) -> Array:
        if self.narrow.ops:
            self.round = read = ROUND[self.narrow.format_of(op)]
            self.inside = self.round if self.narrow.norm == "narrow" else ROUND["f32"]
            inputs = tuple(read(x) if np.asarray(x).dtype == np.float32 else x for x in inputs)
        return super()._do(op, layer, right, *inputs)

    def rounded(self, value: Array) -> Array:
        return self.round(value)

    def norm_of(self, name: str) -> Callable[..., Array]:
        def norm(x: Array, *, eps: float = self.model.eps, weight: Array | None = None) -> Array:
            r = self.inside
            mean = r(r(x * x).mean(axis=-1, keepdims=True, dtype=np.float32))
            root = r(np.sqrt(r(mean + r(np.float32(eps)))))
            return self.round(x / root) * (self.model.vector(name) if weight is None else weight)

        return norm

    def quantise(
        self, x: Array, *, levels: float = 127, rounding: Callable[[Array], Array] = np.rint
    ) -> Quantised:
        if self.narrow.activations == "none" and levels == 127 and rounding is np.rint:
            return x, np.ones((len(x), 1), x.dtype)
        step = self.round if self.narrow.scale == "narrow" else ROUND["f32"]
        scale = step(np.float32(levels) / np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-5)))
        return np.clip(rounding(step(x * scale)), -128, 127), scale

    def multiply_codes(self, codes: Array, scale: Array, m: Matrix) -> Array:
        r, weight_scale = self.round, np.float32(m.scale)
        if self.narrow.weights != "packed":
            return codes @ (ROUND[self.narrow.weights](m.signs * weight_scale)).T / scale
        match self.narrow.scale:
            case "fake":
                return r(r(codes / scale) @ m.signs.T) * r(weight_scale)
            case "narrow":
                return r(r(codes @ m.signs.T) / scale) * r(weight_scale)
            case _:
                return codes @ m.signs.T * (weight_scale / scale)

    def rope(self, x: Array, positions: np.ndarray, *, base: float | None = None, **_: object) -> Array:
        half, r = x.shape[-1] // 2, self.inside
        cos, sin = map(r, self._turns(positions, half, self.model.base if base is None else base, x.dtype))
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([r(a * cos) - r(b * sin), r(a * sin) + r(b * cos)], axis=-1)

    def store_k(self, old: Array, new: Array) -> Array:
        return np.concatenate([old, self.stored(new)])

    store_v = store_k

    def softmax(self, kq: Array, positions: np.ndarray, *, scale: float | None = None, ahead: int = 0) -> Array:
        r, seen = self.inside, np.arange(kq.shape[-1]) <= positions[:, None] + ahead
        scaled = r(kq * r(np.float32(1 / np.sqrt(self.model.head_dim) if scale is None else scale)))
        scaled = np.where(seen, scaled, np.float32(-np.inf))
        weights = r(np.exp(r(scaled - scaled.max(axis=-1, keepdims=True))))
        return weights / r(weights.sum(axis=-1, keepdims=True))


class NarrowEngine(NumpyBitnetRunner):
    """A live runner."""

    def __init__(
        self, path: Path, style: Style, mistake: Mistake | None = None, *, made: numpy_bitnet.Mistake | None = None
    ) -> None:
        """Compute in a style, with a mistake, or one that is made already."""
        self.style, self.mistake = style, mistake
        self.round, self.stored = ROUND[style.compute], ROUND[style.kv or style.compute]
        self.model = model = _RoundedModel(path, self.round)
        self.n_heads, self.n_kv_heads, self.head_dim = model.n_heads, model.n_kv_heads, model.head_dim
        mistakes = [mistake.made()] if mistake else [made] if made else []
        super().__init__(model, mistakes=mistakes)
        self.identity = EngineIdentity("narrow engine", numerics=style.numerics)
        self._new = lambda: _Engine(model, mistakes=mistakes, narrow=style)
        self.reset()

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run the next pass."""
        record, store = super().eval(token_ids, select), ROUND[self.style.stored]
        if self.style.stored == "f32":
            return record
        return replace(
            record,
            taps={
                name: TapArray(store(tap.array), tap.rows, self.style.stored)  # type: ignore[arg-type]
                for name, tap in record.taps.items()
            },
        )

    def _linear(self, layer: int, tensor: str, x: Array) -> Array:
        """Return a BitLinear of these activations, without a mistake."""
        return self.round(self._engine.bitlinear_of(f"blk.{layer}.{tensor}", tensor)(x))

    def record(self, passes: Sequence[PassPlan]) -> Recording:
        """Return every tap of these passes."""
        self.reset()
        names = all_taps(self.model.n_layers)
        return Recording(self.identity, [self.eval(plan.token_ids, names) for plan in passes])


def plans(prompt: Sequence[int], decoded: Sequence[int]) -> list[PassPlan]:
    """Return the passes of a prompt and tokens decoded after it."""
    found = [PassPlan("prefill", tuple(prompt), 0)]
    return found + [PassPlan("decode", (token,), len(prompt) + i) for i, token in enumerate(decoded)]
