"""Our engine on llama models: inside every bound, and each way to get llama wrong is named where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitnet_py.model
from bitnet_py import _native
from bitnet_py._structs import model_struct
from crossval.audit.audit import audit
from crossval.capture import Capture
from crossval.diagnose.findings import Finding, find
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics, PassPlan

MakeModel = Callable[..., Path]
EVERYTHING = {"arch": "llama", "biases": True, "rope_freqs": True, "scales": True, "rope_scaling": 4.0}
MAIN = Numerics(16, False, generation="main", binary16_sums=False)
PLANS = (PassPlan("prefill", (5, 90, 17, 250, 4, 63), 0), PassPlan("decode", (8,), 6))


def examined(path: Path, numerics: Numerics) -> tuple[Any, Finding | None]:
    weights = SpecWeights(path)
    with BitnetPyRunner(path, n_threads=1, numerics=numerics) as runner:
        source = Capture(runner, weights.config, PLANS)
        (result,) = audit([source], weights)
        return result, find("candidate", source, result, weights)


@pytest.mark.parametrize("numerics", [Numerics(8, False), Numerics(16, False), MAIN])
@pytest.mark.parametrize("shape", [EVERYTHING, {"arch": "llama", "untied_head": True, "head_dim": 128}])
def test_every_operation_is_inside_its_bound(make_model: MakeModel, shape: dict, numerics: Numerics) -> None:
    result, _ = examined(make_model(n_heads=4, n_kv_heads=2, **shape), numerics)
    assert result.verdict == "clean"
    assert result.n_covered == result.n_ops


def _without_bias(model: _native.ModelStruct) -> None:
    model.layers[1].v.bias = None


def _other_bias(model: _native.ModelStruct) -> None:
    model.layers[0].k.bias = model.layers[0].v.bias


def _without_factor(model: _native.ModelStruct) -> None:
    model.layers[1].o.factor = 1.0


def _pairs_of_halves(model: _native.ModelStruct) -> None:
    model.rope_pairing = _native.ROPE_PAIRINGS.index("halves")


def _without_rope_factors(model: _native.ModelStruct) -> None:
    model.rope_factors = None


def _without_scaling(model: _native.ModelStruct) -> None:
    model.rope_scale = 1.0


def _tied_head(model: _native.ModelStruct) -> None:
    model.output = model.token_embd


FAULTS = {
    "bias skipped": (_without_bias, "blk.1.v", "bias skipped"),
    "bias of V added to K": (_other_bias, "blk.0.k", "bias blk.0.attn_v.bias"),
    "scale skipped": (_without_factor, "blk.1.attn_o_out", ".scale skipped"),
    "RoPE pairing": (_pairs_of_halves, "blk.0.q_rope", "pairs of halves"),
    "frequency factors skipped": (_without_rope_factors, "blk.0.q_rope", "frequency factors skipped"),
    "linear scaling skipped": (_without_scaling, "blk.0.q_rope", "linear scaling skipped"),
    "embedding as head": (_tied_head, "result_output", "head of token_embd.weight"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_engine_is_named(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The C library itself is given the wrong model, so that nothing but the fault differs."""
    change, tap, cause = FAULTS[name]

    def wrong(weights: Any) -> _native.ModelStruct:
        model = model_struct(weights)
        change(model)
        return model

    monkeypatch.setattr(bitnet_py.model, "model_struct", wrong)
    path = make_model(n_heads=4, n_kv_heads=2, **EVERYTHING, untied_head=True)
    _, found = examined(path, Numerics(8, False))
    assert found is not None
    assert found.check.tap == tap
    assert found.diagnosis.name == cause
