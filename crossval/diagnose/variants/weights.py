"""Ternary weights misread: layout, code table, block, scale, the wrong tensor (families 1 to 4 and 10).

Any table of codes is found by least squares: with S_k the sum of the int8 activations whose weight has code k,
every engine that gives the codes the values a, b, c records ``(a S_0 + b S_1 + c S_2) / scale * weight scale``:
three unknowns against all recorded values, under any layout and any way to quantise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from crossval.diagnose.variants import layouts
from crossval.diagnose.variants.context import Array, Context, Inapplicable, RowsOf, linear
from crossval.diagnose.variants.estimate import (
    CLOSE,
    Fit,
    distance,
    fitted,
    probe,
    recorded_sums,
    settled,
    snapped,
)
from crossval.diagnose.variants.layouts import Layout
from crossval.diagnose.variants.quantizer import Setting, integers
from crossval.diagnose.variants.variant import Variant, on
from crossval.model.config import SpecConfig
from crossval.model.graphs import op_table
from crossval.model.kinds import FloatArray, IntArray, RmsNorm, TernaryMatrix
from crossval.model.taps import BITLINEARS

TENSORS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
Table = tuple[float, ...]
"""Values of the codes 0 to 3."""
N_PROBED = 96
LEAST = 16
"""Minimum number of values that three unknowns have to explain."""
TERNARY = (-1.0, 0.0, 1.0)
LIKE_SIGNS = 1e-5
"""A table this close to a multiple of -1, 0, +1 is a scale, not a table."""

# --- reading the bytes differently ----------------------------------------------------------------------------


def read_through(codes_of: layouts.CodesOf, table: Table = (-1, 0, 1, 2)) -> RowsOf:
    """Return rows of a matrix as seen by an engine that reads its codes in a layout and maps them to values."""
    values = np.asarray(table, np.float32 if all(float(v).is_integer() for v in table) else np.float64)
    return lambda matrix, features: values[codes_of(matrix, features)]


def _misread(layout: Layout, table: Table = (-1, 0, 1, 2)) -> Callable[[Context], Array]:
    rows_of = read_through(layout.codes_of, table)
    return lambda c: linear(c, rows_of=rows_of)


def _layout(layout: Layout) -> Variant:
    return Variant(layout.name, layout.sentence, _misread(layout), family=1, ops=BITLINEARS)


def _with_table(layout: Layout, table: tuple[int, ...]) -> Variant:
    said = ", ".join(map(str, table))
    sentence = layout.sentence.removesuffix(", not as blocks of 128 in four strides")
    return Variant(
        f"{layout.name}, table [{said}]",
        f"{sentence}; the codes stand for {said}",
        _misread(layout, table),
        family=1,
        ops=BITLINEARS,
    )


def _table(name: str, *table: float) -> Variant:
    sentence = f"the 2-bit codes 0, 1, 2 stand for {name} instead of -1, 0, +1"
    return Variant(f"code table {name}", sentence, _misread(layouts.RIGHT, table), family=2, ops=BITLINEARS)


# --- scale ----------------------------------------------------------------------------------------------------


def neighbours(context: Context) -> Iterator[str]:
    """Yield the tensors that may be used by mistake: of this layer, the next ones, the first and the last."""
    own = context.op.weights[0]
    layer, tensor = context.layer, own.split(".")[2]
    assert layer is not None
    yield from (name for t in TENSORS if (name := f"blk.{layer}.{t}.weight") != own)
    near = {layer - 1, layer + 1, 0, context.config.n_layers - 1} - {layer}
    yield from (f"blk.{j}.{tensor}.weight" for j in sorted(near) if 0 <= j < context.config.n_layers)


def _far(context: Context) -> Iterator[str]:
    """Yield the same tensor of every layer that is not among the neighbours."""
    own = context.op.weights[0]
    seen = {own, *neighbours(context)}
    names = (f"blk.{j}.{own.split('.')[2]}.weight" for j in range(context.config.n_layers))
    return (name for name in names if name not in seen)


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


def same_shape(names: Iterator[str], context: Context) -> list[str]:
    """Return the tensors that have as many rows and columns as the operation's own."""
    shape = matrix_shape(context.config, context.op.weights[0].split(".")[2])
    return [name for name in names if matrix_shape(context.config, name.split(".")[2]) == shape]


def _transposed(matrix: TernaryMatrix, features: IntArray) -> Array:
    rows, cols = matrix.signs.shape
    return matrix.signs.reshape(cols, rows).T[features]


def _head_permutation(context: Context) -> Array:
    """Return the order in which llama-style converters put the rows of Q and K for interleaved rotation."""
    n_heads = context.config.n_heads if context.op.name == "q" else context.config.n_kv_heads
    rows = np.arange(n_heads * context.config.head_dim)
    return rows.reshape(n_heads, 2, context.config.head_dim // 2).swapaxes(1, 2).reshape(-1)


def _for_adjacent_pairs(context: Context) -> Array:
    """Return the order of converters in a model that rotates halves."""
    if context.config.rope_pairing == "adjacent":
        raise Inapplicable
    return _head_permutation(context)


def _for_halves(context: Context) -> Array:
    """Return the order before conversion in a model that rotates adjacent pairs."""
    if context.config.rope_pairing == "halves":
        raise Inapplicable
    return np.argsort(_head_permutation(context))


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
    for op in op_table(context.config):
        if op.output == context.op.inputs[0] and isinstance(op.kind, RmsNorm):
            return linear(context, x=context.tap(op.inputs[0]))
    raise Inapplicable


scale = partial(Variant, family=4, ops=BITLINEARS)
matrix = partial(Variant, family=10, ops=BITLINEARS)
# fmt: off
VARIANTS = (
    *map(_layout, (layouts.FOUR_IN_A_ROW, layouts.FOUR_IN_A_ROW_LOW, layouts.REVERSED)),
    _with_table(layouts.FOUR_IN_A_ROW, (-2, -1, 1, 2)),
    _with_table(layouts.FOUR_IN_A_ROW_LOW, (-2, -1, 1, 2)),
    Variant("block of {}", "I2_S unpacked in blocks of {} weights instead of 128",
        lambda c, block: _misread(layouts.blocks_of(block))(c),
        lambda c: [b for b in layouts.BLOCKS if c.inputs[0].shape[-1] % b == 0],
        group="block of another size than 128", family=3, ops=BITLINEARS),
    _table("-2, -1, +1", -2, -1, 1, 2),
    _table("-1, -0.33, +0.33", -1, -0.33, 0.33, 1),
    _table("-1, -1/3, +1/3", -1, -1 / 3, 1 / 3, 1),
    _table("0, +1, -1", 0, 1, -1, 0),
    _table("0, 1, 2", 0, 1, 2, 3),
    _table("+1, 0, -1", 1, 0, -1, -2),
    _table("0, -1, +1", 0, -1, 1, 0),
    _table("-1.5, -0.5, +0.5", -1.5, -0.5, 0.5, 1.5),
    scale("weight scale ignored", "the tensor's scale is not applied (1.0 in its place)",
        lambda c: linear(c, weight_scale=c.matrix.factor)),
    scale("weight scale applied twice", "the tensor's scale is applied twice",
        lambda c: linear(c, weight_scale=c.matrix.scale**2 / c.matrix.factor)),
    scale("weight scale inverted", "the result is divided by the tensor's scale instead of multiplied",
        lambda c: linear(c, weight_scale=c.matrix.factor**2 / c.matrix.scale)),
    scale("weight scale 0.5", "a hard-coded weight scale of 0.5 instead of the tensor's own",
        lambda c: linear(c, weight_scale=0.5 * c.matrix.factor)),
    Variant("weight scale rounded to F16", "the tensor's scale is rounded to binary16",
        lambda c: linear(c, weight_scale=float(np.float16(c.matrix.scale))), family=12, ops=BITLINEARS),
    scale("scale of {}", "the weight scale is that of {} instead of the tensor's own",
        lambda c, name: linear(c, weight_scale=c.scale_of(name) * c.matrix.factor), neighbours,
        group="weight scale of another tensor"),
    matrix("weights of {}", "multiplied with {} instead of its own tensor",
        lambda c, name: linear(c, matrix=c.other(name)),
        lambda c: same_shape(neighbours(c), c), group="weights of another tensor"),
    matrix("weights of {}", "multiplied with {} instead of its own tensor",
        lambda c, name: linear(c, matrix=c.other(name)), _far,
        group="weights of another tensor", deferred=True),
    matrix("weights of {} with its own scale",
        "multiplied with the ternary weights of {} but with its own tensor's scale",
        lambda c, name: linear(c, matrix=c.other(name), weight_scale=c.matrix.scale),
        lambda c: same_shape(neighbours(c), c), group="weights of another tensor with its own scale"),
    matrix("weights transposed", "the matrix is read as (inputs, outputs): x·W instead of W·x",
        lambda c: linear(c, rows_of=_transposed)),
    matrix("inputs in reverse order", "the rows of the matrix are read back to front",
        lambda c: linear(c, rows_of=lambda matrix, features: matrix.signs[features, ::-1])),
    Variant("rows permuted for interleaved RoPE",
        "the rows of every head are in the order of llama-style converters (for interleaved rotation)",
        _reordered(_for_adjacent_pairs), family=10, ops=on("q", "k")),
    Variant("rows not permuted for interleaved RoPE",
        "the rows of every head are in the order of Hugging Face (for rotation in halves)",
        _reordered(_for_halves), family=10, ops=on("q", "k")),
    Variant("heads split as (head_dim, heads)",
        "the features are split into heads as (head_dim, heads) instead of (heads, head_dim)",
        _reordered(_interleaved_heads), family=10, ops=on("q", "k", "v")),
    Variant("norm before it skipped", "multiplies the tensor before the norm, not the normed one",
        _input_before_norm, family=7, ops=BITLINEARS),
)
# fmt: on

# --- fitted: any table of codes, under any layout and any way to quantise -------------------------------------


@dataclass(frozen=True)
class _Mode:
    """A way to convert activations to integers that is tried together with misread weights."""

    name: str
    """Empty for the correct one."""
    sentence: str
    setting: Setting | None
    """None: activations stay floating-point."""

    def codes(self, context: Context) -> tuple[Array, Array]:
        """Return codes and the scale of each token."""
        if self.setting is None:
            return context.inputs[0], np.ones((context.n_rows, 1))
        return integers(context, self.setting)


RIGHT = _Mode("", "", Setting())
MODES = (
    RIGHT,
    *(
        _Mode(name, sentence, Setting(rounding=name))
        for name, sentence in (
            ("truncation", "activations are truncated towards zero"),
            ("rounded down", "activations are rounded down (floor)"),
            ("rounded up", "activations are rounded up (ceil)"),
            ("round half away from zero", "ties are rounded away from zero"),
        )
    ),
    _Mode("128 levels instead of 127", "activations are scaled to 128 levels per sign", Setting(128.0)),
    _Mode("no activation quantisation", "activations stay floating-point", None),
)


def _fits(context: Context) -> Iterator[Fit]:
    """Fit the table under every layout and way to quantise; yield those that reproduce the sampled sums."""
    features = probe(context, N_PROBED)
    seen = settled(context.sampled(features))
    matrix, options = context.matrix, _distinct(seen)
    wanted = [recorded_sums(seen, scale) for _, _, scale in options]
    for layout in layouts.layouts(matrix.signs.shape[1]):
        try:
            codes = layout.codes_of(matrix, features)
        except ValueError:
            continue
        low, high = ((codes == k).astype(np.float32) for k in (0, 2))
        for (mode, x, _), sums in zip(options, wanted, strict=True):
            values = _values(x, low, high, sums)
            fit = None if values is None else _named(layout, values, mode, matrix.scale)
            if fit is not None:
                yield fit


def _distinct(context: Context) -> list[tuple[_Mode, Array, Array]]:
    """Return the ways to quantise that give codes other than the correct ones on this input."""
    made = [(mode, *mode.codes(context)) for mode in MODES]
    return [one for one in made if one[0] is RIGHT or not np.array_equal(one[1], made[0][1])]


def _values(x: Array, low: Array, high: Array, sums: FloatArray) -> FloatArray | None:
    """Return the values of codes 0, 1, 2 that come closest to the sums; None: far from them."""
    first, last = ((x @ mask.T.astype(x.dtype)).astype(np.float64) for mask in (low, high))
    middle = x.astype(np.float64).sum(axis=-1, keepdims=True) - first - last
    size = np.sqrt(np.mean(sums**2, axis=-1, keepdims=True))
    if not size.all() or sums.size < LEAST:
        return None
    terms = np.stack([(one / size).reshape(-1) for one in (first, middle, last)], axis=-1)
    wanted = (sums / size).reshape(-1)
    solution, _, rank, _ = np.linalg.lstsq(terms, wanted, rcond=None)
    if rank < 3 or distance(wanted, terms @ solution) > CLOSE:
        return None
    return solution


def _named(layout: Layout, values: FloatArray, mode: _Mode, scale: float) -> Fit | None:
    factor, scaled = 1.0, ""
    table: Table = tuple(map(snapped, map(float, values)))
    times = float(values[2] - values[0]) / 2
    if np.allclose(values, times * np.asarray(TERNARY), atol=2e-4 * max(1.0, abs(times))):
        table = TERNARY
        if abs(times - 1) > 2e-4:
            factor, scaled = times, _scale_name(times, scale)
            if not scaled:
                return None  # some factor: which of the scales is wrong cannot be told
    if table[0] == table[1] == table[2]:
        return _blind(layout, table, mode)
    parts = [(layout.name, layout.sentence)]
    if table != TERNARY:
        parts.append(table_words(table))
    parts += [(scaled, scaled), (mode.name, mode.sentence)]
    words, said = ([part[i] for part in parts if part[0]] for i in (0, 1))
    if len(words) < 2 and table == TERNARY and layout not in layouts.OTHERS:
        return None  # nothing, or one mistake that has a variant of its own
    return Fit("; ".join(words), partial(_read, layout, table, mode, factor), "; ".join(said), words[0])


def _blind(layout: Layout, table: Table, mode: _Mode) -> Fit | None:
    """The weights do not matter: any layout would fit."""
    if layout is not layouts.RIGHT or mode is not RIGHT:
        return None
    return Fit(
        f"{table[0]:g} times the activation sum",
        partial(_read, layout, table, mode, 1.0),
        f"every output is {table[0]:g} times the sum of the activations: all codes are read alike, or the sum "
        "over the codes is lost and only its correction is left",
    )


def _read(layout: Layout, table: Table, mode: _Mode, factor: float, context: Context) -> Array:
    codes, scale = mode.codes(context)
    rows_of = read_through(layout.codes_of, (*table, 0.0))
    return linear(context, codes=codes, scale=scale, rows_of=rows_of, weight_scale=factor * context.matrix.scale)


def table_words(table: Table) -> tuple[str, str]:
    """Return the name and the sentence of a table of codes."""
    said = ", ".join(f"{v:g}" if v <= 0 else f"+{v:g}" for v in table)
    offset = table[1]
    name, sentence = f"code table {said}", f"the 2-bit codes 0, 1, 2 stand for {said} instead of -1, 0, +1"
    if np.allclose(np.asarray(table) - offset, TERNARY, atol=LIKE_SIGNS):
        times = 1 - offset
        often = {2.0: "twice", 0.0: "not at all"}.get(times, f"{times:g} times")
        name += f" (activation sum subtracted {often})"
        sentence += f": the sum of the activations is subtracted {often} instead of once"
    return name, sentence


def _scale_name(factor: float, scale: float) -> str:
    known = {"weight scale ignored": 1 / scale, "weight scale applied twice": scale}
    return next((name for name, value in known.items() if abs(factor - value) <= 1e-4 * value), "")


FITTED = (
    fitted(
        "{}",
        "{0.sentence}",
        _fits,
        group="{0.group}",
        family=2,
        ops=BITLINEARS,
        shown="*layout*; code table *a*, *b*, *c*; *weight scale*; *quantisation*",
        shown_sentence="any values of the three codes by least squares, under any layout, scale and quantisation",
    ),
)
"""Tried when nothing simpler explains a matrix product."""
