"""Fused operations: what a kernel keeps to itself is neither missed nor allowed a rounding it does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.audit.audit import audit
from crossval.audit.checks import AuditResult
from crossval.capture import Capture
from crossval.engines.recorded import RecordedRunner
from crossval.model import taps
from crossval.model.weights import SpecWeights
from crossval.passes import EngineIdentity, Numerics
from tests.support.narrow_engine import NarrowEngine, Style, _Engine, plans
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.recorded import only, write_trace

NORMS = ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm")
IDS = (3, 14, 15, 9, 26)


class _Fused(_Engine):
    """Norm and quantiser in one kernel: what is between them has all its digits."""

    _op = ""

    def _do(self, op: str, layer: int | None, right: Any, *inputs: Any) -> Any:
        self._op = op
        return super()._do(op, layer, right, *inputs)

    def rounded(self, value: Any) -> Any:
        return value if self._op in NORMS else super().rounded(value)

    def norm_of(self, name: str) -> Callable[..., Any]:
        if name.rpartition(".")[2] not in NORMS:
            return super().norm_of(name)

        def norm(x: Any, *, eps: float = self.model.eps, weight: Any = None) -> Any:
            root = np.sqrt((x * x).mean(axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps))
            return x / root * (Model.vector(self.model, name) if weight is None else weight)

        return norm


@pytest.fixture(scope="module")
def audited(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AuditResult]:
    """Return the audit of a bfloat16 engine whose norms are in its kernels and not recorded."""

    def run(fused: tuple[str, ...], factor: float = 1.0) -> AuditResult:
        engine = NarrowEngine(model_path, Style("bf16"))
        engine._new = lambda: _Fused(engine.model, narrow=engine.style)
        recording = only(engine.record(plans(IDS, (7,))), lambda name: taps.parse(name).tap not in NORMS)
        numerics = Numerics(compute_dtype="bf16", fused=fused)
        recording = replace(recording, identity=EngineIdentity("fused", numerics=numerics))
        if factor != 1.0:
            array = recording.array(0, "blk.1.ffn_down")
            array[2] = engine.round(array[2] * np.float32(factor))
        out = tmp_path_factory.mktemp("fused") / "t"
        write_trace(recording, engine.model, IDS, "text", out)
        weights = SpecWeights(model_path)
        with RecordedRunner(out) as runner:
            (found,) = audit([Capture(runner, weights.config, runner.plan)], weights)
        return found

    return run


def segments(found: AuditResult) -> dict[str, list[float | None]]:
    """Return status -> how far each segment was left open."""
    made: dict[str, list[float | None]] = {}
    for check in found.checks:
        if check.n_ops > 1:
            made.setdefault(check.status, []).append(check.within)
    return made


def test_what_a_kernel_keeps_has_its_digits_and_is_judged_by_them(audited: Callable[..., AuditResult]) -> None:
    """Rounded to bfloat16, nearly every activation would lie at a tie; in a kernel none needs to."""
    stated = audited(NORMS)
    assert stated.verdict == "clean"
    assert set(segments(stated)) == {"ok"}
    unstated = segments(audited(()))
    assert set(unstated) == {"within"}
    assert min(filter(None, unstated["within"])) > 0.02


def test_a_small_fault_shows_in_a_kernel_that_is_stated_only(audited: Callable[..., AuditResult]) -> None:
    found = audited(NORMS, 1.02)
    assert (found.verdict, found.first_guilty.tap, found.first_guilty.spans) == (  # type: ignore[union-attr]
        "guilty",
        "blk.1.ffn_down",
        ("blk.1.ffn_sub_norm",),
    )
    open_ = [check for check in audited((), 1.02).checks if check.tap == "blk.1.ffn_down"]
    assert {check.status for check in open_} == {"within"}


def test_a_kernel_that_is_stated_and_rounds_inside_is_not_excused(model_path: Path, tmp_path: Path) -> None:
    """The declaration narrows the bounds; one that is not true makes the engine wrong, not undecided."""
    engine = NarrowEngine(model_path, Style("bf16"))
    recording = only(engine.record(plans(IDS, (7,))), lambda name: taps.parse(name).tap not in NORMS)
    numerics = Numerics(compute_dtype="bf16", fused=NORMS)
    recording = replace(recording, identity=EngineIdentity("fused", numerics=numerics))
    write_trace(recording, engine.model, IDS, "text", tmp_path / "t")
    weights = SpecWeights(model_path)
    with RecordedRunner(tmp_path / "t") as runner:
        (found,) = audit([Capture(runner, weights.config, runner.plan)], weights)
    assert found.verdict == "guilty"
