"""Engines against themselves: every relation holds for real bitnet.cpp, not for our C library with a fault."""

from __future__ import annotations

import re

import numpy as np
import pytest
from click.testing import Result

from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.causal.view import causal_view
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model import taps
from crossval.model.weights import SpecWeights
from crossval.repeat.floors import CAPTURE, PREFILL_DECODE, measure_floors
from crossval.repeat.metamorphic.cases import MetamorphicOptions
from crossval.repeat.metamorphic.relations import enough_tokens, run_metamorphic
from tests.support.extra import sampled
from tests.support.families import FAMILIES
from tests.support.strangers import run
from tests.zoo.engine import all_faults, faulty_library

N_LAYERS = 5


@pytest.mark.live
def test_bitnet_cpp_holds_every_relation(five_layers, bitnet_cpp_library):
    options = MetamorphicOptions()
    result = run_metamorphic(
        lambda **asked: BitnetCppRunner(five_layers, library=bitnet_cpp_library, **asked),
        enough_tokens([], 1000, options.n_tokens),
        n_layers=N_LAYERS,
        side="reference",
        options=options,
    )
    assert result.verdict == "holds", [c for c in result.checks if c.status != "ok"]
    assert result.engine == "bitnet.cpp"
    kqv = [c for c in result.checks if c.case.endswith("kqv_out")]
    assert kqv
    assert all(0.1 < c.worst <= 1.0 for c in kqv)


@pytest.mark.live
def test_a_model_with_one_head_holds_in_bitnet_cpp(make_model, bitnet_cpp_library):
    path = make_model(n_heads=1, n_kv_heads=1)
    result = run_metamorphic(
        lambda **asked: BitnetCppRunner(path, library=bitnet_cpp_library, **asked),
        enough_tokens([], 300, 32),
        n_layers=2,
        options=MetamorphicOptions(lengths=(1, 2, 5), thread_counts=(1,)),
    )
    assert result.verdict == "holds", [c for c in result.checks if c.status != "ok"]


@pytest.mark.live
def test_main_holds_every_relation(make_model, main_library):
    """Its single tokens have attention scores of their own, which is no fault."""
    path, options = make_model(arch="bitnet", n_layers=3), MetamorphicOptions(lengths=(1, 2, 5, 33, 65))
    result = run_metamorphic(
        lambda **asked: BitnetCppRunner(path, library=main_library, **asked),
        enough_tokens([], 300, options.n_tokens),
        n_layers=3,
        options=options,
    )
    assert result.verdict == "holds", [c for c in result.checks if c.status != "ok"]


@pytest.mark.live
def test_floors_of_bitnet_cpp_are_those_of_our_engine(five_layers, bitnet_cpp_library):
    """Engines that are bit-identical in every way of running have equal floors."""
    prompts = [np.random.default_rng(n).integers(0, 1000, n).tolist() for n in (5, 13)]
    with BitnetCppRunner(five_layers, library=bitnet_cpp_library) as reference:
        numerics = reference.identity.numerics
    theirs = measure_floors(
        lambda **asked: BitnetCppRunner(five_layers, library=bitnet_cpp_library, **asked),
        prompts, n_layers=N_LAYERS, thread_counts=(1,),
    )  # fmt: skip
    ours = measure_floors(
        lambda **asked: BitnetPyRunner(five_layers, numerics=numerics, **asked),
        prompts, n_layers=N_LAYERS, thread_counts=(1,),
    )  # fmt: skip
    assert theirs.floors == ours.floors
    assert theirs.unmeasured == ()
    assert theirs.of("result_output", CAPTURE).rel_l2 == 0.0
    assert theirs.of("result_output", PREFILL_DECODE).rel_l2 > 0.0
    assert {floor.tap for floor in theirs.floors} == set(taps.of_model(N_LAYERS))


@pytest.mark.live
def test_causal_view_of_two_live_engines(five_layers, bitnet_cpp_library):
    """Prompt in one pass by one, token by token by the other: they differ by flipped codes, reported as such."""
    ids = np.random.default_rng(1).integers(0, 1000, 9).tolist()
    outline = taps.of_model(N_LAYERS, outline=True)
    with BitnetCppRunner(five_layers, library=bitnet_cpp_library) as reference:
        theirs = [reference.eval([token], outline) for token in ids]
    with BitnetPyRunner(five_layers) as engine:
        ours = [engine.eval(ids, outline)]
    view = causal_view(ours, theirs, SpecWeights(five_layers))
    assert view.baseline_kl > 0.0
    assert not view.reliable
    assert view.effects[0].equal_states
    assert not view.effects[1].equal_states


# --- our C library with one fault of the zoo ---------------------------------------------------------------------

LENGTHS = (1, 4, 7)


REMAINDER = "remainder-scaled-as-first-row"


BROKEN = (
    ("", set(), None),
    (REMAINDER, {"one_by_one", "prefix", "split"}, "blk.0.q"),
    ("cache-k-overwrites-previous:layer=1:pass=decode", {"one_by_one", "split"}, None),
    ("only-the-last-sees-itself:layer=2", {"one_by_one", "prefix", "split"}, "blk.2.kq_soft_max"),
    ("third-thread-off-by-one", {"threads"}, "blk.0.q"),
    ("three-threads-one-ulp:layer=3:op=ffn_up", {"threads"}, "blk.3.ffn_up"),
)


@pytest.mark.parametrize(
    ("fault", "relations", "where", "kernel"),
    sampled([(*one, kernel) for one in BROKEN for kernel in FAMILIES], 5, lambda case: case[:1]),
)
def test_a_broken_library_violates_what_it_breaks(five_layers, fault, relations, where, kernel, monkeypatch):
    options, ran = MetamorphicOptions(lengths=LENGTHS), set()

    def opened(**asked):
        runner = BitnetPyRunner(five_layers, **asked)
        with runner:
            ran.add(runner.identity.settings["kernel"])
        return runner

    monkeypatch.setenv("BITNET_KERNEL", kernel)
    with faulty_library(all_faults()) as select:
        select(fault)
        result = run_metamorphic(
            opened, enough_tokens([], 1000, options.n_tokens), n_layers=N_LAYERS, options=options
        )
    assert ran == {kernel}
    failed = [check for check in result.checks if check.status == "failed"]
    assert result.verdict == ("violated" if relations else "holds"), failed
    assert {check.name for check in failed} == relations
    if where is not None:
        assert all(c.where.startswith(where + ",") for c in failed if c.expectation == "bits"), failed
    if fault == REMAINDER:
        whole = [f"{n} of 32 tokens" for n in LENGTHS if n > 1 and n % 4]
        assert [c.case for c in failed if c.name == "prefix"] == whole
    if relations == {"threads"}:
        assert [c.case for c in failed] == ["3 threads"]


def test_the_command_finds_a_broken_library(five_layers):
    def command(fault: str) -> Result:
        with faulty_library(all_faults()) as select:
            select(fault)
            return run("metamorphic", "--model", five_layers, "--lengths", "1,2,18")

    assert command("").exit_code == 0
    done = command("only-the-last-sees-itself:layer=2")
    assert done.exit_code == 1, done.stderr
    assert "blk.2.kq_soft_max" in done.stdout
    done = command("third-thread-off-by-one")
    assert done.exit_code == 1, done.stderr
    place = r"blk.0.q, token \d+, pass \d+, element \d+, \d+"
    shown = re.search(rf"{place}: (\S+) so, (\S+) as usual", done.stdout)
    assert shown is not None, done.stdout
    assert float(shown[1]) != float(shown[2])
