"""Families of faults with parameters, as mistakes of the NumPy engine: what is drawn, what the op becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np

from tests.support.numpy_bitnet.engine import TENSORS, Call
from tests.support.numpy_bitnet.mistakes import levels, skipped
from tests.support.numpy_bitnet.model import Matrix
from tests.support.numpy_bitnet.styles import Array

BITLINEARS = tuple(TENSORS)
NORMS = ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm")
PLAIN = (
    "attn_norm", *BITLINEARS, "q_rope", "k_rope", "kqv_out", "attn_sub_norm", "ffn_inp", "ffn_norm", "ffn_act",
    "ffn_out", "ffn_sub_norm", "l_out",
)  # fmt: skip
"""Operations whose output has tokens first."""
BOTH = (None, None, "prefill", "decode")
PROMPT = ("prefill",)


@dataclass(frozen=True)
class Site:
    """The model and the prompt that a fault is drawn for."""

    shape: Mapping[str, Any]
    n_tokens: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return int(self.shape["dim"]) // int(self.shape["n_heads"])

    def width(self, op: str) -> int:
        """Features of an op's output, all heads together."""
        if op in ("k", "v", "k_rope"):
            return self.head_dim * int(self.shape["n_kv_heads"])
        wide = ("ffn_gate", "ffn_up", "ffn_act", "ffn_out", "ffn_sub_norm")
        return int(self.shape["hidden_dim"] if op in wide else self.shape["dim"])


@dataclass(frozen=True)
class Planned:
    """A fault but for its place."""

    op: str
    """The first operation that is wrong."""
    what: str
    code: Callable[[Call], Array]
    words: tuple[str, ...]
    """A correct name contains one of these, and these numbers (or those of ``or_numbers``)."""
    numbers: tuple[float, ...] = ()
    kinds: tuple[str | None, ...] = BOTH
    ops: tuple[str, ...] = ()
    """All operations that the code replaces, where there are more."""
    layer: int | None = None
    or_numbers: tuple[tuple[float, ...], ...] = ()
    or_names: tuple[str, ...] = ()
    """Names that are correct without a number."""


Code = Callable[[Call], Array]


def _changed(change: Callable[[Array], Array]) -> Code:
    """Return what changes the correct output as rows of features; ``change`` may work in place."""

    def code(call: Call) -> Array:
        right = call.right(*call.inputs)
        return change(right.reshape(len(right), -1).copy()).reshape(right.shape).astype(right.dtype)

    return code


def _filled(index: Any, value: Any) -> Callable[[Array], Array]:
    """Return a change that sets part of an array; ``value`` may be computed from the array."""

    def change(y: Array) -> Array:
        y[index] = value(y) if callable(value) else value
        return y

    return change


def _times(factor: float) -> Code:
    def code(call: Call) -> Array:
        right = call.right(*call.inputs)
        return right * right.dtype.type(factor)

    return code


def _matrix(call: Call) -> Matrix:
    return call.engine.model.matrix(f"blk.{call.layer}.{TENSORS[call.op]}")


def _weights(of: Callable[[Matrix], np.ndarray]) -> Code:
    """Return a BitLinear with other weights, made from the correct matrix."""

    def code(call: Call) -> Array:
        old = _matrix(call)
        return call.right(*call.inputs, matrix=Matrix(of(old).astype(np.float32), old.scale, old.packed))

    return code


def _override(call: Call, **override: Any) -> Array:
    """Compute the operation with one of its parameters replaced."""
    return call.right(*call.inputs, **override)


def _norm(call: Call, x: Array, name: str, group: int | None = None) -> Array:
    """Return an RMS norm of all features, or of each group of them, with the weight of that name."""
    parts = x.reshape(len(x), -1, group or x.shape[-1])
    root = np.sqrt((parts * parts).mean(-1, keepdims=True) + x.dtype.type(call.engine.model.eps))
    weight = call.engine.model.vector(f"blk.{call.layer}.{name}")
    return ((parts / root).reshape(x.shape) * weight).astype(x.dtype)


# --- weights --------------------------------------------------------------------------------------------------


def _table(rng: Random) -> tuple[float, float, float]:
    values = [-3, -2, -1.5, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, round(rng.uniform(-2, 2), 2)]
    while True:
        a, b, c = (float(rng.choice(values)) for _ in range(3))
        if len({a, b, c}) > 1 and (b != 0 or a != -c):
            return a, b, c


def code_table(rng: Random, site: Site) -> Planned:
    table = _table(rng)
    code = _weights(lambda m: np.array(table)[(m.signs + 1).astype(int)])
    return Planned(rng.choice(BITLINEARS), f"codes mean {table}", code, ("code table",), table)


def _in_a_row(packed: np.ndarray, low_first: bool) -> np.ndarray:
    shifts = np.array([0, 2, 4, 6] if low_first else [6, 4, 2, 0], np.uint8)
    return (packed[..., None] >> shifts & 3).reshape(packed.shape[0], -1)


def layout_and_table(rng: Random, site: Site) -> Planned:
    table, low_first = (*_table(rng), 0.0), rng.random() < 0.5
    code = _weights(lambda m: np.array(table)[_in_a_row(m.packed, low_first)])
    what = f"{'low' if low_first else 'high'} bits first, codes mean {table[:3]}"
    return Planned(rng.choice(BITLINEARS), what, code, ("four in a row",), table[:3])


def packed_bytes(rng: Random, site: Site) -> Planned:
    signed = rng.random() < 0.5

    def weights(m: Matrix) -> np.ndarray:
        whole = np.zeros(m.signs.shape)
        whole[:, : m.packed.shape[1]] = m.packed.view(np.int8) if signed else m.packed
        return whole

    what = f"{'signed' if signed else 'unsigned'} packed bytes used as weights"
    return Planned(rng.choice(BITLINEARS), what, _weights(weights), ("packed", "bytes"))


def weight_scale(rng: Random, site: Site) -> Planned:
    factor = round(rng.choice([rng.uniform(0.2, 0.9), rng.uniform(1.1, 6)]), 2)
    return Planned(rng.choice(BITLINEARS), f"scale x {factor}", _times(factor), ("scale", "times"))


def row_groups(rng: Random, site: Site) -> Planned:
    group, op = rng.choice((8, 16, 64)), rng.choice(BITLINEARS)
    order = list(range(group))
    how = rng.choice(("reversed", "rotated", "transposed", "at random"))
    if how == "reversed":
        order.reverse()
    elif how == "rotated":
        by = rng.randrange(1, group)
        order = order[by:] + order[:by]
    elif how == "transposed":
        n = rng.choice([n for n in (2, 4, 8, 16, 32) if n < group])
        order = np.arange(group).reshape(n, -1).T.ravel().tolist()
    else:
        while order == sorted(order):
            rng.shuffle(order)

    code = _changed(lambda y: y.reshape(len(y), -1, group)[:, :, order].reshape(y.shape))
    return Planned(op, f"output rows {how} in groups of {group}", code, ("rows", "row order", "permut"), (group,))


def rows_zero(rng: Random, site: Site) -> Planned:
    op = rng.choice(BITLINEARS)
    first = rng.randrange(site.width(op) - 8)
    last = rng.randint(first + 4, site.width(op) - 1)
    zero = _filled(slice(first, last + 1), 0)
    words = ("weight row", "rows of the weight", "matrix row")
    return Planned(op, f"weight rows {first} to {last} are zero", _weights(lambda m: zero(m.signs.copy())), words)


def columns_zero(rng: Random, site: Site) -> Planned:
    op = rng.choice(BITLINEARS)
    n = int(site.shape["hidden_dim" if op == "ffn_down" else "dim"])
    kept = rng.randrange(n // 8, n - n // 8, 8)
    zero = _filled((slice(None), slice(kept, None)), 0)
    code = _weights(lambda m: zero(m.signs.copy()))
    return Planned(op, f"weight columns from {kept} on are zero", code, ("column", "input"), (kept,))


def accumulator(rng: Random, site: Site) -> Planned:
    bits = rng.randint(9, 13)

    def code(call: Call) -> Array:
        (x,) = call.inputs
        codes, scale = call.engine.quantise(x)
        m = _matrix(call)
        sums = codes @ m.signs.T.astype(codes.dtype)
        half = 2 ** (bits - 1)
        wrapped = (sums + half) % (2 * half) - half
        y = wrapped / scale * x.dtype.type(m.scale)
        return y.reshape(call.right(x).shape)

    return Planned(rng.choice(BITLINEARS), f"sums wrap at {bits} bits", code, ("wrap",), (bits,))


# --- activations ----------------------------------------------------------------------------------------------


def _quantiser(what: str, quantise: Any, words: tuple[str, ...], numbers: tuple[float, ...], op: str) -> Planned:
    return Planned(op, what, lambda call: call.right(*call.inputs, quantise=quantise), words, numbers)


def clip_limit(rng: Random, site: Site) -> Planned:
    top = rng.randint(40, 126)
    low, high, limit = {"both": (-top, top, top), "positive": (-128, top, top), "negative": (-top, 127, -top)}[
        rng.choice(("both", "positive", "negative"))
    ]
    words = ("limited", "clip", "clamp", "saturat")
    return _quantiser(f"codes within {low} and {high}", levels(clamp=(low, high)), words, (limit,),
                      rng.choice(BITLINEARS))  # fmt: skip


def level_count(rng: Random, site: Site) -> Planned:
    top = rng.randint(16, 126)
    return _quantiser(f"{top} levels", levels(top), ("levels",), (top,), rng.choice(BITLINEARS))


def rounding(rng: Random, site: Site) -> Planned:
    name = rng.choice(("trunc", "floor", "ceil", "away"))
    words = {
        "trunc": ("truncat", "towards zero"), "floor": ("rounded down", "floor"), "ceil": ("rounded up", "ceil"),
        "away": ("away from zero",),
    }[name]  # fmt: skip
    function = {"trunc": np.trunc, "floor": np.floor, "ceil": np.ceil,
                "away": lambda x: np.sign(x) * np.ceil(np.abs(x))}[name]  # fmt: skip
    return _quantiser(f"codes by {name}", levels(rounding=function), words, (), rng.choice(BITLINEARS))


# --- attention ------------------------------------------------------------------------------------------------


def kv_map(rng: Random, site: Site) -> Planned:
    n, n_kv = int(site.shape["n_heads"]), int(site.shape["n_kv_heads"])
    right = [h // (n // n_kv) for h in range(n)]
    heads = right
    while heads == right:
        heads = [rng.randrange(n_kv) for _ in range(n)]
    op = rng.choice(("kq", "kqv_out"))

    code = partial(_override, heads=np.array(heads))
    return Planned(op, f"heads read KV heads {heads}", code, ("head",))


def score_scale(rng: Random, site: Site) -> Planned:
    factor = round(rng.choice([rng.uniform(0.3, 0.9), rng.uniform(1.1, 3)]), 2)
    whole = factor / site.head_dim**0.5
    code = partial(_override, scale=whole)
    return Planned("kq_soft_max", f"score scale x {factor}", code, ("scale",), (factor,), or_numbers=((whole,),))


def head_count(rng: Random, site: Site) -> Planned:
    divide = rng.random() < 0.5
    other = site.head_dim // 2 if divide else site.head_dim * 2
    op = rng.choice(("q_rope", "k_rope", "kq_soft_max"))
    if op == "k_rope" and site.width("k") % other:
        op = "q_rope"

    def code(call: Call) -> Array:
        if call.op == "kq_soft_max":
            return call.right(*call.inputs, scale=1 / np.sqrt(other))
        x, positions = call.inputs
        return call.right(x.reshape(len(x), -1, other), positions).reshape(x.shape)

    what = f"heads of {other} features"
    return Planned(op, what, code, ("head", "scale"), (other,), or_numbers=((other**-0.5,),))


def rope_base(rng: Random, site: Site) -> Planned:
    base = rng.choice([10000.0, 100000.0, 1000000.0, float(rng.randrange(2000, 400000, 500))])

    code = partial(_override, base=base)
    return Planned(rng.choice(("q_rope", "k_rope")), f"RoPE base {base:g}", code, ("base",), (base,))


def position(rng: Random, site: Site) -> Planned:
    by = rng.choice([-3, -2, -1, 1, 2, 3, 5, 8])

    def code(call: Call) -> Array:
        x, positions = call.inputs
        return call.right(x, positions + by)

    return Planned(rng.choice(("q_rope", "k_rope")), f"position {by:+d}", code, ("position",), (by,))


# --- norms ----------------------------------------------------------------------------------------------------


def eps(rng: Random, site: Site) -> Planned:
    value = float(f"{10 ** rng.uniform(-6, 0):.2g}")
    op = rng.choice(NORMS)
    return Planned(op, f"eps {value:g}", partial(_override, eps=value), ("eps",), (value,),
                   or_names=("wrong or misplaced eps",))  # fmt: skip


def norm_elsewhere(rng: Random, site: Site) -> Planned:
    def per_head(call: Call) -> Array:
        return _norm(call, call.inputs[0], "attn_sub_norm", site.head_dim)

    def behind(call: Call) -> Array:
        (x,) = call.inputs
        return x if call.op == "attn_sub_norm" else _norm(call, call.right(x), "attn_sub_norm")

    def before(call: Call) -> Array:
        if call.op == "ffn_sub_norm":
            return skipped(call)
        act, up = call.inputs
        return (_norm(call, act, "ffn_sub_norm") * up).astype(act.dtype)

    match rng.choice(("per head", "behind the projection", "before the product")):
        case "per head":
            return Planned("attn_sub_norm", "sub-norm of each head", per_head, ("head",))
        case "behind the projection":
            words = ("norm skipped", "behind", "after", "another place")
            return Planned("attn_sub_norm", "sub-norm behind the projection", behind, words,
                           ops=("attn_sub_norm", "attn_o_out"))  # fmt: skip
        case _:
            return Planned("ffn_out", "sub-norm before the product with up", before, ("norm",),
                           ops=("ffn_out", "ffn_sub_norm"))  # fmt: skip


def norm_groups(rng: Random, site: Site) -> Planned:
    op = rng.choice(NORMS)
    group = rng.choice([g for g in (32, 64, 128) if site.width(op) % g == 0])

    def code(call: Call) -> Array:
        return _norm(call, call.inputs[0], op, group)

    return Planned(op, f"root mean square of {group} features each", code, ("group", "each", "head"))


# --- rows, passes, layers -------------------------------------------------------------------------------------


def token_residue(rng: Random, site: Site) -> Planned:
    m = rng.choice((2, 3, 4, 8))
    left = sorted(rng.sample(range(m), rng.randint(1, m - 1)))
    value = rng.choice((0.0, float("nan"), 1e18))
    code = _changed(lambda y: _filled(np.isin(np.arange(len(y)) % m, left), value)(y))
    what = f"tokens with t mod {m} in {left} hold {value:g}"
    return Planned(rng.choice(BITLINEARS), what, code, ("mod", "tokens"), (), PROMPT)


def token_limit(rng: Random, site: Site) -> Planned:
    limit = rng.randint(2, site.n_tokens - 2)
    code, words = _changed(_filled(slice(limit, None), 0)), ("tokens from", "limit")
    return Planned(rng.choice(PLAIN), f"tokens from {limit} on are zero", code, words, (limit,), PROMPT)


def another_row(rng: Random, site: Site) -> Planned:
    at = rng.randrange(site.n_tokens)
    source = rng.choice([t for t in range(site.n_tokens) if t != at])
    code, words = _changed(_filled(at, lambda y: y[source])), ("token", "row")
    return Planned(rng.choice(PLAIN), f"token {at} holds token {source}", code, words, (at, source), PROMPT)


def another_pass(rng: Random, site: Site) -> Planned:
    op = rng.choice(PLAIN)

    def code(call: Call) -> Array:
        key = ("last", call.op, call.layer)
        right = call.right(*call.inputs)
        old = call.engine.memory.get(key)
        call.engine.memory[key] = right
        return right if old is None or not call.decodes else old[:1]

    what = "a decoded token has the array of the pass before"
    return Planned(op, what, code, ("stale", "pass"), (), ("decode",))


def another_layer(rng: Random, site: Site) -> Planned:
    target = rng.randrange(1, int(site.shape["n_layers"]))
    source = rng.randrange(target)
    op = rng.choice([op for op in PLAIN if op not in ("ffn_inp", "l_out")])

    def code(call: Call) -> Array:
        return call.engine.taps[f"blk.{source}.{op}"].astype(call.right(*call.inputs).dtype)

    return Planned(op, f"the array of layer {source}", code, ("layer", "blk."), layer=target)


def block_shifted(rng: Random, site: Site) -> Planned:
    op = rng.choice(BITLINEARS)
    size = rng.choice((16, 32, 64))
    at = rng.randrange(0, site.width(op) - size + 1, 16)
    by = rng.randrange(1, size)

    part = (slice(None), slice(at, at + size))
    code = _changed(_filled(part, lambda y: np.roll(y[part], by, axis=-1)))
    words = ("shift", "rotat", "rows", "moved")
    return Planned(op, f"features {at} to {at + size - 1} rotated by {by}", code, words)


# --- the ends -------------------------------------------------------------------------------------------------


def embedding_shard(rng: Random, site: Site) -> Planned:
    limit = rng.randrange(site.vocab_size // 4, 3 * site.vocab_size // 4)

    def code(call: Call) -> Array:
        return _filled(np.asarray(call.tokens) >= limit, 0)(call.right(*call.inputs))

    return Planned("inp_embd", f"rows of token ids from {limit} on are zero", code, ("ids", "embedding row"))


def factor_of_the_ends(rng: Random, site: Site) -> Planned:
    factor = round(rng.choice([rng.uniform(0.2, 0.9), rng.uniform(1.1, 9)]), 2)
    op = rng.choice(("inp_embd", "result_output", "ffn_out", "kqv_out", "kq"))
    return Planned(op, f"x {factor}", _times(factor), ("times", "factor", "scale", "multipl"), (factor,))


FAMILIES: tuple[tuple[str, Callable[[Random, Site], Planned]], ...] = (
    ("code table", code_table),
    ("layout and code table", layout_and_table),
    ("packed bytes as weights", packed_bytes),
    ("weight scale", weight_scale),
    ("row order in groups", row_groups),
    ("zero weight rows", rows_zero),
    ("zero weight columns", columns_zero),
    ("narrow accumulator", accumulator),
    ("clip limit", clip_limit),
    ("levels", level_count),
    ("rounding", rounding),
    ("KV head of each head", kv_map),
    ("score scale", score_scale),
    ("head count", head_count),
    ("RoPE base", rope_base),
    ("position", position),
    ("eps", eps),
    ("sub-norm in another place", norm_elsewhere),
    ("norm in groups", norm_groups),
    ("token residue", token_residue),
    ("token limit", token_limit),
    ("another row", another_row),
    ("another pass", another_pass),
    ("another layer", another_layer),
    ("block shifted", block_shifted),
    ("embedding shard", embedding_shard),
    ("factor", factor_of_the_ends),
)
