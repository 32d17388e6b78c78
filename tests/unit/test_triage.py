"""``crossval triage``: the verdict of ``layers`` in plain words, with the same exit code."""

from __future__ import annotations

from click.testing import CliRunner

from crossval.arbitrate import ADVICE
from crossval.cli import cli


def test_healthy_engine_is_told_to_look_elsewhere(shipped_model):
    golden = shipped_model.with_suffix(".goldens") / "what-is-2-2"
    done = CliRunner().invoke(cli, ["triage", "--prompt", "What is 2+2?", "--reference", str(golden)])
    assert done.exit_code == 0, done.output
    assert " ".join(ADVICE["parity"].next_step.split()[:4]) in " ".join(done.output.split())


def test_empty_prompt_exits_4():
    assert CliRunner().invoke(cli, ["triage", "--prompt", ""]).exit_code == 4
