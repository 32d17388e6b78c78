"""The embedding and the head done wrong (families 10 and 12)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.linear import head, input_scale, quantize
from crossval.diagnose.variants.precision import bf16_read_as_f16, f16_read_as_bf16, truncate_bf16
from crossval.diagnose.variants.variant import Variant, on
from crossval.formats import to_bf16, to_f16

EMBED = on("inp_embd")
HEAD = on("result_output")

Change = Callable[[Array], Array]

# --- embedding ------------------------------------------------------------------------------------------------


def _rows(context: Context, ids: Array) -> Array:
    return context.vector[ids].astype(np.float64)


def _next_id(context: Context, offset: int) -> Array:
    ids = context.inputs[0] + offset
    if ids.min() < 0 or ids.max() >= context.config.vocab_size:
        ids = np.clip(ids, 0, context.config.vocab_size - 1)
    return _rows(context, ids)


def _transposed_table(table: Array) -> Array:
    return table.reshape(table.shape[1], table.shape[0]).T


def _normed(context: Context) -> Array:
    x = context.expected
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + context.config.rms_eps)


_EMBED = (
    Variant(
        "row of token id {:+d}",
        10,
        EMBED,
        "the row of token id {:+d} is taken",
        _next_id,
        lambda c: (-1, 1),
        group="row of another token id",
    ),
    Variant(
        "embedding scaled by the root of dim",
        10,
        EMBED,
        "rows are multiplied by sqrt(dim) (Gemma, T5)",
        lambda c: c.expected * np.sqrt(c.config.dim),
    ),
    Variant(
        "embedding divided by the root of dim",
        10,
        EMBED,
        "rows are divided by sqrt(dim)",
        lambda c: c.expected / np.sqrt(c.config.dim),
    ),
    Variant("embedding normed", 10, EMBED, "rows are normed on the way in", _normed),
    Variant(
        "embedding table transposed",
        10,
        EMBED,
        "the table is read as (dim, vocab_size)",
        lambda c: _transposed_table(c.vector)[c.inputs[0]].astype(np.float64),
    ),
    Variant(
        "embedding BF16 read as F16",
        12,
        EMBED,
        "the table was stored as bfloat16 and its bits are read as binary16",
        lambda c, store: bf16_read_as_f16(c.expected, store),
        lambda c: (to_bf16, truncate_bf16),
    ),
    Variant(
        "embedding F16 read as BF16",
        12,
        EMBED,
        "the bits of binary16 values are read as bfloat16",
        lambda c: f16_read_as_bf16(c.expected),
    ),
)

# --- head -----------------------------------------------------------------------------------------------------


def _head_with(context: Context, change: Change) -> Array:
    """Multiply with a changed table, changing only the rows that are looked at."""
    table = context.vector
    parts = [
        context.inputs[0] @ change(table[at].astype(np.float64)).T for at in context.feature_chunks(table.shape[0])
    ]
    return np.concatenate(parts, axis=-1)


def _other_table(context: Context) -> Iterator[str]:
    own = context.op.weights[0]
    return (name for name in ("token_embd.weight", "output.weight") if name != own)


def _with_table(context: Context, name: str) -> Array:
    try:
        table = context.weights[name]
    except KeyError:
        raise Inapplicable from None
    assert isinstance(table, np.ndarray)
    return head(context, table=table)


def _vocabulary(context: Context, step: int) -> Array:
    n = context.config.vocab_size
    wanted = np.arange(n) if context.features is None else context.features
    return head(context.sampled((wanted - step) % n))


def _unnormed(context: Context) -> Array:
    return head(context, x=context.round(0, context.tap(f"blk.{context.config.n_layers - 1}.l_out")))


def _int8_input(context: Context) -> Array:
    x = context.inputs[0]
    scale = input_scale(context, x)
    return head(context, x=quantize(context, x, scale).astype(np.float64) / scale)


def _whole(context: Context) -> Array:
    return head(context.sampled(None))


def _log_softmax(context: Context) -> Array:
    logits = _whole(context)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return context.flat(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _table_rounded(name: str, change: Change) -> Variant:
    return Variant(f"head table {name}", 12, HEAD, f"the head's table is {name}", lambda c: _head_with(c, change))


_HEAD = (
    Variant(
        "head of {}",
        10,
        HEAD,
        "multiplied with {} instead of the head's own table",
        _with_table,
        _other_table,
        group="head of another table",
    ),
    Variant(
        "head table transposed",
        10,
        HEAD,
        "the table is read as (dim, vocab_size)",
        lambda c: head(c, table=_transposed_table(c.vector)),
    ),
    Variant(
        "logits shifted by {:+d}",
        10,
        HEAD,
        "logits are stored {:+d} places from their token ids",
        _vocabulary,
        lambda c: (-1, 1),
        group="logits shifted",
    ),
    Variant(
        "final norm skipped",
        7,
        HEAD,
        "the head multiplies the last layer's output without the final norm",
        _unnormed,
    ),
    Variant("head with int8 activations", 12, HEAD, "the head's input is quantised to int8", _int8_input),
    Variant(
        "logits divided by the root of dim",
        10,
        HEAD,
        "logits are divided by sqrt(dim)",
        lambda c: c.expected / np.sqrt(c.config.dim),
    ),
    Variant(
        "logits multiplied by the root of dim",
        10,
        HEAD,
        "logits are multiplied by sqrt(dim)",
        lambda c: c.expected * np.sqrt(c.config.dim),
    ),
    Variant(
        "soft-capped logits",
        10,
        HEAD,
        "logits go through 30·tanh(x/30) (Gemma)",
        lambda c: 30.0 * np.tanh(c.expected / 30.0),
    ),
    Variant(
        "log-probabilities",
        10,
        HEAD,
        "the head returns log-probabilities, not logits",
        _log_softmax,
        deferred=True,
    ),
    Variant(
        "probabilities",
        10,
        HEAD,
        "the head returns probabilities, not logits",
        lambda c: np.exp(_log_softmax(c)),
        deferred=True,
    ),
    _table_rounded("rounded to BF16", to_bf16),
    _table_rounded("truncated to BF16", truncate_bf16),
    _table_rounded("BF16 read as F16", bf16_read_as_f16),
    _table_rounded("BF16 read as F16", lambda t: bf16_read_as_f16(t, truncate_bf16)),
    _table_rounded("F16 read as BF16", lambda t: f16_read_as_bf16(t)),
    Variant(
        "head table F32 rounded to F16",
        12,
        HEAD,
        "a float32 table is rounded to binary16",
        lambda c: _head_with(c, to_f16) if c.vector.dtype != np.float16 else _not_f32(),
    ),
)


def _not_f32() -> Array:
    raise Inapplicable


VARIANTS = (*_EMBED, *_HEAD)
