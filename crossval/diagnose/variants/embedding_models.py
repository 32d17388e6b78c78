"""What embedding models add, done wrong: constants, norms of heads and after blocks, pooling, the final norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.norms import unit
from crossval.diagnose.variants.variant import Variant, on
from crossval.formats import to_bf16, to_f16
from crossval.model.graphs import op_table
from crossval.model.kinds import Pool, Pooling, Rope, Scale, pool, rms_norm
from crossval.model.op import Op

NARROW = {"BF16": to_bf16, "F16": to_f16}
HEADS = on("q_norm", "k_norm")
POST = on("attn_post_norm", "ffn_post_norm")


def _x(context: Context) -> Array:
    return context.inputs[0]


def _op(context: Context, name: str) -> Op:
    """Return another operation of the layer.

    Raises:
        Inapplicable: the model has none.
    """
    full = context.name(name)
    for op in op_table(context.config):
        if op.output == full:
            return op
    raise Inapplicable


# --- constants ------------------------------------------------------------------------------------------------


def _factor(context: Context) -> float:
    kind = context.op.kind
    if not isinstance(kind, Scale):
        raise Inapplicable
    return kind.factor


def _times(factor_of: Callable[[Context], float]) -> Callable[[Context], Array]:
    """Return the product with another constant; where that is the model's, there is no mistake."""

    def function(c: Context) -> Array:
        other = factor_of(c)
        if abs(other - _factor(c)) <= 1e-7 * abs(_factor(c)):
            raise Inapplicable
        return _x(c) * other

    return function


def _narrow(context: Context, form: str) -> Array:
    return _times(lambda c: float(NARROW[form](np.array([_factor(c)]))[0]))(context)


def _truncated(context: Context) -> float:
    return float(math.floor(_factor(context)))


scaled_embedding = partial(Variant, family=10, ops=on("inp_scaled"))
scaled_query = partial(Variant, family=9, ops=on("q_scaled"))
# fmt: off
_CONSTANTS = (
    scaled_embedding("embedding not scaled", "rows are not multiplied by sqrt(dim)", _times(lambda c: 1.0)),
    scaled_embedding("embedding scaled twice", "rows are multiplied by sqrt(dim) twice",
        _times(lambda c: c.config.dim)),
    scaled_embedding("embedding divided by the root of dim", "rows are divided by sqrt(dim)",
        _times(lambda c: c.config.dim**-0.5)),
    scaled_embedding("embedding scale rounded to {}", "sqrt(dim) is rounded to {} before the product",
        _narrow, lambda c: NARROW),
    scaled_embedding("embedding scale rounded down", "sqrt(dim) is computed in integers", _times(_truncated)),
    scaled_query("query scale missing", "queries are not scaled", _times(lambda c: 1.0)),
    scaled_query("query scale 1/head_dim", "queries are divided by head_dim instead of by its root",
        _times(lambda c: 1.0 / c.config.head_dim)),
    scaled_query("query scale by dim / n_heads", "queries are divided by the root of dim / n_heads, not head_dim",
        _times(lambda c: (c.config.dim // c.config.n_heads) ** -0.5)),
    scaled_query("query scale 1/sqrt(dim)", "queries are divided by the root of dim instead of head_dim",
        _times(lambda c: c.config.dim**-0.5)),
    scaled_query("query scale sqrt(head_dim)", "queries are multiplied by sqrt(head_dim) instead of divided",
        _times(lambda c: c.config.head_dim**0.5)),
)
# fmt: on

# --- norms ----------------------------------------------------------------------------------------------------


def _all_heads(context: Context, *, tiled: bool) -> Array:
    """Norm the heads of a token as one row."""
    heads = _x(context)
    if heads.shape[1] == 1:
        raise Inapplicable
    flat = unit(context, heads.reshape(context.n_rows, -1)).reshape(heads.shape)
    return flat * context.vector if tiled else flat


def _after_rotation(context: Context) -> Array:
    rotation = _op(context, context.op.name.replace("_norm", "_rope"))
    assert isinstance(rotation.kind, Rope)
    turned = rotation.kind.compute(_x(context), context.positions)
    return rms_norm(turned, context.vector, eps=context.config.rms_eps)


def _with_stream(context: Context) -> Array:
    """Norm the sum that follows, in place of the branch alone."""
    (following,) = (op for op in op_table(context.config) if context.op.output in op.inputs)
    stream = context.tap(following.inputs[1])
    return rms_norm(_x(context) + stream, context.vector, eps=context.config.rms_eps)


def _of_half(context: Context, half: slice) -> Array:
    x = _x(context)
    part = x[..., half]
    square = np.mean(part * part, axis=-1, keepdims=True)
    return x / np.sqrt(square + context.config.rms_eps) * context.vector


head_norm = partial(Variant, family=7, ops=HEADS)
post_norm = partial(Variant, family=7, ops=POST)
# fmt: off
_NORMS = (
    head_norm("all heads normed at once", "one root mean square for all heads of a token, not one for each",
        partial(_all_heads, tiled=True)),
    head_norm("normed after RoPE", "heads are normed after RoPE instead of before it", _after_rotation),
    head_norm("root mean square of the first half of a head", "only the first half of a head is squared",
        lambda c: _of_half(c, slice(None, c.config.head_dim // 2))),
    post_norm("normed with its residual", "the sum with the residual stream is normed instead of the branch",
        _with_stream),
)
# fmt: on

# --- pooling --------------------------------------------------------------------------------------------------

WORDS: dict[Pooling, str] = {
    "mean": "the mean of all tokens",
    "cls": "the first token",
    "last": "the last token",
}


def _other_pooling(other: Pooling, words: str) -> Variant:
    """Return another pooling than the model's."""

    def pooled(context: Context) -> Array:
        kind, (states, positions) = context.op.kind, context.inputs
        if not isinstance(kind, Pool) or kind.pooling == other:
            raise Inapplicable
        return pool(states, positions, pooling=other)

    said = f"the vector is {words}, which is not what the file asks for"
    return Variant(f"pooled as {words}", said, pooled, family=10, ops=on("pooled"))


def _mean_of(context: Context, part: slice, divisor: int = 0) -> Array:
    """Return the mean of some of the tokens, or their sum over another number than theirs."""
    states, positions = context.inputs
    if len(states) < 2 or context.n_rows > 1 or int(positions[0]) != len(states) - 1:
        raise Inapplicable
    chosen = states[part]
    return chosen.sum(axis=0, keepdims=True) / (divisor or len(chosen))


def _largest(context: Context) -> Array:
    return np.maximum.accumulate(context.inputs[0], axis=0)[context.inputs[1]]


def _unnormed_states(context: Context) -> Array:
    if context.start or not isinstance(context.op.kind, Pool):
        raise Inapplicable
    end = context.tap(f"blk.{context.config.n_layers - 1}.l_out", range(context.n_tokens))
    return pool(end, context.inputs[1], pooling=context.op.kind.pooling)


def _normalised(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


pooling = partial(Variant, family=10, ops=on("pooled"))
final = partial(Variant, family=10, ops=on("embedding"))
# fmt: off
_POOLING = (
    *(_other_pooling(one, words) for one, words in WORDS.items()),
    pooling("mean without the last token", "the last token (EOS) is left out of the mean",
        lambda c: _mean_of(c, slice(None, -1))),
    pooling("mean without the first token", "the first token (BOS) is left out of the mean",
        lambda c: _mean_of(c, slice(1, None))),
    pooling("mean over one token more", "the sum is divided by the number of tokens plus 1",
        lambda c: _mean_of(c, slice(None), len(c.inputs[0]) + 1)),
    pooling("sum instead of mean", "the sum of all tokens instead of their mean",
        lambda c: _mean_of(c, slice(None), 1)),
    pooling("mean over the root of the number", "the sum is divided by the root of the number of tokens",
        lambda c: _mean_of(c, slice(None)) * math.sqrt(len(c.inputs[0]))),
    pooling("the token before the last", "the vector is that of the token before the last",
        lambda c: _mean_of(c, slice(-2, -1))),
    pooling("largest instead of mean", "the largest value of all tokens (max pooling)", _largest),
    pooling("pooled before the final norm", "outputs of the last layer are pooled, not normed ones",
        _unnormed_states),
    pooling("normalised already", "the vector is divided by its Euclidean norm here already",
        lambda c: _normalised(c.expected)),
    final("not normalised", "the pooled vector is passed on as it is", lambda c: _x(c).copy()),
    final("divided by the root mean square", "divided by the root of the mean square, not of its sum",
        lambda c: _normalised(_x(c)) * math.sqrt(_x(c).shape[-1])),
    final("divided by the squared norm", "divided by the sum of squares instead of its root",
        lambda c: _x(c) / np.sum(_x(c) ** 2, axis=-1, keepdims=True)),
    final("divided by the sum of magnitudes", "divided by the sum of magnitudes (L1), not the Euclidean norm",
        lambda c: _x(c) / np.abs(_x(c)).sum(axis=-1, keepdims=True)),
    final("divided by the largest magnitude", "divided by the largest magnitude instead of the Euclidean norm",
        lambda c: _x(c) / np.abs(_x(c)).max(axis=-1, keepdims=True)),
)
# fmt: on

VARIANTS = (*_CONSTANTS, *_NORMS, *_POOLING)
