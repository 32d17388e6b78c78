from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from crossval import schema
from crossval.compare import rows as compare
from crossval.compare.receipt import row_to_json
from crossval.compare.rows import Skip
from crossval.errors import BadInputError
from crossval.examine import greedy_receipt, layers_receipt
from crossval.examine.greedy_receipt import GREEDY, GreedyExamined
from crossval.examine.layers_receipt import LAYERS
from crossval.model import taps, tolerance
from crossval.passes import EngineIdentity, Numerics
from crossval.receipts import file as receipt
from crossval.receipts.kind import build, build_unavailable
from crossval.receipts.party import Party
from tests.support import receipt_samples as samples


@pytest.fixture(scope="module")
def good() -> receipt.Receipt:
    return samples.layers_receipt({(0, "blk.1.l_out"): 1e-6})


# Canonical JSON and digest


def test_canonical_json_is_sorted_compact_utf8() -> None:
    assert receipt.canonical_json({"b": [1, 0.1, None], "a": "é\n", "A": True}) == (
        '{"A":true,"a":"é\\n","b":[1,0.1,null]}'.encode()
    )


@pytest.mark.parametrize("number", [0.1, 1e-300, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0])
def test_canonical_floats_read_back_as_the_same_number(number: float) -> None:
    assert math.copysign(1, float(receipt.canonical_json(number))) == math.copysign(1, number)
    assert float(receipt.canonical_json(number)) == number


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "\ud800", {"a": {1, 2}}, object()])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(BadInputError, match="canonical JSON"):
        receipt.canonical_json({"value": value})


def test_digest_is_the_sha256_of_everything_else(good: receipt.Receipt) -> None:
    rest = {key: value for key, value in good.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert good["digest"] == hashlib.sha256(text.encode()).hexdigest() == receipt.digest(good)


def test_digest_survives_writing_and_reading(good: receipt.Receipt, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    receipt.write(path, good)
    assert receipt.read(path) == good
    assert receipt.digest(receipt.read(path)) == good["digest"]


# Building


def test_a_receipt_holds_no_path_and_no_constant_for_parity(good: receipt.Receipt) -> None:
    rows = good["results"]["rows"]
    assert good["parity"]["cosine_similarity"] == min(row["cosine"] for row in rows)
    equal = sum(round(row["exact_match_rate"] * row["n_elements"]) for row in rows)
    assert good["parity"]["exact_match_rate"] == pytest.approx(equal / sum(row["n_elements"] for row in rows))
    assert 0.9 < good["parity"]["exact_match_rate"] < 1.0
    assert good["parity"]["logits_exact_match_rate"] == 1.0
    assert (good["verdict"], good["parity"]["status"]) == ("parity", "parity")
    assert good["first_divergence"] is None
    assert (good["first_inexact"]["tap"], good["first_inexact"]["layer"]) == ("blk.1.l_out", 1)


def test_parity_numbers_are_null_when_nothing_was_compared() -> None:
    skip = tuple(
        Skip(index, tap, "the candidate did not give it")
        for index in range(3)
        for tap in ("inp_embd", "blk.0.l_out", "blk.1.l_out", "result_norm", "result_output")
    )
    made = samples.build(samples.layers_result(skipped=skip), samples.context())
    assert made["results"]["rows"] == []
    assert made["parity"]["cosine_similarity"] is made["parity"]["exact_match_rate"] is None
    assert made["verdict"] == made["parity"]["status"] == "incomplete"
    assert made["coverage"]["required"] == len(made["coverage"]["skipped"]) == 15


def test_a_divergence_is_located() -> None:
    made = samples.layers_receipt({(1, "blk.0.l_out"): 0.9, (1, "blk.0.ffn_down"): 0.9, (2, "result_output"): 0.9})
    assert made["verdict"] == "divergence"
    place = made["first_divergence"]
    assert (place["pass_index"], place["pass_kind"], place["tap"], place["layer"]) == (
        1,
        "decode",
        "blk.0.ffn_down",
        0,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_metrics_that_are_not_finite_become_null_and_the_row_invalid(bad: float) -> None:
    result = samples.layers_result()
    broken = dataclasses.replace(result.rows[4], max_abs=bad, nmse=bad, cosine=math.nan, status="equal")
    result = dataclasses.replace(result, rows=(*result.rows[:4], broken, *result.rows[5:]))
    made = samples.build(result, samples.context())
    row = made["results"]["rows"][4]
    assert (row["max_abs"], row["nmse"], row["cosine"], row["status"]) == (None, None, None, "invalid")
    assert made["parity"]["cosine_similarity"] is None
    assert made["verdict"] == "divergence"


def test_a_greedy_receipt_counts_tokens_and_logits_apart() -> None:
    made = samples.greedy_receipt(differs_at=1)
    assert made["parity"]["exact_match_rate"] == pytest.approx(5 / 6)
    assert made["parity"]["logits_exact_match_rate"] == pytest.approx(1 - 150 / 1800)
    assert made["first_divergence"] == {
        "prompt_index": 0,
        "step": 1,
        "candidate_token": 99,
        "reference_token": 51,
        "near_tie": True,
        "explanation": "close",
    }
    assert made["coverage"] == {"required": 6, "compared": 6, "skipped": []}


def test_missing_greedy_steps_are_reported_as_skipped() -> None:
    result = samples.greedy_result()
    short = dataclasses.replace(
        result.prompts[1],
        steps=result.prompts[1].steps[:2],
        reference_tokens=result.prompts[1].reference_tokens[:2],
        candidate_tokens=result.prompts[1].candidate_tokens[:2],
        why_incomplete="the trace ends",
    )
    result = dataclasses.replace(result, prompts=(result.prompts[0], short))
    made = build(GREEDY, GreedyExamined(result, {}), samples.context())
    assert made["verdict"] == "incomplete"
    assert made["coverage"]["skipped"] == [{"prompt_index": 1, "n_steps": 1, "why": "the trace ends"}]


def test_a_receipt_without_a_reference_is_incomplete() -> None:
    nobody = Party("unavailable", EngineIdentity("bitnet.cpp"), note="not built")
    made = build_unavailable(LAYERS, samples.context(reference=nobody))
    assert (made["verdict"], made["parity"]["cpp_available"]) == ("incomplete", False)
    assert made["parity"]["cosine_similarity"] is made["parity"]["exact_match_rate"] is None


@pytest.mark.parametrize(
    ("status", "name", "available"),
    [("live", "bitnet.cpp", True), ("recorded", "bitnet.cpp", True), ("live", "specification", False)],
)
def test_cpp_available_means_real_bitnet_cpp(status: Any, name: str, available: bool) -> None:
    made = samples.layers_receipt(reference=Party(status, EngineIdentity(name, numerics=samples.NUMERICS)))
    assert made["parity"]["cpp_available"] is available


@pytest.mark.parametrize("mode", ["outline", "full"])
def test_layer_results_survive_the_round_trip(mode: str) -> None:
    result = samples.layers_result({(0, "blk.1.l_out"): 1e-6}, mode=mode)
    assert layers_receipt.from_json(samples.build(result, samples.context())).result == result


@pytest.mark.parametrize("differs_at", [None, 1])
def test_greedy_results_survive_the_round_trip(differs_at: int | None) -> None:
    result = samples.greedy_result(differs_at=differs_at)
    made = build(GREEDY, GreedyExamined(result, {}), samples.context())
    assert greedy_receipt.from_json(made).result == result


def test_parties_survive_the_round_trip() -> None:
    identity = EngineIdentity("other", "1", "c", "s", "l", "cc", "-O3", Numerics(16, True), {"n_threads": 4})
    party = Party("recorded", identity, "e" * 64, None)
    assert Party.from_json(party.to_json()) == party


def test_row_status_is_judged_anew_when_written() -> None:
    row = dataclasses.replace(samples.row("result_output", 0, samples.PLAN[0], 0.9), status="equal")
    assert compare.row_status(row) == "diverged"
    assert row_to_json(row)["status"] == "diverged"


# Reading and the schema


def spoil(good: receipt.Receipt, **changes: Any) -> bytes:
    return json.dumps({**good, **changes}).encode()


BROKEN: dict[str, Any] = {
    "empty": lambda good: b"",
    "not json": lambda good: b"{",
    "not utf-8": lambda good: b'{"a": "\xff"}',
    "a list": lambda good: b"[]",
    "null": lambda good: b"null",
    "no fields": lambda good: b"{}",
    "duplicate key": lambda good: json.dumps(good)[:-1].encode() + b', "verdict": "parity"}',
    "nested duplicate key": lambda good: spoil(good).replace(b'"status":', b'"status": 1, "status":', 1),
    "NaN": lambda good: spoil(good, verdict=math.nan),
    "number too large": lambda good: spoil(good).replace(b'"schema_version": 1', b'"schema_version": 1e999'),
    "integer too large": lambda good: spoil(good).replace(
        b'"size_bytes": 123456', b'"size_bytes": 1' + b"0" * 400
    ),
    "integer beyond python": lambda good: b'{"a": ' + b"1" * 5000 + b"}",
    "deep": lambda good: b"[" * 200_000,
    "unknown field": lambda good: spoil(good, extra=1),
    "other version": lambda good: spoil(good, schema_version=2),
    "true is no number": lambda good: spoil(good, schema_version=True),
    "other kind": lambda good: spoil(good, kind="smoke"),
    "results of another kind": lambda good: spoil(good, kind="greedy"),
    "no results, but a reference": lambda good: spoil(good, results={"rows": []}),
    "free text as time": lambda good: spoil(good, created_at="yesterday"),
    "short digest": lambda good: spoil(good, digest="ab"),
    "lone surrogate": lambda good: b'{"a": "\\ud800"}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_receipt_is_one_clear_error(name: str, good: receipt.Receipt, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(BROKEN[name](good))
    with pytest.raises(BadInputError) as caught:
        receipt.read(path)
    message = str(caught.value)
    assert "broken.json" in message
    assert "\n" not in message
    assert len(message) < 600


def test_missing_directory_or_huge_receipts_are_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match="cannot read"):
        receipt.read(tmp_path / "missing.json")
    with pytest.raises(BadInputError, match="not a regular file"):
        receipt.read(tmp_path)
    monkeypatch.setattr(receipt, "MAX_SIZE_BYTES", 10)
    big = tmp_path / "big.json"
    big.write_bytes(b" " * 11)
    with pytest.raises(BadInputError, match="larger than"):
        receipt.read(big)


def test_a_name_that_ends_in_gz_is_compressed_and_read_whatever_its_name(good: receipt.Receipt, tmp_path: Path):
    plain, small, renamed = (tmp_path / name for name in ("a.json", "a.json.gz", "b.json"))
    for path in (plain, small):
        good.save(path)
    assert gzip.decompress(small.read_bytes()) == plain.read_bytes()
    assert small.stat().st_size < plain.stat().st_size / 2
    small.rename(renamed)
    assert receipt.read(renamed) == receipt.read(plain) == good
    good.save(small)
    assert small.read_bytes() == renamed.read_bytes(), "the time is not in it"
    assert receipt.in_folder(tmp_path) == [plain, small, renamed]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "damaged gzip file"),
        (lambda data: data[:20], "damaged gzip file"),
        (lambda data: data[:2], "damaged gzip file"),
        (lambda data: data[:40] + b"\xff" * 20 + data[60:], "damaged gzip file"),
        (lambda data: data[:-8] + bytes(4) + data[-4:], "damaged gzip file"),
        (lambda data: data + b"no more", "damaged gzip file"),
        (lambda data: gzip.compress(data), "not valid JSON"),
    ],
)
def test_a_damaged_gzip_file_is_one_clear_error(damage, message, good, tmp_path):
    path = tmp_path / "broken.json.gz"
    good.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInputError, match=message) as caught:
        receipt.read(path)
    assert "\n" not in str(caught.value)
    assert "broken.json.gz" in str(caught.value)


def test_a_gzip_file_may_not_grow_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(receipt, "MAX_SIZE_BYTES", 1000)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * 1001))
    assert path.stat().st_size < 1000
    with pytest.raises(BadInputError, match="larger than 1000 bytes when decompressed"):
        receipt.read(path)


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(BadInputError, match="not a regular file"):
        receipt.read(path)


def test_writing_refuses_what_is_not_a_file(good: receipt.Receipt, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not a regular file"):
        receipt.write(tmp_path, good)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot write"):
        receipt.write(tmp_path / "file" / "x", good)


def test_rows_of_zeros_have_no_cosine_and_do_not_hide_the_others() -> None:
    result = samples.layers_result({(0, "blk.1.l_out"): 1e-6})
    zeros = dataclasses.replace(result.rows[0], cosine=None, worst_token_cosine=None)
    made = samples.build(dataclasses.replace(result, rows=(zeros, *result.rows[1:])), samples.context())
    assert made["verdict"] == "parity"
    assert 0.99 < made["parity"]["cosine_similarity"] < 1.0


def test_sealing_refuses_what_the_schema_forbids(good: receipt.Receipt) -> None:
    with pytest.raises(BadInputError, match=r"receipt.v1.schema.json at verdict"):
        receipt.seal({**good, "verdict": "fine"})


def test_a_prompt_with_a_lone_surrogate_cannot_become_a_receipt() -> None:
    with pytest.raises(BadInputError, match="canonical JSON"):
        samples.layers_receipt(text="bad \udcff byte")


def objects(schema: Any, path: str = "") -> Any:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for key, value in schema.items():
            yield from objects(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from objects(value, f"{path}/{index}")


def test_the_schema_knows_every_tap_and_no_other(good: receipt.Receipt) -> None:
    names = [*taps.all_taps(2), "blk.123.q"]
    bad = ["blk.01.q", "blk.0.nope", "q", "blk.0.qx", "xinp_embd", "inp_embdx", "blk.0.inp_embd"]
    for name in names + bad:
        place = {"pass_index": 0, "pass_kind": "prefill", "tap": name, "layer": 0, "row": None, "note": None}
        if name in bad:
            with pytest.raises(BadInputError):
                schema.validate({**good, "first_inexact": place})
        else:
            schema.validate({**good, "first_inexact": place})


@pytest.mark.parametrize("policy", ["same", "independent"])
def test_the_schema_takes_the_tolerance_table(good: receipt.Receipt, policy: Any) -> None:
    schema.validate({**good, "thresholds": tolerance.describe(policy)})


@pytest.mark.parametrize("name", ["receipt.v1", "policy.v1"])
def test_every_object_of_the_schema_is_closed(name: str) -> None:
    found = dict(objects(json.loads((schema.schema_dir() / f"{name}.schema.json").read_text())))
    assert found
    for path, part in found.items():
        extra = part.get("additionalProperties")
        named = isinstance(extra, dict) and extra.get("additionalProperties") is False  # a closed object per name
        assert (
            extra is False
            or named
            or (path, extra)
            in (
                ("/$defs/engine/properties/settings", {"$ref": "#/$defs/scalar"}),
                ("/$defs/mixed_dtype/properties/ops", {"$ref": "#/$defs/dtype"}),
                # each held to this schema itself, without `kinds` and `per_kind` (crossval.receipts.policy)
                ("/properties/per_kind", {"type": "object", "maxProperties": 100}),
                ("/properties/per_kind/additionalProperties", None),
            )
        )
        if name == "receipt.v1" and not path.endswith(("bound", "settings", "ops")):
            optional = {
                "/properties/model": ["input_norms", "pooling"],
                "/$defs/greedy_results": ["from_journal", "further", "passes"],
                "/$defs/metamorphic_results/properties/summary": ["candidate", "reference"],
                "/$defs/metamorphic_criterion": ["taps"],
                "/$defs/bench_values": ["flags"],
                "/$defs/bench_results": ["references", "search"],
                "/$defs/bench_measure/properties/passes": ["within"],
                "/$defs/engine_audit": ["misrecorded", "precision", "products"],
                "/$defs/precision": ["exceptions"],
                "/$defs/products": ["alternatives"],
                "/$defs/row": ["token_nmse"],
                "/$defs/audit_row": ["n_segments", "within", "n_within"],
                "/$defs/guilty_op": ["segment", "within", "n_within"],
                "/$defs/diagnosis": ["further", "segment", "segment_ops"],
                "/$defs/tap_location": ["after"],
                "/properties/tokenizer": ["rules"],
                "/$defs/compared_tensor": ["criterion"],
                "/$defs/numerics": [
                    "accumulate",
                    "activation_quantization",
                    "attention_threads",
                    "bfloat_pairs",
                    "binary16_sums",
                    "compute_dtype",
                    "flash_attention",
                    "fused",
                    "fused_sums",
                    "generation",
                    "kv_dtype",
                    "quantizer_block",
                    "weights",
                ],
                "": ["floors", "causal", "default_run"],
            }.get(path, [])
            assert sorted([*part["required"], *optional]) == sorted(part["properties"]), path
