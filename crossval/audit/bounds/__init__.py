"""How far a correct engine may be from the specification in one operation, given that engine's own inputs.

Every bound is derived from the operation: which values are rounded to binary32 (``U`` each), how long a sum is,
where a value is rounded to binary16. First-order terms are summed; ``SECOND_ORDER`` covers the rest. Where the
family of an engine is known (bitnet.cpp's), its reduction shapes give short sums and its inputs are exactly what
was recorded; any other engine may sum in any order and carry more digits than it recorded.

An engine that computes in a 16-bit format, because it states so or because everything it recorded is in it
(``crossval.audit.precision``), is judged at its unit roundoff ``u`` wherever a tensor or an elementwise step is
rounded. Sums are not among these: every such engine carries them in binary32, and one that does not loses
``n u`` of a sum. What it recorded is what it had, so its inputs carry no error of their own.

There is one rule for every kind of operation. BitLinear is judged in integers instead (``integers``), or,
where activations are quantised in blocks, on the codes of its input (``blocks``); of an engine that does not
quantise them, as the sum of floating-point products that it is (``floats``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crossval.audit.bounds import attention, elementwise, tables
from crossval.audit.bounds.approx import Approx
from crossval.audit.bounds.arithmetic import (
    SECOND_ORDER,
    TINY,
    U16,
    Arithmetic,
    Array,
    Reading,
    Rounding,
    U,
    read_as,
)
from crossval.audit.bounds.attention import FLASH
from crossval.audit.bounds.bitlinear import check_bitlinear, propagate_bitlinear
from crossval.audit.bounds.rule import Rule, one_rounding
from crossval.audit.bounds.tables import head_bound, row_norms
from crossval.model.kinds import KINDS, BitLinear, FloatArray, Kind
from crossval.model.op import Op

__all__ = [
    "FLASH",
    "SECOND_ORDER",
    "TINY",
    "U16",
    "Arithmetic",
    "Reading",
    "Rounding",
    "U",
    "bound",
    "check_bitlinear",
    "head_bound",
    "is_one_rounding",
    "one_rounding",
    "propagate",
    "propagate_bitlinear",
    "read_as",
    "readings",
    "row_norms",
]

RULES: Mapping[type[Kind], Rule] = {**elementwise.RULES, **attention.RULES, **tables.RULES}
"""No kind falls through to a default: a bound that is too narrow reports a correct engine as wrong."""
if RULES.keys() | {BitLinear} != KINDS:
    raise TypeError(f"kinds without a rule, or rules without a kind: {KINDS ^ (RULES.keys() | {BitLinear})}")


def readings(op: Op, arithmetic: Arithmetic, n_tokens: int, n_rows: int) -> tuple[Reading, ...]:
    """Return the allowed readings of an operation: one where the engine's family is known.

    ``n_tokens``: of the pass; ``n_rows``: that the output was recorded for.
    """
    if isinstance(op.kind, BitLinear):
        return (Reading("", (None,)),)
    arithmetic = arithmetic.of(op)
    found = RULES[type(op.kind)].readings(op.kind, len(op.inputs), arithmetic, n_tokens, n_rows)
    return _mixed(found, arithmetic) if arithmetic.mixed and arithmetic.low else found


def _mixed(found: Sequence[Reading], arithmetic: Arithmetic) -> tuple[Reading, ...]:
    """Return readings of inputs with more digits than an operation computes with: as they are, and rounded."""
    form = arithmetic.format
    return tuple(
        replace(one, name=", ".join(filter(None, (one.name, name))), rounded=tuple(r or to for r in one.rounded))
        for one in found
        for name, to in (("as recorded", None), (f"inputs in {form.name.upper()}", form.name))
    )


def bound(
    op: Op, inputs: Sequence[Array], expected: FloatArray, weights: Sequence[Any], arithmetic: Arithmetic
) -> FloatArray:
    """Return the largest allowed ``|recorded - expected|``, elementwise, for every op but BitLinear.

    ``inputs`` are the arrays as the reading has them, float64; ``expected`` is the op's output on them.
    """
    return RULES[type(op.kind)].bound(op.kind, inputs, expected, weights, arithmetic.of(op))


def is_one_rounding(op: Op) -> bool:
    """Return whether each value of the output is one rounding of an exact result."""
    return not isinstance(op.kind, BitLinear) and RULES[type(op.kind)].one_rounding


def propagate(op: Op, inputs: Sequence[Approx], weights: Sequence[Any], arithmetic: Arithmetic) -> Approx:
    """Compute an operation other than BitLinear with its error; inputs are rounded to binary16 already."""
    rule, arithmetic = RULES[type(op.kind)], arithmetic.of(op)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = rule.propagate(op.kind, inputs, weights, arithmetic)
        if not arithmetic.low:
            return found
        # the roundings of a 16-bit format are more than those of binary32, which are in there too
        own = rule.bound(op.kind, [x.value for x in inputs], found.value, weights, arithmetic)
        return replace(found, noise=np.hypot(found.noise, own))
