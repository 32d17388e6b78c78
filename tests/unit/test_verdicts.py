"""Which side is wrong: every verdict from the command line, with engines that are wrong in a known place."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.api.request import Request
from crossval.audit import segments
from crossval.capture import Capture
from crossval.engines.session import Prompt
from crossval.examine.layers_receipt import LAYERS
from crossval.model import taps
from crossval.receipts import file as receipt
from crossval.terms import SEPARATE_OUTPUT_NOTE
from tests.support.rewritten import Passes, rewritten
from tests.support.strangers import PROMPT, Fault, run

Record = Callable[..., Path]
ROLLED = Fault(rolled_from="1/ffn_sub_norm")
OTHER = Fault(rolled_from="0/ffn_sub_norm")
OUTLINE = taps.of_model(2, outline=True)


def diff(model: Path, candidate: Path, reference: Path, folder: Path) -> tuple[int, receipt.Receipt]:
    out = folder / "d.json"
    result = run("diff", candidate, reference, "--model", model, "--receipt", out)
    made = receipt.read(out)
    assert run("gate", out, "--allow-compute", "recorded").exit_code == 1, "one build of one library"
    return result.exit_code, made


def guilty(made: receipt.Receipt, side: str) -> str | None:
    found = made["audit"][side]["first_guilty"]
    return None if found is None else found["tap"]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "candidate_tap", "reference_tap"),
    [
        (None, None, "parity", None, None),
        (ROLLED, None, "candidate_defect", "blk.1.ffn_sub_norm", None),
        (None, ROLLED, "reference_defect", None, "blk.1.ffn_sub_norm"),
        (ROLLED, ROLLED, "shared_deviation", "blk.1.ffn_sub_norm", "blk.1.ffn_sub_norm"),
        (OTHER, ROLLED, "both_differ", "blk.0.ffn_sub_norm", "blk.1.ffn_sub_norm"),
    ],
)
def test_each_verdict(
    model_path: Path,
    record: Record,
    tmp_path: Path,
    ours: Fault | None,
    theirs: Fault | None,
    verdict: str,
    candidate_tap: str | None,
    reference_tap: str | None,
) -> None:
    code, made = diff(model_path, record("other", ours), record(fault=theirs), tmp_path)
    assert made["verdict"] == verdict
    assert code == (0 if verdict == "parity" else 1)
    assert (guilty(made, "candidate"), guilty(made, "reference")) == (candidate_tap, reference_tap)
    assert made["parity"]["status"] == ("parity" if ours == theirs else "divergence")
    causes = [(one["party"], one["tap"]) for one in made["diagnosis"]]
    expected = [("candidate", candidate_tap), ("reference", reference_tap)]
    assert causes == [one for one in expected if one[1] is not None]


def test_a_defect_the_direct_comparison_tolerates_is_a_defect(
    model_path: Path, record: Record, tmp_path: Path
) -> None:
    fault = Fault(scaled=(("result_output", 1.0005),))
    code, made = diff(model_path, record("other", fault), record(), tmp_path)
    assert (code, made["verdict"], made["parity"]["status"]) == (1, "candidate_defect", "parity")
    assert made["first_divergence"] is None
    found = made["audit"]["candidate"]["first_guilty"]
    assert (found["tap"], found["pass_index"], found["n_beyond"]) == ("result_output", 0, 1)
    states = {row["tap"]: row["status"] for row in made["audit"]["candidate"]["rows"]}
    assert {tap for tap, state in states.items() if state != "ok"} == {"result_output"}


def test_one_value_that_nothing_read_is_the_recordings(model_path: Path, record: Record, tmp_path: Path) -> None:
    fault = Fault(scaled=(("blk.1.ffn_act", 1.0005),))
    code, made = diff(model_path, record("other", fault), record(), tmp_path)
    assert (code, made["verdict"], made["parity"]["status"]) == (3, "incomplete", "parity")
    (found,) = made["audit"]["candidate"]["misrecorded"]
    assert (found["taps"], found["passes"]) == (["blk.1.ffn_act"], [0, 1, 2])


def test_values_that_are_not_finite_convict(model_path: Path, record: Record, tmp_path: Path) -> None:
    def change(passes: Passes) -> None:
        for given in passes:
            for name, tap in given.items():
                if taps.execution_index(name, 2) >= taps.execution_index("blk.0.kqv_out", 2):
                    tap.array[...] = np.nan

    wrong = rewritten(record(), tmp_path / "nan", change)
    code, made = diff(model_path, record("other"), wrong, tmp_path)
    assert (code, made["verdict"]) == (1, "reference_defect")
    found = made["audit"]["reference"]["first_guilty"]
    assert (found["tap"], found["status"], found["ratio"]) == ("blk.0.kqv_out", "invalid", None)


def test_the_head_a_model_has_of_its_own_and_the_reference_ignores(
    make_model: Callable[..., Path], record: Record, tmp_path: Path
) -> None:
    model = make_model(untied_head=True)
    golden, out = record(model=model, fault=Fault(ignores_output=True)), tmp_path / "r.json"
    result = run("layers", "--prompt", PROMPT, "--model", model, "--reference", golden, "--receipt", out)
    assert result.exit_code == 1, result.output
    made = receipt.read(out)
    assert (made["verdict"], guilty(made, "candidate"), guilty(made, "reference")) == (
        "reference_defect",
        None,
        "result_output",
    )
    assert SEPARATE_OUTPUT_NOTE in made["notes"]
    assert SEPARATE_OUTPUT_NOTE in result.stdout
    assert made["audit"]["reference"]["rows"][-2]["status"] == "ok"


def test_an_outline_is_judged_in_segments(model_path: Path, record: Record, tmp_path: Path) -> None:
    code, made = diff(model_path, record("other"), record(taps=OUTLINE), tmp_path)
    assert (code, made["verdict"]) == (0, "parity")
    audit = made["audit"]["reference"]
    assert audit["n_covered"] == audit["n_ops"] == 43 * 3
    assert [row["tap"] for row in audit["rows"]] == OUTLINE
    # a later pass's segment also spans the keys and values of the passes before it
    assert [row["n_ops"] for row in audit["rows"]] == [3, 20 + 24 + 28, 20 + 24 + 28, 3, 3]


def test_an_outline_that_shows_too_little_is_not_parity_until_its_distance_is_accepted(
    model_path: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bound of a segment is narrow enough here: all agree, and nothing is shown below the distance."""
    monkeypatch.setattr(segments, "RESOLVES", 0.0)
    candidate, reference, out = record("other"), record(taps=OUTLINE), tmp_path / "d.json"
    result = run("diff", candidate, reference, "--model", model_path, "--receipt", out)
    made = receipt.read(out)
    assert (result.exit_code, made["verdict"], made["parity"]["status"]) == (3, "agrees_within", "parity")
    assert made["audit"]["candidate"]["verdict"] == "clean"
    assert made["audit"]["reference"]["verdict"] == "within"
    assert "record attn_norm, attn_sub_norm, ffn_norm and ffn_sub_norm" in result.stdout
    assert "of layers 0 and 1" in result.stdout
    for options, accepted in ([], False), (["--accept-within", "1e-9"], False), (["--accept-within", "1"], True):
        shown = run("gate", out, "--allow-compute", "recorded", *options).stdout
        states = {line.split("  ")[0].strip(): " pass " in line for line in shown.splitlines() if "  " in line}
        assert (states["verdict"], states["audit of the reference"]) == (accepted, accepted)
        assert states["audit of the candidate"]


def test_an_outline_names_the_layer(model_path: Path, record: Record, tmp_path: Path) -> None:
    code, made = diff(model_path, record("other"), record(fault=ROLLED, taps=OUTLINE), tmp_path)
    assert (code, made["verdict"], guilty(made, "reference")) == (1, "reference_defect", "blk.1.l_out")


def test_a_trace_without_what_an_audit_needs_is_incomplete(
    model_path: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the LM head is missing: nothing is wrong, and nothing is proven."""
    whole = Capture.records

    def headless(self: Capture, names: Collection[str], *args: Any, **options: Any) -> Any:
        kept = [name for name in names if name != "result_output"] if options.get("ahead") else names
        return whole(self, kept, *args, **options)

    monkeypatch.setattr(Capture, "records", headless)
    code, made = diff(model_path, record("other"), record(), tmp_path)
    assert (code, made["verdict"], made["parity"]["status"]) == (3, "incomplete", "parity")
    assert made["audit"]["candidate"]["verdict"] == "incomplete"
    assert made["audit"]["candidate"]["n_covered"] == 42 * 3


def test_an_engine_that_does_not_say_how_it_rounds(model_path: Path, record: Record, tmp_path: Path) -> None:
    code, made = diff(model_path, record("other", anonymous=True), record(), tmp_path)
    assert (code, made["verdict"]) == (0, "parity")
    readings = {row["tap"]: row["reading"] for row in made["audit"]["candidate"]["rows"]}
    assert readings["blk.0.kq"] == "q and k in F16"
    assert readings["blk.0.ffn_act"] is None


def test_the_specification_against_itself_is_clean_by_construction(model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    args = ("--prompt", PROMPT, "--model", model_path, "--decode", "1", "--receipt", out)
    assert run("layers", *args, "--reference", "spec").exit_code == 0
    made = receipt.read(out)
    assert {audit["verdict"] for audit in made["audit"].values()} == {"clean"}
    assert max(row["ratio"] for row in made["audit"]["reference"]["rows"]) <= 1.0


def test_a_diagnosis_gives_a_command_to_be_pasted(
    model_path: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths stay as they were given, relative ones too, and everything is quoted for the shell."""
    for name in ("BITNET_KERNEL", "BITNET_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("my models").symlink_to(model_path.parent)
    Path("golden").symlink_to(record(fault=ROLLED))
    model_path, out, golden = Path("my models", model_path.name), tmp_path / "r.json", Path("golden")
    args = ("--prompt", PROMPT, "--model", model_path, "--reference", golden, "--threads", "1", "--full")
    result = run("layers", *args, "--receipt", out)
    (found,) = receipt.read(out)["diagnosis"]
    assert found["command"] == (
        f"crossval layers --prompt 'Hello there' --model '{model_path}' --candidate bitnet_py "
        "--reference golden --threads 1 --decode 2 --full --repro repro"
    )
    assert f"reproduce  {found['command']}\n" in result.stdout
    words = shlex.split(found["command"])
    assert words.pop(0) == "crossval"
    assert run(*words).exit_code == 1
    assert [path.name for path in Path("repro").iterdir() if path.suffix == ".npz"] == ["inputs.npz"]
    _, made = diff(model_path, record("other"), golden, tmp_path)
    assert made["diagnosis"][0]["command"] == (
        f"crossval diff {record('other')} ./golden --model '{model_path}' --decode 1 --repro repro"
    )
    monkeypatch.setenv("BITNET_KERNEL", "scalar")
    monkeypatch.setenv("BITNET_CPP_LIB", "my libs/libllama.so")
    prompt = Prompt("-x", (1, 2), None)
    made_by = Request(LAYERS, None, "bitnet.cpp:../a fork").command(prompt, 0)
    assert made_by == (
        "BITNET_KERNEL=scalar BITNET_CPP_LIB='my libs/libllama.so' crossval layers --prompt=-x "
        "--candidate 'bitnet.cpp:../a fork' --reference auto --decode 0 --repro repro"
    )
    monkeypatch.delenv("BITNET_CPP_LIB")
    monkeypatch.setenv("BITNET_CPP_GENERATION", "main")
    monkeypatch.setenv("BITNET_CPP_BUILD_DIR", str(tmp_path / "built"))
    assert Request(LAYERS).command(prompt, 0).startswith("BITNET_KERNEL=scalar crossval")
    (tmp_path / "built/main/lib").mkdir(parents=True)
    (tmp_path / "built/main/lib/libllama.so").touch()
    assert (
        Request(LAYERS)
        .command(prompt, 0)
        .startswith(
            f"BITNET_KERNEL=scalar BITNET_CPP_BUILD_DIR={tmp_path}/built BITNET_CPP_GENERATION=main crossval"
        )
    )
