"""Traces of logits only, or of the last token only: what they hold is compared, what they cannot show is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crossval.examine.advice import advice_of
from crossval.examine.verdict import ADVICE
from crossval.model import taps
from crossval.passes import TapArray
from crossval.receipts import file as receipt
from crossval.traces.read import Trace
from crossval.traces.write import write_safetensors
from tests.support.strangers import Fault

Record = Callable[..., Path]
NOT_SEEN = "An error in any layer that leaves these logits within their bounds is not seen"


def last_token(source: Path, out: Path) -> Path:
    """Copy a trace with the last token of every pass only."""
    shutil.copytree(source, out)
    trace = Trace.open(source)
    value = json.loads((out / "trace.json").read_text())
    for index, item in enumerate(value["passes"]):
        tensors, n_tokens = {}, len(item["token_ids"])
        for entry in item["taps"]:
            tap = trace.taps(index)[entry["name"]]
            last = np.take(tap.array, [-1], axis=taps.token_axis(entry["name"]))
            tensors[f"p{index}.{entry['name']}"] = TapArray(last)
            entry.update(shape=list(last.shape), rows=[n_tokens - 1])
        item["sha256"] = write_safetensors(out / item["file"], tensors)
    (out / "trace.json").write_text(json.dumps(value))
    return out


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("full", [False, True])
def test_logits_alone_agree_and_are_no_parity(layers, record: Record, out: Path, full: bool) -> None:
    result = layers("--candidate", record(taps=[]), "--receipt", out, *["--full"] * full)
    assert result.exit_code == 3
    assert receipt.read(out)["verdict"] == "incomplete"
    assert "Only logits were compared, and they agree. " + NOT_SEEN in words(result.stdout)
    assert "PARITY" not in result.stdout


def test_logits_that_differ_are_not_said_to_agree(layers, record: Record, out: Path) -> None:
    layers("--candidate", record(taps=[]), "--receipt", out)
    made = receipt.read(out)
    assert NOT_SEEN in advice_of(made).meaning
    made["results"]["rows"][-1]["status"] = "diverged"
    assert advice_of(made) == ADVICE["incomplete"]


def test_the_last_token_alone_agrees_and_attention_is_said_to_be_open(
    layers, record: Record, tmp_path: Path, out: Path
) -> None:
    result = layers("--candidate", last_token(record(), tmp_path / "last"), "--receipt", out)
    assert result.exit_code == 3
    made = receipt.read(out)
    n_tokens = len(made["prompt"]["token_ids"])
    text = words(result.stdout)
    assert f"of pass 0 only 1 of {n_tokens} tokens were recorded. The others feed attention" in text
    assert "Record every token of the pass" in text
    assert "blk.0.k_rope of pass 0 was not recorded for all of its tokens" in text
    assert "PARITY" not in text
    assert all(row["status"] == "equal" for row in made["results"]["rows"])


def test_what_is_wrong_in_the_last_token_is_still_found(layers, record: Record, tmp_path: Path, out: Path) -> None:
    broken = last_token(record(fault=Fault(rolled_from="1/ffn_sub_norm")), tmp_path / "last")
    assert layers("--candidate", broken, "--receipt", out).exit_code == 1
    first = receipt.read(out)["audit"]["candidate"]["first_guilty"]
    assert first["tap"].startswith("blk.1.ffn")


def test_a_trace_that_lacks_something_else_gets_the_general_advice(layers, record: Record) -> None:
    kept = [name for name in taps.all_taps(2) if name != "inp_embd"]
    text = words(layers("--candidate", record(taps=kept)).stdout)
    assert "Something that had to be compared was not." in text
