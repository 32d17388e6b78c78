"""Where a wrong segment lies: its operations and layers, and which taps would narrow it down."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from crossval.audit.checks import OpCheck
from crossval.model import taps

_FEW = 6
"""Most taps that are listed by name."""


def of_check(check: OpCheck) -> dict[str, Any] | None:
    """Return what a check spans as a receipt's ``segment``; None for a single operation.

    ``first_layer`` and ``last_layer`` are null when no layer is in it; ``first_op`` is the full name of the first
    tap that was not recorded; ``record`` lists the taps that would narrow it down: of several layers their
    outputs.
    """
    if not check.spans:
        return None
    names = sorted({*check.spans}, key=taps.execution_index)
    outputs = [name for name in names if taps.parse(name).tap == taps.LAYER_TAPS[-1]]
    return {**_range([*names, check.tap]), "record": outputs or names}


def between(tap: str, after: str | None, n_layers: int, optional: Collection[str] = ()) -> dict[str, Any] | None:
    """Return what lies between two taps as a ``segment`` that ends at ``tap``; None when that is one operation.

    ``optional``: taps, without layer, that the model lacks.
    """
    every = [name for name in taps.all_taps(n_layers) if taps.parse(name).tap not in optional]
    first = 0 if after is None else every.index(after) + 1
    names = every[first : every.index(tap) + 1]
    return _range(names) if len(names) > 1 else None


def _range(names: Sequence[str]) -> dict[str, Any]:
    """Return first and last layer and the first tap of taps in execution order."""
    layers = layers_of(names)
    return {
        "first_layer": layers[0] if layers else None,
        "last_layer": layers[-1] if layers else None,
        "first_op": names[0],
    }


def layers_of(names: Iterable[str]) -> list[int]:
    """Return the layers that taps are of, ascending."""
    return sorted({layer for name in names if (layer := taps.parse(name).layer) is not None})


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
    names, layers = segment["record"], layers_of(segment["record"])
    ops = {taps.parse(name).tap for name in names}
    if len(ops) == 1 and layers:
        return f"{ops.pop()} of {numbers('layer', layers)}"
    if len(names) <= _FEW or not layers:
        return listed(names)
    return f"every tap of {numbers('layer', layers)}"


def numbers(noun: str, values: Iterable[int]) -> str:
    """Return ``layer 3``, ``layers 3 and 4``, ``layers 3 to 6`` or ``layers 0 to 2 and 5``; ascending."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    words: list[str] = []
    for run in runs:
        words += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    if len(runs) == len(runs[0]) == 1:
        return f"{noun} {words[0]}"
    return f"{noun}{'es' if noun.endswith('s') else 's'} {listed(words)}"


def listed(words: Iterable[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
