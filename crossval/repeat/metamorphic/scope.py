"""Which taps the checks compare, and over how many values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, get_args

from crossval.compare import receipt
from crossval.model import taps
from crossval.passes import Numerics, PassPlan
from crossval.repeat.metamorphic.cases import PlannedCheck, Sizes
from crossval.terms import LOGITS
from crossval.traces.read import TraceModel

KQV = "blk.0.kqv_out"
_UP_TO_SOFTMAX = taps.LAYER_TAPS[: taps.LAYER_TAPS.index("kq_soft_max") + 1]

Gathered = Literal["logits", "head", "last layer"]
"""From where on an engine gives its taps for the last token of a pass only."""
GATHERED: tuple[Gathered, ...] = get_args(Gathered)


TapScope = Literal["all", "outline"]
"""In which taps bits have to be equal: every one, or (older receipts) those that are measured."""


@lru_cache(maxsize=16)
def measured_taps(n_layers: int) -> tuple[str, ...]:
    """Return the taps whose values are measured: layer 0 whole, of the others the output, and what shows the last
    K and V."""
    last = f"blk.{n_layers - 1}.attn_o_out"
    names = {*taps.outline_taps(n_layers), *taps.layer_taps(0), last}
    return tuple(sorted(names, key=lambda name: taps.execution_index(name, n_layers)))


@dataclass(frozen=True)
class Form:
    """What of a model and of an engine's arithmetic decides which taps are compared, and where bits are equal."""

    scores_vary: bool = False
    """Attention scores depend on how many tokens a pass holds. In bitnet.cpp of March 2026 those of one head do:
    it keeps Q in binary32 in longer passes. Later ones add up a single token's in another order."""
    known: tuple[str, ...] = taps.of_graph(None)
    """What the model has at most, without layers."""
    inside_others: frozenset[str] = frozenset()
    """Taps of a layer that the engine may compute inside another operation; they are not compared."""

    def has(self, tap: str) -> bool:
        """Return whether a tap, without its layer, is compared."""
        return tap in self.known and tap not in self.inside_others

    @classmethod
    def of(
        cls,
        n_heads: int | None,
        numerics: Numerics,
        architecture: str | None = None,
        input_norms: bool = False,
    ) -> Form:
        """Return it for a model with so many heads, of an architecture, and an engine that rounds so."""
        inside = numerics.inside_others(architecture, input_norms)
        known = taps.of_graph(architecture, input_norms)
        return cls(n_heads == 1 or numerics.generation in ("main", "mainline"), known, inside)


def up_to_attention(form: Form) -> list[str]:
    """Return the taps whose bits do not depend on how many tokens a pass holds."""
    alike = [tap for tap in _UP_TO_SOFTMAX if not (form.scores_vary and taps.OPS[tap].token_axis)]
    return ["inp_embd", *(f"blk.0.{tap}" for tap in alike if form.has(tap))]


def compared_taps(case: PlannedCheck, n_layers: int, form: Form, scope: TapScope = "all") -> list[str]:
    """Return the taps that a check compares: for equal bits all in ``scope``, else those that are measured."""
    part, exact = case.part, up_to_attention(form)
    every = case.expectation == "bits" and scope == "all"
    possible = taps.all_taps(n_layers) if every else measured_taps(n_layers)
    names = [name for name in possible if form.has(taps.parse(name).tap)]
    if part == "rest":
        done = exact if form.scores_vary else [*exact, KQV]
        return [name for name in names if name not in done]
    if part == "beginnings":  # the last layer need not give its output for tokens in the middle
        return [name for name in names if not taps.may_be_gathered(name, n_layers)]
    return {"all": names, "logits": [LOGITS], "exact": exact, "attention": [KQV]}[part]


@lru_cache(maxsize=1024)
def n_values(
    case: PlannedCheck, model: TraceModel, gathered: Gathered, form: Form, *, sub_norms: bool, scope: TapScope
) -> int:
    """Return how many values a check compares; ``sub_norms``: the model has them."""
    n_tokens, width = (pick(sum(case.one), sum(case.other)) for pick in (min, max))
    whole = PassPlan("prefill", (0,) * width, 0)
    ends = sorted(_ends(case.one) & _ends(case.other))
    total = 0
    for name in compared_taps(case, model.n_layers, form, scope):
        if taps.parse(name).tap in taps.SUB_NORMS and not sub_norms:
            continue
        rows = ends if _is_gathered(name, model.n_layers, gathered) else range(n_tokens)
        total += receipt.n_elements(name, model, whole, rows)
    return total


def _is_gathered(name: str, n_layers: int, gathered: Gathered) -> bool:
    if name == LOGITS or gathered == "logits":
        return name == LOGITS
    return taps.may_be_gathered(name, n_layers) if gathered == "last layer" else name in taps.HEAD_TAPS


def _ends(sizes: Sizes) -> set[int]:
    return {end - 1 for end in accumulate(sizes)}
