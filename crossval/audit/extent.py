"""Where a wrong segment lies: its operations and layers, and which taps would narrow it down."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from crossval.audit.checks import OpCheck
from crossval.model import taps

_FEW = 6
"""So many taps are listed by name."""


def of_check(check: OpCheck) -> dict[str, Any] | None:
    """Return what a check spans as a receipt's ``segment``; None for a single operation.

    ``first_layer`` and ``last_layer`` are null when no layer is in it; ``first_op`` is the full name of the first
    tap that was not recorded; ``record`` lists the taps that would narrow it down: of several layers their
    outputs.
    """
    if not check.spans:
        return None
    names = sorted({*check.spans}, key=_index)
    layers = sorted({layer for name in [*names, check.tap] if (layer := taps.parse(name).layer) is not None})
    between = [name for name in names if taps.parse(name).tap == taps.LAYER_TAPS[-1]]
    return {
        "first_layer": layers[0] if layers else None,
        "last_layer": layers[-1] if layers else None,
        "first_op": names[0],
        "record": between or names,
    }


def _index(name: str) -> int:
    return taps.execution_index(name, 1 << 20)


def between(tap: str, after: str | None, n_layers: int, optional: Collection[str] = ()) -> dict[str, Any] | None:
    """Return what lies between two taps as a ``segment`` that ends at ``tap``; None when that is one operation.

    ``optional``: taps, without layer, that the model lacks.
    """
    every = [name for name in taps.all_taps(n_layers) if taps.parse(name).tap not in optional]
    first = 0 if after is None else every.index(after) + 1
    between = every[first : every.index(tap) + 1]
    if len(between) < 2:
        return None
    layers = [layer for name in between if (layer := taps.parse(name).layer) is not None]
    return {
        "first_layer": layers[0] if layers else None,
        "last_layer": layers[-1] if layers else None,
        "first_op": between[0],
    }


def where(found: Mapping[str, Any]) -> str:
    """Return the place of a wrong operation, or the range of a segment, without its pass.

    ``found``: an item with ``layer``, ``op`` and perhaps ``segment``: a ``first_guilty``, a ``diagnosis``.
    """
    segment = found.get("segment")
    layer, op = found["layer"], found["op"]
    if segment is None:
        return f"op {op}" if layer is None else f"layer {layer}, op {op}"
    first = taps.parse(segment["first_op"])
    layers = [n for n in (segment["first_layer"], segment["last_layer"]) if n is not None]
    if not layers:
        return f"ops {first.tap} to {op}"
    if layers[0] != layers[1]:
        return f"layers {layers[0]} to {layers[1]}, up to op {op}"
    if first.layer is None:
        return f"from op {first.tap} to layer {layers[1]}, op {op}"
    return f"layer {layers[0]}, ops {first.tap} to {op}"


def narrower(segment: Mapping[str, Any]) -> str:
    """Return what to record to find the error in a segment: ``l_out of layers 6 and 7``."""
    parsed = [taps.parse(name) for name in segment["record"]]
    layers = sorted({one.layer for one in parsed if one.layer is not None})
    if len({one.tap for one in parsed}) == 1 and layers:
        return f"{parsed[0].tap} of {numbers('layer', layers)}"
    if len(parsed) <= _FEW or not layers:
        return listed([str(one) for one in parsed])
    return f"every tap of {numbers('layer', layers)}"


def numbers(noun: str, values: Sequence[int]) -> str:
    """Return ``layer 3``, ``layers 3 and 4``, ``layers 3 to 6`` or ``layers 3, 5 and 8``."""
    if len(values) == 1:
        return f"{noun} {values[0]}"
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{plural} {values[0]} to {values[-1]}"
    return f"{plural} {listed(map(str, values))}"


def listed(words: Iterable[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
