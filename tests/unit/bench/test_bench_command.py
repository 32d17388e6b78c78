"""``crossval bench``: command, receipt, gate and table, with our engine under another name as the reference."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from crossval import registry
from crossval.bench import table as bench_table
from crossval.bench.engine import BitnetPyProcess
from crossval.console import console
from crossval.errors import EngineCrashError
from crossval.passes import EngineIdentity, Numerics, PassRecord
from crossval.receipts import file as receipt
from crossval.receipts.file import Receipt
from crossval.receipts.policy import Policy, read_policy
from crossval.registry import show_receipt
from tests.support import receipt_samples as samples
from tests.support.strangers import error_line
from tests.support.strangers import run as crossval

ARGUMENTS = ("--prompt-tokens", "9", "--decode", "2", "--rounds", "2", "--threads", "1")


class Stranger(BitnetPyProcess):
    """Our engine in its own process as a build of bitnet.cpp; ``wrong_from``: decoded token off by a bit."""

    wrong_from: int | None = None
    numerics = Numerics(8, False)

    def __init__(
        self, path: Path, *, library: Path | None, n_threads: int, n_ctx: int, n_ubatch: int, flash_attention: None
    ) -> None:
        super().__init__(path, n_threads=n_threads, numerics=self.numerics, n_ubatch=n_ubatch)
        self.library = str(library)

    @property
    def identity(self) -> EngineIdentity:
        digest = hashlib.sha256(self.library.encode()).hexdigest()
        return dataclasses.replace(super().identity, name="bitnet.cpp", library_digest=digest)

    def eval_each(self, token_ids: Any) -> list[PassRecord]:
        records = super().eval_each(token_ids)
        if self.wrong_from is not None:
            for record in records[self.wrong_from :]:
                record.taps["result_output"].array.view("u4")[0, 5] ^= 1
        return records


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> type[Stranger]:
    """An available reference."""
    monkeypatch.setattr("crossval.bitnet_cpp.library.find_library", lambda: object())
    monkeypatch.setattr("crossval.bitnet_cpp.library.resolve", lambda path: SimpleNamespace(path=Path(path)))
    monkeypatch.setattr("crossval.engines.registry.BitnetCppRunner", Stranger)
    monkeypatch.setattr(Stranger, "wrong_from", None)
    return Stranger


def bench(model: Path, *arguments: Any) -> Result:
    return crossval("bench", "--model", model, *ARGUMENTS, *map(str, arguments))


def failures(made: Receipt, policy: Policy | None = None) -> list[str]:
    return [check.name for check in registry.judge(receipt.seal(made), policy) if not check.passed]


def test_a_right_engine_passes(stranger: type[Stranger], model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    result = bench(model_path, "--receipt", out, "--min-decode-ratio", "0.0001", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "PASS  18 of 18 passes compared, all logits bit-identical" in result.stdout
    assert result.stderr == ""
    made = receipt.read(out)
    assert made["thresholds"] == {"min_ratios": {"prefill": None, "decode": 0.0001, "greedy": None}}
    assert made["coverage"] == {"required": 18, "compared": 18, "skipped": []}
    assert made["parity"]["exact_match_rate"] == 1.0
    assert made["parity"]["cpp_available"] is True
    assert len(made["prompt"]["token_ids"]) == 9
    measures = made["results"]["measures"]
    assert [len(one["candidate"]["raw"]) for one in (measures["prefill"], measures["decode"])] == [2, 2]
    assert len(measures["first_token"]["reference"]["raw"]) == 3
    assert len(measures["peak_memory"]["ratios"]) == 3
    assert all(one["candidate"]["figure"] and one["ratio"] for one in measures.values())
    assert len(measures["decode"]["reads"]["shares"]) == 2
    assert any("i2s" in kernel["name"] and kernel["calls"] for kernel in made["compute"]["kernels"])
    assert failures(made) == []
    assert crossval("gate", out, "--require-live", "--require-bitwise", "--min-exact-match", "1").exit_code == 0
    assert crossval("gate", out, "--min-decode-ratio", "1e6").exit_code == 1
    table = CliRunner().invoke(bench_table.main, [str(out)])
    assert table.exit_code == 0
    assert table.stdout.count("\n") == 2 + 5
    assert "| prefill 9 | tok/s |" in table.stdout


def test_two_builds_beside_ours(stranger: type[Stranger], model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    references = ("--reference", "bitnet.cpp", "--reference", f"bitnet.cpp:{tmp_path}/main.so")
    result = bench(model_path, *references, "--threads", "2", "--receipt", out)
    assert result.exit_code in (0, 3), result.output  # 3: this machine is too busy for a ratio
    assert "36 of 36 passes compared, all logits bit-identical" in result.stdout
    assert "beside bitnet.cpp:main.so" in result.stdout
    assert "bitnet.cpp:main.so: 2 threads" in result.stdout
    made = receipt.read(out)
    assert made["settings"]["reference"] == "bitnet.cpp"
    (other,) = made["results"]["references"]
    assert other["word"] == "bitnet.cpp:main.so"
    assert other["reference"]["library_digest"] != made["reference"]["library_digest"]
    # both references state the same arithmetic: one candidate beside both
    assert other["search"]["candidate"] == made["results"]["search"]["candidate"]
    assert {one["n_threads"] for one in other["search"]["reference"]["tried"]} == {1, 2}
    assert set(failures(made)) <= {"verdict"}
    table = CliRunner().invoke(bench_table.main, [str(out)])
    assert table.stdout.count("bitnet_py beside bitnet.cpp:main.so") == 5


def test_two_builds_beside_each_other(stranger: type[Stranger], model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    candidate = f"bitnet.cpp:{tmp_path}/fork.so"
    result = bench(model_path, "--candidate", candidate, "--reference", "bitnet.cpp", "--receipt", out)
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    assert made["settings"]["candidate"] == "bitnet.cpp:fork.so"
    assert made["compute"]["path"] == "library"
    assert made["results"]["measures"]["decode"]["reads"] is not None  # the double counts what it reads
    assert failures(made) == ["kernels"]  # and no library does


def test_engines_of_different_arithmetic_agree_within_bounds(
    stranger: type[Stranger], model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(stranger):  # type: ignore[misc, valid-type]
        numerics = Numerics(16, False)

    def either(path: Path, *, library: Path | None, **options: Any) -> Stranger:
        return (stranger if library is None else Wide)(path, library=library, **options)

    monkeypatch.setattr("crossval.engines.registry.BitnetCppRunner", either)
    out = tmp_path / "r.json"
    result = bench(model_path, "--candidate", f"bitnet.cpp:{tmp_path}/wide.so", "--receipt", out)
    assert result.exit_code == 0, result.output
    assert "within the bounds of engines that state different arithmetic" in result.stdout
    made = receipt.read(out)
    measures = made["results"]["measures"]
    assert measures["greedy"]["passes"] == {"compared": 0, "equal": 0, "within": 0}
    passes = measures["decode"]["passes"]
    assert passes["compared"] == passes["equal"] + passes["within"] == 6
    assert passes["within"] > 0


def test_the_kernel_that_was_asked_for_ran(stranger: type[Stranger], model_path: Path) -> None:
    result = bench(model_path, "--kernel", "scalar", "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["results"]["work"]["kernel"] == "scalar"
    assert made["candidate"]["settings"]["kernel"] == "scalar"
    assert made["compute"]["fallback"] is False
    assert {one["name"] for one in made["results"]["measures"]["decode"]["reads"]["weights"]} == {
        "i2s_gemv_scalar", "head_f16_scalar", "rms_norm_scalar",
    }  # fmt: skip
    assert failures(made) == []


def test_another_result_is_no_benchmark(
    stranger: type[Stranger], model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stranger, "wrong_from", 1)
    out = tmp_path / "r.json"
    result = bench(model_path, "--receipt", out)
    assert result.exit_code == 1, result.output
    assert "FAIL  18 of 18 passes compared, 15 with equal logits" in result.stdout
    assert "3 of 18 passes do not agree" in result.stdout
    made = receipt.read(out)
    assert made["results"]["measures"]["decode"]["passes"] == {"compared": 6, "equal": 3}
    assert failures(made) == ["verdict"]


def test_too_slow(stranger: type[Stranger], model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    result = bench(model_path, "--min-prefill-ratio", "100000", "--receipt", out)
    assert result.exit_code == 1, result.output
    assert "missed: prefill: ratio " in result.stdout
    assert failures(receipt.read(out)) == ["verdict"]


def test_memory_that_cannot_be_read_is_incomplete(
    stranger: type[Stranger], model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossval.bench.measures.peak_resident_bytes", lambda pid: None)
    out = tmp_path / "r.json"
    result = bench(model_path, "--receipt", out)
    assert result.exit_code == 3, result.output
    assert "INCOMPLETE" in result.stdout
    assert "verdict" in failures(receipt.read(out))


def test_an_engine_that_crashes(
    stranger: type[Stranger], model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: Any, token_ids: Any) -> list[PassRecord]:
        raise EngineCrashError("bitnet.cpp was killed by SIGSEGV")

    monkeypatch.setattr(stranger, "eval_each", crash)
    result = bench(model_path)
    assert result.exit_code == 5
    assert "SIGSEGV" in error_line(result)


@pytest.mark.usefixtures("no_bitnet_cpp")
@pytest.mark.parametrize("word", ["auto", "bitnet.cpp"])
def test_without_bitnet_cpp(model_path: Path, tmp_path: Path, word: str) -> None:
    out = tmp_path / "r.json"
    result = bench(model_path, "--reference", word, "--receipt", out)
    assert result.exit_code == 3
    assert "make fetch-cpp" in error_line(result)
    made = receipt.read(out)
    assert (made["kind"], made["verdict"], made["reference"]["status"]) == ("bench", "incomplete", "unavailable")
    assert "reference" in failures(made)


def test_a_file_that_is_no_library(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libllama.so"
    broken.write_text("no library")
    monkeypatch.setenv("BITNET_CPP_LIB", str(broken))
    result = bench(model_path)
    assert result.exit_code == 4, result.output
    assert "is not a shared library" in error_line(result)


def test_a_candidate_that_is_not_here(
    stranger: type[Stranger], model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossval.engines.llama_package.find_library", lambda: None)
    out = tmp_path / "r.json"
    result = bench(model_path, "--candidate", "llama.cpp", "--receipt", out)
    assert result.exit_code == 3
    assert "no llama.cpp is installed here" in error_line(result)
    made = receipt.read(out)
    assert {side: made[side]["status"] for side in ("candidate", "reference")} == {
        "candidate": "unavailable", "reference": "unavailable",
    }  # fmt: skip
    assert "no llama.cpp is installed here" in made["candidate"]["note"]
    assert made["reference"]["note"] == "not opened"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--reference", "spec"), ("--candidate", "spec"), ("--reference", "bitnet.cpp", "--reference", "spec"),
        ("--candidate", "bitnet.cpp", "--kernel", "scalar"), ("--reference", "bitnet.cpp") * 9,
        ("--kernel", "nope"), ("--rounds", "0"), ("--decode", "0"), ("--threads", "0"),
        ("--min-prefill-ratio", "0"), ("--min-decode-ratio", "x"), ("--seed", "-1"), ("more",),
    ],
)  # fmt: skip
def test_usage(model_path: Path, arguments: tuple[str, ...]) -> None:
    result = bench(model_path, *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_bad_input(stranger: type[Stranger], model_path: Path, tmp_path: Path) -> None:
    result = bench(model_path, "--prompt-tokens", "90000")
    assert result.exit_code == 4
    assert "the model's context holds" in error_line(result)
    result = bench(tmp_path / "no.gguf")
    assert result.exit_code == 4
    assert "no.gguf" in error_line(result)


# A receipt against itself


def change(*path: Any, value: Any) -> Callable[[Receipt], None]:
    def apply(made: Receipt) -> None:
        place: Any = made
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    return apply


MEASURES = ("results", "measures")
TRIED = ("results", "search", "candidate", "tried")


@pytest.mark.parametrize(
    ("edit", "check"),
    [
        (change(*MEASURES, "prefill", "candidate", "raw", 0, value=0.1), "summary"),
        (change(*MEASURES, "prefill", "ratio", "median", value=9.0), "summary"),
        (change(*MEASURES, "decode", "reference", "figure", "max", value=1.0), "summary"),
        (change(*MEASURES, "decode", "ratios", 0, value=9.0), "summary"),
        (change(*MEASURES, "peak_memory", "reference", "raw", value=[1e9]), "summary"),
        (change(*MEASURES, "prefill", "n_tokens", value=6), "summary"),
        (change(*MEASURES, "prefill", "unit", value="s"), "summary"),
        (change(*MEASURES, "decode", "reads", "share", "median", value=1.5), "summary"),
        (change("results", "machine", "read_s", value=[0.02, 0.011, 0.009]), "summary"),
        (change("results", "missed", value=["decode: too slow"]), "summary"),
        (change(*MEASURES, "prefill", "passes", "equal", value=3), "verdict"),
        (change(*MEASURES, "prefill", "passes", "equal", value=5), "measurements"),
        (change(*MEASURES, "decode", "passes", value={"compared": 1, "equal": 1}), "measurements"),
        (change(*MEASURES, "decode", "reads", value=None), "reads"),
        (change(*MEASURES, "decode", "reads", "weights", 0, "bytes", value=1), "reads"),
        (change(*MEASURES, "decode", "reads", "weights", 1, "bytes", value=10**9), "reads"),
        (change(*MEASURES, "decode", "reads", "weights", 0, "name", value="i2s_gemv_scalar"), "reads"),
        (change("model", "shape", "hidden_dim", value=512), "reads"),
        (change("results", "work", "seed", value=8), "workload"),
        (change("results", "work", "n_threads", value=4), "placement"),
        (change("results", "work", "n_processes", value=1), "workload"),
        (change("results", "work", "kernel", value="scalar"), "workload"),
        (change("results", "work", "n_rounds", value=4), "measurements"),
        (change("results", "machine", "read_bytes", value=1 << 28), "workload"),
        (change("prompt", "token_ids", value=[1, 2, 3, 4, 5]), "workload"),
        (change("candidate", "settings", value={"n_threads": 1, "kernel": "avx2"}), "placement"),
        (change("reference", "settings", value={"n_threads": 1}), "placement"),
        (change("settings", "n_threads", value=4), "placement"),
        (change("settings", "n_threads", value=1), "summary"),  # the samples chose two
        (change(*TRIED, 1, "n_threads", value=3), "placement"),
        (change(*TRIED, 2, "cores", value=[0]), "placement"),
        (change(*TRIED, 2, "cores", value=[1, 1]), "placement"),
        (change(*TRIED, 1, "cores", value=[0, 1]), "placement"),
        (change(*TRIED, 2, "measures", "decode", "raw", value=[]), "placement"),
        (change(*TRIED, 2, "measures", "decode", "raw", 0, value=7.0), "summary"),
        (change(*TRIED, 2, "measures", "decode", "figure", "max", value=1.0), "summary"),
        (change("results", "search", "candidate", "chosen", "decode", value=0), "summary"),
        (change(*MEASURES, "decode", "candidate", "flags", value=["two_speeds"]), "summary"),
        (change(*MEASURES, "decode", "passes", "within", value=1), "measurements"),
        (change("reference", "status", value="recorded"), "workload"),
        (change("settings", "n_decode", value=3), "workload"),
        (change("tokenizer", "vocab_size", value=299), "workload"),
        (change("model", "shape", "context_length", value=6), "workload"),
    ],
)
def test_an_altered_receipt_is_refused(edit: Callable[[Receipt], None], check: str) -> None:
    made = copy.deepcopy(samples.bench_receipt())
    assert failures(made) == []
    edit(made)
    assert check in failures(made)


@pytest.mark.parametrize("name", ["prefill", "decode", "greedy"])
def test_the_policys_ratios(name: str) -> None:
    made = samples.bench_receipt()
    field = f"min_{name}_ratio"
    median = made["results"]["measures"][name]["ratio"]["median"]
    assert failures(made, Policy(**{field: median})) == []
    assert failures(made, Policy(**{field: median + 0.001})) == [f"{name} ratio"]
    assert f"{name} ratio" in failures(samples.smoke_receipt(), Policy(**{field: 0.5}))


def test_a_policy_file_may_demand_them(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"schema_version": 1, "min_prefill_ratio": 1.5, "min_decode_ratio": 1.2}))
    assert read_policy(path).min_ratios == {"prefill": 1.5, "decode": 1.2}


def test_a_forged_second_reference_is_refused() -> None:
    findings = samples.bench_findings(pairs=(samples.bench_pair(), samples.bench_further()))
    made = samples.bench_receipt(findings)
    assert failures(made) == []
    place = ("results", "references", 0)
    edits = {
        change(*place, "reference", "status", value="recorded"): "workload",
        change(*place, "reference", "library_digest", value="1" * 64): "workload",  # the candidate's
        change(*place, "measures", "decode", "ratio", "median", value=9.0): "summary",
        change(*place, "measures", "decode", "passes", "equal", value=7): "verdict",
        change(*place, "measures", "decode", "reads", value=None): "reads",
        change(*place, "search", "reference", "chosen", "greedy", value=2): "summary",
    }
    for edit, check in edits.items():
        changed = copy.deepcopy(made)
        edit(changed)
        assert check in failures(changed)
    slow = samples.bench_further(raw={"decode": ((0.2,) * 3, (0.1,) * 3)})
    made = samples.bench_receipt(samples.bench_findings(pairs=(samples.bench_pair(), slow)))
    assert failures(made, Policy(min_decode_ratio=1.0)) == ["decode ratio"]


def test_what_makes_no_ratio_is_shown_and_satisfies_no_demand(capsys: pytest.CaptureFixture[str]) -> None:
    work = dataclasses.replace(samples.BENCH_WORK, n_rounds=5)
    raw = {name: tuple(side[:1] * 5 for side in samples.BENCH_RAW[name]) for name in ("prefill", "greedy")}
    raw["decode"] = ((0.1,) * 5, (0.2, 2.0, 0.21, 2.1, 0.2))
    made = samples.bench_receipt(samples.bench_findings(raw=raw, work=work, read_s=(0.01,) * 5))
    assert failures(made) == []
    assert failures(made, Policy(min_decode_ratio=0.1)) == ["decode ratio"]
    show_receipt(console(), made)
    shown = capsys.readouterr().out
    assert (
        "decode: bitnet.cpp has two speeds, 9.5 to 10.0 tok/s in 3 rounds and 1.0 to 1.0 tok/s in 2 rounds"
        in shown
    )
    assert "decode: bitnet.cpp may be slower than its single thread, 3.3 to 3.3 tok/s before the rounds" in shown
    assert "bitnet_py: 2 threads pinned to 0, 1 for prefill and decode, 1 thread for greedy" in shown


def test_receipts_of_earlier_versions_are_read() -> None:
    findings = samples.bench_findings(pairs=(samples.bench_pair(search=None),))
    settings = {"n_threads": 2, "n_decode": 2, "n_steps": None, "full": None}
    made = samples.bench_receipt(findings, settings=settings)
    assert failures(made) == ["placement"]  # there every engine stated its threads
    for side in ("candidate", "reference"):
        made[side]["settings"]["n_threads"] = 2
    assert failures(made) == []
    assert "search" not in made["results"]


def test_a_receipt_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    made = samples.bench_receipt(
        samples.bench_findings(min_ratios={"prefill": 3.0, "decode": None, "greedy": None})
    )
    show_receipt(console(), made)
    shown = capsys.readouterr().out
    assert "prefill 5    tok/s" in shown
    assert "2.00 (1.50 to 2.00)" in shown
    assert "missed: prefill: ratio 2.000, 3 required" in shown
    assert "FAIL  23 of 23 passes compared, all logits bit-identical" in shown


def test_a_table_is_made_only_of_what_the_gate_passes(tmp_path: Path) -> None:
    good, edited, other = tmp_path / "good.json", tmp_path / "edited.json", tmp_path / "other.json"
    made = samples.bench_receipt()
    receipt.write(good, made)
    receipt.write(edited, {**made, "verdict": "fail"})
    receipt.write(other, samples.smoke_receipt())
    for path, code, words in (
        (edited, 1, "digest"),
        (other, 4, "kind smoke"),
        (tmp_path / "no.json", 4, "no.json"),
    ):
        result = CliRunner().invoke(bench_table.main, [str(good), str(path)])
        assert result.exit_code == code
        assert words in error_line(result)
        assert result.stdout == ""
    assert CliRunner().invoke(bench_table.main, []).exit_code == 2
    result = CliRunner().invoke(bench_table.main, [str(good)])
    assert "| decode 2 | tok/s |" in result.stdout
    assert "| `good.json` |" in result.stdout
