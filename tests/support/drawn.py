"""Faults drawn at random, place and parameter, in every operation except the products with ternary weights.

Written from their descriptions in float32, row by row where that is clearer, and sharing nothing with
``crossval.diagnose.variants``: what an engine with such a mistake would have recorded, and what the diagnosis
has to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from crossval.passes import PassRecord

Rng = np.random.Generator
Array = np.ndarray[Any, np.dtype[Any]]
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Scene:
    """One operation of a healthy recording, to be modified."""

    op: str
    layer: int | None
    records: Sequence[PassRecord]
    index: int
    weights: Any
    """Tensors by name, as the specification reads them."""

    @property
    def config(self) -> Any:
        return self.weights.config

    @property
    def ids(self) -> list[int]:
        return list(self.records[self.index].plan.token_ids)

    @property
    def positions(self) -> Array:
        return np.asarray(self.records[self.index].plan.positions)

    def tap(self, name: str, layer: int | None = None, index: int | None = None) -> Array:
        taken = self.records[self.index if index is None else index].taps
        layer = self.layer if layer is None else layer
        return taken[name if name in taken else f"blk.{layer}.{name}"].array.astype(np.float64)

    def cells(self, name: str) -> Array:
        return np.concatenate([self.tap(name, index=i) for i in range(self.index + 1)])

    @property
    def output(self) -> Array:
        return self.tap(self.op)

    @property
    def layer_input(self) -> str:
        return f"blk.{self.layer - 1}.l_out" if self.layer else "inp_embd"

    @property
    def normed(self) -> str:
        """What this norm reads."""
        before = {"attn_norm": self.layer_input, "ffn_norm": "ffn_inp", "attn_sub_norm": "kqv_out",
                  "ffn_sub_norm": "ffn_out"}  # fmt: skip
        return before.get(self.op, f"blk.{self.config.n_layers - 1}.l_out")

    @property
    def norm_weight(self) -> Array:
        name = "output_norm.weight" if self.layer is None else f"blk.{self.layer}.{self.op}.weight"
        return np.asarray(self.weights[name], np.float64)


@dataclass(frozen=True)
class Drawn:
    """What an engine with a fault would have recorded, and the correct diagnoses."""

    recorded: Array
    words: str
    """How the name has to start."""
    numbers: tuple[float, ...] = ()
    """Numbers it must contain, in order, within a hundredth."""
    also: tuple[str, ...] = ()
    """Other names with the same meaning."""

    def is_named(self, name: str) -> bool:
        if any(fnmatchcase(name, other) for other in self.also):
            return True
        if not name.startswith(self.words):
            return False
        found = [float(n) for n in _NUMBER.findall(name[len(self.words) :])]
        return len(found) >= len(self.numbers) and all(
            abs(a - b) <= 1e-2 * max(abs(b), 1e-9) for a, b in zip(found, self.numbers, strict=False)
        )


# --- attention ------------------------------------------------------------------------------------------------


def _attend(scene: Scene, queries: Sequence[int], keys: Sequence[int]) -> Array:
    n_heads = scene.config.n_heads
    if scene.op == "kq":
        q, k = scene.tap("q_rope"), scene.cells("k_rope")
        return np.stack([q[:, queries[h]] @ k[:, keys[h]].T for h in range(n_heads)])
    weights, v = scene.tap("kq_soft_max"), scene.cells("v")
    return np.concatenate([weights[queries[h]] @ v[:, keys[h]] for h in range(n_heads)], axis=-1)


def head_map(rng: Rng, scene: Scene) -> Drawn | None:
    n, n_kv = scene.config.n_heads, scene.config.n_kv_heads
    keys = rng.integers(0, n_kv, n)
    right = np.arange(n) // (n // n_kv)
    if (keys == right).all():
        return None
    named = {
        tuple(np.arange(n) % n_kv): "GQA heads tiled",
        (0,) * n: "all heads read kv head 0",
        tuple(n_kv - 1 - right): "wrong kv head",
        tuple((right + 1) % n_kv): "wrong kv head",
    }
    also = (named[tuple(keys.tolist())],) if tuple(keys.tolist()) in named else ()
    also += ("kv heads in reverse", "kv head off by one") if "wrong kv head" in also else ()
    return Drawn(_attend(scene, range(n), keys), "query heads use KV heads (", tuple(keys.astype(float)), also)


def query_order(rng: Rng, scene: Scene) -> Drawn | None:
    n, n_kv = scene.config.n_heads, scene.config.n_kv_heads
    order = rng.permutation(n)
    right = np.arange(n) // (n // n_kv)
    if (order == np.arange(n)).all():
        return None
    words = "heads hold those" if (right[order] == right).all() else "query heads read as ("
    return Drawn(_attend(scene, order, right), words, ())


def output_heads(rng: Rng, scene: Scene) -> Drawn | None:
    order = rng.permutation(scene.config.n_heads)
    if (order == np.arange(order.size)).all():
        return None
    out = scene.output
    if scene.op == "kqv_out":
        parts = np.split(out, scene.config.n_heads, axis=-1)
        moved = np.concatenate([parts[h] for h in order], axis=-1)
    else:
        moved = out[order] if scene.op in ("kq", "kq_soft_max") else out[:, order]
    return Drawn(moved, "heads hold those of heads (", tuple(order.astype(float)))


def _softmax(
    scene: Scene, change: Callable[[Array], Array], sees: Callable[[int, int], bool], sink: Any = 0.0
) -> Array:
    scores = scene.tap("kq") / np.sqrt(scene.config.head_dim)
    out = np.zeros_like(scores)
    for row, position in enumerate(scene.positions):
        seen = np.array([sees(int(position), key) for key in range(scores.shape[-1])])
        e = np.exp(change(scores[:, row])) * seen
        total = e.sum(axis=-1, keepdims=True) + np.reshape(sink, (-1, 1))
        out[:, row] = np.where(total > 0, e / np.where(total > 0, total, 1.0), 0.0)
    return out


def _causal(p: int, k: int) -> bool:
    return k <= p


def score_scale(rng: Rng, scene: Scene) -> Drawn:
    factor = float(np.exp(rng.uniform(-1.5, 1.5)))
    scale = factor / np.sqrt(scene.config.head_dim)
    return Drawn(_softmax(scene, lambda s: s * factor, _causal), "score scale ", (scale,))


def soft_cap(rng: Rng, scene: Scene) -> Drawn | None:
    largest = np.abs(scene.tap("kq") / np.sqrt(scene.config.head_dim)).max()
    cap = float(largest * np.exp(rng.uniform(-1.0, 1.0)))
    return Drawn(_softmax(scene, lambda s: cap * np.tanh(s / cap), _causal), "scores capped at ", (cap,))


def sink(rng: Rng, scene: Scene) -> Drawn:
    term = float(np.exp(rng.uniform(-1, 2)))
    return Drawn(_softmax(scene, lambda s: s, _causal, term), "attention sink of ", (term,))


def sinks(rng: Rng, scene: Scene) -> Drawn:
    terms = np.exp(rng.uniform(-1, 2, scene.config.n_heads))
    return Drawn(_softmax(scene, lambda s: s, _causal, terms), "attention sink of ", tuple(terms))


def mask_offset(rng: Rng, scene: Scene) -> Drawn | None:
    offset = int(rng.choice([-3, -2, 2, 3, 4]))
    if len(scene.positions) < abs(offset) + 2:
        return None
    return Drawn(
        _softmax(scene, lambda s: s, lambda p, k: k <= p + offset), "mask off by ", (offset,), ("mask missing",)
    )


def window(rng: Rng, scene: Scene) -> Drawn | None:
    last = int(scene.positions[-1])
    if last < 3:
        return None
    width = int(rng.integers(1, last))
    also = ("keys of earlier tokens hidden",)
    return Drawn(
        _softmax(scene, lambda s: s, lambda p, k: p - width < k <= p), "sliding window of ", (width,), also
    )


def chunks(rng: Rng, scene: Scene) -> Drawn | None:
    size = int(rng.integers(2, 6))
    if len(scene.positions) < size + 2:
        return None
    sees = lambda p, k: p // size * size <= k <= p  # noqa: E731
    return Drawn(_softmax(scene, lambda s: s, sees), "attention in chunks of ", (size,))


def _with_cells(scene: Scene, cells: Array) -> Array:
    repeat = scene.config.n_heads // scene.config.n_kv_heads
    heads = range(scene.config.n_heads)
    if scene.op == "kq":
        q = scene.tap("q_rope")
        return np.stack([q[:, h] @ cells[:, h // repeat].T for h in heads])
    weights = scene.tap("kq_soft_max")
    return np.concatenate([weights[h] @ cells[:, h // repeat] for h in heads], axis=-1)


def cell_moved(rng: Rng, scene: Scene) -> Drawn | None:
    cells = scene.cells("k_rope" if scene.op == "kq" else "v").copy()
    a, b = (int(i) for i in rng.choice(len(cells), 2, replace=False))
    cells[a] = cells[b]
    also = (f"cell {a} holds the key or value of position {b}", "own cells hold the token before")
    also += ("one wrong KV cell", "cell 0 overwritten by the newest", "own cells stored one too early")
    return Drawn(_with_cells(scene, cells), f"KV positions {a} read as ", (b,), also)


def cells_swapped(rng: Rng, scene: Scene) -> Drawn | None:
    cells = scene.cells("k_rope" if scene.op == "kq" else "v").copy()
    a, b = sorted(int(i) for i in rng.choice(len(cells), 2, replace=False))
    cells[[a, b]] = cells[[b, a]]
    return Drawn(_with_cells(scene, cells), f"KV positions {a}, {b} read as ", (b, a))


def cells_of_layer(rng: Rng, scene: Scene) -> Drawn:
    tap = "k_rope" if scene.op == "kq" else "v"
    other = (scene.layer + 1) % scene.config.n_layers
    cells = np.concatenate([scene.tap(tap, other, i) for i in range(scene.index + 1)])
    return Drawn(_with_cells(scene, cells), "KV positions all read as those of layer ", (other,))


# --- RoPE -----------------------------------------------------------------------------------------------------


def _turned(x: Array, angles: Array, pairs: Sequence[tuple[int, int]]) -> Array:
    out = x.copy()
    for n, (a, b) in enumerate(pairs):
        c, s = np.cos(angles[:, n])[:, None], np.sin(angles[:, n])[:, None]
        out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return out


def _rope(scene: Scene, positions: Array, base: float | None = None) -> Array:
    x = scene.tap(scene.op[0])
    d = x.shape[-1]
    frequency = np.array([(base or scene.config.rope_base) ** (-2.0 * i / d) for i in range(d // 2)])
    return _turned(x, np.outer(positions, frequency), [(i, i + d // 2) for i in range(d // 2)])


_ANY = ("other positions",)


def rope_base(rng: Rng, scene: Scene) -> Drawn | None:
    if not scene.positions.any():
        return None
    base = float(np.exp(rng.uniform(np.log(50), np.log(1e7))))
    return Drawn(_rope(scene, scene.positions, base), "RoPE base ", (base,))


def rope_slowed(rng: Rng, scene: Scene) -> Drawn | None:
    """As llama 3.1 extends its context: the slower pairs rotate more slowly still."""
    if len(scene.positions) < 4:
        return None
    x = scene.tap(scene.op[0])
    half = x.shape[-1] // 2
    first, slower = int(rng.integers(1, half // 2)), float(rng.uniform(0.1, 0.5))
    frequency = scene.config.rope_base ** (-np.arange(half) / half) * np.where(np.arange(half) < first, 1, slower)
    out = _turned(x, np.outer(scene.positions, frequency), [(i, i + half) for i in range(half)])
    return Drawn(out, f"RoPE frequencies: pairs {first}")


def rope_offset(rng: Rng, scene: Scene) -> Drawn:
    offset = int(rng.choice([-9, -7, -5, -4, -3, 3, 4, 5, 7, 11, 16]))
    also = _ANY if len(scene.positions) == 1 else ()
    if offset < 0 and -offset <= scene.positions[0]:
        also += (f"positions restart after {-offset}",)  # the same where a pass started there
    return Drawn(_rope(scene, scene.positions + offset), "position ", (offset,), also)


def rope_scale(rng: Rng, scene: Scene) -> Drawn | None:
    if not scene.positions.any():
        return None
    scale = float(np.exp(rng.uniform(-2, 1)))
    also = _ANY if len(scene.positions) == 1 else ()
    return Drawn(_rope(scene, scene.positions * scale), "positions times ", (scale,), also)


def rope_limit(rng: Rng, scene: Scene) -> Drawn | None:
    if len(scene.positions) < 4:
        return None
    limit = int(rng.integers(scene.positions[0] + 1, scene.positions[-1]))
    also = _ANY if limit == scene.positions[-2] else ()
    return Drawn(
        _rope(scene, np.minimum(scene.positions, limit)), "rotated by positions that stop at ", (limit,), also
    )


def rope_part(rng: Rng, scene: Scene) -> Drawn | None:
    if not scene.positions.any():
        return None
    x = scene.tap(scene.op[0])
    d = x.shape[-1]
    size = 2 * int(rng.integers(1, d // 2))
    own = bool(rng.integers(2))
    frequency = np.array([scene.config.rope_base ** (-2.0 * i / (size if own else d)) for i in range(size // 2)])
    out = _turned(x, np.outer(scene.positions, frequency), [(i, i + size // 2) for i in range(size // 2)])
    return Drawn(out, "rotated only the first ", (size, d), ("half of each head rotated",))


def rope_pairs(rng: Rng, scene: Scene) -> Drawn | None:
    if not scene.positions.any():
        return None
    x = scene.tap(scene.op[0])
    d = x.shape[-1]
    kept = int(rng.integers(1, d // 2))
    frequency = np.array([scene.config.rope_base ** (-2.0 * i / d) * (i < kept) for i in range(d // 2)])
    out = _turned(x, np.outer(scene.positions, frequency), [(i, i + d // 2) for i in range(d // 2)])
    return Drawn(out, "rotated only the first ", (kept, d // 2))


# --- norms ----------------------------------------------------------------------------------------------------


def _normed(x: Array, weight: Array, eps: float, power: float = 0.5) -> Array:
    return np.stack([row / (np.mean(row**2) + eps) ** power for row in x]) * weight


def norm_eps(rng: Rng, scene: Scene) -> Drawn | None:
    x = scene.tap(scene.normed)
    eps = float(np.exp(rng.uniform(np.log(1e-3), np.log(1.0))) * np.mean(x**2))
    eps = float(f"{eps:.2g}")
    return Drawn(_normed(x, scene.norm_weight, eps), "eps ", (eps,), ("wrong or misplaced eps",))


def norm_offset(rng: Rng, scene: Scene) -> Drawn:
    c = float(rng.uniform(-2, 2))
    return Drawn(
        _normed(scene.tap(scene.normed), scene.norm_weight + c, scene.config.rms_eps), "norm weight plus ", (c,)
    )


def norm_power(rng: Rng, scene: Scene) -> Drawn:
    p = float(rng.choice([-1.0, 0.5, 1.5, 3.0]))
    w = scene.norm_weight
    return Drawn(
        _normed(scene.tap(scene.normed), np.sign(w) * np.abs(w) ** p, scene.config.rms_eps),
        "norm weight to the power ",
        (p,),
    )


def norm_groups(rng: Rng, scene: Scene) -> Drawn | None:
    x = scene.tap(scene.normed)
    n = x.shape[-1]
    size = int(rng.choice([g for g in range(4, n) if n % g == 0]))
    out = x.copy()
    for first in range(0, n, size):
        part = slice(first, first + size)
        out[:, part] = _normed(x[:, part], np.ones(size), scene.config.rms_eps)
    return Drawn(out * scene.norm_weight, "norm in groups of ", (size,), ("per-head norm",))


def norm_root(rng: Rng, scene: Scene) -> Drawn:
    power = float(rng.uniform(0.1, 0.9))
    x = scene.tap(scene.normed)
    return Drawn(_normed(x, scene.norm_weight, scene.config.rms_eps, power), "mean square to the power ", (power,))


def norm_part(rng: Rng, scene: Scene) -> Drawn:
    x = scene.tap(scene.normed)
    count = int(rng.integers(x.shape[-1] // 4, x.shape[-1] - 1))
    square = np.mean(x[:, :count] ** 2, axis=-1, keepdims=True)
    out = x / np.sqrt(square + scene.config.rms_eps) * scene.norm_weight
    return Drawn(out, "root mean square of the first ", (count,))


# --- feed-forward ---------------------------------------------------------------------------------------------


def _act(scene: Scene, function: Callable[[Array], Array], words: str, *numbers: float) -> Drawn:
    return Drawn(function(scene.tap("ffn_gate")), words, numbers)


def act_power(rng: Rng, scene: Scene) -> Drawn:
    p = float(rng.uniform(0.5, 3.5))
    return _act(scene, lambda x: np.maximum(x, 0) ** p, "ReLU to the power ", p)


def act_leaky(rng: Rng, scene: Scene) -> Drawn:
    a = float(rng.uniform(0.01, 0.5))
    return _act(scene, lambda x: np.where(x > 0, x, a * x), "x above zero and ", a)


def act_leaky_square(rng: Rng, scene: Scene) -> Drawn:
    a = float(rng.uniform(0.01, 0.5))
    return _act(scene, lambda x: np.where(x > 0, x, a * x) ** 2, "x² above zero and ", a * a)


def act_limit(rng: Rng, scene: Scene) -> Drawn:
    top = float(np.quantile(np.maximum(scene.tap("ffn_gate"), 0) ** 2, rng.uniform(0.7, 0.98)))
    return _act(scene, lambda x: np.minimum(np.maximum(x, 0) ** 2, top), "squared ReLU limited to ", top)


def act_line(rng: Rng, scene: Scene) -> Drawn:
    a, b = rng.uniform(0.2, 2), rng.uniform(0.1, 1)
    return _act(scene, lambda x: a * x + b, "", a, b)


def act_threshold(rng: Rng, scene: Scene) -> Drawn:
    t = float(rng.uniform(0.05, 0.3) * np.abs(scene.tap("ffn_gate")).max())
    return _act(scene, lambda x: np.maximum(x - t, 0) ** 2, "squared ReLU of x - ", t)


def act_swish(rng: Rng, scene: Scene) -> Drawn:
    beta = float(np.exp(rng.uniform(0.3, 1.5)))
    return _act(scene, lambda x: x / (1 + np.exp(-beta * x)), "x·sigmoid(", beta)


def product_limit(rng: Rng, scene: Scene) -> Drawn:
    top = float(np.quantile(np.abs(scene.output), rng.uniform(0.8, 0.98)))
    return Drawn(np.clip(scene.output, -top, top), "product limited to ±", (top,))


# --- residuals ------------------------------------------------------------------------------------------------


def residual_weights(rng: Rng, scene: Scene) -> Drawn:
    a, b = rng.uniform(0.2, 3, 2)
    branch, stream = ("attn_o_out", scene.layer_input) if scene.op == "ffn_inp" else ("ffn_down", "ffn_inp")
    return Drawn(a * scene.tap(branch) + b * scene.tap(stream), "", (a, b))


def other_branch(rng: Rng, scene: Scene) -> Drawn:
    branch, stream = ("attn_o_out", scene.layer_input) if scene.op == "ffn_inp" else ("ffn_down", "ffn_inp")
    other = f"blk.{(scene.layer + 1) % scene.config.n_layers}.{rng.choice(['attn_o_out', 'ffn_down', 'l_out'])}"
    return Drawn(scene.tap(other) + scene.tap(stream), f"reads {other} instead of blk.{scene.layer}.{branch}")


# --- embedding and head ---------------------------------------------------------------------------------------


def _table(scene: Scene) -> Array:
    return np.asarray(scene.weights["token_embd.weight"], np.float64)


def id_offset(rng: Rng, scene: Scene) -> Drawn | None:
    ids = np.array(scene.ids)
    offset = int(rng.choice([-5, -4, -3, -2, 2, 3, 7, 16]))
    if (ids + offset).min() < 0 or (ids + offset).max() >= scene.config.vocab_size:
        return None
    also = ("rows of other token ids",) if ids.size == 1 else ()
    return Drawn(_table(scene)[ids + offset], "row of token id ", (offset,), also)


def id_modulus(rng: Rng, scene: Scene) -> Drawn | None:
    ids = np.array(scene.ids)
    n = int(2 ** rng.integers(5, 8))
    if (ids < n).all():
        return None
    also = ("rows of other token ids",)
    return Drawn(_table(scene)[ids % n], "row of token id mod ", (n,), also)


def id_limit(rng: Rng, scene: Scene) -> Drawn | None:
    ids = np.array(scene.ids)
    top = int(rng.integers(30, 240))
    if (ids <= top).all():
        return None
    also = ("rows of other token ids",)
    return Drawn(_table(scene)[np.minimum(ids, top)], "row of min(token id, ", (top,), also)


def missing_shard(rng: Rng, scene: Scene) -> Drawn | None:
    ids = np.array(scene.ids)
    first = int(rng.integers(30, 280))
    gone = ids >= first
    if not gone.any() or gone.all():
        return None
    out = np.where(gone[:, None], 0.0, _table(scene)[ids])
    return Drawn(out, "rows of token ids from ", (float(ids[gone].min()),), ("token* zero",))


def _head(scene: Scene, order: Array) -> Array:
    name = "token_embd.weight" if scene.config.tied_head else "output.weight"
    return scene.tap("result_norm") @ np.asarray(scene.weights[name], np.float64)[order].T


def logits_shifted(rng: Rng, scene: Scene) -> Drawn:
    n, d = scene.config.vocab_size, int(rng.choice([-16, -3, -2, 2, 3, 4, 64]))
    return Drawn(_head(scene, (np.arange(n) - d) % n), "logits shifted by ", (d,))


def logits_in_groups(rng: Rng, scene: Scene) -> Drawn:
    n, size = scene.config.vocab_size, int(rng.choice([4, 8, 16]))
    order, inside = np.arange(n), rng.permutation(size)
    while np.array_equal(inside, np.arange(size)):
        inside = rng.permutation(size)
    for first in range(0, n // size * size, size):
        order[first : first + size] = first + inside
    also = ("logits in groups of [248] in another order*",)  # the smallest groups that say it
    return Drawn(_head(scene, order), "logits in groups of ", (size,), also)


def capped(rng: Rng, scene: Scene) -> Drawn:
    x = scene.output
    cap = float(np.abs(x).max() * np.exp(rng.uniform(-1, 1)))
    return Drawn(cap * np.tanh(x / cap), "capped at ", (cap,))


# --- any operation --------------------------------------------------------------------------------------------


def output_factor(rng: Rng, scene: Scene) -> Drawn | None:
    if "norm" in scene.op and len(scene.positions) == 1:
        return None
    c = float(np.exp(rng.uniform(-2, 2)))
    return Drawn(c * scene.output, "output times ", (c,))


def token_order(rng: Rng, scene: Scene) -> Drawn | None:
    n = len(scene.positions)
    axis = 1 if scene.op in ("kq", "kq_soft_max") else 0
    if n < 4 or scene.output.shape[axis] != n:
        return None
    a, b = sorted(rng.choice(n, 2, replace=False))
    order = np.arange(n)
    order[[a, b]] = [b, a]
    return Drawn(np.take(scene.output, order, axis=axis), f"tokens {a}, {b} hold the results of tokens {b}, {a}")


def another_layer(rng: Rng, scene: Scene) -> Drawn | None:
    if scene.layer is None:
        return None
    other = f"blk.{(scene.layer + 1) % scene.config.n_layers}.{scene.op}"
    return Drawn(scene.tap(other), f"holds the values of {other}", also=("another tensor",))


NORMS = ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm", "result_norm")
EVERY = ("q_rope", "k_rope", "kq", "kq_soft_max", "kqv_out", "ffn_inp", "ffn_act", "ffn_out", "l_out", *NORMS,
         "inp_embd", "result_output")  # fmt: skip
Mistake = Callable[[Rng, Scene], Drawn | None]
MISTAKES: dict[Mistake, tuple[str, ...]] = {
    head_map: ("kq", "kqv_out"),
    query_order: ("kq", "kqv_out"),
    output_heads: ("q_rope", "kq", "kq_soft_max", "kqv_out"),
    **dict.fromkeys((cell_moved, cells_swapped, cells_of_layer), ("kq", "kqv_out")),
    **dict.fromkeys((score_scale, soft_cap, sink, sinks, mask_offset, window, chunks), ("kq_soft_max",)),
    **dict.fromkeys(
        (rope_base, rope_slowed, rope_offset, rope_scale, rope_limit, rope_part, rope_pairs), ("q_rope", "k_rope")
    ),
    **dict.fromkeys((norm_eps, norm_offset, norm_power, norm_groups, norm_root, norm_part), NORMS),
    **dict.fromkeys(
        (act_power, act_leaky, act_leaky_square, act_limit, act_line, act_threshold, act_swish), ("ffn_act",)
    ),
    product_limit: ("ffn_out",),
    **dict.fromkeys((residual_weights, other_branch), ("ffn_inp", "l_out")),
    **dict.fromkeys((id_offset, id_modulus, id_limit, missing_shard), ("inp_embd",)),
    **dict.fromkeys((logits_shifted, logits_in_groups), ("result_output",)),
    capped: ("kq", "result_output"),
    output_factor: (*EVERY, "q", "v", "attn_o_out", "ffn_up", "ffn_down"),
    token_order: EVERY,
    another_layer: EVERY,
}
"""Each with the operations that can have it."""
