"""Hypotheses of a segment: every known bug in each operation, in all that share their code, in every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crossval.diagnose.replay import Mistake, Mode, Replay
from crossval.diagnose.variants import Candidate, candidates
from crossval.diagnose.variants.cache import SCOPES
from crossval.model import taps
from crossval.model.op import Op
from crossval.model.taps import BITLINEARS, NORMS
from crossval.passes import PassKind

SHARED: tuple[tuple[str, frozenset[str]], ...] = (
    ("queries and keys", frozenset({"q_rope", "k_rope"})),
    ("queries and keys", frozenset({"q", "k"})),
    ("queries, keys and values", frozenset({"q", "k", "v"})),
    ("gate and up", frozenset({"ffn_gate", "ffn_up"})),
    ("gate, up and down", frozenset({"ffn_gate", "ffn_up", "ffn_down"})),
    ("every BitLinear", BITLINEARS),
    ("both norms of the stream", frozenset({"attn_norm", "ffn_norm"})),
    ("both sub-norms", frozenset({"attn_sub_norm", "ffn_sub_norm"})),
    ("norms of the heads", frozenset({"q_norm", "k_norm"})),
    ("norms before queries, keys and values", frozenset({"attn_q_norm_in", "attn_k_norm_in", "attn_v_norm_in"})),
    ("norms before gate and up", frozenset({"ffn_gate_norm_in", "ffn_up_norm_in"})),
    ("both norms after blocks", frozenset({"attn_post_norm", "ffn_post_norm"})),
    ("every norm", NORMS),
    ("keys and values", frozenset({"kq", "kqv_out"})),
    ("both residual connections", frozenset({"ffn_inp", "l_out"})),
)
"""Operations that share code in most engines, so that a bug in it affects all of them."""

SAME: dict[tuple[str, str], tuple[str, str]] = {
    ("ffn_out", "SiLU gate"): ("ffn_act", "SiLU"),
    ("ffn_out", "gate without activation"): ("ffn_act", "no activation"),
    ("ffn_act", "already multiplied by up"): ("ffn_out", "activation on both"),
    ("attn_o_out", "norm before it skipped"): ("attn_sub_norm", "norm skipped"),
    ("ffn_down", "norm before it skipped"): ("ffn_sub_norm", "norm skipped"),
    ("q", "already rotated"): ("q_rope", "rotated twice"),
    ("k", "already rotated"): ("k_rope", "rotated twice"),
    ("kq", "q rotated again"): ("q_rope", "rotated twice"),
    ("kq", "k rotated again"): ("k_rope", "rotated twice"),
    ("kq", "q not rotated"): ("q_rope", "not rotated"),
    ("kq", "k not rotated"): ("k_rope", "not rotated"),
    ("kqv_out", "RoPE applied to V"): ("v", "RoPE applied to V"),
    ("kq", "scaled here already"): ("kq_soft_max", "scale 1/head_dim"),
    **{
        (made, f"output rounded to {form}"): (read, f"{cache} rounded to {form}")
        for made, read, cache in (("k_rope", "kq", "k_cache"), ("v", "kqv_out", "v_cache"))
        for form in ("F16", "BF16", "truncated BF16")
    },
}
"""One bug seen at two operations: when both fit, the first is reported under the name of the second."""

SWAPPED: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "keys and values, each the other's",
        {"k": "weights of this.attn_v.weight", "v": "weights of this.attn_k.weight"},
    ),
    (
        "both norms of the stream, each the other's",
        {"attn_norm": "norm weight of this.ffn_norm.weight", "ffn_norm": "norm weight of this.attn_norm.weight"},
    ),
)
"""Two tensors swapped: two wrong operations with one cause."""


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A mistake in some operations, and its name."""

    mistake: Mistake
    group: str | None
    """Common name of operations that share their code; None: it is one kind of operation."""

    @property
    def first(self) -> tuple[str, Candidate]:
        """The first wrong operation and what is done there."""
        return next(iter(self.mistake.at.items()))

    @property
    def name(self) -> str:
        """Name of the mistake."""
        return self.first[1].name

    @property
    def seen_at(self) -> tuple[str, str]:
        """The kind of operation and the name: the key of synonyms."""
        return taps.parse(self.first[0]).tap, self.name

    def place(self, tap: str) -> str:
        """Describe which operations are wrong, inside a segment that ends in ``tap``."""
        end, names = taps.parse(tap), [taps.parse(output) for output in self.mistake.at]
        layers = sorted({name.layer for name in names if name.layer is not None})
        where = ""
        if len(layers) > 1:
            where = f" of layers {layers[0]} to {layers[-1]}"
        elif layers and layers[0] != end.layer:
            where = f" of layer {layers[0]}"
        when = "" if self.mistake.kind is None else f", in {self.mistake.kind} passes"
        return f"{self.group or names[0].tap}{where}{when}, inside the segment that ends in {end.tap}"


def hypotheses(replay: Replay, mode: Mode, deferred: bool) -> Iterator[Hypothesis]:
    """Yield every mistake of every operation inside: alone, in all that share its code, and in every layer."""
    segment = replay.segment
    known = {op.output: _named(op, replay, mode, deferred) for op in segment}
    layers = sorted({layer for op in segment if (layer := taps.parse(op.output).layer) is not None})
    # after other passes, a mistake may be made in passes of one kind only
    kinds: list[PassKind | None] = [None, replay.records[-1].plan.kind] if len(replay.records) > 1 else [None]
    seen: set[tuple[str, frozenset[str]]] = set()
    for label, ops in _places([op.output for op in segment], layers):
        names = dict.fromkeys(name for op in ops for name in known[op])
        for name in names:
            at = {op: known[op][name] for op in ops if name in known[op]}
            if len(at) < len(ops) or (name, frozenset(at)) in seen:
                continue
            seen.add((name, frozenset(at)))
            yield from (Hypothesis(Mistake(at, kind), label) for kind in kinds)
    for label, names_of in SWAPPED:
        for layer in layers:
            pair = {f"blk.{layer}.{tap}": name for tap, name in names_of.items()}
            if all(name in known.get(op, {}) for op, name in pair.items()):
                yield Hypothesis(Mistake({op: known[op][name] for op, name in pair.items()}), label)


def _places(inside: Sequence[str], layers: Sequence[int]) -> Iterator[tuple[str | None, list[str]]]:
    """Yield sets of operations that may be wrong in the same way."""
    yield from ((None, [output]) for output in inside)
    in_layers = [set(layers)] if len(layers) == 1 else [*({layer} for layer in layers), set(layers)]
    for chosen in in_layers:
        here = [o for o in inside if taps.parse(o).layer in chosen]
        if len(chosen) > 1:
            for name in dict.fromkeys(taps.parse(o).tap for o in here):
                yield None, [o for o in here if taps.parse(o).tap == name]
        for label, names in SHARED:
            shared = [o for o in here if taps.parse(o).tap in names]
            if len({taps.parse(o).tap for o in shared}) > 1:
                yield label, shared


def _named(op: Op, replay: Replay, mode: Mode, deferred: bool) -> dict[str, Candidate]:
    """Return the known mistakes of an operation by name, without its own layer and tensor.

    Several forms of one mistake are numbered. In a single pass the scopes of a mistake in the cache coincide.
    """
    context = replay.context(op, mode)
    found: dict[str, Candidate] = {}
    forms: Counter[str] = Counter()
    with np.errstate(all="ignore"):
        for one in candidates(context, deferred=deferred):
            name = _key(op, one)
            if forms[name] and len(replay.records) == 1 and _is_of_the_cache(one):
                continue
            forms[name] += 1
            found[name if forms[name] == 1 else f"{name} (form {forms[name]})"] = one
    return found


def _is_of_the_cache(one: Candidate) -> bool:
    """Return whether a mistake is in the cache, and so affects some passes or all."""
    last = one.arguments[-1] if one.arguments else None
    scope = getattr(last, "scope", last)
    return isinstance(scope, str) and scope in SCOPES


def _key(op: Op, one: Candidate) -> str:
    """Return a candidate's name without its own layer and tensor, so that it is the same in other layers."""
    name, layer = one.name, taps.parse(op.output).layer
    if layer is None:
        return name
    own = op.weights[0].split(".")[2] if op.weights and op.weights[0].startswith("blk.") else ""
    for word, number in (("this", layer), ("next", layer + 1), ("previous", layer - 1)):
        name = name.replace(f"blk.{number}.{own}.", f"{word}.own.") if own else name
        name = name.replace(f"blk.{number}.", f"{word}.")
    return name
