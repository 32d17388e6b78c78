"""Is a table in blocks the checkpoint's? Quantised again, or held to half a step at the file's own scales.

ggml's quantisers (ggml-quants.c, ``quantize_row_*_ref``) are of two kinds. Q8_0, TQ1_0 and TQ2_0 are a
division and a rounding: quantised again, the checkpoint's values give the file's bytes, or the file holds
others. So do Q4_0 and Q5_0, but a build that fuses ``x * id + 8.5`` rounds ties otherwise. Q6_K and Q3_K
search for their scales in float32 sums whose order depends on the build; their codes are then the nearest at
the scales that were found. So the scales are taken from the file, and each value must be within half a step
of the checkpoint's, or at an end of the codes with the checkpoint's beyond it, no farther than the search can
leave one. That judges codes, not the choice of scales.

The table may have been rounded to float16 before, as bitnet.cpp's converter does: either is right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

Criterion = Literal["requantised", "half a step"]
REQUANTISED: Criterion = "requantised"
CRITERIA: dict[str, tuple[Criterion, ...]] = {
    "Q8_0": ("requantised",),
    "TQ1_0": ("requantised",),
    "TQ2_0": ("requantised",),
    "Q4_0": ("requantised", "half a step"),
    "Q5_0": ("requantised", "half a step"),
    "Q6_K": ("half a step",),
    "Q3_K": ("half a step",),
}
"""Type -> by which a table of it is right, the strictest first."""
_ENDS = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q6_K": (-32, 31), "Q3_K": (-4, 3)}
"""Smallest and largest code."""
_REACH = {"Q4_0": 8.0, "Q5_0": 16.0, "Q6_K": 65.8, "Q3_K": 126.0}
"""Steps of its scale, before that is rounded, that a quantised value can have. Q6_K: the scales tried map the
largest value to at most 32.9, and the least-squares scale of such codes is at least half of it. Q3_K: codes
are changed only where that lowers the weighted error, which starts at 15 values off by one step at most, so
that the largest value keeps a step of at least its (4 - sqrt(15)) / 16th part."""
_LEAST = 1e-13
"""Values that small may be quantised to 0 (``GROUP_MAX_EPS`` times the reach)."""

Values = npt.NDArray[np.float32]


@dataclass
class Tally:
    """Values of a table in blocks that are not the checkpoint's, counted over chunks of rows."""

    kind: GGMLQuantizationType
    counts: dict[tuple[Criterion, str], int] = field(default_factory=dict)
    """By criterion, and by what the table was quantised from."""

    def add(self, stored: npt.NDArray[np.uint8], right: Values) -> None:
        """Count over some rows: their bytes ``stored (rows, bytes)``, the right values ``(rows, cols)``."""
        for source, values in (("float32", right), ("float16", _in_half(right))):
            for criterion in CRITERIA[self.kind.name]:
                count = _count_requantised if criterion == REQUANTISED else _count_beyond
                found = count(stored, values, self.kind)
                self.counts[criterion, source] = self.counts.get((criterion, source), 0) + found

    @property
    def outcome(self) -> tuple[Criterion, int]:
        """Return the strictest criterion that every value meets, or the last one, and how many do not meet it."""
        best = {
            criterion: min(count for (one, _), count in self.counts.items() if one == criterion)
            for criterion in CRITERIA[self.kind.name]
        }
        criterion = next((one for one, count in best.items() if not count), list(best)[-1])
        return criterion, best[criterion]


def _in_half(values: Values) -> Values:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16).astype(np.float32)
    return narrow if np.isfinite(narrow).all() else values


def _count_requantised(stored: npt.NDArray[np.uint8], values: Values, kind: GGMLQuantizationType) -> int:
    """Return how many values differ; of a block whose bytes alone do, one."""
    width, size_bytes = GGML_QUANT_SIZES[kind]
    again = quantize(values, kind)
    blocks = (stored != again).reshape(-1, size_bytes).any(axis=1)
    if not blocks.any():
        return 0
    held, right = (
        dequantize(rows.reshape(-1, size_bytes)[blocks], kind).reshape(-1, width) for rows in (stored, again)
    )
    return int(np.maximum((held != right).sum(axis=1), 1).sum())


def _count_beyond(stored: npt.NDArray[np.uint8], values: Values, kind: GGMLQuantizationType) -> int:
    """Return how many values are farther than half a step from the checkpoint's, at the file's scales."""
    units, reach, slack = (one.repeat(16, axis=1) for one in _scales(stored, kind))
    right = values.astype(np.float64).reshape(units.shape)
    held = dequantize(stored, kind).astype(np.float64).reshape(units.shape)
    low, high = _ENDS[kind.name]
    codes = np.rint(np.divide(held, units, out=np.zeros_like(held), where=units != 0))
    within = np.abs(right - held) <= np.abs(units) / 2 + slack
    beyond = ((codes == low) & (right * units < low * units * units)) | (
        (codes == high) & (right * units > high * units * units)
    )
    ended = (beyond | (units == 0)) & (np.abs(right) <= reach + _LEAST)
    return int(right.size - np.count_nonzero(within | ended))


def _scales(
    stored: npt.NDArray[np.uint8], kind: GGMLQuantizationType
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return for every 16 values ``(blocks, values / 16)``: the step with its sign, the largest value, the slack.

    Slack: by how much a value may be off beyond half a step, because a code was found at the step before that was
    rounded to float16 (Q4_0, Q5_0), or by the rounding of a division (Q6_K, Q3_K).
    """
    width, size_bytes = GGML_QUANT_SIZES[kind]
    blocks = stored.reshape(-1, size_bytes)
    at = {"Q6_K": 208, "Q3_K": 108}.get(kind.name, 0)
    step = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float64).repeat(width // 16, axis=1)
    top = -_ENDS[kind.name][0]
    if kind.name in ("Q4_0", "Q5_0"):
        rounding = np.maximum(np.abs(step) * 2.0**-11, 2.0**-25)
        return step, _REACH[kind.name] * (np.abs(step) + rounding), 1.01 * top * rounding
    factors = _factors(blocks, kind)
    units = step * factors
    reach = _REACH[kind.name] * (np.abs(factors) + 1) * np.maximum(np.abs(step) * (1 + 2.0**-10), 2.0**-24)
    return units, reach, np.abs(units) * top * 2.0**-22


def _factors(blocks: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[np.float64]:
    """Return the integer scales of 16 values each, ``(blocks, 16)``."""
    if kind is GGMLQuantizationType.Q6_K:  # [192 bytes of codes][16 int8 scales][float16]
        return np.asarray(blocks[:, 192:208].view(np.int8), np.float64)
    # Q3_K: [96 bytes of codes][12 bytes: low halves of 16 scales, then their upper two bits][float16]
    low = np.concatenate([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], axis=1)
    high = np.concatenate([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    found: npt.NDArray[np.float64] = (low | high << 4).astype(np.float64) - 32
    return found
