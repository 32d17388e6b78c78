"""Residual connections done wrong (family 13)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.estimate import Fit, fitted, number
from crossval.diagnose.variants.factor import LEAST
from crossval.diagnose.variants.norms import unit
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.graphs import op_table
from crossval.model.kinds import RmsNorm

ADD = on("ffn_inp", "l_out")


def _branch(c: Context) -> Array:
    return c.inputs[0]


def _stream(c: Context) -> Array:
    return c.inputs[1]


def _norm_of(context: Context) -> str:
    """Return the norm that the branch started from."""
    return "attn_norm" if context.op.name == "ffn_inp" else "ffn_norm"


def _post_norm(context: Context) -> Array:
    """Add first, norm the sum with the weight of the layer's norm."""
    return unit(context, context.expected) * context.array(context.name(f"{_norm_of(context)}.weight"))


def _post_norm_late(context: Context) -> Array:
    """Add the branch before its own norm, then norm the sum (in models that norm after each block)."""
    before = next((op for op in op_table(context.config) if op.output == context.op.inputs[0]), None)
    if before is None or not isinstance(before.kind, RmsNorm):
        raise Inapplicable
    branch = context.tap(before.inputs[0])
    return unit(context, branch + _stream(context)) * context.array(before.weights[0])


def _shifted(context: Context) -> Array:
    if context.n_rows < 2 or not context.whole_pass:
        raise Inapplicable
    return _branch(context) + np.concatenate([_stream(context)[:1], _stream(context)[:-1]])


residual = partial(Variant, family=13, ops=ADD)
layer_output = partial(Variant, family=13, ops=on("l_out"))
# fmt: off
VARIANTS = (
    residual("residual skipped", "the branch alone; the residual stream is not added",
        lambda c: _branch(c).copy()),
    residual("branch skipped", "the residual stream alone; the branch is not added", lambda c: _stream(c).copy()),
    residual("residual doubled", "the residual stream is added twice", lambda c: _branch(c) + 2 * _stream(c)),
    residual("branch doubled", "the branch is added twice", lambda c: 2 * _branch(c) + _stream(c)),
    residual("residual after the norm", "the normed stream is added instead of the stream itself",
        lambda c: _branch(c) + c.tap(c.name(_norm_of(c)))),
    residual("sum normed", "the sum is normed (post-norm instead of pre-norm)", _post_norm),
    residual("post norm after the residual", "the branch is added first, then the sum goes through its norm",
        _post_norm_late),
    residual("residual subtracted", "the residual stream is subtracted", lambda c: _branch(c) - _stream(c)),
    residual("branch subtracted", "the branch is subtracted", lambda c: _stream(c) - _branch(c)),
    residual("mean instead of sum", "the mean of branch and stream instead of their sum",
        lambda c: 0.5 * c.expected),
    residual("sum over root 2", "the sum is divided by the root of 2", lambda c: c.expected / np.sqrt(2.0)),
    residual("product instead of sum", "branch times stream instead of plus", lambda c: _branch(c) * _stream(c)),
    residual("residual of the token before", "the residual stream of the token before is added", _shifted),
    layer_output("residual from the layer's input",
        "the layer's input is added instead of the stream after attention",
        lambda c: _branch(c) + c.tap(c.layer_input)),
    layer_output("residual from the attention branch",
        "the attention's output is added instead of the stream after attention",
        lambda c: _branch(c) + c.tap(c.name("attn_o_out"))),
    layer_output("layer's input added again", "the layer's input is added a second time",
        lambda c: c.expected + c.tap(c.layer_input)),
)
# fmt: on


def _weights(context: Context) -> Iterator[Fit]:
    """Fit the weights of branch and residual stream by least squares."""
    if not np.isfinite(context.target).all():
        raise Inapplicable
    terms = np.stack([x.ravel() for x in context.inputs], axis=-1)
    found = np.linalg.lstsq(terms, context.target.ravel(), rcond=None)[0]
    a, b = (0.0 if abs(x) < LEAST else 1.0 if abs(x - 1) < LEAST else float(x) for x in found)
    if abs(a - b) > LEAST:  # a factor of the sum otherwise
        name = f"{number(a)} times the branch plus {number(b)} times the residual stream"
        yield Fit(name, lambda c: a * _branch(c) + b * _stream(c))


FITTED = (fitted("{}", "the sum is {}", _weights, family=13, ops=ADD),)
