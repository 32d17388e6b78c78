"""Policies: read from files, what their fields mean, and that none of them is silently without effect."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from crossval import registry
from crossval.cli.policy_docs import policy_markdown
from crossval.errors import BadInputError
from crossval.receipts import file as receipt
from crossval.receipts import gate, shipped
from crossval.receipts.file import Receipt
from crossval.receipts.party import Party
from crossval.receipts.policy import MIN_CORRECT, POLICIES, GateCheck, Policy, demands, policy_of, read_policy
from crossval.receipts.trusted import policy_text
from crossval.receipts.yaml_text import parse_yaml
from crossval.registry import KINDS
from tests.support import receipt_samples as samples
from tests.support.weights_samples import weights_receipt

ROOT = Path(__file__).parents[3]


def checks(made: Receipt, policy: Policy) -> dict[str, GateCheck]:
    return {check.name: check for check in registry.judge(made, policy)}


def failures(made: Receipt, policy: Policy) -> list[str]:
    return [name for name, check in checks(made, policy).items() if not check.passed]


# Files


@pytest.mark.parametrize(("name", "write"), [("p.json", json.dumps), ("p.yaml", json.dumps), ("p", json.dumps)])
def test_policy_files(tmp_path: Path, name: str, write: Any) -> None:
    path = tmp_path / name
    path.write_text(write({"schema_version": 1, "require_live": True, "reference_names": ["a", "b"]}))
    assert read_policy(path) == Policy(require_live=True, reference_names=("a", "b"))
    path.write_text(write({"schema_version": 1}))
    assert read_policy(path) == Policy()


def test_a_policy_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("schema_version: 1\nkinds: [layers]  # no other\ntaps: {l_out: {max_nmse: 1e-6}}\n")
    assert read_policy(path) == Policy(kinds=("layers",), taps={"l_out": {"max_nmse": 1e-6}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"schema_version": 1, "require_lve": true}',
        '{"schema_version": 1, "min_tokens": 0}',
        "schema_version: 1\nrequire_live: yes\n",
        "schema_version: 1\nmodel_sha256: [x]\n",
        "schema_version: 1\nper_kind: {layer: {}}\n",
        "schema_version: 1\nper_kind: {layers: {kinds: [greedy]}}\n",
        "schema_version: 1\nper_kind: {layers: {min_correct: 0.9}}\n",
        "schema_version: 1\nper_kind: {layers: {min_cosine: 2}}\n",
        "schema_version: 1\ntaps: {l_out: {max_cosine: 1}}\n",
    ],
)
def test_a_broken_policy_is_bad_input(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"policy\.json"):
        read_policy(path)
    yaml = tmp_path / "policy.yaml"
    yaml.write_text(text)
    with pytest.raises(BadInputError, match=r"policy\.yaml"):
        read_policy(yaml)


def test_schema_and_class_have_the_same_fields_and_defaults() -> None:
    assert list(demands()) == [field.name for field in dataclasses.fields(Policy)]
    for name, demand in demands().items():
        default = getattr(Policy(), name)
        default = list(default) if isinstance(default, tuple) else default
        assert demand.default == (MIN_CORRECT if name == "min_correct" else default), name
        assert set(demand.kinds) <= set(KINDS), name
    assert set(demands()["kinds"].kinds) == set(KINDS)
    counted = {name for name, entry in KINDS.items() if entry.kind.counted is not None}
    assert set(demands()["min_exact_match"].kinds) == counted


def test_the_page_is_what_the_schema_says() -> None:
    assert (ROOT / "docs/policy.md").read_text(encoding="utf-8") == policy_markdown()


# What a field means


@pytest.fixture(scope="module")
def one_of_each() -> dict[str, Receipt]:
    names = ("layers", "greedy", "smoke", "selftest", "metamorphic", "bench", "tokens", "score")
    made = {name: getattr(samples, f"{name}_receipt")() for name in names}
    return {**made, "weights": weights_receipt()}


ASKED: dict[str, Any] = {
    "kinds": ("diff",),
    "require_live": True,
    "min_exact_match": 1.0,
    "min_token_match": 1.0,
    "min_logit_match": 1.0,
    "min_cosine": 0.5,
    "require_bitwise": True,
    "tolerance": "same",
    "taps": {"l_out": {"min_cosine": 0.9}},
    "min_coverage": 1.0,
    "min_tokens": 2,
    "min_correct": 0.1,
    "min_prefill_ratio": 0.001,
    "min_decode_ratio": 0.001,
    "min_greedy_ratio": 0.001,
    "max_age_days": 1.0,
    "accept_within": 0.1,
    "allow_precision": ("f16",),
    "allow_deviation": ("weights_f16",),
    "allow_reference_graph": True,
    "allow_fallback": True,
    "allow_compute_paths": ("none",),
    "allow_dirty": False,
    "tool_version": ("9",),
    "model_sha256": ("0" * 64,),
    "candidate_library_digest": ("0" * 64,),
    "reference_names": ("other",),
    "reference_generation": ("mainline",),
    "reference_library_digest": ("0" * 64,),
    "reference_source_digest": ("0" * 64,),
    "reference_trace_digest": ("0" * 64,),
    "allow_unknown_provenance": False,
}


@pytest.mark.parametrize("name", [name for name in demands() if name != "per_kind"])
def test_no_field_is_silently_without_effect(name: str, one_of_each: dict[str, Receipt]) -> None:
    """Every field either adds or changes a check of a receipt, or the gate says that it is not for its kind."""
    policy = Policy(**{name: ASKED[name]})
    for kind, made in one_of_each.items():
        before, after = checks(made, Policy()), checks(made, policy)
        said = [one for one in after.values() if not one.applies and one.detail.startswith("not applicable")]
        changed = [one for one in after.values() if before.get(one.name) != one and one.applies]
        if kind not in demands()[name].kinds:
            assert [one.detail for one in said] == [demands()[name].why]
            assert [one.passed for one in said] == [demands()[name].allows]
            assert not changed
        elif not demands()[name].allows and name != "allow_unknown_provenance":
            assert changed or said, f"{name} of a {kind} receipt"


def test_fields_for_one_kind_replace_those_for_all(one_of_each: dict[str, Receipt]) -> None:
    policy = Policy(min_coverage=1.0, per_kind={"greedy": {"reference_names": ("other",), "min_token_match": 1.0}})
    assert failures(one_of_each["layers"], policy) == []
    assert failures(one_of_each["greedy"], policy) == ["reference"]
    assert "token match" in checks(one_of_each["greedy"], policy)


@pytest.mark.parametrize(
    ("limits", "passes"),
    [
        ({}, True),
        ({"min_cosine": 0.99, "max_nmse": 1e-6, "max_abs": 1e-3, "min_exact_match": 0.4}, True),
        ({"min_cosine": 1.0}, False),
        ({"max_nmse": 1e-14}, False),
        ({"max_abs": 1e-9}, False),
        ({"min_exact_match": 0.9}, False),
    ],
)
def test_limits_of_a_tap_hold_each_of_its_rows(limits: dict[str, float], passes: bool) -> None:
    made = samples.layers_receipt({(0, "blk.1.l_out"): 1e-6})
    for tap in ("l_out", "blk.1.l_out"):
        assert failures(made, Policy(taps={tap: limits})) == ([] if passes else [f"taps: {tap}"])
    assert failures(made, Policy(taps={"blk.0.l_out": limits})) == []


def test_a_tap_that_was_not_compared_fails() -> None:
    made = samples.layers_receipt()
    assert failures(made, Policy(taps={"kqv_out": {}})) == ["taps: kqv_out"]


# Whose results


@functools.cache
def live(**changes: Any) -> Receipt:
    return samples.layers_receipt(reference=Party("live", dataclasses.replace(samples.THEIRS, **changes)))


@functools.cache
def recorded(digest: str = "e" * 64) -> Receipt:
    identity = dataclasses.replace(samples.THEIRS, source_digest="3" * 64)
    return samples.layers_receipt(reference=Party("recorded", identity, digest))


LIBRARY, SOURCE, TRACE, OTHER = ("2" * 64,), ("3" * 64,), ("e" * 64,), ("9" * 64,)


@pytest.mark.parametrize(
    ("made", "policy", "failed"),
    [
        (live(), Policy(reference_library_digest=LIBRARY), []),
        (live(), Policy(reference_library_digest=OTHER), ["reference library"]),
        (live(), Policy(reference_source_digest=SOURCE), ["reference source"]),
        (live(source_digest="3" * 64), Policy(reference_source_digest=SOURCE), []),
        (live(source_digest="3" * 64), Policy(reference_source_digest=OTHER), ["reference source"]),
        (live(), Policy(reference_library_digest=LIBRARY, reference_trace_digest=OTHER), []),
        (live(), Policy(reference_trace_digest=TRACE), ["reference trace"]),
        (recorded(), Policy(reference_trace_digest=TRACE), []),
        (recorded(), Policy(reference_trace_digest=OTHER, reference_library_digest=LIBRARY), ["reference trace"]),
        (recorded(), Policy(reference_library_digest=LIBRARY), ["reference library"]),
        (recorded(), Policy(reference_source_digest=SOURCE), ["reference source"]),
        (live(), Policy(allow_unknown_provenance=False), ["provenance"]),
        (live(source_digest="3" * 64), Policy(allow_unknown_provenance=False), []),
        (live(), Policy(allow_unknown_provenance=False, reference_library_digest=LIBRARY), []),
        (recorded(), Policy(allow_unknown_provenance=False), ["provenance"]),
        (recorded(), Policy(allow_unknown_provenance=False, reference_trace_digest=TRACE), []),
        (live(), Policy(candidate_library_digest=("1" * 64,)), []),
        (live(), Policy(candidate_library_digest=OTHER), ["candidate library"]),
        (live(), Policy(reference_generation=("march",)), []),
        (live(), Policy(reference_generation=("main",)), ["reference generation"]),
        (live(), Policy(kinds=("greedy",)), ["kinds"]),
        (live(), Policy(model_sha256=("shipped",)), ["model"]),
        (live(), Policy(tool_version=("0.0.0",)), ["tool version"]),
        (live(), Policy(tool_version=("this",)), []),
    ],
)
def test_lists_of_what_is_accepted(made: Receipt, policy: Policy, failed: list[str]) -> None:
    assert failures(made, policy) == failed


def test_what_ships_is_what_is_pinned() -> None:
    """A golden that was edited, or recorded again without renewing the pins, is not a shipped one."""
    model = ROOT / "models/bitnet-qa.gguf"
    assert json.loads(shipped.PINS.read_text()) == shipped.pins(model)
    assert len(list(model.parent.glob("*.goldens*/*"))) == sum(map(len, shipped.pins(model)["goldens"].values()))


# Policies made of receipts, and the one that ships

COMMITTED = ["layers-llama-zen4", "metamorphic-shipped", "score-shipped"]


@pytest.mark.parametrize("name", COMMITTED)
def test_a_policy_made_of_a_receipt_accepts_it_and_nothing_of_another_model(name: str) -> None:
    trusted = receipt.read(ROOT / f"receipts/{name}.json")
    policy = policy_of(parse_yaml(policy_text(trusted).encode(), "here"), "here")
    assert failures(trusted, policy) == []
    assert policy.kinds == (trusted.kind,)
    for field, value in (
        ("model", {**trusted["model"], "sha256": "0" * 64}),
        ("tool", {**trusted["tool"], "version": "9"}),
    ):
        other = receipt.seal({**trusted, field: value})
        assert failures(other, policy) == ["model" if field == "model" else "tool version"]
    if trusted["reference"]["status"] == "live":
        other = receipt.seal({**trusted, "reference": {**trusted["reference"], "library_digest": "0" * 64}})
        assert "reference library" in failures(other, policy)


def test_the_strict_policy_accepts_parity_of_the_shipped_model_only() -> None:
    policy = dataclasses.replace(read_policy("strict"), max_age_days=None)
    assert read_policy(POLICIES / "strict.yaml").max_age_days == 30
    for name, failed in (
        ("layers-shipped", []),
        ("greedy-shipped", []),
        ("score-shipped", ["kinds"]),
        ("layers-2b-4t-shape", ["model"]),
    ):
        made = receipt.read(ROOT / f"receipts/{name}.json")
        assert [one for one in failures(made, policy) if checks(made, policy)[one].applies] == failed, name
        assert gate.passed(registry.judge(made, policy)) is (not failed)
