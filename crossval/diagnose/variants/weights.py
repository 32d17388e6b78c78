"""Ternary weights misread: layout, code table, block, scale, the wrong tensor (families 1 to 4 and 10)."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from crossval.diagnose.variants import layouts
from crossval.diagnose.variants.context import Array, Context, Inapplicable
from crossval.diagnose.variants.linear import RowsOf, linear
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.config import SpecConfig
from crossval.model.kinds import IntArray, TernaryMatrix
from crossval.model.taps import BITLINEARS

LINEAR = BITLINEARS
TENSORS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


# --- reading the bytes differently ----------------------------------------------------------------------------


def read_through(codes_of: layouts.CodesOf, table: tuple[float, ...] = (-1, 0, 1, 2)) -> RowsOf:
    """Return rows of a matrix as an engine sees them that gets codes in a certain way and gives them values."""
    values = np.asarray(table, np.float32 if all(float(v).is_integer() for v in table) else np.float64)
    return lambda matrix, features: values[codes_of(matrix, features)]


def _misread(layout: layouts.Layout, table: tuple[float, ...] = (-1, 0, 1, 2)) -> Callable[[Context], Array]:
    rows_of = read_through(layout.codes_of, table)
    return lambda c: linear(c, rows_of=rows_of)


def _layout(layout: layouts.Layout) -> Variant:
    return Variant(layout.name, 1, LINEAR, layout.sentence, _misread(layout))


def _with_table(layout: layouts.Layout, table: tuple[int, ...]) -> Variant:
    said = ", ".join(map(str, table))
    sentence = layout.sentence.removesuffix(", not as blocks of 128 in four strides")
    sentence = f"{sentence}; the codes stand for {said}"
    return Variant(f"{layout.name}, table [{said}]", 1, LINEAR, sentence, _misread(layout, table))


_LAYOUT = (
    *map(_layout, (layouts.FOUR_IN_A_ROW, layouts.FOUR_IN_A_ROW_LOW, layouts.REVERSED)),
    _with_table(layouts.FOUR_IN_A_ROW, (-2, -1, 1, 2)),
    _with_table(layouts.FOUR_IN_A_ROW_LOW, (-2, -1, 1, 2)),
    Variant(
        "block of {}",
        3,
        LINEAR,
        "I2_S unpacked in blocks of {} weights instead of 128",
        lambda c, block: _misread(layouts.blocks_of(block))(c),
        lambda c: [b for b in layouts.BLOCKS if c.inputs[0].shape[-1] % b == 0],
        group="block of another size than 128",
    ),
)


def _table(name: str, table: tuple[float, ...]) -> Variant:
    sentence = f"the 2-bit codes 0, 1, 2 stand for {name} instead of -1, 0, +1"
    return Variant(f"code table {name}", 2, LINEAR, sentence, _misread(layouts.RIGHT, table))


_TABLES = (
    _table("-2, -1, +1", (-2, -1, 1, 2)),
    _table("-1, -0.33, +0.33", (-1, -0.33, 0.33, 1)),
    _table("-1, -1/3, +1/3", (-1, -1 / 3, 1 / 3, 1)),
    _table("0, +1, -1", (0, 1, -1, 0)),
    _table("0, 1, 2", (0, 1, 2, 3)),
    _table("+1, 0, -1", (1, 0, -1, -2)),
    _table("0, -1, +1", (0, -1, 1, 0)),
    _table("-1.5, -0.5, +0.5", (-1.5, -0.5, 0.5, 1.5)),
)

# --- scale ----------------------------------------------------------------------------------------------------


def _neighbours(context: Context) -> Iterator[str]:
    """Yield the tensors one may take by mistake: of this layer, the next ones, the first and the last."""
    own = context.op.weights[0]
    layer, tensor = context.layer, own.split(".")[2]
    assert layer is not None
    yield from (name for t in TENSORS if (name := f"blk.{layer}.{t}.weight") != own)
    near = {layer - 1, layer + 1, 0, context.config.n_layers - 1} - {layer}
    yield from (f"blk.{j}.{tensor}.weight" for j in sorted(near) if 0 <= j < context.config.n_layers)


def _far(context: Context) -> Iterator[str]:
    """Yield the same tensor of every layer not yet among the neighbours."""
    own = context.op.weights[0]
    seen = {own, *_neighbours(context)}
    names = (f"blk.{j}.{own.split('.')[2]}.weight" for j in range(context.config.n_layers))
    return (name for name in names if name not in seen)


_SCALES = (
    Variant(
        "weight scale ignored",
        4,
        LINEAR,
        "the tensor's scale is not applied (1.0 in its place)",
        lambda c: linear(c, weight_scale=1.0),
    ),
    Variant(
        "weight scale applied twice",
        4,
        LINEAR,
        "the tensor's scale is applied twice",
        lambda c: linear(c, weight_scale=c.matrix.scale**2),
    ),
    Variant(
        "weight scale inverted",
        4,
        LINEAR,
        "the result is divided by the tensor's scale instead of multiplied",
        lambda c: linear(c, weight_scale=1.0 / c.matrix.scale),
    ),
    Variant(
        "weight scale 0.5",
        4,
        LINEAR,
        "a hard-coded weight scale of 0.5 instead of the tensor's own",
        lambda c: linear(c, weight_scale=0.5),
    ),
    Variant(
        "weight scale rounded to F16",
        12,
        LINEAR,
        "the tensor's scale is rounded to binary16",
        lambda c: linear(c, weight_scale=float(np.float16(c.matrix.scale))),
    ),
    Variant(
        "scale of {}",
        4,
        LINEAR,
        "the weight scale is that of {} instead of the tensor's own",
        lambda c, name: linear(c, weight_scale=c.scale_of(name)),
        _neighbours,
        group="weight scale of another tensor",
    ),
)

# --- the wrong matrix -----------------------------------------------------------------------------------------


def matrix_shape(config: SpecConfig, tensor: str) -> tuple[int, int]:
    """Return ``(rows, cols)`` of a layer's ternary tensor by the model's shape."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "attn_q": (q_dim, config.dim),
        "attn_k": (kv_dim, config.dim),
        "attn_v": (kv_dim, config.dim),
        "attn_output": (config.dim, q_dim),
        "ffn_gate": (config.hidden_dim, config.dim),
        "ffn_up": (config.hidden_dim, config.dim),
        "ffn_down": (config.dim, config.hidden_dim),
    }[tensor]


def _same_shape(names: Iterator[str], context: Context) -> list[str]:
    shape = matrix_shape(context.config, context.op.weights[0].split(".")[2])
    return [name for name in names if matrix_shape(context.config, name.split(".")[2]) == shape]


def _other_matrix(context: Context, name: str) -> Array:
    return linear(context, matrix=context.other(name))


def _foreign_signs(context: Context, name: str) -> Array:
    return linear(context, matrix=context.other(name), weight_scale=context.matrix.scale)


def _transposed(matrix: TernaryMatrix, features: IntArray) -> Array:
    rows, cols = matrix.signs.shape
    return matrix.signs.reshape(cols, rows).T[features]


def _mirrored(matrix: TernaryMatrix, features: IntArray) -> Array:
    return matrix.signs[features, ::-1]


def _head_permutation(context: Context) -> Array:
    """Return the order in which llama-style converters put the rows of Q and K for interleaved rotation."""
    n_heads = context.config.n_heads if context.op.name == "q" else context.config.n_kv_heads
    rows = np.arange(n_heads * context.config.head_dim)
    return rows.reshape(n_heads, 2, context.config.head_dim // 2).swapaxes(1, 2).reshape(-1)


def _reordered(order: Callable[[Context], Array]) -> Callable[[Context], Array]:
    def function(c: Context) -> Array:
        taken = order(c)
        if np.array_equal(taken, np.arange(taken.size)):
            raise Inapplicable
        return linear(c, rows_of=lambda matrix, features: matrix.signs[taken[features]])

    return function


def _interleaved_heads(context: Context) -> Array:
    n_heads = context.config.n_heads if context.op.name == "q" else context.config.n_kv_heads
    return np.arange(n_heads * context.config.head_dim).reshape(n_heads, -1).T.reshape(-1)


def _input_before_norm(context: Context) -> Array:
    source = {
        "q": context.layer_input,
        "k": context.layer_input,
        "v": context.layer_input,
        "attn_o_out": context.name("kqv_out"),
        "ffn_gate": context.name("ffn_inp"),
        "ffn_up": context.name("ffn_inp"),
        "ffn_down": context.name("ffn_out"),
    }[context.op.name]
    if source == context.op.inputs[0]:
        raise Inapplicable
    return linear(context, x=context.tap(source))


_MATRICES = (
    Variant(
        "weights of {}",
        10,
        LINEAR,
        "multiplied with {} instead of its own tensor",
        _other_matrix,
        lambda c: _same_shape(_neighbours(c), c),
        group="weights of another tensor",
    ),
    Variant(
        "weights of {}",
        10,
        LINEAR,
        "multiplied with {} instead of its own tensor",
        _other_matrix,
        _far,
        group="weights of another tensor",
        deferred=True,
    ),
    Variant(
        "weights of {} with its own scale",
        10,
        LINEAR,
        "multiplied with the ternary weights of {} but with its own tensor's scale",
        _foreign_signs,
        lambda c: _same_shape(_neighbours(c), c),
        group="weights of another tensor with its own scale",
    ),
    Variant(
        "weights transposed",
        10,
        LINEAR,
        "the matrix is read as (inputs, outputs): x·W instead of W·x",
        lambda c: linear(c, rows_of=_transposed),
    ),
    Variant(
        "inputs in reverse order",
        10,
        LINEAR,
        "the rows of the matrix are read back to front",
        lambda c: linear(c, rows_of=_mirrored),
    ),
    Variant(
        "rows permuted for interleaved RoPE",
        10,
        on("q", "k"),
        "the rows of every head are in the order of llama-style converters (for interleaved rotation)",
        _reordered(_head_permutation),
    ),
    Variant(
        "heads split as (head_dim, heads)",
        10,
        on("q", "k", "v"),
        "the features are split into heads as (head_dim, heads) instead of (heads, head_dim)",
        _reordered(_interleaved_heads),
    ),
    Variant(
        "norm before it skipped",
        7,
        LINEAR,
        "multiplies the tensor before the norm, not the normed one",
        _input_before_norm,
    ),
)

VARIANTS = (*_LAYOUT, *_TABLES, *_SCALES, *_MATRICES)
