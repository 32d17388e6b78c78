"""``--tap-map``, and traces that hold more, less or other tensors than are compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.api.rerun import Rerun
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.passes import TapArray
from crossval.receipts import file as receipt
from crossval.traces.read import Trace
from crossval.traces.write import write_safetensors
from tests.support.strangers import PROMPT, Fault, error_line, run

Record = Callable[..., Path]
Renamed = Callable[[str, np.ndarray], tuple[str, np.ndarray]]


def rewritten(source: Path, out: Path, change: Renamed, **model: int) -> Path:
    """Copy a trace with other names and layouts of its tensors, and other fields of its model."""
    shutil.copytree(source, out)
    trace = Trace.open(source)
    value = json.loads((out / "trace.json").read_text())
    value["model"].update(model)
    for index, item in enumerate(value["passes"]):
        tensors = {}
        for entry in item["taps"]:
            name, array = change(entry["name"], trace.taps(index)[entry["name"]].array)
            tensors[f"p{index}.{name}"] = TapArray(array)
            entry.update(name=name, shape=list(array.shape))
        item["sha256"] = write_safetensors(out / item["file"], tensors)
    (out / "trace.json").write_text(json.dumps(value))
    return out


def in_other_words(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Names and layouts of another engine: a batch axis, attention by head first."""
    if name.endswith((".q", ".k", ".v")):
        array = np.ascontiguousarray(array.swapaxes(0, 1))
    return f"net/{name.replace('blk.', 'block_').replace('.', '/')}", array[None]


@pytest.fixture
def own_map(tmp_path: Path) -> Path:
    """The map of ``in_other_words``."""
    entries: list[dict[str, Any]] = []
    for tap in taps.LAYER_TAPS:
        entries.append({"tap": f"blk.{{i}}.{tap}", "from": f"net/block_{{i}}/{tap}"})
        if tap in ("q", "k", "v"):
            entries[-1]["do"] = [{"transpose": [1, 0, 2]}]
    entries += [{"tap": tap, "from": f"net/{tap}"} for tap in (*taps.INPUT_TAPS, *taps.HEAD_TAPS)]
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"format": "crossval-tap-map", "format_version": 1, "taps": entries}))
    return path


def test_an_engine_in_its_own_words_gets_the_same_rows(
    layers, record: Record, golden: Path, own_map: Path, tmp_path: Path, out: Path
) -> None:
    plain, other = record(), rewritten(record(), tmp_path / "other", in_other_words)
    assert layers("--candidate", plain, "--full", "--receipt", tmp_path / "plain.json").exit_code == 0
    result = layers("--candidate", other, "--full", "--tap-map", own_map, "--receipt", out)
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    for part in ("results", "audit", "coverage"):
        assert made[part] == receipt.read(tmp_path / "plain.json")[part]
    assert any("read as taps by the tap map own.json, sha256 " in note for note in made["notes"])


def test_a_receipt_made_with_a_map_is_rerun_with_it(
    layers, record: Record, golden: Path, own_map: Path, model_path: Path, tmp_path: Path, out: Path
) -> None:
    other = rewritten(record("other"), tmp_path / "other", in_other_words)
    assert layers("--candidate", other, "--tap-map", own_map, "--receipt", out).exit_code == 0
    again = Rerun(model=model_path, candidate=str(other), reference=str(golden), tap_map=own_map)
    (check,) = again.checks(receipt.read(out))
    assert (check.passed, check.detail) == (True, "3 of 3 passes, 15 rows: equal")
    with pytest.raises(BadInputError, match="--tap-map"):
        list(replace(again, tap_map=None).checks(receipt.read(out)))
    usage = run("gate", out, "--tap-map", own_map)
    assert (usage.exit_code, "for --rerun" in usage.stderr) == (2, True)


def test_a_fault_behind_a_map_is_found_where_it_is(
    layers, record: Record, own_map: Path, tmp_path: Path, out: Path
) -> None:
    broken = rewritten(record(fault=Fault(rolled_from="1/ffn_sub_norm")), tmp_path / "other", in_other_words)
    result = layers("--candidate", broken, "--tap-map", own_map, "--receipt", out)
    assert result.exit_code == 1
    made = receipt.read(out)
    assert (made["verdict"], made["audit"]["candidate"]["first_guilty"]["tap"]) == (
        "candidate_defect",
        "blk.1.ffn_sub_norm",
    )
    assert f"--tap-map {own_map}" in made["diagnosis"][0]["command"]


def test_a_wrong_step_of_a_map_is_no_parity(layers, record: Record, own_map: Path, tmp_path: Path) -> None:
    """Without the transposition the tensor has another shape."""
    other = rewritten(record(), tmp_path / "other", in_other_words)
    own_map.write_text(own_map.read_text().replace("[1, 0, 2]", "[0, 1, 2]"))
    result = layers("--candidate", other, "--tap-map", own_map)
    assert result.exit_code == 4
    assert "which is blk.0.q, has shape" in error_line(result)


def test_without_its_map_the_trace_says_what_it_holds(layers, record: Record, tmp_path: Path) -> None:
    other = rewritten(record(), tmp_path / "other", in_other_words)
    result = layers("--candidate", other)
    assert result.exit_code == 4
    assert "none of its tensors is a tap: net/inp_embd (1), net/block_" in error_line(result)


def test_unknown_tensors_are_listed_and_not_compared(layers, record: Record, tmp_path: Path, out: Path) -> None:
    def half(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        return (f"cache.{name[4:]}", array) if name.endswith((".k", ".v")) else (name, array)

    result = layers("--candidate", rewritten(record(), tmp_path / "other", half), "--receipt", out)
    assert result.exit_code == 0, result.output
    note = "not compared, for the candidate's trace has no tap of that name: cache.{i}.k (2), cache.{i}.v (2)"
    assert note in receipt.read(out)["notes"]
    assert note in " ".join(result.stdout.split())


def test_a_word_that_is_no_map_is_a_clean_error(layers, record: Record) -> None:
    result = layers("--candidate", record(), "--tap-map", "nonsense")
    assert result.exit_code == 4
    assert "'nonsense' is neither a file nor one of" in error_line(result)


# --- what a trace states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["n_layers", "vocab_size"])
def test_a_trace_that_states_another_shape_than_the_model(
    layers, record: Record, model_path: Path, tmp_path: Path, field: str
) -> None:
    stated = json.loads((record() / "trace.json").read_text())["model"][field]
    other = rewritten(record(), tmp_path / "other", lambda name, array: (name, array), **{field: stated + 1})
    result = layers("--candidate", other)
    assert result.exit_code == 4
    assert f"model.{field} is {stated + 1}, {model_path.name} has {stated}" in error_line(result)


def test_the_shorter_of_two_traces_is_what_is_compared(
    record: Record, model_path: Path, tmp_path: Path, out: Path
) -> None:
    long, short = record(n_decode=3), record(n_decode=1)
    for one, other in ((long, short), (short, long)):
        result = run("diff", one, other, "--model", model_path, "--receipt", out)
        assert result.exit_code == 0, result.output
        made = receipt.read(out)
        assert len(made["results"]["passes"]) == 2
        held = [len(Trace.open(path).info.passes) for path in (one, other)]
        note = (
            f"the candidate's trace holds {held[0]} passes and the reference's {held[1]}: the first 2 were "
            "compared, and nothing is shown about the others"
        )
        assert note in made["notes"]
        out.unlink()
    equal = run("diff", long, record(name="other", n_decode=3), "--model", model_path, "--receipt", out)
    assert equal.exit_code == 0
    assert not any("nothing is shown about the others" in note for note in receipt.read(out)["notes"])


def test_asking_for_more_than_the_shorter_trace_holds_is_incomplete(record: Record, model_path: Path) -> None:
    result = run("diff", record(n_decode=3), record(n_decode=1), "--model", model_path, "--decode", "3")
    assert result.exit_code == 3
    assert "PARITY" not in result.stdout


# --- fused operations -----------------------------------------------------------------------------------------


def without_act(source: Path, out: Path, fused: list[str], also: str = ".ffn_act") -> Path:
    """Copy a trace without its activation, and say that it is in one kernel with the product."""
    shutil.copytree(source, out)
    trace = Trace.open(source)
    value = json.loads((out / "trace.json").read_text())
    value["engine"]["numerics"]["fused"] = fused
    for index, item in enumerate(value["passes"]):
        item["taps"] = [entry for entry in item["taps"] if not entry["name"].endswith((".ffn_act", also))]
        kept = {f"p{index}.{one['name']}": trace.taps(index)[one["name"]] for one in item["taps"]}
        item["sha256"] = write_safetensors(out / item["file"], kept)
    (out / "trace.json").write_text(json.dumps(value))
    return out


def test_a_tensor_inside_a_kernel_is_not_missing(layers, record: Record, tmp_path: Path, out: Path) -> None:
    open_ = layers("--candidate", without_act(record(), tmp_path / "open", []), "--full")
    assert open_.exit_code == 3
    stated = without_act(record(), tmp_path / "stated", ["ffn_act"])
    result = layers("--candidate", stated, "--full", "--receipt", out)
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    assert made["verdict"] == "parity"
    assert made["candidate"]["numerics"]["fused"] == ["ffn_act"]
    assert not any(row["tap"].endswith("ffn_act") for row in made["results"]["rows"])
    gate = run("gate", out, "--allow-compute", "recorded")
    failed = [line.split()[:2] for line in gate.output.splitlines() if "FAIL" in line]
    assert failed == [["two", "parties"], ["FAIL", str(out)]], gate.output  # one library gave both traces


def test_a_fault_inside_a_kernel_is_found_as_the_kernels(
    layers, record: Record, tmp_path: Path, out: Path
) -> None:
    broken = record(fault=Fault(scaled=(("blk.1.ffn_out", 1.01),)))
    plain = layers("--candidate", broken, "--full", "--receipt", tmp_path / "plain.json")
    result = layers("--candidate", without_act(broken, tmp_path / "t", ["ffn_act"]), "--full", "--receipt", out)
    assert result.exit_code == plain.exit_code != 0
    assert receipt.read(out)["verdict"] == receipt.read(tmp_path / "plain.json")["verdict"] != "parity"


def test_only_what_is_stated_may_be_missing(layers, record: Record, tmp_path: Path) -> None:
    stated = without_act(record(), tmp_path / "stated", ["attn_sub_norm"], also=".attn_sub_norm")
    assert layers("--candidate", stated, "--full").exit_code == 3


def test_greedy_reads_a_trace_through_a_map(
    record: Record, model_path: Path, own_map: Path, tmp_path: Path, out: Path
) -> None:
    plain = record()
    other = rewritten(plain, tmp_path / "other", in_other_words)
    words = ("greedy", "--prompt", PROMPT, "--steps", "3", "--model", model_path)
    assert run(*words, "--reference", plain, "--receipt", tmp_path / "plain.json").exit_code == 0
    journal = ("--journal", tmp_path / "j.jsonl", "--receipt", out)
    result = run(*words, "--reference", other, "--tap-map", own_map, *journal)
    assert result.exit_code == 0, result.output
    made = receipt.read(out)
    first = receipt.read(tmp_path / "plain.json")
    assert made["results"]["prompts"] == first["results"]["prompts"]
    assert (made["verdict"], made["audit"]) == ("parity", first["audit"])
    assert any("read as taps by the tap map own.json, sha256 " in note for note in made["notes"])
    own_map.write_text(own_map.read_text() + "\n")
    result = run(*words, "--reference", other, "--tap-map", own_map, *journal)
    assert "belongs to another run: settings.tap_map" in error_line(result)


def test_greedy_finds_a_fault_behind_a_map(
    record: Record, model_path: Path, own_map: Path, tmp_path: Path, out: Path
) -> None:
    fault = Fault(scaled=(("result_output", 1.01),))
    broken = rewritten(record(fault=fault), tmp_path / "other", in_other_words)
    words = ("greedy", "--prompt", PROMPT, "--steps", "3", "--model", model_path, "--reference", broken)
    assert run(*words, "--tap-map", own_map, "--receipt", out).exit_code == 1
    made = receipt.read(out)
    assert made["audit"]["reference"]["first_guilty"]["tap"] == "result_output"
    assert f"--tap-map {own_map}" in made["diagnosis"][0]["command"]
