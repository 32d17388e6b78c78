"""The input of a variant: one recorded operation, and matrix products with every step replaceable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from bitnet_py.tq import TQ_BLOCK
from crossval.audit.bounds import Arithmetic, blocks, floats
from crossval.audit.recorded_op import Array, Inapplicable, RecordedOp
from crossval.model.kinds import BitLinear, Head, IntArray, TernaryMatrix, widen
from crossval.passes import Numerics

__all__ = ["Array", "Context", "Inapplicable", "Quantizer", "head", "linear", "of_records"]

Quantizer = Literal["float64", "float32", "fused", "divide", "main", "blocks", "fused blocks", "none"]
"""How an engine gets from a float activation to its code (see ``scaled``); where blocks have steps of their own,
or nothing is quantised, what is multiplied with the weights stands for codes (``quantize``)."""
BLOCK_QUANTIZERS: Mapping[Quantizer, Arithmetic] = {
    "blocks": Arithmetic(Numerics(fused_quantizer=False, activation_quantization="q8_k"), n_heads=0),
    "fused blocks": Arithmetic(Numerics(fused_quantizer=True, activation_quantization="q8_k"), n_heads=0),
}
WITHOUT_CODES: tuple[Quantizer, ...] = (*BLOCK_QUANTIZERS, "none")
RowsOf = Callable[[TernaryMatrix, IntArray], Array]
"""Returns some rows of a matrix as an engine sees them: ``(features, cols)``."""
Product = Callable[[Array, Array], Array]
"""Multiplies codes ``(n_rows, cols)`` by rows of a matrix: ``(n_rows, features)``."""

CHUNK_FEATURES = 512
"""Output features of a matrix multiplied at a time; bounds memory."""


def quantizer_of(arithmetic: Arithmetic) -> Quantizer:
    """Return how an engine of binary32 gets from an activation to its code, as far as it states it."""
    if floats.is_float(arithmetic):
        return "none"
    if arithmetic.numerics.quantizer_block is not None:
        return "fused blocks" if arithmetic.numerics.fused_quantizer else "blocks"
    if arithmetic.is_main:
        return "main"
    return "fused" if arithmetic.numerics.fused_quantizer else "float32"


@dataclass
class Held:
    """Decoded matrices kept during one diagnosis: decoding costs more than multiplying a sample."""

    own: TernaryMatrix | None = None
    scales: dict[str, float] = field(default_factory=dict)
    cut: dict[tuple[str, bytes], TernaryMatrix] = field(default_factory=dict)
    """Sampled rows, by tensor name and selection."""


@dataclass(frozen=True)
class Context(RecordedOp):
    """A recorded operation to be diagnosed; of a matrix product, possibly only some output features."""

    quantizer: Quantizer = "float64"
    features: IntArray | None = None
    """Sampled output features (matrix products only); None: all."""
    held: Held = field(default_factory=Held)
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_linear(self) -> bool:
        """Whether the op multiplies by a ternary matrix."""
        return isinstance(self.op.kind, BitLinear)

    @property
    def is_flat(self) -> bool:
        """Whether outputs are ``(n_rows, features)`` cut to ``features``: every product with a weight matrix."""
        return isinstance(self.op.kind, BitLinear | Head)

    def flat(self, output: Array) -> Array:
        """Reshape a complete output, shaped as the tap, to the shape of ``target``."""
        if not self.is_flat:
            return output
        flat = output.reshape(output.shape[0], -1)
        return flat if self.features is None else flat[:, self.features]

    @cached_property
    def target(self) -> Array:
        """The recorded output in float64; of matrix products ``(n_rows, sampled features)``."""
        return self.flat(widen(self.recorded))

    @cached_property
    def expected(self) -> Array:
        """What the specification computes, shaped as ``target``."""
        if self.is_linear:
            return linear(self)
        return head(self) if self.is_flat else self.compute(*self.inputs)

    def by_token(self, output: Array) -> Array:
        """Return ``(n_rows, values)`` of an output shaped as ``target``; scores of later tokens are zeroed."""
        output = self.masked(output)
        if self.token_axis:
            output = np.moveaxis(output, self.token_axis, 0)
        return output.reshape(output.shape[0], -1)

    @cached_property
    def target_by_token(self) -> Array:
        """The recorded output, ``(n_rows, values)``."""
        return self.by_token(self.target)

    @cached_property
    def quantized(self) -> tuple[Array, Array]:
        """A BitLinear's input as integer codes (float32), and the scale of each token."""
        scale = input_scale(self, self.inputs[0])
        return quantize(self, self.inputs[0], scale), scale

    # --- weights and features ---------------------------------------------------------------------------------

    @property
    def vector(self) -> Array:
        """The op's own norm weight or table."""
        weight = self.weights[self.op.weights[0]]
        assert not isinstance(weight, TernaryMatrix)
        return weight

    def array(self, name: str) -> Array:
        """Return another norm weight or table of the model.

        Raises:
            Inapplicable: the model has none.
        """
        try:
            weight = self.weights[name]
        except KeyError:
            raise Inapplicable from None
        assert isinstance(weight, np.ndarray)
        return weight

    @property
    def matrix(self) -> TernaryMatrix:
        """The op's own ternary matrix."""
        if self.held.own is None:
            self.held.own = self._decoded(self.op.weights[0])
        return self.held.own

    @property
    def bias(self) -> Array | None:
        """The sampled values of the bias of a BitLinear; None: it has none."""
        if len(self.op.weights) < 2:
            return None
        bias = self.array(self.op.weights[1])
        return bias if self.features is None else bias[self.features]

    def other(self, name: str) -> TernaryMatrix:
        """Return the sampled rows of another ternary matrix, and its scale."""
        if self.features is None:
            return self._decoded(name)
        key = (name, self.features.tobytes())
        if key not in self.held.cut:
            matrix = self._decoded(name)
            self.held.cut[key] = replace(matrix, signs=matrix.signs[self.features])
        return self.held.cut[key]

    def scale_of(self, name: str) -> float:
        """Return the scale of another ternary matrix, without what ``.scale`` adds to it."""
        if name not in self.held.scales:
            self._decoded(name)
        return self.held.scales[name]

    def _decoded(self, name: str) -> TernaryMatrix:
        weight = self.weights[name]
        assert isinstance(weight, TernaryMatrix)
        self.held.scales[name] = weight.scale / weight.factor
        return weight

    @property
    def looked_at(self) -> IntArray:
        """Indices of the output features that ``target`` holds."""
        return np.arange(self.recorded[0].size) if self.features is None else self.features

    def feature_chunks(self, n_features: int) -> Iterator[IntArray]:
        """Yield the output features to compute, in blocks."""
        wanted = np.arange(n_features) if self.features is None else self.features
        for first in range(0, wanted.size, CHUNK_FEATURES):
            yield wanted[first : first + CHUNK_FEATURES]

    def once(self, key: str, compute: Callable[[Context], Any]) -> Any:
        """Return what ``compute`` returned at the first call with this key."""
        if key not in self._known:
            self._known[key] = compute(self)
        return self._known[key]

    # --- changes ----------------------------------------------------------------------------------------------

    def sampled(self, features: IntArray | None) -> Context:
        """Return the same operation restricted to some of its output features."""
        return replace(self, features=features)

    def of_tokens(self, kept: Array) -> Context:
        """Return the same matrix product for some of its tokens (flags, or indices into ``rows``)."""
        at = np.arange(self.n_rows)[kept]
        rows = tuple(self.rows[i] for i in at)
        return replace(self, rows=rows, raw=(self.raw[0][at], *self.raw[1:]), recorded=self.recorded[at])


of_records = Context.of_records

# --- BitLinear and the LM head with every step replaceable ----------------------------------------------------


def peak(x: Array) -> Array:
    """Return the largest magnitude of each row, ``(n_rows, 1)``."""
    return np.max(np.abs(x), axis=-1, keepdims=True)


def input_scale(context: Context, x: Array, *, largest: Array | None = None, levels: float = 127.0) -> Array:
    """Return what activations are multiplied by: ``levels / max(largest, 1e-5)``, rounded as the engine does.

    ``main`` has no least magnitude; the scale of an all-zero row is then 1. In blocks, ``quantize`` gives values
    and no codes, of which the scale is 1; so it does where nothing is quantised.

    Raises:
        Inapplicable: in both there is no other.
    """
    if context.quantizer in WITHOUT_CODES:
        if largest is not None or levels != blocks.LEVELS:
            raise Inapplicable
        return np.ones((*x.shape[:-1], 1))
    largest = peak(x) if largest is None else largest
    if context.quantizer == "main":
        with np.errstate(divide="ignore"):
            return np.where(largest == 0, 1.0, _f32(levels / largest))
    largest = np.maximum(largest, 1e-5)
    if context.quantizer == "divide":
        return 1.0 / _f32(largest / levels)
    scale = levels / largest
    return scale if context.quantizer == "float64" else _f32(scale)


def scaled(context: Context, x: Array, scale: Array | float) -> Array:
    """Return ``x * scale`` before it is rounded to integers.

    ``float32``, ``main``: the product is rounded to binary32 first; ``fused``: it is not (one FMA with the
    rounding); ``divide``: ``x`` divided by the binary32 step size; ``float64``: no binary32 anywhere.
    """
    if context.quantizer in ("float32", "main"):
        return _f32(x * scale)
    return _f32(x / (1.0 / np.asarray(scale))) if context.quantizer == "divide" else x * scale


def quantize(
    context: Context,
    x: Array,
    scale: Array | float,
    *,
    rounding: Callable[[Array], Array] | None = None,
    low: float = -128.0,
    high: float = 127.0,
) -> Array:
    """Return integer codes as float32 (exact); ``rounding``: another one than the engine's to nearest.

    In blocks, and where nothing is quantised: what is multiplied with the weights, in float64.

    Raises:
        Inapplicable: in both there is no other scale or rounding.
    """
    if context.quantizer in WITHOUT_CODES:
        is_own = rounding is None and (low, high) == (-128.0, 127.0) and np.all(np.asarray(scale) == 1.0)
        if not is_own or (context.quantizer != "none" and x.shape[-1] % TQ_BLOCK):
            raise Inapplicable
        if context.quantizer == "none":
            return x
        return blocks.quantize(x, BLOCK_QUANTIZERS[context.quantizer]).values.reshape(x.shape)
    rounding = rounding or (half_away if context.quantizer == "main" else np.rint)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.clip(rounding(scaled(context, x, scale)), low, high).astype(np.float32)


def half_away(x: Array) -> Array:
    """Round halves away from zero, as C's ``round`` does."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), 0.0)


def own_rows(matrix: TernaryMatrix, features: IntArray) -> Array:
    """Return rows of a matrix as they are; consecutive ones are not copied."""
    first, n = int(features[0]), len(features)
    consecutive = np.array_equal(features, np.arange(first, first + n))
    return matrix.signs[first : first + n] if consecutive else matrix.signs[features]


def product(codes: Array, rows: Array) -> Array:
    """Return ``codes @ rows.T`` in float64; through binary32 where that is exact (integers below 2^24)."""
    if codes.dtype == np.float32 and rows.dtype == np.float32:
        return (codes @ rows.T).astype(np.float64)
    return codes.astype(np.float64, copy=False) @ rows.astype(np.float64, copy=False).T


def linear(
    context: Context,
    *,
    x: Array | None = None,
    scale: Array | float | None = None,
    unscale: Array | float | None = None,
    codes: Array | None = None,
    matrix: TernaryMatrix | None = None,
    weight_scale: float | None = None,
    rows_of: RowsOf = own_rows,
    dot: Product = product,
) -> Array:
    """Compute BitLinear with some of its parts replaced: quantise, accumulate, rescale.

    ``scale`` quantises; the sums are divided by ``unscale`` (the same unless given), then multiplied by
    ``weight_scale``; then the operation's own bias is added. ``matrix`` is another tensor, cut to the sampled
    rows (``Context.other``).
    """
    if x is None and scale is None and codes is None:
        codes, scale = context.quantized
    x = context.inputs[0] if x is None else x
    scale = input_scale(context, x) if scale is None else scale
    codes = quantize(context, x, scale) if codes is None else codes
    seen = context if matrix is None else context.sampled(None)
    matrix = context.matrix if matrix is None else matrix
    sums = [dot(codes, rows_of(matrix, features)) for features in seen.feature_chunks(matrix.signs.shape[0])]
    weight_scale = matrix.scale if weight_scale is None else weight_scale
    y = np.concatenate(sums, axis=-1) / (scale if unscale is None else unscale) * weight_scale
    return y if context.bias is None else y + context.bias


def head(
    context: Context,
    x: Array | None = None,
    table: Array | None = None,
    change: Callable[[Array], Array] = lambda rows: rows,
) -> Array:
    """Multiply by the sampled rows of the LM head's table: logits ``(n_rows, features)``.

    ``change`` is applied to these rows, in float64.
    """
    x = context.inputs[0] if x is None else x
    table = context.vector if table is None else table
    chunks = context.feature_chunks(table.shape[0])
    return np.concatenate([x @ change(table[at].astype(np.float64)).T for at in chunks], axis=-1)


def _f32(x: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float32).astype(np.float64)
