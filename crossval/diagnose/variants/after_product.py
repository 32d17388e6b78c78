"""What follows the product with a matrix done wrong: its tensor ``.scale``, its bias (families 4 and 10)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from crossval.diagnose.variants.context import Array, Context, Inapplicable, linear
from crossval.diagnose.variants.variant import Variant
from crossval.diagnose.variants.weights import neighbours, same_shape
from crossval.model.taps import BITLINEARS


def _with_factor(context: Context, power: int) -> Array:
    matrix = context.matrix
    if matrix.factor == 1:
        raise Inapplicable
    return linear(context, weight_scale=matrix.scale * matrix.factor ** (power - 1))


def _own_bias(context: Context) -> Array:
    if context.bias is None:
        raise Inapplicable
    return context.bias


def _with_bias(context: Context, times: float) -> Array:
    return linear(context) + (times - 1.0) * _own_bias(context)


def _other_biases(context: Context) -> Iterator[str]:
    """Yield the biases of the same width: of this layer, and of the next ones."""
    _own_bias(context)
    for name in same_shape(neighbours(context), context):
        if name.split(".")[2] in context.config.biases:
            yield name.replace(".weight", ".bias")


def _other_bias(context: Context, name: str) -> Array:
    other = context.array(name)
    return linear(context) - _own_bias(context) + (other if context.features is None else other[context.features])


scale = partial(Variant, family=4, ops=BITLINEARS)
bias = partial(Variant, family=10, ops=BITLINEARS)
# fmt: off
VARIANTS = (
    scale(".scale skipped", "the factor in the tensor .scale is not applied", lambda c: _with_factor(c, 0)),
    scale(".scale applied twice", "the factor in the tensor .scale is applied twice",
        lambda c: _with_factor(c, 2)),
    scale(".scale inverted", "the product is divided by the tensor .scale instead of multiplied",
        lambda c: _with_factor(c, -1)),
    bias("bias skipped", "the bias is not added", lambda c: _with_bias(c, 0.0)),
    bias("bias added twice", "the bias is added twice", lambda c: _with_bias(c, 2.0)),
    bias("bias subtracted", "the bias is subtracted", lambda c: _with_bias(c, -1.0)),
    bias("bias times the weight scale", "the bias is added before the sums are multiplied by the weights' scale",
        lambda c: _with_bias(c, c.matrix.scale / c.matrix.factor)),
    bias("bias {}", "{} is added instead of its own bias", lambda c, name: _other_bias(c, name),
        _other_biases, group="bias of another tensor"),
)
# fmt: on
