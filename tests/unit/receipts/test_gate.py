from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest

from crossval import registry, schema
from crossval.compare import rows as compare
from crossval.compare.receipt import metrics
from crossval.compare.rows import Skip
from crossval.examine import layers_receipt
from crossval.examine.layers_receipt import LAYERS
from crossval.passes import EngineIdentity, Numerics
from crossval.receipts import file as receipt
from crossval.receipts import gate
from crossval.receipts.file import Receipt, seal
from crossval.receipts.kind import build_unavailable
from crossval.receipts.party import Compute, Party
from crossval.receipts.policy import Policy
from tests.support import receipt_samples as samples


@pytest.fixture(scope="module")
def exact() -> Receipt:
    return samples.layers_receipt()


@pytest.fixture(scope="module")
def inexact() -> Receipt:
    return samples.layers_receipt({(0, "blk.1.l_out"): 1e-6})


@pytest.fixture(scope="module")
def greedy() -> Receipt:
    return samples.greedy_receipt()


def failures(made: Receipt, policy: Policy | None = None, **options: Any) -> list[str]:
    return [check.name for check in registry.judge(made, policy, **options) if not check.passed]


# What passes


def test_honest_receipts_pass(exact: Receipt, inexact: Receipt, greedy: Receipt) -> None:
    full = samples.build(
        samples.layers_result(mode="full"),
        samples.context(settings={"n_threads": 2, "n_decode": 2, "n_steps": None, "full": True}),
    )
    for made in (exact, inexact, greedy, full):
        schema.validate(made)
        assert failures(made) == []
        assert gate.passed(registry.judge(made))


def test_no_check_at_all_is_no_pass() -> None:
    assert not gate.passed([])


# What the engines did wrong


def test_a_divergence_fails() -> None:
    assert failures(samples.layers_receipt({(1, "blk.0.l_out"): 0.9})) == ["verdict"]
    assert failures(samples.greedy_receipt(differs_at=1)) == ["verdict"]


def test_disagreeing_tokenizers_fail_even_when_every_row_is_equal() -> None:
    made = samples.layers_receipt(tokenizer={**samples.TOKENIZER, "engines_agree": False})
    assert made["verdict"] == "divergence"
    assert failures(made) == ["verdict"]


@pytest.mark.parametrize(
    ("ours", "theirs", "rules", "passes"),
    [
        ("march", "march", None, True),  # of an older version
        ("march", "march", "march", True),
        ("march", "march", "main", False),
        ("march", "main", "main", True),
        ("march", "main", "march", False),
        ("mainline", None, "main", True),
        (None, None, "march", True),
        (None, None, "main", False),
    ],
)
def test_text_is_read_by_the_rules_that_follow_from_the_engines(
    ours: Any, theirs: Any, rules: str | None, passes: bool
) -> None:
    stated = {} if rules is None else {"rules": rules}
    made = dict(samples.layers_receipt(tokenizer={**samples.TOKENIZER, **stated}))
    for side, generation in (("candidate", ours), ("reference", theirs)):
        made[side] = {**made[side], "numerics": {"simd_width": None, "fused_quantizer": None}}
        made[side]["numerics"] |= {} if generation is None else {"generation": generation}
    assert (not LAYERS.checks["structure"](seal(made))) is passes


def test_anything_skipped_fails() -> None:
    result = samples.layers_result(skipped=(Skip(0, "blk.1.l_out", "the candidate did not give it"),))
    made = samples.build(result, samples.context())
    assert made["verdict"] == "incomplete"
    assert failures(made) == ["verdict"]


def test_nothing_compared_fails() -> None:
    everything = tuple(Skip(i, row.tap, "no") for i in range(3) for row in samples.layers_result().rows[:5])
    made = samples.build(samples.layers_result(skipped=everything), samples.context())
    assert {"verdict", "compared", "exact match"} <= set(failures(made))


def test_a_receipt_without_reference_fails() -> None:
    nobody = Party("unavailable", EngineIdentity("bitnet.cpp"), note="not built")
    assert "reference" in failures(build_unavailable(layers_receipt.LAYERS, samples.context(reference=nobody)))


def party(name: str = "bitnet.cpp", status: Any = "live", **facts: Any) -> Party:
    digest = facts.pop("trace_digest", None)
    numerics = facts.pop("numerics", samples.NUMERICS)
    return Party(status, EngineIdentity(name, numerics=numerics, **{"library_digest": "2" * 64, **facts}), digest)


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"reference": party(library_digest="1" * 64)}, "two parties"),
        ({"reference": party("bitnet_py", library_digest=None)}, "two parties"),
        ({"reference": party("bitnet_py")}, "reference"),
        (
            {
                "candidate": party("other", "recorded", trace_digest="e" * 64, library_digest="1" * 64),
                "reference": party(status="recorded", trace_digest="e" * 64),
                "compute": Compute("recorded"),
            },
            "two parties",
        ),
        ({"reference": party("specification")}, "reference"),
        ({"reference": party(library_digest=None)}, "reference build"),
        ({"reference": party(status="recorded")}, "recorded reference"),
        ({"compute": Compute("none")}, "compute path"),
        ({"compute": Compute("real")}, "compute path"),
        ({"compute": Compute("recorded")}, "compute path"),
        ({"compute": Compute("real", False, ({"name": "f16_dot", "calls": 9, "bytes": 9},))}, "compute path"),
        ({"compute": Compute("real", False, ({"name": "i2s_gemv", "calls": 0, "bytes": 9},))}, "compute path"),
        ({"compute": Compute("real", False, ({"name": "i2s_gemv", "calls": 9, "bytes": 0},))}, "compute path"),
        ({"compute": Compute("real", False, samples.KERNELS * 2)}, "kernels"),
        ({"compute": Compute("real", True, samples.KERNELS)}, "fallback"),
        ({"model": {**samples.MODEL, "separate_output": True}}, "notes"),
    ],
)
def test_what_makes_a_comparison_worthless_fails(changes: dict[str, Any], failed: str) -> None:
    assert failed in failures(samples.layers_receipt(**changes))


def test_the_same_engine_name_is_not_enough_of_a_difference() -> None:
    made = samples.layers_receipt(candidate=party("bitnet.cpp", "recorded", trace_digest="e" * 64))
    assert "two parties" in failures(made)


def test_a_recorded_candidate_passes_only_when_allowed() -> None:
    recorded = party("other", "recorded", trace_digest="e" * 64, library_digest=None)
    made = samples.layers_receipt(candidate=recorded, compute=Compute("recorded"))
    assert failures(made) == ["compute path"]
    assert failures(made, Policy(allow_compute_paths=("recorded",))) == []
    assert failures(made, Policy(allow_compute_paths=("specification",))) == ["compute path"]


# Policy


@pytest.mark.parametrize(
    ("policy", "failed"),
    [
        (Policy(min_exact_match=0.99), "exact match"),
        (Policy(min_token_match=0.0), "token match"),
        (Policy(min_cosine=1.0), "cosine"),
        (Policy(require_bitwise=True), "bitwise"),
        (Policy(model_sha256=("00" * 32,)), "model"),
        (Policy(min_tokens=6), "tokens"),
        (Policy(reference_names=("specification",)), "reference"),
    ],
)
def test_each_demand_can_fail(inexact: Receipt, policy: Policy, failed: str) -> None:
    assert failures(inexact, policy) == [failed]


def test_each_demand_can_be_met(exact: Receipt) -> None:
    policy = Policy(
        min_exact_match=1.0,
        min_cosine=1.0,
        require_bitwise=True,
        require_live=True,
        max_age_days=1,
        model_sha256=("00" * 32, "ab" * 32),
        min_tokens=5,
        tolerance="same",
    )
    assert failures(exact, policy) == []


def test_require_live_refuses_a_recorded_reference() -> None:
    made = samples.layers_receipt(reference=party(status="recorded", trace_digest="e" * 64))
    assert failures(made) == []
    assert failures(made, Policy(require_live=True)) == ["live reference"]


def test_age_is_counted_from_created_at(exact: Receipt) -> None:
    made = samples.forge(exact, "created_at", "2026-01-01T00:00:00Z")
    now = datetime.datetime(2026, 1, 3, tzinfo=datetime.timezone.utc)
    assert failures(made, Policy(max_age_days=2), now=now) == []
    assert failures(made, Policy(max_age_days=1.9), now=now) == ["age"]
    early = datetime.datetime(2025, 12, 31, tzinfo=datetime.timezone.utc)
    assert failures(made, now=early) == ["age"]
    assert failures(samples.forge(exact, "created_at", "2026-02-30T00:00:00Z")) == ["age"]


@pytest.mark.parametrize(("dirty", "accepted"), [(False, True), (True, False), (None, False)])
def test_clean_tool(exact: Receipt, dirty: bool | None, accepted: bool) -> None:
    made = samples.forge(exact, "tool", "dirty", dirty)
    assert failures(made, Policy(allow_dirty=False)) == ([] if accepted else ["clean tool"])
    assert failures(made) == []


def test_engines_of_different_arithmetic_are_held_to_the_wider_table() -> None:
    other = Party("live", EngineIdentity("bitnet.cpp", library_digest="2" * 64, numerics=Numerics(16, False)))
    made = samples.build(samples.layers_result(policy="independent"), samples.context(reference=other))
    assert failures(made) == []
    assert failures(made, Policy(tolerance="same")) == ["tolerance"]
    narrow = samples.build(samples.layers_result(policy="same"), samples.context(reference=other))
    assert failures(narrow) == ["thresholds"]


def test_engines_of_the_same_arithmetic_may_not_use_the_wider_table() -> None:
    wide = samples.build(samples.layers_result(policy="independent"), samples.context())
    assert failures(wide) == ["thresholds"]


# Forgeries: one lie and a recomputed digest


def test_an_edit_without_a_new_digest_fails(exact: Receipt) -> None:
    assert failures({**exact, "notes": ["all is well"]}) == ["digest"]


FORGERIES: dict[str, tuple[Any, ...]] = {
    "verdict": ("verdict", "incomplete"),
    "row status": ("results", "rows", 2, "status", "equal"),
    "cosine of a row": ("results", "rows", 2, "cosine", 0.999),
    "worst cosine of a row": ("results", "rows", 2, "worst_token_cosine", 0.999),
    "NMSE of a row": ("results", "rows", 2, "nmse", 0.0),
    "norm ratio of a row": ("results", "rows", 2, "norm_ratio", 1.0001),
    "bits of a row": ("results", "rows", 2, "bitwise_equal", True),
    "rate of a row": ("results", "rows", 2, "exact_match_rate", 1.0),
    "share that no count gives": ("results", "rows", 2, "exact_match_rate", 0.123456),
    "elements of a row": ("results", "rows", 2, "n_elements", 1),
    "no elements": ("results", "rows", 2, "n_elements", 0),
    "tokens of a row": ("results", "rows", 2, "rows_compared", 4),
    "error of a token": ("results", "rows", 2, "token_nmse", 0, 0.5),
    "errors of fewer tokens": ("results", "rows", 2, "token_nmse", [1e-4]),
    "worst token": ("results", "rows", 2, "worst_token", 0),
    "worst token outside": ("results", "rows", 2, "worst_token", 77),
    "bound of a row": ("results", "rows", 2, "bound", "nmse", 0.9),
    "no bounds": ("results", "rows", 2, "bound", {}),
    "floor of a row": ("results", "rows", 2, "floor", 0.5),
    "tap of a row": ("results", "rows", 2, "tap", "blk.0.ffn_out"),
    "tap of no layer": ("results", "rows", 2, "tap", "blk.7.l_out"),
    "pass of a row": ("results", "rows", 2, "pass_index", 1),
    "kind of a row": ("results", "rows", 2, "pass_kind", "decode"),
    "a threshold": ("thresholds", "safety", 100.0),
    "the table": ("thresholds", "policy", "independent"),
    "required": ("coverage", "required", 14),
    "compared": ("coverage", "compared", 14),
    "parity cosine": ("parity", "cosine_similarity", 1.0),
    "parity rate": ("parity", "exact_match_rate", 1.0),
    "logits rate": ("parity", "logits_exact_match_rate", 0.5),
    "parity status": ("parity", "status", "divergence"),
    "cpp": ("parity", "cpp_available", False),
    "first inexact": ("first_inexact", None),
    "first divergence": ("first_inexact", "tap", "blk.0.l_out"),
    "token ids": ("prompt", "token_ids", [1, 17, 43]),
    "layers of the model": ("model", "shape", "n_layers", 1),
    "fewer layers": ("results", "n_layers", 1),
    "a token outside": ("results", "passes", 1, "token_ids", [300]),
    "start of a pass": ("results", "passes", 1, "start", 4),
    "decoded tokens": ("settings", "n_decode", 4),
    "kind of a pass": ("results", "passes", 1, "kind", "prefill"),
    "vocabulary": ("tokenizer", "vocab_size", 299),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_field_contradicts_the_others(name: str, inexact: Receipt) -> None:
    made = samples.forge(inexact, *FORGERIES[name])
    assert made != inexact
    found = failures(made)
    assert found
    assert "digest" not in found


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("exact_match_rate", 0.123456, "not a whole number of elements"),
        ("nmse", 0.5, "contradicts cosine and norm ratio"),
        ("nmse", 0.0, "some value differs"),
        ("max_abs", -1.0, "a distance is negative"),
        ("max_ulp", 0, "contradicts max_ulp"),
        ("worst_token", None, "contradicts worst_token"),
        ("worst_token_nmse", 0.0, "below the whole tap's"),
        ("worst_token_cosine", 0.5, "contradicts the worst token's NMSE"),
        ("worst_token_cosine", None, "only one of cosine"),
        ("rows_compared", 1, "one token was compared"),
        ("bitwise_equal", True, "bitwise_equal but"),
    ],
)
def test_each_metric_is_held_against_the_others(
    inexact: Receipt, field: str, value: object, complaint: str
) -> None:
    made = samples.forge(inexact, "results", "rows", 2, field, value)
    assert complaint in " ".join(metrics(made))
    assert metrics(inexact) == []


def test_a_deleted_or_doubled_row_fails(inexact: Receipt) -> None:
    rows = inexact["results"]["rows"]
    for changed in (rows[:-1], [*rows, rows[-1]], [rows[1], rows[0], *rows[2:]]):
        assert failures(samples.forge(inexact, "results", "rows", changed))


def test_a_required_row_cannot_be_dropped_together_with_its_count(inexact: Receipt) -> None:
    made = copy.deepcopy(inexact)
    del made["results"]["rows"][2]
    made["coverage"] = {"required": 14, "compared": 14, "skipped": []}
    made["first_inexact"] = None
    made = {**made, "parity": {**made["parity"], "cosine_similarity": 1.0, "exact_match_rate": 1.0}}
    made["digest"] = receipt.digest(made)
    assert failures(made) == ["structure"]


def test_a_divergence_cannot_be_relabelled() -> None:
    made = samples.layers_receipt({(1, "blk.0.l_out"): 0.9})
    for row in made["results"]["rows"]:
        row["status"] = "equal" if row["status"] == "equal" else "within"
    made.update(verdict="parity", first_divergence=None)
    made["parity"]["status"] = "parity"
    made["digest"] = receipt.digest(made)
    assert {"row status", "summary", "verdict"} <= set(failures(made))


# Greedy receipts: tokens, logits, audits

GREEDY_AUDITS = samples.audits(plan=samples.GREEDY_PLAN)
COARSE = samples.coarse_audit()
GUILTY = samples.summary.to_json(samples.audit_result({(1, "blk.0.v"): 9.0}, plan=samples.GREEDY_PLAN))


def detail(made: Receipt, name: str, policy: Policy | None = None) -> str:
    (found,) = [check.detail for check in registry.judge(made, policy) if check.name == name]
    return found


def test_what_is_counted_is_named(exact: Receipt, inexact: Receipt, greedy: Receipt) -> None:
    assert detail(greedy, "exact match") == "1 of the tokens, 0 required"
    assert detail(exact, "exact match") == "1 of the values, 0 required"
    assert detail(samples.smoke_receipt(), "exact match").endswith("of the texts, 0 required")
    assert detail(samples.bench_receipt(), "exact match") == "1 of the passes, 0 required"
    policy = Policy(min_token_match=1.0, min_logit_match=1.0)
    assert failures(greedy, policy) == []
    assert detail(greedy, "token match", policy) == "1 of the tokens, 1 required"
    assert detail(greedy, "logit match", policy) == "1 of the logits, 1 required"
    assert failures(inexact, Policy(min_logit_match=1.0)) == []
    for made in (samples.smoke_receipt(), samples.bench_receipt()):
        assert failures(made, policy) == ["token match", "logit match"]
        assert detail(made, "logit match", policy).startswith("not applicable: min_logit_match is for layers")


def test_tokens_and_logits_are_demanded_apart() -> None:
    made = samples.greedy_receipt(inexact_at=0, policy="independent")
    assert failures(made) == failures(made, Policy(min_exact_match=1.0, min_token_match=1.0)) == []
    assert failures(made, Policy(min_logit_match=1.0)) == ["logit match"]
    assert failures(made, Policy(min_logit_match=0.5)) == []


def test_equal_tokens_of_unequal_bits_where_the_same_arithmetic_is_stated_fail() -> None:
    made = samples.greedy_receipt(inexact_at=1)
    assert (made["verdict"], made["parity"]["exact_match_rate"]) == ("divergence", 1.0)
    assert made["first_divergence"]["step"] == 1
    assert failures(made, Policy(min_exact_match=1.0, require_live=True)) == ["verdict"]


@pytest.mark.parametrize("policy", ["same", "independent"])
@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_a_greedy_receipt_without_a_whole_audit(side: str, policy: Any) -> None:
    inexact_at = 0 if policy == "independent" else None
    for lacking, vouched, otherwise in ((COARSE, policy == "same", "agrees_within"), (None, False, "incomplete")):
        made = samples.greedy_receipt(policy=policy, inexact_at=inexact_at, held={**GREEDY_AUDITS, side: lacking})
        assert made["verdict"] == ("parity" if vouched else otherwise)
        assert failures(made) == ([] if vouched else ["verdict", f"audit of the {side}"])
        assert failures(made, Policy(accept_within=0.1)) == failures(made)
        assert failures(made, Policy(accept_within=0.125)) == ([] if lacking else failures(made))
    made = samples.greedy_receipt(policy=policy, inexact_at=inexact_at, held={**GREEDY_AUDITS, side: GUILTY})
    assert made["verdict"] == f"{side}_defect"
    assert failures(made) == ["verdict", f"audit of the {side}"]
    made = samples.greedy_receipt(
        policy=policy, inexact_at=inexact_at, held={"candidate": None, "reference": None}
    )
    assert made["verdict"] == "incomplete"
    assert failures(made) == ["verdict", "audit of the candidate", "audit of the reference"]


def test_a_greedy_receipt_from_before_the_audit_shows_equal_bits_or_nothing(greedy: Receipt) -> None:
    old = samples.unaudited(greedy, "parity")
    assert failures(old, Policy(min_exact_match=1.0, require_live=True)) == []
    assert "before greedy comparisons were audited; all logits are bit-equal" in detail(old, "arithmetic")
    apart = samples.unaudited(samples.greedy_receipt(inexact_at=0, policy="independent"), "parity")
    assert failures(apart) == ["summary", "verdict", "arithmetic"]
    assert failures(samples.unaudited(samples.greedy_receipt(inexact_at=0), "parity")) == [
        "summary",
        "verdict",
        "arithmetic",
    ]


def drop(audit: str) -> Any:
    return lambda made: made["audit"].update({audit: None})


AUDIT_FORGERIES: dict[str, Any] = {
    "one audit left out": drop("reference"),
    "both audits left out": lambda made: made.update(audit={"candidate": None, "reference": None}),
    "other tokens": lambda made: made["results"]["passes"][0].update(token_ids=[1, 17, 43]),
    "another decoded token": lambda made: made["results"]["passes"][1].update(token_ids=[51]),
    "no decoded token": lambda made: made["results"]["passes"].pop(),
    "a gap": lambda made: made["results"]["passes"][1].update(start=4),
    "another kind of pass": lambda made: made["results"]["passes"][1].update(kind="prefill"),
    "no passes": lambda made: made["results"].pop("passes"),
    "a diagnosis of nothing": lambda made: made["diagnosis"].append(samples.diagnosis_of("candidate", GUILTY)),
    "a row beyond its bound": lambda made: made["audit"]["candidate"]["rows"][3].update(ratio=2.0),
    "passes without audits": lambda made: made.update(audit=None, diagnosis=None),
}


@pytest.mark.parametrize("name", AUDIT_FORGERIES)
def test_a_forged_audit_of_a_greedy_receipt_is_seen(name: str, greedy: Receipt) -> None:
    made = copy.deepcopy(greedy)
    AUDIT_FORGERIES[name](made)
    assert failures({**made, "digest": receipt.digest(made)})


def test_near_ties_of_engines_that_are_not_known_to_be_right_are_no_near_ties() -> None:
    assert failures(samples.greedy_receipt(differs_at=1)) == ["verdict"]
    made = samples.greedy_receipt(differs_at=1, held={**GREEDY_AUDITS, "reference": COARSE})
    assert failures(made) == ["structure", "verdict", "audit of the reference"]
    assert "near_tie is True, tokens, logits and audits say otherwise" in detail(made, "structure")


GREEDY_FORGERIES: dict[str, tuple[Any, ...]] = {
    "token": ("results", "prompts", 0, "steps", 1, "candidate_token", 98),
    "both tokens": ("results", "prompts", 0, "steps", 1, "reference_token", 98),
    "step": ("results", "prompts", 0, "steps", 1, "step", 2),
    "forced": ("results", "prompts", 0, "steps", 1, "forced", True),
    "margin": ("results", "prompts", 0, "steps", 1, "candidate_margin", 0.6),
    "tap": ("results", "prompts", 0, "steps", 1, "logits", "tap", "result_norm"),
    "elements": ("results", "prompts", 0, "steps", 1, "logits", "n_elements", 299),
    "sequence": ("results", "prompts", 0, "candidate_tokens", [50, 51, 53]),
    "matches": ("results", "prompts", 0, "free_running_matches", 2),
    "agreement": ("results", "prompts", 0, "teacher_forced_agreement", 0.5),
    "divergence": ("results", "prompts", 0, "first_divergence", 1),
    "required": ("results", "prompts", 0, "steps_required", 2),
    "asked for": ("settings", "n_steps", 2),
    "prompt": ("results", "prompts", 0, "prompt_ids", [1, 2]),
    "text": ("prompt", "text", "What is 3+3?"),
    "rate": ("parity", "exact_match_rate", 0.9),
    "counted": ("coverage", "compared", 5),
    "no prompts": ("results", "prompts", []),
    "no steps": ("results", "prompts", 1, "steps", []),
}


@pytest.mark.parametrize("name", GREEDY_FORGERIES)
def test_a_forged_greedy_field_contradicts_the_others(name: str, greedy: Receipt) -> None:
    found = failures(samples.forge(greedy, *GREEDY_FORGERIES[name]))
    assert found
    assert "digest" not in found


def test_the_complaint_names_expected_and_actual(inexact: Receipt) -> None:
    made = samples.forge(inexact, "parity", "exact_match_rate", 1.0)
    (check,) = [check for check in registry.judge(made) if check.name == "summary"]
    assert "parity.exact_match_rate is 1.0, the rows say 0.95" in check.detail


def test_the_gate_agrees_with_decide(inexact: Receipt) -> None:
    result = layers_receipt.from_json(inexact).result
    assert compare.decide(result.rows, result.coverage) == inexact["verdict"] == "parity"
