"""Engines against themselves: the real bitnet.cpp holds every relation; our C library, broken, does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from crossval import receipt, taps
from crossval.causal import causal_view
from crossval.cli import cli
from crossval.floors import CAPTURE, PREFILL_DECODE, measure_floors
from crossval.metamorphic.cases import Options
from crossval.metamorphic.run import enough_tokens, run_metamorphic
from crossval.runners.bitnet_cpp import BitnetCppRunner
from crossval.runners.bitnet_py import BitnetPyRunner
from crossval.spec_weights import SpecWeights
from tests import broken_engine
from tests.broken_engine import Mistake

N_LAYERS = 5


@pytest.mark.live
def test_bitnet_cpp_holds_every_relation(five_layers, bitnet_cpp_library):
    options = Options()
    result = run_metamorphic(
        lambda **asked: BitnetCppRunner(five_layers, library=bitnet_cpp_library, **asked),
        enough_tokens([], 1000, options.n_tokens),
        n_layers=N_LAYERS,
        party="reference",
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
        options=Options(lengths=(1, 2, 5), thread_counts=(1,)),
    )
    assert result.verdict == "holds", [c for c in result.checks if c.status != "ok"]


@pytest.mark.live
def test_floors_of_bitnet_cpp_are_those_of_our_engine(five_layers, bitnet_cpp_library):
    """Equal bits in every way of running give equal floors."""
    prompts = [np.random.default_rng(n).integers(0, 1000, n).tolist() for n in (5, 13)]
    with BitnetCppRunner(five_layers, library=bitnet_cpp_library) as reference:
        width = reference.identity.numerics.simd_width
        fused = reference.identity.numerics.fused_quantizer
    theirs = measure_floors(
        lambda **asked: BitnetCppRunner(five_layers, library=bitnet_cpp_library, **asked),
        prompts, n_layers=N_LAYERS, thread_counts=(1,),
    )  # fmt: skip
    ours = measure_floors(
        lambda **asked: BitnetPyRunner(five_layers, simd_width=width, fused_quantizer=fused, **asked),
        prompts, n_layers=N_LAYERS, thread_counts=(1,),
    )  # fmt: skip
    assert theirs.floors == ours.floors
    assert theirs.unmeasured == ()
    assert theirs.of("result_output", CAPTURE).rel_l2 == 0.0
    assert theirs.of("result_output", PREFILL_DECODE).rel_l2 > 0.0
    assert {floor.tap for floor in theirs.floors} == set(taps.all_taps(N_LAYERS))


@pytest.mark.live
def test_causal_view_of_two_live_engines(five_layers, bitnet_cpp_library):
    """Prompt at once by one, token by token by the other: a disagreement by flipped codes, and known as such."""
    ids = np.random.default_rng(1).integers(0, 1000, 9).tolist()
    outline = taps.outline_taps(N_LAYERS)
    with BitnetCppRunner(five_layers, library=bitnet_cpp_library) as reference:
        theirs = [reference.eval([token], outline) for token in ids]
    with BitnetPyRunner(five_layers) as engine:
        ours = engine.eval(ids, outline)
    view = causal_view(ours, theirs, SpecWeights(five_layers))
    assert view.baseline_kl > 0.0
    assert not view.reliable
    assert view.effects[0].equal_states
    assert not view.effects[1].equal_states


# --- our C library with mistakes, one chosen at run time --------------------------------------------------------

MISTAKES = (
    Mistake(
        "columns",
        "forward.c",
        "b->q8 + t * m->cols, m->cols,",
        'b->q8 + (is("columns") && n_cols % 4 && n_tokens > 1 ? 0 : t) * m->cols, m->cols,',
        0,
        "q",
    ),
    Mistake(
        "slot",
        "forward.c",
        "const int64_t cell = p->start + t;",
        'const int64_t cell = p->start + t - (is("slot") && layer == 1 && p->n_tokens == 1 && p->start > 0);',
        1,
        "kq",
    ),
    Mistake(
        "mask",
        "forward.c",
        "n_visible = p->start + t + 1,",
        'n_visible = is("mask") && layer == 2 ? p->start + p->n_tokens : p->start + t + 1,',
        2,
        "kq_soft_max",
    ),
    # a wrong value, not a missing one: rows left unwritten may hold the right values of an earlier pass
    Mistake(
        "slice",
        "forward.c",
        "const float sum = (float)b->q8_sum[t + c],",
        'const float sum = (float)b->q8_sum[t + c] + (is("slice") && r->member == 2),',
        0,
        "q",
    ),
    Mistake(
        "switch",
        "forward.c",
        "/* ---- operations of the team",
        """#include <stdlib.h>
static int is(const char *name) {
    const char *wanted = getenv("MISTAKE");
    return wanted && !strcmp(wanted, name);
}
/* ---- operations of the team""",
        None,
        "",
    ),
)


@pytest.fixture(scope="module")
def broken_library(tmp_path_factory) -> Path:
    """One library with every mistake in it, all of them asleep; ``MISTAKE`` wakes one."""
    folder = tmp_path_factory.mktemp("broken")
    root = folder / "root"
    shutil.copytree(broken_engine.ROOT / "bitnet_py" / "csrc", root / "bitnet_py" / "csrc")
    shutil.copy(broken_engine.ROOT / "CMakeLists.txt", root)
    for mistake in MISTAKES[:-1]:
        path = root / "bitnet_py" / "csrc" / mistake.file
        text = path.read_text()
        assert text.count(mistake.right) == 1, f"{mistake.name}: the source changed, adapt the mistake"
        path.write_text(text.replace(mistake.right, mistake.wrong))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broken_engine, "ROOT", root)
        return broken_engine.build(MISTAKES[-1], folder / "build")


SCRIPT = """
import dataclasses, json, sys
from crossval.metamorphic.cases import Options
from crossval.metamorphic.run import enough_tokens, run_metamorphic
from crossval.runners.bitnet_py import BitnetPyRunner
options = Options(lengths=(1, 2, 3, 4, 7, 18))
result = run_metamorphic(lambda **asked: BitnetPyRunner(sys.argv[1], **asked),
                         enough_tokens([], 1000, options.n_tokens), n_layers=5, options=options)
print(json.dumps(dataclasses.asdict(result)))
"""


@pytest.mark.parametrize(
    ("mistake", "relations", "where"),
    [
        ("none", set(), None),
        ("columns", {"one_by_one", "prefix", "split"}, "blk.0.q"),
        ("slot", {"one_by_one", "split"}, None),
        ("mask", {"one_by_one", "prefix", "split"}, "blk.2.kq_soft_max"),
        ("slice", {"threads"}, "blk.0.q"),
    ],
)
def test_a_broken_library_violates_what_it_breaks(five_layers, broken_library, mistake, relations, where):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, five_layers],
        env={**os.environ, "BITNET_LIBRARY": str(broken_library), "MISTAKE": mistake},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    failed = [check for check in result["checks"] if check["status"] == "failed"]
    assert result["verdict"] == ("violated" if relations else "holds"), done.stdout
    assert {check["name"] for check in failed} == relations
    if where is not None:
        assert all(c["where"].startswith(where + ",") for c in failed if c["expectation"] == "bits"), failed
    if mistake == "columns":
        # columns go 16 at a time and the first tile has the right address: of these lengths only 18 is wrong
        assert [c["case"] for c in failed if c["name"] == "prefix"] == ["18 of 32 tokens"]
    if mistake == "slice":
        assert [c["case"] for c in failed] == ["3 threads"]


def test_the_command_finds_a_broken_library(five_layers, broken_library, tmp_path):
    def command(mistake: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "crossval", "metamorphic", "--model", five_layers, "--lengths", "1,2,18"],
            env={**os.environ, "BITNET_LIBRARY": str(broken_library), "MISTAKE": mistake},
            capture_output=True,
            text=True,
            timeout=240,
        )

    assert command("none").returncode == 0
    done = command("mask")
    assert done.returncode == 1, done.stderr
    assert "blk.2.kq_soft_max" in done.stdout
    done = command("slice")
    assert done.returncode == 1, done.stderr
    shown = re.search(r"blk.0.q, token \d+, element \d+, \d+: (\S+) so, (\S+) as usual", done.stdout)
    assert shown is not None, done.stdout
    assert float(shown[1]) != float(shown[2])


@pytest.mark.live
def test_the_command_checks_both_engines(shipped_model, bitnet_cpp_library, tmp_path, monkeypatch):
    monkeypatch.setenv("BITNET_CPP_LIB", str(bitnet_cpp_library))
    path = tmp_path / "r.json"
    arguments = [
        "metamorphic",
        "--model",
        shipped_model,
        "--engine",
        "both",
        "--prompt",
        "Hello",
        "--receipt",
        path,
    ]
    result = CliRunner().invoke(cli, [str(word) for word in arguments])
    assert result.exit_code == 0, result.output
    made = receipt.read(path)
    assert {row["party"] for row in made["results"]["rows"]} == {"candidate", "reference"}
    assert made["results"]["summary"]["reference"]["verdict"] == "holds"
    gated = CliRunner().invoke(cli, ["gate", str(path), "--require-live"])
    assert gated.exit_code == 0, gated.output
