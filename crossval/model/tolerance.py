"""Thresholds for comparing a tap of one engine directly with the same tap of another.

Bit-identical values always pass, without these thresholds. Values that differ are judged by direction (cosine),
error energy (NMSE) and scale (norm ratio) together, over the whole tap and for its worst token: cosine alone is
blind to scale, and a whole-tensor number alone dilutes one wrong token among many.

Where the numbers come from. Engines of this family round activations to int8 before every projection; a value that
rounds the other way at a tie (a *flip*) moves by 1/127 of its row's maximum. That is a discontinuity: after the
first flip, two correct engines differ by far more than float rounding, and every layer adds flips. Measured on
real bitnet.cpp, relative L2 of the logits between two correct runs:

=========================================  ==============  ===============
two runs                                   4 layers        30 layers
=========================================  ==============  ===============
two builds (AVX2 / AVX-512), same path     up to 0.029     0.06 to 0.09
one build, batch / token by token          0.04 to 0.06    0.16 to 0.19
=========================================  ==============  ===============

Both rows grow as the square root of depth, as independent errors do: 0.015 * sqrt(depth) for two builds (``same``:
the same operations in the same order, differing in single roundings) and 0.03 * sqrt(depth) for two arithmetics of
the same model (``independent``: bitnet.cpp's batch path keeps probabilities in F32, its single-token path rounds
them to F16; the float64 specification is a third). These are the *floors*; a bound is a floor times ``SAFETY``.

An engine in a 16-bit format also rounds between the operations: its flips are no longer rare. Largest relative L2
over a whole tap beside the float64 specification, 350 runs of the tests' ``narrow_engine.py`` on models of 2 to
12 layers: 0.044 * sqrt(depth) in binary16 (``f16``), 0.089 * sqrt(depth) in bfloat16 (``bf16``). Keys and values
in either format in an engine that otherwise computes in binary32 stay within the ``independent`` floor.

Where one of the engines quantises activations in blocks of 256 values (llama.cpp's Q8_K) and the other by row, as
the model is defined, no code is equal: both are off by up to half a step, of a block or of a row, independently.
A step is ``max / 127`` and its error has the standard deviation ``step / sqrt(12)``: 0.7 % of the root mean square
of 256 normal values, 0.8 % of that of some thousand, together 1.1 % of each BitLinear's input; a layer has five
inputs of BitLinears. Largest relative L2 of any tap of llama.cpp beside the specification, in units of
``sqrt(depth)`` and the class's factor, on models of 1, 3, 7 and 24 layers: 0.042 (``blocks``).

This table is provisional by design: it says whether two engines agree end to end, not which is correct. The
op-local audit, which recomputes each operation from the engine's own inputs and needs no allowance for
accumulation, is a separate module and does not use it.

Checked against correct engines, on models of 5, 7, 24 and 30 layers, 1 to 45 tokens and 3 decoded ones,
every tap: the float64 specification beside bitnet.cpp's arithmetic reaches 1.1 times the ``independent`` floor
over a whole tap and 1.8 times it for the worst token; an AVX-512 build beside an AVX2 build, or a gcc one beside a
clang one, reaches 1.0 times the ``same`` floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from crossval.formats import FORMATS
from crossval.model import taps
from crossval.model.kinds import Add, Embedding

PolicyName = Literal["same", "independent", "blocks", "f16", "bf16"]
Direction = Literal["min", "max", "max_abs_minus_one"]


@dataclass(frozen=True)
class TapClass:
    """How taps of one kind differ from the residual stream.

    ``error_factor``: relative L2 floor over that of the residual stream at the same depth. ``norm_share``:
    fraction of the bound by which a norm may differ: flips point in random directions, so in many dimensions
    they change a norm far less than they move the vector.
    """

    error_factor: float
    norm_share: float


DIRECTIONS: dict[str, Direction] = {
    "cosine": "min",
    "worst_token_cosine": "min",
    "nmse": "max",
    "worst_token_nmse": "max",
    "norm_ratio": "max_abs_minus_one",
}
"""How each metric is compared with its threshold; ``max_abs_minus_one`` means ``|value - 1| <= threshold``."""

FLOOR_PER_SQRT_LAYER: dict[PolicyName, float] = {
    "same": 0.015,
    "independent": 0.03,
    "blocks": 0.045,
    "f16": 0.045,
    "bf16": 0.09,
}
"""Relative L2 error of the residual stream after one layer, from the table above."""

SAFETY = 2.0
"""Bound over floor, in relative L2: the floors are maxima of few prompts."""

WORST_TOKEN = 2.0
"""A single token may exceed the bound of the whole tap by this factor (relative L2): flips hit few tokens."""

CLASSES: dict[str, TapClass] = {
    "stream": TapClass(error_factor=1.0, norm_share=0.4),
    "branch": TapClass(error_factor=2.0, norm_share=0.4),
    "scores": TapClass(error_factor=3.0, norm_share=1.0),
}
"""The residual stream and what is computed from it directly; taps inside a layer, where the same absolute error
sits on a smaller vector and squared ReLU doubles it; attention scores and weights, few and sometimes near zero."""

EXACT_REL_L2 = 1e-6
"""The embedding is a copy of F16 values, exact in every engine; this leaves room for a float32 rounding."""


@dataclass(frozen=True)
class Tolerance:
    """The thresholds of one tap: ``floor`` is an NMSE, ``bound`` maps metric names to thresholds."""

    floor: float
    bound: dict[str, float]


def tap_class(name: str) -> Literal["exact", "stream", "branch", "scores"]:
    """Return the tolerance class of a full tap name (``CLASSES``; ``exact`` for the embedding)."""
    op = taps.op_of(name)
    if isinstance(op.kind, Embedding):
        return "exact"
    if op.token_axis:
        return "scores"
    return "stream" if op.layer is None or isinstance(op.kind, Add) else "branch"


def tolerance_for(name: str, n_layers: int, policy: PolicyName) -> Tolerance:
    """Return floor and bounds of a tap: relative L2 grows with the square root of the layers before it."""
    kind = tap_class(name)
    if kind == "exact":
        return _tolerance(exact_rel_l2(policy), exact_rel_l2(policy), 1.0)
    layer = taps.parse(name).layer
    depth = n_layers if layer is None else layer + 1
    floor = FLOOR_PER_SQRT_LAYER[policy] * math.sqrt(depth) * CLASSES[kind].error_factor
    return _tolerance(floor, SAFETY * floor, CLASSES[kind].norm_share)


def exact_rel_l2(policy: PolicyName) -> float:
    """Return how far embeddings may be apart, relative L2: one rounding of values that were copied."""
    return FORMATS[policy].unit_roundoff if policy in FORMATS else EXACT_REL_L2


def _tolerance(floor: float, bound: float, norm_share: float) -> Tolerance:
    token = WORST_TOKEN * bound
    return Tolerance(
        floor=floor**2,
        bound={
            # |c - r| <= e |r| implies cosine >= sqrt(1 - e^2): the same allowance, seen as an angle.
            "cosine": math.sqrt(max(0.0, 1.0 - bound**2)),
            "worst_token_cosine": math.sqrt(max(0.0, 1.0 - token**2)),
            "nmse": bound**2,
            "worst_token_nmse": token**2,
            "norm_ratio": norm_share * bound,
        },
    )


def violations(metrics: object, bound: Mapping[str, float]) -> list[str]:
    """Return one phrase per metric that breaks its threshold; an undefined metric breaks it too.

    ``metrics`` is anything with the metrics as attributes (``Metrics``, ``TapRow``). Without thresholds nothing
    can agree, which is a violation by itself.
    """
    if not bound:
        return ["no thresholds to compare it with"]
    broken = []
    for name, threshold in bound.items():
        direction = DIRECTIONS.get(name)
        value = getattr(metrics, name, None)
        if direction is None:
            broken.append(f"unknown metric {name}")
        elif value is None or not math.isfinite(value):
            broken.append(f"{name} undefined")
        elif direction == "min" and not value >= threshold:
            broken.append(f"{name} {value:.6g} < {threshold:.6g}")
        elif direction == "max" and not value <= threshold:
            broken.append(f"{name} {value:.3g} > {threshold:.3g}")
        elif direction == "max_abs_minus_one" and not abs(value - 1.0) <= threshold:
            broken.append(f"|{name} - 1| {abs(value - 1.0):.3g} > {threshold:.3g}")
    return broken


def describe(policy: PolicyName) -> dict[str, Any]:
    """Return the table in force as plain JSON values, for the receipt."""
    return {
        "policy": policy,
        "floor_rel_l2_per_sqrt_layer": FLOOR_PER_SQRT_LAYER[policy],
        "safety": SAFETY,
        "worst_token": WORST_TOKEN,
        "classes": {name: asdict(kind) for name, kind in CLASSES.items()},
        "exact_rel_l2": exact_rel_l2(policy),
        "directions": dict(DIRECTIONS),
    }
