"""Residual connections done wrong (family 13)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.kinds import rms_norm

ADD = on("ffn_inp", "l_out")


def _branch(c: Context) -> Array:
    return c.inputs[0]


def _stream(c: Context) -> Array:
    return c.inputs[1]


def _normed_stream(context: Context) -> Array:
    """The stream as its norm left it: what the branch started from."""
    return context.tap(context.name("attn_norm" if context.op.name == "ffn_inp" else "ffn_norm"))


def _post_norm(context: Context) -> Array:
    """Add first, norm the sum with the weight of the layer's norm."""
    weight = context.weights[
        context.name("attn_norm.weight" if context.op.name == "ffn_inp" else "ffn_norm.weight")
    ]
    assert isinstance(weight, np.ndarray)
    return rms_norm(context.expected, weight.astype(np.float64), eps=context.config.rms_eps)


def _layer_input(context: Context) -> Array:
    return _branch(context) + context.tap(context.layer_input)


def _attention_only(context: Context) -> Array:
    return _branch(context) + context.tap(context.name("attn_o_out"))


def _parallel(context: Context) -> Array:
    return context.expected + context.tap(context.layer_input)


def _shifted(context: Context) -> Array:
    if context.n_rows < 2 or not context.whole_pass:
        raise Inapplicable
    return _branch(context) + np.concatenate([_stream(context)[:1], _stream(context)[:-1]])


VARIANTS = (
    Variant(
        "residual skipped",
        13,
        ADD,
        "the branch alone; the residual stream is not added",
        lambda c: _branch(c).copy(),
    ),
    Variant(
        "branch skipped",
        13,
        ADD,
        "the residual stream alone; the branch is not added",
        lambda c: _stream(c).copy(),
    ),
    Variant(
        "residual doubled", 13, ADD, "the residual stream is added twice", lambda c: _branch(c) + 2 * _stream(c)
    ),
    Variant("branch doubled", 13, ADD, "the branch is added twice", lambda c: 2 * _branch(c) + _stream(c)),
    Variant(
        "residual after the norm",
        13,
        ADD,
        "the normed stream is added instead of the stream itself",
        lambda c: _branch(c) + _normed_stream(c),
    ),
    Variant("sum normed", 13, ADD, "the sum is normed (post-norm instead of pre-norm)", _post_norm),
    Variant(
        "residual subtracted", 13, ADD, "the residual stream is subtracted", lambda c: _branch(c) - _stream(c)
    ),
    Variant("branch subtracted", 13, ADD, "the branch is subtracted", lambda c: _stream(c) - _branch(c)),
    Variant(
        "mean instead of sum",
        13,
        ADD,
        "the mean of branch and stream instead of their sum",
        lambda c: 0.5 * c.expected,
    ),
    Variant(
        "sum over root 2", 13, ADD, "the sum is divided by the root of 2", lambda c: c.expected / np.sqrt(2.0)
    ),
    Variant(
        "product instead of sum", 13, ADD, "branch times stream instead of plus", lambda c: _branch(c) * _stream(c)
    ),
    Variant("residual of the token before", 13, ADD, "the residual stream of the token before is added", _shifted),
    Variant(
        "residual from the layer's input",
        13,
        on("l_out"),
        "the layer's input is added instead of the stream after attention",
        _layer_input,
    ),
    Variant(
        "residual from the attention branch",
        13,
        on("l_out"),
        "the attention's output is added instead of the stream after attention",
        _attention_only,
    ),
    Variant("layer's input added again", 13, on("l_out"), "the layer's input is added a second time", _parallel),
)
