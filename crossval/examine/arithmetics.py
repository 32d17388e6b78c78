"""Engines that state different arithmetic: what a receipt says of it, and where it first shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crossval.audit.bounds import Arithmetic, readings
from crossval.model import taps
from crossval.model.kinds import Attend, AttentionScores, BitLinear, Head, Silu, Softmax
from crossval.model.op import Op
from crossval.passes import Numerics
from crossval.receipts.file import Receipt
from crossval.receipts.values import plan_from_json
from crossval.terms import SIDES

QUANTISERS: Mapping[str, str] = {
    "march": "scale from max(1e-5, max |x|), halves to even, sums divided by the scale, then times the weight's",
    "main": "scale from max |x|, halves away from zero, sums times one factor of both scales",
}
"""Generation -> how its BitLinear quantises and rescales."""
BY_LANES = (AttentionScores, Attend, Softmax, Silu, Head)
"""Kinds whose sums or exponential depend on the number of lanes."""


def stated(receipt: Receipt) -> str | None:
    """Return both engines' arithmetic in words where both state one, and not the same; None otherwise."""
    both = [_numerics(receipt, side) for side in SIDES]
    if both[0] == both[1] or not all(_known(one) for one in both):
        return None
    said = [f"{side}: {', '.join(one.words())}" for side, one in zip(SIDES, both, strict=True)]
    return "; ".join(said)


def at(receipt: Receipt, location: Mapping[str, Any]) -> str | None:
    """Return why two correct engines may differ in bits at a place.

    ``location``: a ``first_inexact``; of several operations that it covers, the first that may differ. None: they
    compute the same there, or do not state how.
    """
    both = [_numerics(receipt, side) for side in SIDES]
    if not all(_known(one) for one in both):
        return None
    names = taps.all_taps(receipt["model"]["shape"]["n_layers"])
    after = location.get("after")
    first = 0 if after is None else names.index(after) + 1
    one = plan_from_json(receipt["results"]["passes"])[location["pass_index"]]
    for name in names[first : names.index(location["tap"]) + 1]:
        why = _why(taps.op_of(name), both, receipt["model"]["shape"], len(one.token_ids))
        if why is not None:
            return f"at {name}, {why}"
    return None


def _why(op: Op, both: list[Numerics], shape: Mapping[str, Any], n_tokens: int) -> str | None:
    """Return how two arithmetics differ in an operation; None: not at all."""
    ours, theirs = both
    if isinstance(op.kind, BitLinear):
        ways = [_quantiser(one) for one in both]
        return _against("quantiser and rescale", *ways)
    found = []
    for one in both:
        arithmetic = Arithmetic(one, shape["n_heads"], head_dim=shape["head_dim"])
        found.append(readings(op, arithmetic, n_tokens, 1 if isinstance(op.kind, Head) else n_tokens)[0].name)
    different = _against("operands and sums", *found)
    if different is None and isinstance(op.kind, BY_LANES) and ours.simd_width != theirs.simd_width:
        return _against("lanes of sums and exponential", str(ours.simd_width), str(theirs.simd_width))
    return different


def _against(what: str, ours: str, theirs: str) -> str | None:
    return None if ours == theirs else f"{what} differ: candidate {ours}; reference {theirs}"


def _quantiser(one: Numerics) -> str:
    if one.quantizer_block is not None:
        words = f"blocks of {one.quantizer_block} activations, each with a step of its own"
        words += ", product and rounding in one step" if one.fused_quantizer else ""
        return f"{words}, sums of blocks added in one step" if one.fused_sums else words
    words = QUANTISERS.get(one.generation or "", f"that of {one.generation}")
    return f"{words}, product and rounding in one step" if one.fused_quantizer else words


def _numerics(receipt: Receipt, side: str) -> Numerics:
    return Numerics.from_json(receipt[side]["numerics"])


def _known(one: Numerics) -> bool:
    return one.generation is not None
