"""Faults of llama models: those of all models where they make sense there, and those of what only llama has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from crossval.selftest.damage import Codes, of_codes
from tests.zoo.fault import EngineFault, Fault, WeightFault
from tests.zoo.models import SHAPE

PLAIN, EXTRAS = "llama", "llama-extras"
ROPE = ("q_rope", "k_rope")
BIASED = ("k", "q", "v", "attn_o_out")
SCALED = ("ffn_down", "q", "v", "attn_o_out", "ffn_gate")
OTHERWISE = frozenset({"act-silu", "rope-interleaved", "file-head-not-tied"})
"""Faults of other models that are right here."""
_ANGLES = (
    "zoo_rope_factors(x + at, half, (float)(r->pass->start + t) * {scale}, e->model.rope_base,"
    " e->model.rope_pairing, {factors}, {multiplied}, out + at);"
)
_FACTORS, _SCALE = "e->model.rope_factors", "e->model.rope_scale"


def _c(name: str, family: int, what: str, taps: tuple[str, ...], site: str, code: str, **more) -> EngineFault:
    return EngineFault(name, family, what, taps, edits={site: code}, ops={tap: tap for tap in taps}, **more)


def _angle(name: str, what: str, scale: str = _SCALE, factors: str = _FACTORS, multiplied: int = 0) -> EngineFault:
    code = _ANGLES.format(scale=scale, factors=factors, multiplied=multiplied)
    return _c(name, 8, what, ROPE, "rope", code, base=EXTRAS)


def _not_permuted(packed: Codes) -> Codes:
    """Put the rows of every head as Hugging Face has them: first all first elements of the pairs."""
    rows = np.arange(len(packed)).reshape(-1, SHAPE.head_size // 2, 2).swapaxes(1, 2).reshape(-1)
    return packed[rows]


OWN: tuple[Fault, ...] = (
    _c("rope-of-halves", 8, "pairs (i, i + half) instead of (2i, 2i+1)", ROPE, "rope",
       "zoo_rope(x + at, half, (float)(r->pass->start + t), e->model.rope_base, !e->model.rope_pairing,"
       " out + at);",
       base=PLAIN),
    _angle("rope-factors-skipped", "angles not divided by rope_freqs.weight", factors="NULL"),
    _angle("rope-factors-multiplied", "angles multiplied by rope_freqs.weight", multiplied=1),
    _angle("rope-scaling-skipped", "linear scaling left out", scale="1.0f"),
    _angle("rope-scaling-inverted", "positions times the scaling factor", scale="(1.0f / e->model.rope_scale)"),
    _c("bias-skipped", 10, "the bias is not added", BIASED, "bias", ";", base=EXTRAS),
    _c("bias-twice", 10, "the bias is added twice", BIASED, "bias", "y[i] += 2 * m->bias[row + i];", base=EXTRAS),
    _c("bias-of-first-rows", 10, "every tile of rows gets the bias of the first", ("q",), "bias",
       "y[i] += m->bias[i];", base=EXTRAS),
    _c("matrix-scale-skipped", 4, "the tensor .scale is not applied", SCALED, "factor", ";", base=EXTRAS),
    _c("matrix-scale-twice", 4, "the tensor .scale is applied twice", SCALED, "factor",
       "y[i] *= m->factor * m->factor;", base=EXTRAS),
    EngineFault("act-relu-squared", 6, "squared ReLU instead of SiLU", ("ffn_act",), base=PLAIN,
                edits={"activation": "for (int64_t i = 0; i < hidden; i++) {"
                       " const float gate = b->gate[t * hidden + i], relu = gate > 0 ? gate : 0.0f;"
                       " b->act[t * hidden + i] = relu * relu;"
                       " b->prod[t * hidden + i] = b->act[t * hidden + i] * b->up[t * hidden + i]; }"}),
    WeightFault("file-rows-not-permuted", 10, "rows of Q and K as Hugging Face has them", ("q", "k"), base=PLAIN,
                damage=of_codes(_not_permuted)),
)  # fmt: skip
RIGHT = {
    "rope-of-halves": "pairs of halves",
    "rope-factors-skipped": "frequency factors skipped",
    "rope-factors-multiplied": "frequency factors multiplied",
    "rope-scaling-skipped": "linear scaling skipped",
    "rope-scaling-inverted": "linear scaling inverted",
    "bias-skipped": "bias skipped",
    "bias-twice": "bias added twice",
    "matrix-scale-skipped": ".scale skipped",
    "matrix-scale-twice": ".scale applied twice",
    "act-relu-squared": "squared ReLU",
    "act-on-up": "SiLU on up",
    "file-rows-not-permuted": "rows not permuted for interleaved RoPE",
}
"""As ``names.RIGHT``, which counts for the others."""


def on_llama(faults: Iterable[Fault]) -> Iterator[Fault]:
    """Yield the faults of other models as a llama model can have them."""
    for fault in faults:
        taps = tuple(tap for tap in fault.taps if not tap.endswith("_sub_norm") and tap != "token_ids")
        if taps and fault.name not in OTHERWISE and fault.base in ("plain", "untied"):
            yield replace(fault, taps=taps, base=PLAIN)
