"""``--floors`` and ``--causal`` end to end: on engines that are broken in one layer, and with real bitnet.cpp."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from crossval.cli import cli
from crossval.engines.goldens import FULL_PROMPTS
from crossval.receipts import file as receipt
from tests.zoo import engine

CROSSVAL = Path(sysconfig.get_path("scripts")) / "crossval"


def broken(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command with an engine that is wrong in layer 2."""
    return engine.run([CROSSVAL, *arguments], "sub-norm-skipped:layer=2:op=attn_sub_norm")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_causal_view_points_at_the_layer_that_is_broken(golden, tmp_path):
    out = tmp_path / "r.json"
    words = ("--prompt", FULL_PROMPTS[0], "--reference", golden, "--causal", "--receipt", out)
    done = broken("layers", *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "arises between the output of layer 1 and the output of layer 2" in done.stdout
    assert "nothing is recovered from the output of layer 2 on" in done.stdout
    assert "it is the candidate that departs there from the specification" in done.stdout
    made = receipt.read(out)
    assert made["causal"]["reliable"]
    assert made["causal"]["largest"] == made["causal"]["nothing_recovered_from"] == "blk.2.l_out"
    assert [one["equal_states"] for one in made["causal"]["effects"]] == [True, True, True, False, False]
    # The receipt of a candidate that is wrong fails, but not by its causal view.
    gate = run("gate", out, "--json")
    checks = {check["name"]: check["passed"] for check in json.loads(gate.stdout)["receipts"][0]["checks"]}
    assert checks["causal"]
    assert not checks["verdict"]


def test_triage_says_it_too_and_in_words(golden):
    words = ("--prompt", FULL_PROMPTS[0], "--reference", golden, "--causal")
    done = broken("triage", *words)
    assert done.returncode == 1, done.stdout + done.stderr
    causal = [line for line in done.stdout.splitlines() if line.startswith("causal ")]
    assert "between the output of layer 1 and the output of layer 2" in causal[0]
    assert "\ntolerance    no tolerance would do: a cosine is negative (" in done.stdout


def test_diff_shows_the_causal_view_of_two_traces(golden, tmp_path):
    trace, out = tmp_path / "t", tmp_path / "r.json"
    recorded = broken(
        "record", "--prompt", FULL_PROMPTS[0], "--engine", "bitnet_py", "--decode", "0", "--out", trace,
    )  # fmt: skip
    assert recorded.returncode == 0, recorded.stderr
    result = run("diff", trace, golden, "--decode", "0", "--causal", "--receipt", out)
    assert result.exit_code == 1, result.output
    assert receipt.read(out)["causal"]["largest"] == "blk.2.l_out"
    turned = run("diff", golden, trace, "--decode", "0", "--causal")
    assert "it is the reference that departs there from the specification" in turned.stdout


@pytest.mark.live
@pytest.mark.usefixtures("use_bitnet_cpp")
class TestLive:
    WORDS = ("--prompt", FULL_PROMPTS[0], "--reference", "bitnet.cpp")

    def test_two_right_engines(self, tmp_path):
        out = tmp_path / "r.json"
        result = run("layers", *self.WORDS, "--receipt", out, "--floors", "--causal")
        assert result.exit_code == 0, result.output
        assert "the logits of the last token are bit-identical" in result.stdout
        assert "no row differs, so none is a multiple of its floor" in result.stdout
        made = receipt.read(out)
        assert made["floors"]["table"]["unmeasured"] == []
        of_logits = {f["variation"]: f for f in made["floors"]["table"]["floors"] if f["tap"] == "result_output"}
        assert set(of_logits) == {"at once / one by one", "1 threads", "2 threads", "with / without capture"}
        assert of_logits["at once / one by one"]["rel_l2"] > 0.0 == of_logits["with / without capture"]["rel_l2"]
        assert run("gate", out, "--require-live", "--require-bitwise").exit_code == 0

    def test_the_specification_is_a_few_times_the_floor_away(self, tmp_path):
        out = tmp_path / "r.json"
        result = run("triage", *self.WORDS, "--receipt", out, "--candidate", "spec", "--floors")
        assert result.exit_code == 0, result.output
        assert "times their floor" in result.stdout
        assert "of the bounds in force would be enough" in result.stdout
        times = [one["times"] for one in receipt.read(out)["floors"]["multiples"] if one["times"] is not None]
        assert times
        assert 0.5 < max(times) < 50.0
        assert run("gate", out, "--allow-compute", "specification").exit_code == 0

    def test_a_broken_engine_is_far_beyond_the_floor(self, tmp_path):
        out = tmp_path / "r.json"
        done = broken("layers", *self.WORDS, "--receipt", out, "--floors", "--causal")
        assert done.returncode == 1, done.stdout + done.stderr
        made = receipt.read(out)
        assert made["causal"]["largest"] == "blk.2.l_out"
        times = {(one["pass_index"], one["tap"]): one["times"] for one in made["floors"]["multiples"]}
        assert times[0, "blk.2.l_out"] > 100.0
        assert not any(tap == "blk.1.l_out" for _, tap in times)
