"""Engines with one bug that choose the same tokens as the correct one: ``greedy`` detects and locates it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.record import record_trace, trace_model
from crossval.passes import EngineIdentity, Numerics
from crossval.receipts import file as receipt
from tests.support.strangers import Stranger, run
from tests.zoo.catalogue import ENGINE_FAULTS
from tests.zoo.engine import faulty_library
from tests.zoo.faults.quiet import FAULTS as QUIET
from tests.zoo.world import World

PROMPT, STEPS = "Hello there", 4
FAULTS = {fault.name: fault for fault in (*ENGINE_FAULTS, *QUIET)}
CASES = {
    "activations-not-quantised": ("q", 3, "plain"),
    "quantiser-clamps-at-126": ("attn_o_out", 2, "plain"),
    "float-row-sum": ("attn_o_out", 2, "plain"),
    "norm-eps-hard-coded": ("attn_norm", 1, "large-eps"),
}
"""Bug -> the operation and layer it is in, and the model."""
SAME = "100 % of the tokens equal; the logits differ although both engines state the same arithmetic"
LOGITS_ONLY = ("result_output",)
pytestmark = pytest.mark.usefixtures("unnamed_segments")


class Mine(BitnetPyRunner):
    """A live third-party engine, which may not state how it rounds."""

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


@contextmanager
def mistaken(world: World, name: str) -> Iterator[None]:
    """Run everything in the block with one bug in the engine."""
    op, layer, _ = CASES[name]
    with faulty_library(world.library) as select:
        select(f"{name}:layer={layer}:op={FAULTS[name].ops[op]}")
        yield


@pytest.fixture
def unstated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the candidate `bitnet_py` be a live engine that does not state how it rounds."""

    def anonymous(word: str, model: Path, **options: object) -> BitnetPyRunner:
        runner = Mine(model, n_threads=1)
        runner.anonymous = True
        return runner

    monkeypatch.setattr("crossval.engines.session.open_candidate", anonymous)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference `bitnet.cpp` be one that runs now."""
    monkeypatch.setattr(
        "crossval.engines.session.open_reference", lambda word, model, *_, **__: Stranger(model, n_threads=1)
    )


def greedy(model: Path, reference: Path | str, out: Path, *more: str | Path) -> tuple[int, str, receipt.Receipt]:
    words = ("--prompt", PROMPT, "--steps", STEPS, "--model", model, "--reference", reference, "--receipt", out)
    result = run("greedy", *words, *more)
    assert "Traceback" not in result.output
    assert result.stderr == ""
    return result.exit_code, result.stdout, receipt.read(out)


def assert_found(made: receipt.Receipt, name: str, side: str = "candidate") -> None:
    """Check side, layer and operation; all tokens are equal and no logits are."""
    op, layer, _ = CASES[name]
    assert made["verdict"] == f"{side}_defect"
    (found,) = made["diagnosis"]
    assert (found["party"], found["layer"], found["op"], found["pass_kind"]) == (side, layer, op, "prefill")
    assert (made["parity"]["exact_match_rate"], made["parity"]["logits_exact_match_rate"]) == (1.0, 0.0)


@pytest.mark.parametrize("name", CASES)
def test_a_live_candidate(world, tmp_path, name):
    model = world.model(CASES[name][2])
    golden, out = record(Stranger, model, tmp_path / "golden"), tmp_path / "r.json"
    with mistaken(world, name):
        code, text, made = greedy(model, golden, out)
    assert code == 1
    assert f"meaning    {SAME}. The candidate is wrong" in text
    assert f"candidate  bitnet_py   WRONG  layer {CASES[name][1]}, op {CASES[name][0]} (pass 0, prefill)" in text
    assert_found(made, name)
    assert made["first_divergence"]["explanation"] == SAME.partition("; ")[2]
    assert run("gate", out, "--min-exact-match", "1").exit_code == 1


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize("name", CASES)
def test_a_recorded_candidate_beside_a_live_reference_and_the_gate(world, tmp_path, name):
    model, out = world.model(CASES[name][2]), tmp_path / "r.json"
    with mistaken(world, name):
        mine = record(Mine, model, tmp_path / "mine")
    code, text, made = greedy(model, "bitnet.cpp", out, "--candidate", mine)
    assert code == 1
    assert SAME in text
    assert_found(made, name)
    judged = run("gate", out, "--require-live", "--min-exact-match", "1", "--allow-compute", "recorded")
    assert judged.exit_code == 1
    failed = [line.split("FAIL")[0].strip() for line in judged.stdout.splitlines() if " FAIL " in line]
    assert failed == ["verdict", "audit of the candidate"]
    assert "1 of the tokens, 1 required" in judged.stdout
    # The same engine without the mistake, on the same terms.
    good = record(Mine, model, tmp_path / "good")
    assert greedy(model, "bitnet.cpp", out, "--candidate", good)[0] == 0
    demands = ("--require-live", "--min-exact-match", "1", "--min-logit-match", "1", "--require-bitwise")
    assert run("gate", out, *demands, "--allow-compute", "recorded").exit_code == 0


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_of_the_reference(world, tmp_path, name):
    model = world.model(CASES[name][2])
    with mistaken(world, name):
        golden = record(Stranger, model, tmp_path / "golden")
    code, text, made = greedy(model, golden, tmp_path / "r.json")
    assert code == 1
    assert f"{SAME}. The reference is wrong" in text
    assert_found(made, name, "reference")


@pytest.mark.parametrize("name", CASES)
def test_logits_alone_are_enough_for_a_divergence_where_the_arithmetic_is_stated(world, tmp_path, name):
    model, out = world.model(CASES[name][2]), tmp_path / "r.json"
    golden = record(Stranger, model, tmp_path / "golden", LOGITS_ONLY)
    with mistaken(world, name):
        mine = record(Mine, model, tmp_path / "mine", LOGITS_ONLY)
    for more in ((), ("--no-audit",)):
        code, text, made = greedy(model, golden, out, "--candidate", mine, *more)
        assert (code, made["verdict"]) == (1, "divergence")
        assert f"{SAME}; arithmetic not checked" in text
        assert run("gate", out, "--allow-compute", "recorded").exit_code == 1


@pytest.mark.usefixtures("unstated")
@pytest.mark.parametrize("name", CASES)
def test_an_engine_that_does_not_say_how_it_rounds(world, tmp_path, name):
    model, out = world.model(CASES[name][2]), tmp_path / "r.json"
    golden = record(Stranger, model, tmp_path / "golden")
    with mistaken(world, name):
        code, text, made = greedy(model, golden, out)
        assert code == 1
        assert_found(made, name)
        code, text, made = greedy(model, golden, out, "--no-audit")
    # Its logits are within the bounds of another arithmetic: only the audit tells it from a right engine.
    assert made["parity"]["status"] == "parity"
    assert (code, made["verdict"]) == (3, "incomplete")
    assert "tokens agree; arithmetic not checked" in text
    assert run("gate", out, "--min-exact-match", "1", "--allow-compute", "none").exit_code == 1


# Right engines: what is proven, and what is left open.


def test_logits_with_equal_bits_vouch_for_an_engine_that_recorded_nothing_else(world, tmp_path):
    model, out = world.model("plain"), tmp_path / "r.json"
    golden = record(Stranger, model, tmp_path / "golden", LOGITS_ONLY)
    code, text, made = greedy(model, golden, out)
    assert (code, made["verdict"]) == (0, "parity")
    assert "all logits are bit-equal; every operation of the candidate is correct in the passes" in text
    judged = run("gate", out, "--min-logit-match", "1", "--json")
    assert judged.exit_code == 0, judged.stdout
    assert "bit-equal to those of the other engine, which is correct" in judged.stdout


def test_equal_bits_of_two_engines_nobody_looked_into_are_no_parity(world, tmp_path):
    model, out = world.model("plain"), tmp_path / "r.json"
    golden = record(Stranger, model, tmp_path / "golden", LOGITS_ONLY)
    mine = record(Mine, model, tmp_path / "mine", LOGITS_ONLY)
    code, text, made = greedy(model, golden, out, "--candidate", mine)
    assert (code, made["verdict"], made["parity"]["status"]) == (3, "agrees_within", "parity")
    assert "all logits are bit-equal; the arithmetic agrees with the model's definition within" in text
    assert "Record every tap of the candidate and of the reference (inp_embd, attn_norm, q, k, …)" in text
    assert run("gate", out, "--allow-compute", "recorded").exit_code == 1


def test_right_tokens_of_unstated_arithmetic_need_the_audit_of_both(world, tmp_path):
    model, out = world.model("plain"), tmp_path / "r.json"
    whole = record(Mine, model, tmp_path / "mine")
    code, text, made = greedy(model, "spec", out, "--candidate", whole)
    assert (code, made["verdict"]) == (0, "parity")
    assert "100 % of the tokens equal; the logits agree within their bounds; every operation of both" in text
    logits = record(Mine, model, tmp_path / "logits", LOGITS_ONLY)
    code, text, made = greedy(model, "spec", out, "--candidate", logits)
    assert (code, made["verdict"]) == (3, "agrees_within")
    assert "the logits agree within their bounds; the arithmetic agrees with the model's definition within" in text
    assert "not checked below that." in text
    assert "Record every tap of the candidate (inp_embd" in text
    assert run("gate", out, "--allow-compute", "recorded", "--reference-name", "specification").exit_code == 1


def test_bits_that_are_equal_in_all_but_one_step_are_not_vouched_for(world, tmp_path):
    """A bug in decoding, in an engine that recorded logits only: the other engine's audit cannot show it."""
    model, out = world.model("plain"), tmp_path / "r.json"
    with faulty_library(world.library) as select:
        select("quantiser-clamps-at-126:layer=2:op=attn_sub_norm:pass=decode")
        mine = record(Mine, model, tmp_path / "mine", LOGITS_ONLY)
    golden = record(Stranger, model, tmp_path / "golden")
    code, text, made = greedy(model, golden, out, "--candidate", mine)
    assert (code, made["verdict"], made["first_divergence"]["step"]) == (1, "divergence", 1)
    assert f"{SAME}; every operation of the reference is correct in the passes that were audited" in text
