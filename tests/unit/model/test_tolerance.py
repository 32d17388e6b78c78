"""The table of thresholds: growth with depth, classes, and that a missing number never passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest

from crossval.compare.rows import choose_policy
from crossval.model import taps
from crossval.model.tolerance import (
    CLASSES,
    DIRECTIONS,
    FLOOR_PER_SQRT_LAYER,
    describe,
    tap_class,
    tolerance_for,
    violations,
)
from crossval.passes import EngineIdentity, Numerics


@dataclass(frozen=True)
class Numbers:
    cosine: float | None = 1.0
    worst_token_cosine: float | None = 1.0
    nmse: float | None = 0.0
    worst_token_nmse: float | None = 0.0
    norm_ratio: float | None = 1.0


def test_floor_is_the_documented_relative_error() -> None:
    assert math.sqrt(tolerance_for("blk.3.l_out", 4, "same").floor) == pytest.approx(0.015 * 2)
    assert math.sqrt(tolerance_for("result_output", 25, "independent").floor) == pytest.approx(0.03 * 5)


@pytest.mark.parametrize("policy", ["same", "independent"])
def test_every_tap_has_every_threshold_and_depth_only_widens_it(policy: str) -> None:
    for name in taps.of_model(30):
        bound = tolerance_for(name, 30, policy).bound  # type: ignore[arg-type]
        assert set(bound) == set(DIRECTIONS)
        assert not violations(Numbers(), bound)
    for tap in taps.LAYER_TAPS:
        shallow, deep = (tolerance_for(f"blk.{layer}.{tap}", 30, policy) for layer in (0, 29))  # type: ignore[arg-type]
        assert shallow.floor < deep.floor
        assert shallow.bound["nmse"] < deep.bound["nmse"]
        assert shallow.bound["cosine"] > deep.bound["cosine"]


def test_same_arithmetic_is_held_tighter_than_another_one() -> None:
    for name in taps.of_model(4):
        same, other = tolerance_for(name, 4, "same"), tolerance_for(name, 4, "independent")
        assert same.bound["nmse"] <= other.bound["nmse"]
    assert FLOOR_PER_SQRT_LAYER["same"] < FLOOR_PER_SQRT_LAYER["independent"]


def test_embedding_must_be_copied() -> None:
    assert tap_class("inp_embd") == "exact"
    bound = tolerance_for("inp_embd", 30, "independent").bound
    assert violations(Numbers(nmse=1e-6), bound)


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"cosine": 0.5}, "cosine"),
        ({"worst_token_cosine": 0.5}, "worst_token_cosine"),
        ({"nmse": 0.5}, "nmse"),
        ({"worst_token_nmse": 0.5}, "worst_token_nmse"),
        ({"norm_ratio": 1.5}, "norm_ratio"),
        ({"norm_ratio": 0.5}, "norm_ratio"),
    ],
)
def test_each_metric_alone_breaks_the_bound(changes: dict[str, float], metric: str) -> None:
    broken = violations(replace(Numbers(), **changes), tolerance_for("blk.0.l_out", 4, "independent").bound)
    assert len(broken) == 1
    assert metric in broken[0]


@pytest.mark.parametrize("metric", list(DIRECTIONS))
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_undefined_metrics_never_pass(metric: str, value: float | None) -> None:
    bound = tolerance_for("blk.0.l_out", 4, "independent").bound
    assert violations(replace(Numbers(), **{metric: value}), bound) == [f"{metric} undefined"]


def test_no_thresholds_and_unknown_metrics_never_pass() -> None:
    assert violations(Numbers(), {})
    assert violations(Numbers(), {"colour": 1.0}) == ["unknown metric colour"]


def test_policy_follows_what_the_engines_say() -> None:
    w8, w16 = Numerics(8, False), Numerics(16, False)
    ours, theirs, other = EngineIdentity("a", numerics=w8), EngineIdentity("b", numerics=w8), EngineIdentity("c")
    assert choose_policy(ours, theirs) == "same"
    assert choose_policy(ours, EngineIdentity("b", numerics=w16)) == "independent"
    assert choose_policy(other, other) == "independent"
    assert choose_policy(ours, EngineIdentity("b", numerics=Numerics(8, None))) == "independent"


def test_describe_states_the_table_in_force() -> None:
    table = describe("same")
    assert table["policy"] == "same"
    assert table["floor_rel_l2_per_sqrt_layer"] == FLOOR_PER_SQRT_LAYER["same"]
    assert set(table["classes"]) == set(CLASSES)
