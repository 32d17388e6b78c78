"""Environments of two receipts or traces: what differs, what is the same, what nobody states."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

import crossval
from crossval.examine.environment import UNSTATED, Difference, differences, of_receipt, same_groups, unstated
from crossval.receipts.file import Receipt
from tests.support.strangers import error_line, run

RECEIPTS = Path(__file__).parents[3] / "receipts"
SHIPPED = RECEIPTS / "layers-shipped.json"


@pytest.fixture(scope="module")
def facts():
    return of_receipt(crossval.open_receipt(SHIPPED))


CHANGES = [
    (("candidate", "flags"), "-O3", Difference("candidate", "flags", UNSTATED, "-O3")),
    (("reference", "compiler"), None, "reference"),
    (("candidate", "settings", "kernel"), "scalar", Difference("candidate", "settings.kernel", "avx2", "scalar")),
    (("candidate", "numerics", "simd_width"), 16, Difference("candidate", "numerics.simd_width", "8", "16")),
    (("model", "sha256"), "0" * 64, "model"),
    (("model", "shape", "rope_base"), 5e5, Difference("model", "shape.rope_base", "1000.0", "500000.0")),
    (("tokenizer", "pre"), None, Difference("tokenizer", "pre", "llama-bpe", UNSTATED)),
    (("host", "libc"), "musl 1.2", Difference("host", "libc", "glibc 2.36", "musl 1.2")),
    (("tool", "dirty"), True, Difference("tool", "dirty", "False", "True")),
    (("prompt", "template"), "llama3", Difference("prompt", "template", "raw", "llama3")),
    (("compute", "path"), "none", Difference("kernels", "path", "real", "none")),
]


@pytest.mark.parametrize(("place", "value", "expected"), CHANGES, ids=[".".join(case[0]) for case in CHANGES])
def test_every_changed_fact_is_found_and_nothing_else(facts, place, value, expected):
    data = copy.deepcopy(dict(crossval.open_receipt(SHIPPED)))
    *above, last = place
    inner = data
    for name in above:
        inner = inner[name]
    assert inner[last] != value
    inner[last] = value
    (found,) = differences(facts, of_receipt(Receipt(data)))
    assert found == expected if isinstance(expected, Difference) else found.group == expected
    assert found.group not in same_groups(facts, of_receipt(Receipt(data)))


def test_of_lists_only_the_difference_is_shown(facts):
    data = copy.deepcopy(dict(crossval.open_receipt(SHIPPED)))
    data["host"]["isa_flags"] = ["avx512f", *data["host"]["isa_flags"][1:]]
    found = differences(facts, of_receipt(Receipt(data)))
    assert found == [Difference("host", "isa_flags", "also sse4_2", "also avx512f")]


def test_results_and_dates_are_no_environment(facts):
    data = copy.deepcopy(dict(crossval.open_receipt(SHIPPED)))
    data["created_at"], data["digest"], data["verdict"] = "2001-01-01T00:00:00Z", "0", "incomplete"
    assert differences(facts, of_receipt(Receipt(data))) == []


def test_what_neither_states_is_said_to_be_unknown(facts):
    assert "candidate.flags" in unstated(facts, facts)
    assert "candidate.version" not in unstated(facts, facts)
    stated = {**facts, "candidate": {**facts["candidate"], "flags": "-O3"}}
    assert "candidate.flags" not in unstated(facts, stated)
    assert "candidate.flags" not in unstated(stated, facts)


def test_the_command_compares_receipts():
    result = run("diff", SHIPPED, RECEIPTS / "layers-shipped-zen5.json")
    assert result.exit_code == 1, result.output
    text = " ".join(result.stdout.split())
    assert "settings.kernel avx2 avx512vnni" in text
    assert "the same: reference, model, tokenizer, prompt" in text
    same = run("diff", SHIPPED, SHIPPED)
    assert same.exit_code == 0
    assert "every stated fact is the same" in same.stdout
    rows = json.loads(run("diff", SHIPPED, RECEIPTS / "layers-shipped-zen5.json", "--json").stdout)
    assert {"group": "candidate", "field": "settings.kernel", "before": "avx2", "after": "avx512vnni"} in rows


def test_the_command_compares_what_traces_state(golden_of_shipped):
    march, main = golden_of_shipped
    result = run("diff", march, main, "--environment")
    assert result.exit_code == 1
    assert "numerics.generation" in result.stdout
    assert run("diff", march, march, "--environment").exit_code == 0


@pytest.fixture
def golden_of_shipped():
    models = RECEIPTS.parent / "models"
    return models / "bitnet-qa.goldens" / "what-is-2-2", models / "bitnet-qa.goldens-main" / "what-is-2-2"


def test_a_receipt_and_a_trace_and_other_files_are_refused(golden_of_shipped, tmp_path):
    mixed = run("diff", SHIPPED, golden_of_shipped[0], "--environment")
    assert mixed.exit_code == 4
    assert "two of a kind" in error_line(mixed)
    (tmp_path / "no.json").write_text("{}")
    assert run("diff", SHIPPED, tmp_path / "no.json").exit_code == 4
    ignored = run("diff", SHIPPED, SHIPPED, "--full")
    assert ignored.exit_code == 2
    assert "--full is about traces" in ignored.stderr


def test_receipts_of_every_kind_have_an_environment():
    kinds = set()
    for path in sorted(RECEIPTS.glob("*.json")):
        receipt = crossval.open_receipt(path)
        assert differences(of_receipt(receipt), of_receipt(receipt)) == []
        kinds.add(receipt["kind"])
    assert kinds >= {"layers", "greedy", "bench", "smoke", "metamorphic", "selftest"}
