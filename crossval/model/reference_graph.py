"""What a generation of bitnet.cpp computes although it is not the model, for comparisons that follow it.

The audits then hold both engines to that graph, so that everything else can be compared; nothing that they show is
about the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from crossval.model.config import SpecConfig

GRAPHS: Mapping[tuple[str, str], tuple[Mapping[str, Any], str]] = {
    ("main", "bitnet-b1.58"): ({"activation": "silu"}, "SiLU instead of squared ReLU"),
}
"""Generation and architecture -> the fields of ``SpecConfig`` that differ from the model's, and what that is."""
ZERO_ROWS: Mapping[str, str] = {"main": "NaN for an all-zero activation row"}
"""Generation -> what it makes of a row that has no largest magnitude."""


def followed(config: SpecConfig, generation: str | None) -> SpecConfig:
    """Return the configuration of a model as a generation computes it; unchanged where that is the model."""
    if not differences(config.architecture, generation):
        return config
    changed, _ = GRAPHS.get((generation, config.architecture), ({}, "")) if generation else ({}, "")
    return replace(config, **changed, follows=generation)


def differences(architecture: str, generation: str | None) -> list[str]:
    """Return in words what a generation computes otherwise than the model defines."""
    if generation is None:
        return []
    found = [GRAPHS[generation, architecture][1]] if (generation, architecture) in GRAPHS else []
    return found + ([ZERO_ROWS[generation]] if generation in ZERO_ROWS else [])
