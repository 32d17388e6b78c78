"""Which engine of a session opens first, what the other is told of it, and which kernels ran."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitnet_py import _native
from crossval.engines import session
from crossval.passes import EngineIdentity, Numerics, PassPlan
from crossval.terms import Side

STATED = {"candidate": Numerics(16, False, generation="main"), "reference": Numerics(8, False, generation="main")}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Side, dict[str, Any]]]:
    """Sides in the order in which they are opened, with what each was opened with."""
    found: list[tuple[Side, dict[str, Any]]] = []

    class Runner:
        status = "live"
        plan = (PassPlan("prefill", tuple(range(700)), 0),)

        def __init__(self, side: Side) -> None:
            self.identity = EngineIdentity(name=side, numerics=STATED[side])

        def __enter__(self) -> Runner:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def opener(side: Side) -> Any:
        def opens(*_: object, **options: Any) -> Runner:
            found.append((side, options))
            return Runner(side)

        return opens

    monkeypatch.setattr(session, "open_candidate", opener("candidate"))
    monkeypatch.setattr(session, "open_reference", opener("reference"))
    return found


def open_session(candidate: str, reference: str, **options: Any) -> None:
    model: Any = SimpleNamespace(path=Path("m.gguf"))
    with session.Session(model, candidate, reference, n_threads=2, **options) as made:
        made.open("hello")


@pytest.mark.parametrize(
    ("candidate", "reference", "order"),
    [
        ("bitnet_py", "bitnet.cpp", ["reference", "candidate"]),
        ("bitnet.cpp", "bitnet_py", ["candidate", "reference"]),  # ours follows, whichever side it is on
        ("bitnet.cpp:a", "bitnet.cpp", ["reference", "candidate"]),
        ("DIR", "bitnet.cpp", ["candidate", "reference"]),
        ("bitnet_py", "spec", ["reference", "candidate"]),
        ("bitnet.cpp", "spec", ["candidate", "reference"]),  # the specification reads text by the other's rules
        ("spec", "bitnet.cpp", ["reference", "candidate"]),
    ],
)
def test_who_states_its_arithmetic_opens_before_who_follows(opened, tmp_path, candidate, reference, order):
    words = (str(tmp_path) if word == "DIR" else word for word in (candidate, reference))
    open_session(*words)
    assert [side for side, _ in opened] == order


@pytest.mark.parametrize("as_run", [False, True])
@pytest.mark.parametrize("follow", [False, True])
def test_the_second_engine_is_told_how_the_first_computes(opened, as_run, follow):
    open_session("bitnet_py", "bitnet.cpp", follow_reference_graph=follow, as_run=as_run)
    first, second = (options for _, options in opened)
    assert first == {"n_threads": 2, "as_run": as_run, "tap_map": None}
    assert second == {
        "n_threads": 2, "as_run": as_run, "tap_map": None, "numerics": STATED["reference"],
        "follow_reference_graph": follow,
        "n_ubatch": 700,
    }  # fmt: skip


def test_the_model_is_what_is_computed_unless_told_otherwise(opened):
    open_session("bitnet_py", "bitnet.cpp")
    assert [options["as_run"] for _, options in opened] == [False, False]
    assert opened[1][1]["follow_reference_graph"] is False


@pytest.mark.parametrize(
    ("used", "asked", "fallback"),
    [("fast", "", False), ("slow", "", True), ("slow", "slow", False), (None, "", True)],
)
def test_fallback_is_a_slower_kernel_unasked(used, asked, fallback, monkeypatch):
    families = [_native.KernelFamily(*family) for family in (
        ("fastest", "", False), ("fast", "", True), ("slow", "", True),
    )]  # fmt: skip
    monkeypatch.setattr(_native, "kernel_families", lambda: families)
    monkeypatch.setenv("BITNET_KERNEL", asked)
    assert session.is_fallback(used) is fallback
