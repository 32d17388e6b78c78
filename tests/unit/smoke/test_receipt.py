from __future__ import annotations

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from crossval import registry, schema
from crossval.console import console
from crossval.errors import BadInputError
from crossval.passes import EngineIdentity
from crossval.receipts.file import Receipt
from crossval.receipts.kind import build, build_unavailable
from crossval.receipts.party import Compute, Party
from crossval.receipts.policy import Policy
from crossval.registry import show_receipt
from crossval.smoke import receipt as smoke_receipt
from crossval.smoke import suite
from crossval.smoke.answers import MinCorrect
from crossval.smoke.receipt import SMOKE
from tests.support import receipt_samples as samples


def failures(made: Receipt, policy: Policy | None = None) -> list[str]:
    return [check.name for check in registry.judge(made, policy) if not check.passed]


@pytest.fixture(scope="module")
def good() -> Receipt:
    """Three of four correct on both sides; the fourth wrong in different ways."""
    return samples.smoke_receipt(
        samples.smoke_answer(3, text=" warm.", token_ids=(81, 61, samples.EOS)),
        samples.smoke_answer(3, "reference", text="x", token_ids=(5,) * 24, finish="limit"),
    )


def test_an_honest_receipt_passes_and_reads_back(good: Receipt) -> None:
    schema.validate(good)
    assert failures(good) == []
    assert good["verdict"] == good["parity"]["status"] == "pass"
    assert good["parity"]["exact_match_rate"] == 0.75
    assert good["parity"]["cpp_available"] is True
    result = smoke_receipt.from_json(good)
    assert result.answers[7].text == "x"
    assert build(SMOKE, result, samples.context())["results"] == good["results"]


@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_one_engine_alone(side: Any) -> None:
    made = samples.one_sided(side)
    other = "reference" if side == "candidate" else "candidate"
    assert made[other]["status"] == "unused"
    assert made["parity"]["exact_match_rate"] is None
    assert made["parity"]["cpp_available"] is (side == "reference")
    assert failures(made, Policy(allow_compute_paths=("none",))) == []
    assert failures(made) == ([] if side == "candidate" else ["compute path"])
    assert failures(made, Policy(min_exact_match=0.5, allow_compute_paths=("none",))) == ["exact match"]


def test_wrong_answers_fail_even_where_the_command_was_content() -> None:
    wrong = [samples.smoke_answer(index, text="5.", token_ids=(90, samples.EOS)) for index in (0, 1)]
    assert failures(samples.smoke_receipt(*wrong)) == ["verdict", "answers of the candidate"]
    content = samples.smoke_receipt(result=samples.smoke_result(*wrong, min_correct=MinCorrect(1, 2)))
    assert content["verdict"] == "pass"
    assert failures(content) == ["answers of the candidate"]
    assert failures(content, Policy(min_correct=0.5)) == []


def test_nothing_asked_is_incomplete() -> None:
    result = samples.smoke_result()
    none = dataclasses.replace(result, answers=(), n_prompts=0, suite_digest=suite.digest_of(()))
    made = build(SMOKE, none, samples.context(settings={"n_steps": 24}))
    assert made["verdict"] == "incomplete"
    assert {"verdict", "compared", "exact match"} <= set(failures(made))


def test_an_engine_that_could_not_be_had_fails() -> None:
    nobody = Party("unavailable", EngineIdentity("bitnet.cpp"), note="not built")
    made = build_unavailable(SMOKE, samples.context(reference=nobody))
    assert made["verdict"] == "incomplete"
    assert failures(made) == ["reference"]


@pytest.mark.parametrize(
    ("policy", "failed"),
    [
        (Policy(min_correct=0.8), ["answers of the candidate", "answers of the reference"]),
        (Policy(min_exact_match=0.8), ["exact match"]),
        (Policy(min_cosine=0.5), ["cosine"]),
        (Policy(require_bitwise=True), ["bitwise"]),
        (Policy(tolerance="same"), ["tolerance"]),
        (Policy(min_tokens=10_000), ["tokens"]),
        (Policy(model_sha256=("00" * 32,)), ["model"]),
        (Policy(reference_names=("specification",)), ["reference"]),
    ],
)
def test_each_demand_can_fail(good: Receipt, policy: Policy, failed: list[str]) -> None:
    assert failures(good, policy) == failed


def test_a_live_reference_can_be_demanded(good: Receipt) -> None:
    assert failures(good, Policy(require_live=True)) == []
    assert failures(samples.one_sided("candidate"), Policy(require_live=True)) == ["live reference"]


ROW = ("results", "rows")
FORGERIES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "class": ("classes", (*ROW, 6, "class", "correct")),
    "class of a garbled answer": ("classes", (*ROW, 7, "class", "coherent")),
    "text": ("classes", (*ROW, 6, "text", " cold.")),
    "what was expected": ("structure", (*ROW, 6, "answer", " warm.")),
    "pattern": ("structure", (*ROW, 4, "pattern", "It")),
    "family": ("structure", (*ROW, 6, "family", "sum")),
    "seen": ("structure", (*ROW, 6, "seen", True)),
    "id": ("structure", (*ROW, 6, "id", "sum-1")),
    "engine": ("structure", (*ROW, 6, "engine", "reference")),
    "engines": ("structure", ("results", "engines", ["reference", "candidate"])),
    "one engine": ("structure", ("results", "engines", ["candidate"])),
    "number of prompts": ("structure", ("results", "suite", "n_prompts", 3)),
    "digest of the suite": ("structure", ("results", "suite", "digest", "0" * 64)),
    "name of the suite": ("structure", ("results", "suite", "name", "fixed")),
    "token outside": ("structure", (*ROW, 6, "token_ids", [300, 61, 299])),
    "stop ids outside": ("structure", ("results", "stop_ids", [299, 300])),
    "order of special ids": ("structure", ("results", "special_ids", [299, 298])),
    "tokenizers": ("structure", ("tokenizer", "engines_agree", False)),
    "ids of a prompt": ("structure", (*ROW, 6, "prompt_ids", [1, 2])),
    "vocabulary": ("structure", ("tokenizer", "vocab_size", 299)),
    "prompt": ("structure", ("prompt", "text", "What is 3+3?")),
    "prompt's ids": ("structure", ("prompt", "token_ids", [1])),
    "finish": ("generation", (*ROW, 6, "finish", "limit")),
    "finish at the context": ("generation", (*ROW, 7, "finish", "context")),
    "newline that ends nothing": ("generation", (*ROW, 7, "finish", "newline")),
    "no prompt ids": ("generation", (*ROW, 6, "prompt_ids", [])),
    "nothing generated": ("generation", (*ROW, 7, "token_ids", [])),
    "tokens behind the end": ("generation", (*ROW, 6, "token_ids", [81, 299, 61])),
    "end removed": ("generation", ("results", "stop_ids", [])),
    "limit": ("generation", ("settings", "n_steps", 23)),
    "no limit": ("generation", ("settings", "n_steps", None)),
    "text of known tokens": ("generation", (*ROW, 6, "token_ids", [62, 63, 61, 299])),
    "text behind the line feed": ("generation", (*ROW, 4, "text", "It is Paris.\nOr")),
    "criterion": ("thresholds", ("thresholds", "max_repeats", 30)),
    "window": ("thresholds", ("thresholds", "min_distinct_share", "of", 30)),
    "no share": ("thresholds", ("thresholds", "min_correct", "correct", 0)),
    "count": ("summary", ("results", "summary", "engines", 0, "all", "correct", 4)),
    "count of a family": ("summary", ("results", "summary", "engines", 1, "families", 0, "seen", "correct", 0)),
    "equal texts": ("summary", ("results", "summary", "texts", "equal", 4)),
    "rate": ("summary", ("parity", "exact_match_rate", 1.0)),
    "coverage": ("summary", ("coverage", "required", 10)),
    "verdict": ("summary", ("verdict", "incomplete")),
    "demand": ("summary", ("thresholds", "min_correct", "correct", 9)),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_field_contradicts_the_others(name: str, good: Receipt) -> None:
    failed, edit = FORGERIES[name]
    made = samples.forge(good, *edit)
    schema.validate(made)
    found = failures(made)
    assert failed in found
    assert "digest" not in found


def test_rows_cannot_be_dropped_or_doubled(good: Receipt) -> None:
    rows = good["results"]["rows"]
    for changed in (rows[:-1], rows[:-2], [*rows, *rows[-2:]], [rows[1], rows[0], *rows[2:]], []):
        assert "structure" in failures(samples.forge(good, "results", "rows", changed))


def test_a_shipped_suite_must_be_this_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [{k: v for k, v in dataclasses.asdict(one).items() if v is not None} for one in samples.QUESTIONS]
    (tmp_path / "fixed-10.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(suite, "DATA_DIR", tmp_path)
    made = samples.smoke_receipt(result=dataclasses.replace(samples.smoke_result(), suite="fixed"))
    assert failures(made) == []
    (tmp_path / "fixed-10.jsonl").write_text('{"prompt": "x", "answer": "y"}')
    assert failures(made) == ["structure"]
    (tmp_path / "fixed-10.jsonl").unlink()
    assert failures(made) == ["structure"]


def test_a_pattern_that_hangs_cannot_hang_the_gate(good: Receipt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossval.smoke.patterns.TIMEOUT_S", 0.5)
    made = copy.deepcopy(good)
    for row in made["results"]["rows"][4:6]:
        row["pattern"] = "(?:|||){40}(?!)"
    with pytest.raises(BadInputError, match="no answer within"):
        registry.judge(made)


def test_kinds_do_not_mix(good: Receipt) -> None:
    layers = samples.layers_receipt()
    for made, changes in (
        (good, {"kind": "layers"}),
        (good, {"verdict": "parity"}),
        (good, {"thresholds": layers["thresholds"]}),
        (good, {"results": layers["results"]}),
        (good, {"results": {"rows": []}}),
        (good, {"first_inexact": samples.layers_receipt({(0, "result_norm"): 1e-4})["first_inexact"]}),
        (layers, {"kind": "smoke"}),
        (layers, {"verdict": "pass"}),
        (layers, {"thresholds": good["thresholds"]}),
        (layers, {"candidate": {**layers["candidate"], "status": "unused"}}),
    ):
        with pytest.raises(BadInputError):
            schema.validate({**made, **changes})


def test_a_candidate_without_kernels_did_not_compute(good: Receipt) -> None:
    assert failures(samples.smoke_receipt(compute=Compute("real"))) == ["compute path"]
    assert failures(samples.smoke_receipt(reference=Party("live", samples.OURS))) != []


# For people


def shown(made: Receipt) -> str:
    out = io.StringIO()
    show_receipt(console(out), made)
    return out.getvalue()


def test_the_page_shows_counts_verdict_and_what_is_wrong(good: Receipt) -> None:
    text = shown(good)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "sum 2 2 100 % 0 0 1/1 1/1" in lines
    assert "opposite 1 0 0.00 % 1 0 - 0/1" in lines
    assert "all 4 3 75.00 % 0 1 1/1 1/2" in lines
    assert (
        "PASS candidate bitnet_py: 3 of 4 correct; reference bitnet.cpp: 3 of 4 correct (7/10 required)" in lines
    )
    assert "texts equal: 3 of 4; first different: hot" in lines
    assert "wrong: candidate, hot: 'What is the opposite of hot?' -> ' warm.', expected 'cold.', coherent" in lines
    assert any(line.endswith("garbled: token 5 stands 24 times in a row") for line in lines)
    assert max(map(len, text.splitlines()[:24])) <= 120


def test_a_wrong_answer_of_both_is_shown_once() -> None:
    answers = [
        samples.smoke_answer(3, side, text=" warm.", token_ids=(81, 61, samples.EOS))
        for side in ("candidate", "reference")
    ]
    wrong = [line for line in shown(samples.smoke_receipt(*answers)).splitlines() if line.startswith("wrong")]
    assert len(wrong) == 1
    assert wrong[0].startswith("wrong: both, hot: ")


def test_an_answer_cannot_drive_the_terminal() -> None:
    text = shown(samples.smoke_receipt(samples.smoke_answer(3, text="\x1b[31m[red]", token_ids=(9, samples.EOS))))
    assert "\x1b" not in text
    assert "\\x1b[31m[red]" in text


def test_an_engine_that_was_not_asked_is_not_shown() -> None:
    text = shown(samples.one_sided("candidate"))
    assert "reference" not in text
    assert "texts equal" not in text
