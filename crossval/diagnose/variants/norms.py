"""RMSNorm done wrong (family 7)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import rms_norm
from crossval.model.taps import NORMS

EPS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)


def _x(context: Context) -> Array:
    return context.inputs[0]


def mean_square(x: Array) -> Array:
    """Return the mean of the squares of each row, last axis 1."""
    mean: Array = np.mean(x * x, axis=-1, keepdims=True)
    return mean


def _norm(
    context: Context, x: Array | None = None, *, weight: Array | None = None, eps: float | None = None
) -> Array:
    return rms_norm(
        _x(context) if x is None else x,
        context.vector if weight is None else weight,
        eps=context.config.rms_eps if eps is None else eps,
    )


def _other_eps(context: Context) -> Iterator[float]:
    own = context.config.rms_eps
    return (eps for eps in EPS if abs(eps - own) > 1e-6 * own)


def _layer_norm(context: Context) -> Array:
    centred = _x(context) - _x(context).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(mean_square(centred) + context.config.rms_eps) * context.vector


def _unbiased(context: Context) -> Array:
    x = _x(context)
    mean = np.sum(x * x, axis=-1, keepdims=True) / (x.shape[-1] - 1)
    return x / np.sqrt(mean + context.config.rms_eps) * context.vector


def _per_tensor(context: Context) -> Array:
    if context.n_rows == 1 or not context.whole_pass:
        raise Inapplicable
    return _x(context) / np.sqrt(np.mean(_x(context) ** 2) + context.config.rms_eps) * context.vector


def _per_head(context: Context) -> Array:
    if context.config.n_heads == 1:
        raise Inapplicable
    heads = _x(context).reshape(context.n_rows, context.config.n_heads, -1)
    unit = heads / np.sqrt(mean_square(heads) + context.config.rms_eps)
    return unit.reshape(_x(context).shape) * context.vector


def _other_weights(context: Context) -> Iterator[str]:
    """Yield the norms of the whole model; those of another length do not apply."""
    kinds = ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm")
    names = [f"blk.{layer}.{kind}.weight" for layer in range(context.config.n_layers) for kind in kinds]
    return (name for name in ("output_norm.weight", *names) if name != context.op.weights[0])


def _with_weight(context: Context, name: str) -> Array:
    try:
        weight = context.weights[name]
    except KeyError:
        raise Inapplicable from None
    assert isinstance(weight, np.ndarray)
    if weight.shape != context.vector.shape:
        raise Inapplicable
    return _norm(context, weight=weight)


def _branch(context: Context) -> Array:
    """The norm of what was added last, without the residual stream."""
    if context.op.name == "ffn_norm":
        return _norm(context, context.tap(context.name("attn_o_out")))
    last = context.config.n_layers if context.layer is None else context.layer
    if last == 0:
        raise Inapplicable
    return _norm(context, context.tap(f"blk.{last - 1}.ffn_down"))


def _stream(context: Context) -> Array:
    """The norm of the residual stream before the last addition."""
    if context.op.name == "ffn_norm":
        return _norm(context, context.tap(context.layer_input))
    last = context.config.n_layers if context.layer is None else context.layer
    if last == 0:
        raise Inapplicable
    return _norm(context, context.tap(f"blk.{last - 1}.ffn_inp"))


RESIDUAL_NORMS = on("attn_norm", "ffn_norm", "result_norm")

VARIANTS = (
    Variant("norm skipped", 7, NORMS, "the input is passed on unnormed", lambda c: _x(c).copy()),
    Variant(
        "norm skipped but for its weight",
        7,
        NORMS,
        "only multiplied by the weight, not normed",
        lambda c: _x(c) * c.vector,
    ),
    Variant(
        "eps {:g}",
        7,
        NORMS,
        "eps hard-coded to {:g} instead of the header's value",
        lambda c, eps: _norm(c, eps=eps),
        _other_eps,
        group="wrong eps",
    ),
    Variant(
        "eps outside the root",
        7,
        NORMS,
        "eps is added to the root mean square instead of to the mean square",
        lambda c: _x(c) / (np.sqrt(mean_square(_x(c))) + c.config.rms_eps) * c.vector,
        group="wrong eps",
    ),
    Variant(
        "eps as a lower limit",
        7,
        NORMS,
        "eps limits the mean square from below instead of being added to it",
        lambda c: _x(c) / np.sqrt(np.maximum(mean_square(_x(c)), c.config.rms_eps)) * c.vector,
        group="wrong eps",
    ),
    Variant(
        "eps added to the sum",
        7,
        NORMS,
        "eps is added to the sum of squares, before the division by the length",
        lambda c: _norm(c, eps=c.config.rms_eps / _x(c).shape[-1]),
        group="wrong eps",
    ),
    Variant("LayerNorm", 7, NORMS, "mean-centred LayerNorm instead of RMSNorm", _layer_norm),
    Variant(
        "centred without variance of it",
        7,
        NORMS,
        "the mean is subtracted, but the divisor is the root mean square of the uncentred row",
        lambda c: (
            _norm(c)
            - _x(c).mean(axis=-1, keepdims=True) / np.sqrt(mean_square(_x(c)) + c.config.rms_eps) * c.vector
        ),
    ),
    Variant(
        "norm weight not applied",
        7,
        NORMS,
        "the norm's weight is not applied",
        lambda c: _norm(c, weight=np.ones_like(c.vector)),
    ),
    Variant(
        "norm weight + 1",
        7,
        NORMS,
        "multiplied by 1 + weight (Gemma) instead of weight",
        lambda c: _norm(c, weight=c.vector + 1),
    ),
    Variant(
        "norm weight applied twice",
        7,
        NORMS,
        "the norm's weight is applied twice",
        lambda c: _norm(c, weight=c.vector**2),
    ),
    Variant(
        "norm weight as a bias",
        7,
        NORMS,
        "the norm's weight is added instead of multiplied",
        lambda c: _norm(c, weight=np.ones_like(c.vector)) + c.vector,
    ),
    Variant(
        "norm weight of {}",
        7,
        NORMS,
        "the weight is that of {}",
        _with_weight,
        _other_weights,
        group="norm weight of another tensor",
    ),
    Variant(
        "sum instead of mean",
        7,
        NORMS,
        "divided by the root of the sum of squares instead of their mean (L2 norm)",
        lambda c: _x(c) / np.sqrt(np.sum(_x(c) ** 2, axis=-1, keepdims=True) + c.config.rms_eps) * c.vector,
    ),
    Variant("n - 1 instead of n", 7, NORMS, "the sum of squares is divided by n - 1", _unbiased),
    Variant(
        "root missing",
        7,
        NORMS,
        "divided by the mean square instead of its root",
        lambda c: _x(c) / (mean_square(_x(c)) + c.config.rms_eps) * c.vector,
    ),
    Variant("per-tensor norm", 7, NORMS, "one root mean square for all tokens of the pass", _per_tensor),
    Variant("per-head norm", 7, on("attn_sub_norm"), "every head is normed by itself", _per_head),
    Variant("norm applied twice", 7, NORMS, "normed and weighted twice", lambda c: _norm(c, _norm(c))),
    Variant(
        "norm of the branch without its residual",
        13,
        RESIDUAL_NORMS,
        "norms what was added last, without the residual stream",
        _branch,
    ),
    Variant(
        "norm of the stream without its branch",
        13,
        RESIDUAL_NORMS,
        "norms the residual stream as it was before the last addition",
        _stream,
    ),
)
