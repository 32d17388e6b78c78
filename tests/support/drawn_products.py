"""Wrong matrix products with drawn parameters, computed from bytes and loops; shares no code with the diagnosis.

Each ``draw_*`` takes a random generator and an ``Inputs``, and returns what a broken engine would record and the
name that a diagnosis has to give (or several: equal on this input).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bitnet_py.quants import pack_codes
from crossval.diagnose.variants import Context
from crossval.model.config import SpecConfig
from crossval.model.graphs import op_table
from crossval.model.kinds import TernaryMatrix
from crossval.passes import PassPlan


@dataclass(frozen=True)
class Inputs:
    """A BitLinear: activations ``(n_tokens, cols)`` float32, signs ``(rows, cols)``, the scale of the weights."""

    x: np.ndarray
    signs: np.ndarray
    scale: float

    @property
    def data(self) -> np.ndarray:
        """The packed bytes ``(rows, cols / 4)``."""
        n, k = self.signs.shape
        return np.frombuffer(pack_codes((self.signs + 1).astype(np.uint8)), np.uint8)[: n * k // 4].reshape(
            n, k // 4
        )


def inputs(rng: np.random.Generator, n_tokens: int | None = None) -> Inputs:
    """Draw the shape and the values."""
    n_tokens = int(rng.choice([1, 2, 5, 8, 9, 17])) if n_tokens is None else n_tokens
    n, k = int(rng.choice([64, 96, 256, 640])), int(rng.choice([256, 512, 768]))
    x = (rng.normal(size=(n_tokens, k)) * rng.uniform(0.1, 5, (n_tokens, 1))).astype(np.float32)
    return Inputs(x, rng.integers(-1, 2, (n, k)).astype(np.int64), float(np.float32(rng.uniform(0.3, 2.5))))


def quantised(x: np.ndarray, levels: float = 127.0, rounding: Callable = np.rint) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and the scale they were multiplied by."""
    scale = np.float32(levels) / np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-5))
    codes = np.clip(rounding((x * scale).astype(np.float32)), -128, 127)
    return codes.astype(np.float64), scale.astype(np.float64)


def product(given: Inputs, weights: np.ndarray | None = None, codes=None, scale=None) -> np.ndarray:
    """Return the correct output, with parts replaced."""
    own, unit = quantised(given.x)
    codes = own if codes is None else codes
    unit = unit if scale is None else scale
    return codes @ (given.signs if weights is None else weights).T.astype(np.float64) / unit * given.scale


def number(v: float) -> str:
    """A number of a table as names write it."""
    return f"+{v:g}" if v > 0 else f"{v:g}"


# --- layouts and tables ---------------------------------------------------------------------------------------


def _element(row: np.ndarray, i: int, layout: str) -> int:
    """The code of element i of a row of bytes."""
    if layout == "codes read four in a row":
        return row[i // 4] >> (6 - 2 * (i % 4)) & 3
    if layout == "codes read four in a row, low bits first":
        return row[i // 4] >> (2 * (i % 4)) & 3
    block = int(layout.split()[-1]) if layout else 128
    start, j = i // block * block // 4, i % block
    return row[start + j % (block // 4)] >> (6 - 2 * (j // (block // 4))) & 3


LAYOUTS = (
    "",
    "codes read four in a row",
    "codes read four in a row, low bits first",
    "block of 32",
    "block of 64",
)


def read(given: Inputs, layout: str) -> np.ndarray:
    """Return the codes of all weights, read in a layout."""
    cols, data = given.signs.shape[1], given.data.T
    return np.stack([_element(data, i, layout) for i in range(cols)], axis=1).astype(np.int64)


def table(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draw what the codes stand for: whole numbers, halves, or two places; not in proportion to -1, 0, +1."""
    while True:
        step = rng.choice([1.0, 0.5, 0.01])
        a, b, c = (
            float(np.round(rng.integers(-int(2.5 / step), int(2.5 / step) + 1) * step, 2)) for _ in range(3)
        )
        if (b or a != -c) and not a == b == c:
            return a, b, c


def named_table(values: tuple[float, float, float]) -> str:
    """The name of a table."""
    name = "code table " + ", ".join(map(number, values))
    if np.allclose(np.subtract(values, values[1]), (-1, 0, 1)):
        times = round(1 - values[1], 6)
        often = {2.0: "twice", 0.0: "not at all"}.get(times, f"{times:g} times")
        name += f" (activation sum subtracted {often})"
    return name


def draw_table(rng, given):
    layout, values = str(rng.choice(LAYOUTS)), table(rng)
    output = product(given, np.asarray((*values, 0.0))[read(given, layout)])
    return output, "; ".join(filter(None, [layout, named_table(values)]))


def draw_sum_twice(rng, given):
    """The activation sum subtracted another number of times, under a wrong layout."""
    layout, times = str(rng.choice(LAYOUTS[1:])), int(rng.choice([0, 2, 3]))
    codes, scale = quantised(given.x)
    sums = codes @ read(given, layout).T.astype(np.float64) - times * codes.sum(axis=1, keepdims=True)
    values = tuple(float(v - times) for v in range(3))
    return sums / scale * given.scale, f"{layout}; {named_table(values)}"


def draw_layout_and_rounding(rng, given):
    layout = str(rng.choice(LAYOUTS[1:]))
    name, rounding = [("truncation", np.trunc), ("rounded down", np.floor), ("rounded up", np.ceil)][
        rng.integers(3)
    ]
    codes, scale = quantised(given.x, rounding=rounding)
    return product(given, read(given, layout) - 1, codes, scale), f"{layout}; {name}"


# --- quantiser ------------------------------------------------------------------------------------------------


def draw_limit(rng, given):
    limit = float(rng.integers(1, 127))
    codes, _ = quantised(given.x)
    side = rng.integers(3)
    if side == 0:
        return product(given, codes=np.clip(codes, -limit, limit)), f"codes limited to {limit:g}"
    if side == 1:
        if codes.max() <= limit:
            return None
        return product(given, codes=np.minimum(codes, limit)), (
            f"positive codes limited to {limit:g}",
            "codes limited",
        )
    if codes.min() >= -limit:
        return None
    return product(given, codes=np.maximum(codes, -limit)), (
        f"negative codes limited to {-limit:g}",
        "codes limited",
    )


def draw_levels(rng, given):
    levels = float(rng.integers(2, 127))
    name, rounding = [
        ("", np.rint),
        ("truncation", np.trunc),
        ("rounded down", np.floor),
        ("rounded up", np.ceil),
        ("rounded away from zero", lambda x: np.sign(x) * np.ceil(np.abs(x))),
    ][rng.integers(5)]
    codes, scale = quantised(given.x, levels, rounding)
    words = "; ".join(filter(None, [f"{levels:g} levels instead of 127", name]))
    return product(given, codes=codes, scale=scale), (words, "wrong number of levels")


def draw_row_scale(rng, given):
    n, group = given.x.shape[0], int(rng.choice([2, 4, 8]))
    if n <= group:
        return None
    codes, scale = quantised(given.x)
    source = np.arange(n) // group * group
    unit = scale[source]
    codes = np.clip(np.rint((given.x * unit.astype(np.float32)).astype(np.float32)), -128, 127)
    return product(given, codes=codes, scale=unit), (
        f"input scale of the first of {group} tokens",
        "input scale of another row",
    )


def draw_row_scale_back(rng, given):
    n, group = given.x.shape[0], int(rng.choice([2, 4, 8]))
    if n <= group:
        return None
    codes, scale = quantised(given.x)
    last = np.minimum(np.arange(n) // group * group + group, n) - 1
    return product(given, codes=codes, scale=scale[last]), (
        f"sums rescaled by the input scale of the last of {group} tokens",
        "sums rescaled by another row's input scale",
    )


# --- places ---------------------------------------------------------------------------------------------------


def draw_rows_in_groups(rng, given):
    n = given.signs.shape[0]
    group = int(rng.choice([g for g in (4, 8, 16, 32, 64) if n % g == 0]))
    inner = rng.permutation(group)
    if np.array_equal(inner, np.arange(group)) or given.x.shape[0] == 1:
        return None
    order = np.arange(n) // group * group + np.tile(inner, n // group)
    return product(given)[:, order], ("output rows in another order", f"output rows in groups of {group}:")


def draw_shift(rng, given):
    n, k = given.signs.shape
    by = int(rng.integers(1, k)) * int(rng.choice([-1, 1]))
    if rng.integers(2):
        flat = np.zeros(n * k, np.int64)
        source = given.signs.reshape(-1)
        if by > 0:
            flat[:-by] = source[by:]
        else:
            flat[-by:] = source[:by]
        return product(given, flat.reshape(n, k)), (
            f"weights shifted by {by:+d} within the tensor",
            "weights shifted",
        )
    rolled = np.stack([[row[(j + by) % k] for j in range(k)] for row in given.signs])
    by = (by + k // 2 - 1) % k - (k // 2 - 1)
    return product(given, rolled), f"weights shifted by {by:+d} within each row"


def draw_block(rng, given):
    k = given.signs.shape[1]
    a, b = (int(v) for v in rng.choice(k // 128, 2, replace=False))
    weights = given.signs.copy()
    weights[:, a * 128 : (a + 1) * 128] = given.signs[:, b * 128 : (b + 1) * 128]
    return product(given, weights), f"block {a} of 128 inputs multiplied with the weights of block {b}"


def draw_lost_columns(rng, given):
    k = given.signs.shape[1]
    a, b = sorted(int(v) for v in rng.choice(k + 1, 2, replace=False))
    if b - a < 2 or b - a > k - 2:
        return None
    weights = given.signs.copy()
    weights[:, a:b] = 0
    return product(given, weights), f"inputs {a} to {b} (exclusive) count as zero"


def draw_lost_products(rng, given):
    """Products with the codes 0, 1, 2 left out, while the activation sum that is subtracted is whole."""
    k = given.signs.shape[1]
    a, b = sorted(int(v) for v in rng.choice(k + 1, 2, replace=False))
    if b - a < 2 or b - a > k - 2:
        return None
    codes, scale = quantised(given.x)
    kept = np.r_[:a, b:k]
    sums = codes[:, kept] @ (given.signs[:, kept] + 1).T.astype(np.float64) - codes.sum(axis=1, keepdims=True)
    return (
        sums / scale * given.scale,
        f"products of inputs {a} to {b} (exclusive) left out, not their activation sum",
    )


def draw_quarter(rng, given):
    """One quarter of every block of 128 meets the inputs, or the weights, of another."""
    k = given.signs.shape[1]
    a, b = (int(v) for v in rng.choice(4, 2, replace=False))
    source = np.array([j + 32 * (b - a) if j % 128 // 32 == a else j for j in range(k)])
    codes, scale = quantised(given.x)
    if rng.integers(2):
        name = f"quarter {a} of each block with the weights of quarter {b}"
        return product(given, given.signs[:, source]), (name, "quarters of blocks")
    sums = codes[:, source] @ (given.signs + 1).T.astype(np.float64) - codes.sum(axis=1, keepdims=True)
    name = f"quarter {a} of each block with the inputs of quarter {b}"
    return sums / scale * given.scale, (name, "quarters of blocks")


def draw_lost_rows(rng, given):
    n = given.signs.shape[0]
    a, b = sorted(int(v) for v in rng.choice(n + 1, 2, replace=False))
    if b - a < 2 or b - a == n:
        return None
    weights = given.signs.copy()
    weights[a:b] = 0
    return product(given, weights), f"features {a} to {b} (exclusive) zero"


def draw_bytes(rng, given):
    values = given.data.astype(np.int8).astype(np.int64)
    codes, scale = quantised(given.x)
    quarter = codes[:, : values.shape[1]]
    return quarter @ values.T / scale * given.scale, "packed bytes used as weights (signed)"


def draw_wrap(rng, given):
    """Partial sums over drawn stretches of inputs, kept in a drawn number of bits."""
    bits, width = int(rng.choice([9, 10, 12])), int(rng.choice([32, 64, 256]))
    codes, scale = quantised(given.x)
    k, total = given.signs.shape[1], 0.0
    for first in range(0, k, width):
        at = slice(first, first + width)
        part = codes[:, at] @ given.signs[:, at].T
        total = total + ((part + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1))
    output = total / scale * given.scale
    return None if np.array_equal(output, product(given)) else (output, f"{bits}-bit partial sums wrap")


# --- tokens ---------------------------------------------------------------------------------------------------


def garbage(rng, shape):
    """Contents of uninitialised memory: NaN, huge and tiny numbers, zeros."""
    found = rng.choice([np.nan, np.inf, 2.8e18, -1e34, 1e-39, 0.0, 0.31], size=shape)
    found[..., 0] = 2.8e18
    return found


def draw_unwritten(rng, given):
    n, group = given.x.shape[0], int(rng.choice([2, 4, 8]))
    if n <= group:
        return None
    remainder = int(rng.integers(group))
    bad = np.asarray([t % group != remainder for t in range(n)])
    if np.count_nonzero(~bad) < 2 or group == 2:
        return None  # one good token is no rule
    output = product(given)
    output[bad] = garbage(rng, output[bad].shape)
    return output, f"in passes of several tokens, tokens t mod {group} ≠ {remainder} never written"


def draw_three_at_once(rng, given):
    """Layout, table and unwritten tokens."""
    output, name = draw_sum_twice(rng, given)
    broken = draw_unwritten(rng, given)
    if broken is None:
        return None
    bad = ~np.isfinite(broken[0]).all(axis=1) | (np.abs(np.nan_to_num(broken[0])) > 1e15).any(axis=1)
    return np.where(bad[:, None], broken[0], output), f"{name}; {broken[1]}"


def draw_layout_and_lost_rows(rng, given):
    output, name = draw_table(rng, given)
    n = given.signs.shape[0]
    a = int(rng.integers(1, n - 8))
    b = int(rng.integers(a + 5, n))
    output[:, a:b] = 0.0
    return output, f"{name}; features {a} to {b} (exclusive) zero"


def draw_layout_and_lost_columns(rng, given):
    layout, times = str(rng.choice(LAYOUTS[1:])), int(rng.choice([0, 1, 2]))
    weights, k = read(given, layout) - times, given.signs.shape[1]
    a = int(rng.integers(0, k // 64)) * 32
    b = int(rng.integers(a // 32 + 2, k // 32)) * 32
    weights[:, a:b] = 0
    said = "" if times == 1 else "; " + named_table(tuple(float(v - times) for v in range(3)))
    return product(given, weights), f"{layout}{said}; inputs {a} to {b} (exclusive) count as zero"


def draw_four_at_once(rng, given):
    """Layout, table, unwritten tokens, and rows that are lost."""
    made = draw_three_at_once(rng, given)
    if made is None:
        return None
    output, name = made
    n = given.signs.shape[0]
    a = int(rng.integers(1, n - 16))
    good = np.abs(np.nan_to_num(output, nan=1e30)).max(axis=1) < 1e15
    output[np.ix_(good, np.arange(a, a + 12))] = 0.0
    what, _, _ = name.partition("; in passes")
    return output, f"{what}; features {a} to {a + 12} (exclusive) zero; tokens"


def draw_layout_in_some_tokens(rng, given):
    """Tokens left over after groups of four use another kernel, which reads another layout."""
    n = given.x.shape[0]
    if n < 5 or n % 4 == 0:
        return None
    layout = str(rng.choice(LAYOUTS[1:]))
    output = product(given)
    rest = replace(given, x=given.x[n // 4 * 4 :])
    output[n // 4 * 4 :] = product(rest, read(given, layout) - 1)
    return output, f"{layout}, only in token"


def draw_token_order(rng, given):
    n = given.x.shape[0]
    if n < 3:
        return None
    order = rng.permutation(n)
    if np.array_equal(order, np.arange(n)):
        return None
    return product(given)[order], ("tokens hold another's result", "tokens ")


DRAWN = {
    name.removeprefix("draw_"): function
    for name, function in sorted(globals().items())
    if name.startswith("draw_")
}


# --- as a recorded operation ----------------------------------------------------------------------------------


class _Tensors(dict):
    """The product's own tensor; any other is drawn when asked for."""

    def __init__(self, config: SpecConfig, own: dict[str, TernaryMatrix]) -> None:
        super().__init__(own)
        self._config = config

    def __missing__(self, name: str) -> TernaryMatrix:
        c = self._config
        q_dim, kv_dim, up = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, (c.hidden_dim, c.dim)
        shape = {"attn_q": (q_dim, c.dim), "attn_output": (c.dim, q_dim), "ffn_down": up[::-1]}.get(
            name.split(".")[2], up if "ffn" in name else (kv_dim, c.dim)
        )
        rng = np.random.default_rng(list(name.encode()))
        self[name] = TernaryMatrix(rng.integers(-1, 2, shape).astype(np.float32), float(rng.uniform(0.3, 2.0)))
        return self[name]


def recorded(given: Inputs, output: np.ndarray, start: int = 0) -> Context:
    """Return the product as layer 0's ``q`` of one head, with this output recorded."""
    (n, k), n_tokens = given.signs.shape, given.x.shape[0]
    config = SpecConfig(1, 1, 1, n, k, 4 * k, 300, 64, 10000.0, 1e-5)
    op = next(op for op in op_table(config) if op.output == "blk.0.q")
    tensors = _Tensors(config, {op.weights[0]: TernaryMatrix(given.signs.astype(np.float32), given.scale)})
    rows = tuple(range(n_tokens))
    plan = PassPlan("prefill", rows, start)
    with np.errstate(over="ignore", invalid="ignore"):
        array = output.astype(np.float32).reshape(n_tokens, 1, n)
    return Context(op, config, tensors, plan, rows, (given.x,), array)
