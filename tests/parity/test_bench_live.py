"""Real bitnet.cpp in benchmarks: threads that can be pinned and that sleep, both generations side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from crossval.bench import threads
from crossval.bench.measures import Work
from crossval.bench.search import Setting
from crossval.bench.stage import Entrant, Stage
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.cli import cli
from crossval.receipts import file as receipt

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("use_bitnet_cpp")]

REFERENCE = Entrant("reference", 0)


def test_its_threads_are_found_pinned_and_put_to_sleep(bitnet_cpp_library: Path, shipped_model: Path) -> None:
    cores = threads.usable_cores()
    if not threads.can_place() or len(cores) < 2:
        pytest.skip("threads cannot be placed here: needs Linux and two processors")
    setting = Setting(2, tuple(cores[:2]))
    work = Work(seed=0, n_prompt=64, n_decode=1, n_rounds=1, n_threads=2, vocab_size=1000)

    def start(entrant: Entrant, n_threads: int) -> BitnetCppRunner:
        return BitnetCppRunner(shipped_model, library=bitnet_cpp_library, n_threads=n_threads)

    with Stage(start, work) as stage:
        engine = stage.start(REFERENCE, setting).engine
        stage.pin(REFERENCE, setting)
        engine.reset()
        engine.eval(work.prompt_ids, ("result_output",))
        assert threads.settle([engine.pid]) == []
        stage.rest()
        assert stage.idle == {REFERENCE: "sleeps"}


def test_both_generations_beside_ours(march_library: Path, main_library: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result = CliRunner().invoke(
        cli,
        ["bench", "--reference", f"bitnet.cpp:{march_library}", "--reference", f"bitnet.cpp:{main_library}",
         "--follow-reference-graph", "--prompt-tokens", "20", "--decode", "3", "--rounds", "2", "--threads", "1",
         "--receipt", str(path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = receipt.read(path)
    (main,) = made["results"]["references"]
    assert made["reference"]["numerics"]["generation"] == "march"
    assert main["reference"]["numerics"]["generation"] == main["candidate_numerics"]["generation"] == "main"
    assert made["parity"]["exact_match_rate"] == 1.0
    assert made["coverage"]["compared"] == 2 * (3 * (1 + 3 + 3) + 3)
