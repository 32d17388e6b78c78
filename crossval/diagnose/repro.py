"""A reproducer of one wrong operation: its inputs in ``inputs.npz``, its formula in a script for NumPy alone.

It holds no more than is needed to show the error: one token; of a matrix product, the output features that are
farthest off; of the cache, the rows that the token sees.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic
from crossval.audit.checks import OpCheck
from crossval.diagnose import repro_script
from crossval.diagnose.findings import Finding
from crossval.diagnose.segment import remedy
from crossval.diagnose.variants import Context
from crossval.errors import BadInputError
from crossval.files import write_atomically
from crossval.model.kinds import Embedding, FloatArray, Head
from crossval.model.taps import is_state, token_axis

SCRIPT, INPUTS = "repro.py", "inputs.npz"
MAX_FEATURES = 64
"""Number of output features kept of a matrix product."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Reproducer:
    """One operation on one token. ``recorded`` and ``bound`` are shaped alike."""

    arrays: Mapping[str, Array]
    """What ``inputs.npz`` holds."""
    script: str


@dataclass(frozen=True)
class _Case:
    """The operation cut to one token."""

    inputs: dict[str, Array]
    """Arrays as recorded, under the names that the script uses."""
    recorded: Array
    expected: FloatArray
    bound: FloatArray
    constants: dict[str, Any]


def why_not(finding: Finding) -> str | None:
    """Return why there can be no reproducer, None when there can."""
    if finding.in_segment:
        check = finding.check
        return f"the inputs of {check.tap} were not recorded; {remedy([*check.spans, check.tap])}"
    return finding.diagnosis.explanation if finding.context is None else None


def check_writable(directory: Path) -> None:
    """Reject a place where no reproducer can be written, before the work that leads to it begins.

    Raises:
        BadInputError: it is not a directory, or may not be written.
    """
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BadInputError(f"cannot write a reproducer to {directory}: {place} is not a writable directory")


def write(finding: Finding, engine: str, directory: Path) -> Path:
    """Write ``inputs.npz`` and ``repro.py`` and return the script's path.

    Raises:
        BadInputError: the directory cannot be written.
        ValueError: the finding has no reproducer (``why_not``).
    """
    made = build(finding, engine)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **made.arrays)  # type: ignore[arg-type]  # the stubs see allow_pickle only
    try:
        write_atomically(directory / INPUTS, buffer.getvalue())
        write_atomically(directory / SCRIPT, made.script.encode("utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot write a reproducer to {directory}: {error.strerror or error}") from error
    return directory / SCRIPT


def build(finding: Finding, engine: str) -> Reproducer:
    """Cut a finding to one token and write its script.

    Raises:
        ValueError: the finding has no reproducer (``why_not``).
    """
    context = finding.context
    if context is None:
        raise ValueError("the operation's own inputs were not recorded")
    row = _row(finding.check, context)
    position = context.start + context.rows[row]
    case, features = _cut(context, finding.arithmetic, row)
    facts = repro_script.Facts(
        tap=finding.check.tap,
        kind=type(context.op.kind),
        engine=engine,
        pass_index=finding.check.pass_index,
        pass_kind=finding.check.pass_kind,
        position=position,
        cause=finding.diagnosis.explanation,
        constants=case.constants,
        shape=case.recorded.shape,
        sampled=features is not None,
    )
    arrays = {**case.inputs, "recorded": case.recorded, "bound": case.bound}
    if features is not None:
        arrays["features"] = features
    return Reproducer(arrays, repro_script.render(facts))


def _row(check: OpCheck, context: Context) -> int:
    """Return which of the recorded tokens is shown: the worst, or the first that is not finite."""
    if check.worst is not None:
        return context.rows.index(check.worst.token - context.start)
    axis = context.token_axis
    others = tuple(i for i in range(context.recorded.ndim) if i != axis)
    return int(np.argmax(~np.isfinite(context.recorded).all(axis=others)))


def _cut(context: Context, arithmetic: Arithmetic, row: int) -> tuple[_Case, Array | None]:
    """Return the operation on one token, and which output features are kept (None: all)."""
    taken = [
        array if is_state(name) else np.take(array, [row], axis=token_axis(name))
        for name, array in zip(context.op.inputs, context.raw, strict=True)
    ]
    recorded = np.take(context.recorded, [row], axis=context.token_axis)
    if context.is_linear:
        return _bitlinear(context, taken[0], recorded, arithmetic)
    if isinstance(context.op.kind, Embedding):
        table = np.asanyarray(context.vector)[int(taken[0][0])][None]
        expected = table.astype(np.float64)
        return _Case({"table_row": table}, recorded, expected, np.zeros_like(expected), {}), None
    allowed = bounds.readings(context.op, arithmetic, context.n_tokens, context.n_rows)
    if isinstance(context.op.kind, Head):
        return min((_head(context, taken[0], recorded, arithmetic, r) for r in allowed), key=_misfit)
    return min((_plain(context, list(taken), recorded, arithmetic, r, row) for r in allowed), key=_misfit)


def _misfit(cut: tuple[_Case, Array | None]) -> tuple[int, float]:
    """Order the readings an engine may have: by values outside their bound, then by the largest distance."""
    ratio = _times(cut[0].recorded, cut[0].expected, cut[0].bound)
    return int(np.count_nonzero(ratio > 1)), float(ratio.max())


def _times(recorded: Array, expected: FloatArray, allowed: FloatArray) -> FloatArray:
    """Return the distance of each value in multiples of its bound; infinite where it is not a number."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        off = np.abs(recorded.astype(np.float64) - expected)
        ratio = np.where(off == 0, 0.0, off / allowed)
    return np.where(np.isnan(ratio), np.inf, ratio)


def _plain(
    context: Context,
    taken: list[Array],
    recorded: Array,
    arithmetic: Arithmetic,
    reading: bounds.Reading,
    row: int,
) -> tuple[_Case, None]:
    """Cut every operation whose output is small: norms, RoPE, attention, activation, sums."""
    op = context.op
    if op.kind.unmasked:  # keys after the token's own position are causally masked
        n_visible = context.start + context.rows[row] + 1
        taken[1], recorded = taken[1][:n_visible], recorded[..., :n_visible]
    arrays = [reading.apply(index, array) for index, array in enumerate(taken)]
    weights = [context.weights[name] for name in op.weights]
    expected = op.function(*arrays, *weights)
    allowed = bounds.bound(op, arrays, expected, weights, arithmetic)
    constants = dict(vars(op.kind))
    names = repro_script.INPUT_NAMES[type(op.kind)]
    inputs: dict[str, Any] = dict(zip(names, [*taken, *weights], strict=False))  # a weight may be optional
    if "position" in inputs:
        constants["position"] = int(inputs.pop("position")[0])
    for name, rounded in zip(names, reading.rounded, strict=False):
        constants[f"{name}_in"] = rounded
    return _Case({k: np.asarray(v) for k, v in inputs.items()}, recorded, expected, allowed, constants), None


def _bitlinear(context: Context, x: Array, recorded: Array, arithmetic: Arithmetic) -> tuple[_Case, Array | None]:
    matrix, bias = context.matrix, context.bias
    flat, weights = recorded.reshape(1, -1), [matrix] if bias is None else [matrix, bias]
    whole = bounds.check_bitlinear(x.reshape(1, -1), flat, weights, arithmetic)
    features = _farthest(flat, whole.expected, whole.bound)
    known = arithmetic.known
    constants = {
        "weight_scale": matrix.scale,
        "scale_in_f32": known,
        "product_in_f32": known and not arithmetic.numerics.fused_quantizer,
    }
    inputs = {"x": x.reshape(1, -1), "signs": matrix.signs[features].astype(np.int8)}
    if whole.multiplied is not None and whole.scale is not None:
        inputs["multiplied"], constants["scale"] = whole.multiplied, float(whole.scale[0, 0])
    if bias is not None:
        inputs["bias"] = bias[features]
    case = _Case(inputs, flat[:, features], whole.expected[:, features], whole.bound[:, features], constants)
    return case, features


def _head(
    context: Context, x: Array, recorded: Array, arithmetic: Arithmetic, reading: bounds.Reading
) -> tuple[_Case, Array | None]:
    table = np.asanyarray(context.vector)
    wide = reading.apply(0, x)
    expected = context.op.function(wide, table)
    allowed = bounds.head_bound(wide, bounds.row_norms(table, arithmetic.head_table), arithmetic, expected)
    features = _farthest(recorded, expected, allowed)
    # What a quantiser makes of the input is kept instead of it: the script would be longer than the operation.
    in_script = reading.rounded[0] in repro_script.ROUNDINGS
    inputs = {"x": x if in_script else wide, "table_rows": table[features]}
    constants = {"x_in": reading.rounded[0] if in_script else None}
    return _Case(inputs, recorded[:, features], expected[:, features], allowed[:, features], constants), features


def _farthest(recorded: Array, expected: FloatArray, allowed: FloatArray) -> Array:
    """Return the output features of a token farthest outside their bound, in ascending order."""
    ratio = _times(recorded, expected, allowed)[0]
    return np.sort(np.argsort(-ratio, kind="stable")[:MAX_FEATURES])
