"""Engines with one mistake that choose the same tokens as the right one: ``greedy`` has to see it, and say where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from strangers import Stranger, run

from crossval import taps
from crossval.record import record_trace, trace_model
from crossval.runners.base import EngineIdentity, Numerics
from crossval.runners.bitnet_py import BitnetPyRunner
from tests.zoo import models
from tests.zoo.catalogue import ENGINE_FAULTS
from tests.zoo.engine import faulty_library
from tests.zoo.fault import EngineFault
from tests.zoo.faults.quiet import FAULTS as QUIET
from tests.zoo.world import World

PROMPT, STEPS = "Hello there", 4
FAULTS = {fault.name: fault for fault in (*ENGINE_FAULTS, *QUIET)}
CASES = {
    "activations-not-quantised": ("q", 0, "plain"),
    "quantiser-clamps-at-126": ("attn_o_out", 2, "plain"),
    "float-row-sum": ("attn_o_out", 2, "plain"),
    "norm-eps-hard-coded": ("attn_norm", 1, "large-eps"),
}
"""Mistake -> the operation and layer it is in, and the model."""
SAME = "100 % of the tokens equal; the logits differ although both engines state the same arithmetic"
LOGITS_ONLY = ("result_output",)


class Mine(BitnetPyRunner):
    """A live engine of somebody else, which may not say how it rounds."""

    anonymous = False

    @property
    def identity(self) -> EngineIdentity:
        known = super().identity
        return replace(known, name="mine", numerics=Numerics() if self.anonymous else known.numerics)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("zoo"))


def record(kind: type[BitnetPyRunner], model: Path, out: Path, names: tuple[str, ...] | None = None) -> Path:
    with kind(model, n_threads=1) as runner:
        record_trace(
            runner, trace_model(model), out, prompt_ids=runner.tokenize(PROMPT), prompt_text=PROMPT,
            n_decode=STEPS - 1, select_prefill=names, select_decode=names, n_decode_full=STEPS - 1,
        )  # fmt: skip
    return out
