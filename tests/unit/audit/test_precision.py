"""16-bit engines: healthy ones are no defect, found out as such; wrong ones are found where they are wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.audit import overflow, precision, summary
from crossval.audit.audit import audit
from crossval.audit.bounds import Arithmetic
from crossval.audit.checks import AuditResult
from crossval.audit.precision import MIN_TAPS, Precision, Survey
from crossval.capture import Capture
from crossval.diagnose import repro
from crossval.diagnose.findings import find
from crossval.formats import BF16, F16, FORMATS
from crossval.model import taps
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics, PassPlan, Runner, TapArray
from crossval.receipts.party import compute_dtypes
from tests.support.extra import sampled
from tests.support.narrow_engine import Mistake, NarrowEngine, Style, of_file, plans
from tests.support.wrapped import Wrapped

PLANS = plans((1019, 273, 271, 220, 17, 10, 17, 30), (220, 19))
SHORT = plans((1019, 273, 271), (220,))
"""For segments: whether flips explain one is searched token by token."""
NARROW = [
    Style("bf16"),
    Style("bf16", scale="narrow"),
    Style("bf16", scale="fake", norm="narrow"),
    Style("bf16", scale="narrow", norm="narrow"),
    Style("f16"),
    Style("f16", scale="narrow"),
    Style("f16", scale="fake"),
]
"""Binary16 with every step of a norm in it overflows on this model: that is a test of its own."""
MISTAKES = {
    "ffn_sub_norm skipped": ("blk.2.ffn_sub_norm", "norm skipped"),
    "attn_norm skipped": ("blk.2.attn_norm", "norm skipped"),
    "ffn_norm of another": ("blk.2.ffn_norm", None),
    "kq scale": ("blk.2.kq_soft_max", None),
    "SiLU": ("blk.2.ffn_act", "SiLU"),
    "128 levels": ("blk.2.q", None),
    "truncation ffn_gate": ("blk.2.ffn_gate", None),
}


def examined(model: Path, style: Style, mistake: Mistake | None = None) -> AuditResult:
    return audited(NarrowEngine(model, style, mistake), SpecWeights(model))


def audited(engine: Runner, weights: SpecWeights, passes: Sequence[PassPlan] = PLANS) -> AuditResult:
    return audit([Capture(engine, weights.config, passes)], weights)[0]


def wrong_tap(result: AuditResult) -> str:
    assert result.first_guilty is not None
    return result.first_guilty.tap


def precision_of(result: AuditResult) -> Precision:
    assert result.precision is not None
    return result.precision


def names(style: Style) -> str:
    return "-".join(str(part) for part in (style.compute, style.kv, style.scale, style.norm) if part)


@pytest.mark.parametrize(("style", "states"), sampled(product(NARROW, (False, True)), 3, lambda case: case[:1]))
def test_a_healthy_engine_is_clean_and_its_precision_is_a_finding_of_its_own(shipped_model, style, states):
    result = examined(shipped_model, replace(style, states=states))
    assert result.verdict == "clean"
    found = precision_of(result)
    assert (found.dtype, found.scope, found.declared) == (style.compute, "all", states)
    assert found.n_in_format == found.n_taps > 200
    assert found.unit_roundoff == FORMATS[style.compute].unit_roundoff


WRONG: list[tuple[Style, Mistake | None, str]] = [
    *((s, Mistake(name), MISTAKES[name][0]) for s in NARROW if s.scale != "fake" for name in MISTAKES),
    # a stated format of the cache hides nothing, one that is not stated is a bug
    *(
        (Style("f32", kv=kv, states=True), Mistake(name), MISTAKES[name][0])
        for kv in ("bf16", "f16")
        for name in ("kq scale", "ffn_sub_norm skipped", "SiLU", "128 levels")
    ),
    (Style("f32", kv="bf16"), None, "blk.0.kq"),
    # in all layers: a wrong eps is found where inputs are small
    *((Style(compute), Mistake("attn_norm eps", layer=None), "blk.0.attn_norm") for compute in ("bf16", "f16")),
    (Style("bf16"), Mistake("SiLU", layer=None), "blk.0.ffn_act"),
]


@pytest.mark.parametrize(
    ("style", "mistake", "tap"), sampled(WRONG, 3, lambda case: (case[0], case[1] and case[1].name)), ids=str
)
def test_the_first_operation_outside_its_bound_is_found(shipped_model, style, mistake, tap):
    result = examined(shipped_model, style, mistake)
    assert (result.verdict, wrong_tap(result)) == ("guilty", tap)
    if style.compute == "f32":
        assert result.precision is None
    else:
        assert (precision_of(result).dtype, precision_of(result).scope) == (style.compute, "all")


@pytest.mark.parametrize("style", [Style("bf16"), Style("f16")], ids=names)
@pytest.mark.parametrize("name", ["ffn_sub_norm skipped", "SiLU"])
def test_the_cause_is_named_at_this_precision(shipped_model, style, name):
    engine, weights = NarrowEngine(shipped_model, style, Mistake(name)), SpecWeights(shipped_model)
    source = Capture(engine, weights.config, PLANS)
    (result,) = audit([source], weights)
    finding = find("candidate", source, result, weights)
    assert finding is not None
    assert finding.diagnosis.name == MISTAKES[name][1]
    assert finding.arithmetic.format.name == style.compute


@pytest.mark.parametrize("kv", ["bf16", "f16"])
@pytest.mark.parametrize("compute", ["f32", "bf16"])
def test_a_stated_format_of_the_cache_is_no_defect(shipped_model, compute, kv):
    result = examined(shipped_model, Style(compute, kv=kv, states=True))
    assert result.verdict == "clean"
    if compute == "f32":
        assert result.precision is None
        readings = {check.reading for check in result.checks if check.tap.endswith(".kq")}
        assert readings == {f"k in {kv.upper()}"}


def test_a_cache_stated_to_be_binary32_may_not_be_rounded(shipped_model):
    engine = NarrowEngine(shipped_model, Style("f32", kv="f16"))
    assert audited(engine, SpecWeights(shipped_model)).verdict == "clean"
    stated = Wrapped(engine, numerics=Numerics(kv_dtype="f32"))
    result = audited(stated, SpecWeights(shipped_model))
    assert wrong_tap(result) == "blk.0.kq"


DIGITS = ("attn_norm", "ffn_norm", "ffn_gate")


def more_digits(x: np.ndarray) -> np.ndarray:
    return x * np.float32(1 + 2**-20)


def test_a_tensor_with_more_digits_is_an_exception_that_is_named(shipped_model):
    engine, weights = NarrowEngine(shipped_model, Style("bf16")), SpecWeights(shipped_model)
    result = audited(Wrapped(engine, ops={"ffn_gate": more_digits}), weights)
    assert result.verdict == "clean"
    found = precision_of(result)
    assert (found.dtype, found.scope, found.declared) == ("bf16", "all", False)
    assert found.exceptions == tuple(f"blk.{layer}.ffn_gate" for layer in range(weights.config.n_layers))
    said = precision.sentence(found.to_json())
    assert "but for blk.0.ffn_gate, blk.1.ffn_gate" in said
    assert precision.of_json(found.to_json()) == found


def test_more_digits_in_more_than_a_tenth_of_the_tensors_rule_a_format_out(shipped_model):
    engine, weights = NarrowEngine(shipped_model, Style("bf16")), SpecWeights(shipped_model)
    result = audited(Wrapped(engine, ops=dict.fromkeys(DIGITS, more_digits)), weights)
    assert result.verdict == "guilty"
    found = precision_of(result)
    assert (found.scope, found.declared, found.exceptions) == ("some", False, ())
    assert not set(DIGITS) & set(found.ops)
    assert "l_out" in found.ops


def test_a_mistake_that_leaves_more_digits_is_found_in_an_engine_of_few(shipped_model):
    engine, weights = NarrowEngine(shipped_model, Style("bf16")), SpecWeights(shipped_model)
    wrong = Wrapped(engine, at={(0, "blk.2.ffn_norm"): lambda x: x * np.float32(1.1)})
    result = audited(wrong, weights)
    assert wrong_tap(result) == "blk.2.ffn_norm"
    found = precision_of(result)
    assert (found.scope, found.exceptions) == ("all", ("blk.2.ffn_norm",))


MIXED = Style("f32", ops=(("attn_norm", "f32"), ("bitlinear", "bf16"), ("rmsnorm", "f16")))


def test_formats_stated_by_operation_give_its_bounds(shipped_model):
    weights = SpecWeights(shipped_model)
    result = audited(NarrowEngine(shipped_model, replace(MIXED, states=True)), weights)
    assert result.verdict == "clean"
    found = precision_of(result)
    assert (found.dtype, found.scope, found.declared) == ("bf16", "mixed", True)
    assert "attn_norm" not in found.ops
    assert {"q", "ffn_down", "ffn_norm", "result_norm"} <= set(found.ops)
    unstated = audited(NarrowEngine(shipped_model, MIXED), weights)
    assert (unstated.verdict, wrong_tap(unstated)) == ("guilty", "blk.0.q")


@pytest.mark.parametrize(
    ("op", "error", "wrong"),
    [
        ("attn_norm", 2.0**-12, True),
        ("ffn_norm", 2.0**-14, False),
        ("ffn_norm", 2.0**-7, True),
        ("v", 2.0**-12, False),
    ],
)
def test_what_is_stated_for_one_operation_widens_no_other(shipped_model, op, error, wrong):
    engine = NarrowEngine(shipped_model, replace(MIXED, states=True))
    off = Wrapped(engine, at={(0, f"blk.1.{op}"): lambda x: x * np.float32(1 + error)})
    result = audited(off, SpecWeights(shipped_model))
    assert {c.tap for c in result.checks if c.wrong} >= ({f"blk.1.{op}"} if wrong else set())
    assert not any(c.tap == f"blk.1.{op}" and c.wrong for c in result.checks) or wrong


def test_a_statement_by_operation_that_the_record_contradicts_is_not_confirmed(shipped_model):
    stated = Wrapped(NarrowEngine(shipped_model, Style("f32")), numerics=replace(MIXED, states=True).numerics)
    found = precision_of(audited(stated, SpecWeights(shipped_model)))
    assert (found.scope, found.declared, found.n_in_format) == ("mixed", False, 0)


# --- stored in 16 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_tensors_stored_in_the_format_of_the_engine_lose_nothing(shipped_model, dtype, states):
    result = examined(shipped_model, Style(dtype, stored=dtype, states=states))
    assert (result.verdict, precision_of(result).scope) == ("clean", "all")


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_tensors_stored_in_fewer_digits_than_stated_are_no_defect(shipped_model, dtype):
    result = examined(shipped_model, Style("f32", stored=dtype, states=True))
    assert (result.verdict, result.precision) == ("incomplete", None)
    assert {
        check.tap.rpartition(".")[2] for check in result.checks if check.status == "unchecked"
    } == taps.BITLINEARS


def test_a_projection_stored_in_fewer_digits_is_judged_by_its_exact_input(shipped_model):
    engine, weights = NarrowEngine(shipped_model, Style("f32")), SpecWeights(shipped_model)
    stored = Stored(engine, "blk.1.q", "f16")
    result = audited(stored, weights)
    assert result.verdict == "clean"
    assert any(c.wrong and c.tap == "blk.1.q" for c in audited(Stored(engine, "blk.1.q", "f32"), weights).checks)


class Stored(Wrapped):
    """Rounds one tensor to binary16 when it is recorded, and says that it is stored in ``dtype``."""

    def __init__(self, engine: Runner, name: str, dtype: Any) -> None:
        super().__init__(engine, at={(i, name): F16.round for i in range(len(PLANS))})
        self._name, self._dtype = name, dtype

    def eval(self, token_ids, select):
        record = super().eval(token_ids, select)
        given = {n: replace(tap, dtype=self._dtype) if n == self._name else tap for n, tap in record.taps.items()}
        return replace(record, taps=given)


def test_a_norm_skipped_in_one_layer_is_found_though_all_is_stored_in_few_digits(shipped_model):
    """The engine of issue 16: binary32, every tensor rounded to F16 when it is recorded."""
    for states in (False, True):
        style = Style("f32", stored="f16", states=states)
        result = examined(shipped_model, style, Mistake("attn_norm skipped"))
        assert wrong_tap(result) == "blk.2.attn_norm"
        assert {c.tap for c in result.checks if c.wrong} == {"blk.2.attn_norm"}


def test_rounding_in_one_kind_of_tensor_is_a_defect_and_is_described(shipped_model):
    engine = NarrowEngine(shipped_model, Style("f32"))
    rounding = Wrapped(engine, ops={"k_rope": BF16.round, "v": BF16.round})
    result = audited(rounding, SpecWeights(shipped_model))
    assert wrong_tap(result) == "blk.0.v"
    found = precision_of(result)
    assert (found.ops, found.unit_roundoff) == (("v", "k_rope"), 2.0**-24)
    assert "v, k_rope hold values of bfloat16 only" in precision.sentence(found.to_json())


def test_keys_and_values_recorded_in_the_stated_format_of_the_cache_are_right(shipped_model):
    engine = NarrowEngine(shipped_model, Style("f32", kv="bf16"))
    rounding = Wrapped(engine, ops={"k_rope": BF16.round, "v": BF16.round}, numerics=Numerics(kv_dtype="bf16"))
    assert audited(rounding, SpecWeights(shipped_model)).verdict == "clean"


def test_a_statement_that_the_record_contradicts_is_not_confirmed(shipped_model):
    exact = Wrapped(NarrowEngine(shipped_model, Style("f32")), numerics=Numerics(compute_dtype="bf16"))
    found = precision_of(audited(exact, SpecWeights(shipped_model)))
    assert not found.declared
    assert found.n_in_format == 0 < found.n_taps
    assert "states that it computes in bfloat16, but only 0 of" in precision.sentence(found.to_json())
    other = Wrapped(NarrowEngine(shipped_model, Style("f16")), numerics=Numerics(compute_dtype="bf16"))
    found = precision_of(audited(other, SpecWeights(shipped_model)))
    assert (found.dtype, found.declared) == ("f16", False)


# --- coarse traces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "name"),
    sampled(
        [
            *(("bf16", name) for name in (None, "SiLU", "ffn_sub_norm skipped", "kq scale", "128 levels")),
            ("f16", None),
        ],
        3,
    ),
)
def test_a_coarse_trace_is_never_parity_and_a_healthy_one_no_defect(shipped_model, compute, name):
    engine = NarrowEngine(shipped_model, Style(compute), Mistake(name) if name else None)
    weights = SpecWeights(shipped_model)
    result = audited(Wrapped(engine, only=taps.of_model(weights.config.n_layers, outline=True)), weights, SHORT)
    found = precision_of(result)
    assert (found.dtype, found.scope) == (compute, "all")
    if name in ("SiLU", "ffn_sub_norm skipped"):
        assert wrong_tap(result) == "blk.2.l_out"
    else:
        assert result.verdict == "within"


# --- recorded in fewer digits than computed ---------------------------------------------------------------------


@pytest.mark.parametrize("form", [BF16, F16], ids=lambda form: form.name)
def test_a_record_with_fewer_digits_than_the_engine_leaves_its_codes_open(shipped_model, form):
    engine = NarrowEngine(shipped_model, Style("f32"))
    result = audited(Wrapped(engine, every=form.round), SpecWeights(shipped_model))
    assert result.verdict == "incomplete"
    found = precision_of(result)
    assert (found.dtype, found.scope) == (form.name, "recorded")
    left = {check.tap.rpartition(".")[2] for check in result.checks if check.status == "unchecked"}
    assert left == taps.BITLINEARS
    assert "record binary32" in precision.sentence(found.to_json())


@pytest.mark.parametrize(
    ("name", "form"),
    sampled(product(("ffn_sub_norm skipped", "SiLU", "kq scale", "ffn_norm of another"), (BF16, F16)), 3),
    ids=lambda value: getattr(value, "name", value),
)
def test_such_a_record_still_shows_a_mistake(shipped_model, form, name):
    engine = NarrowEngine(shipped_model, Style("f32"), Mistake(name))
    result = audited(Wrapped(engine, every=form.round), SpecWeights(shipped_model))
    assert precision_of(result).scope == "recorded"
    assert wrong_tap(result) == MISTAKES[name][0]


# --- overflow -------------------------------------------------------------------------------------------------


def with_norm_times(model: Path, name: str, factor: float, out: Path) -> Path:
    """Copy a model with one norm's weight multiplied."""
    file, data = of_file(model), bytearray(model.read_bytes())
    (n,), kind, offset = file.infos[name]
    assert kind == 0
    at = file.data + offset
    data[at : at + 4 * n] = (np.frombuffer(bytes(data[at : at + 4 * n]), "<f4") * np.float32(factor)).tobytes()
    out.write_bytes(bytes(data))
    return out


def test_overflow_of_binary16_is_the_finding(shipped_model, tmp_path):
    model = with_norm_times(shipped_model, "blk.1.ffn_norm.weight", 20, tmp_path / "large.gguf")
    assert examined(model, Style("f32")).verdict == "clean"
    assert examined(model, Style("bf16")).verdict == "clean"
    for states in (False, True):
        result = examined(model, Style("f16", states=states))
        first = result.first_guilty
        assert first is not None
        assert (first.tap, first.status) == ("blk.1.ffn_out", "invalid")
        assert "overflow of binary16 (F16), expected up to 5.24e+06" in (first.note or "")
        assert "the largest it holds is 65504" in (first.note or "")


def test_overflow_inside_a_norm_is_said(shipped_model):
    result = examined(shipped_model, Style("f16", norm="narrow"))
    first = result.first_guilty
    assert first is not None
    assert first.tap == "blk.0.ffn_sub_norm"
    assert "overflow of binary16 (F16) inside: at 6 of 8 tokens" in (first.note or "")
    skipped = examined(shipped_model, Style("f16", norm="narrow"), Mistake("ffn_sub_norm skipped", 0))
    assert skipped.first_guilty is not None
    assert "overflow" not in (skipped.first_guilty.note or "")


def test_subnormal_weights_of_a_norm_are_no_defect(shipped_model, tmp_path):
    model = with_norm_times(shipped_model, "blk.1.attn_norm.weight", 5e-6, tmp_path / "small.gguf")
    assert examined(model, Style("f16")).verdict == "clean"


def test_a_scale_too_large_for_binary16_explains_nothing(shipped_model, tmp_path):
    model = with_norm_times(shipped_model, "blk.1.attn_norm.weight", 3e-4, tmp_path / "small.gguf")
    assert examined(model, Style("f16")).verdict == "clean"
    engine, weights = NarrowEngine(model, Style("f16", scale="narrow")), SpecWeights(model)
    source = Capture(engine, weights.config, PLANS)
    (result,) = audit([source], weights)
    finding = find("candidate", source, result, weights)
    assert finding is not None
    assert finding.check.tap == "blk.1.q"
    assert "overflow of binary16 (F16) inside: at 8 of 8 tokens a scale" in (finding.check.note or "")
    assert not finding.diagnosis.determined  # all zeros, but not because they were never written
    assert finding.diagnosis.explanation == finding.check.note


def test_an_overflow_is_no_cause_of_what_is_wrong_elsewhere():
    """The first token's input is zero, and so, rightly, is its output; the second is wrong for another reason."""
    arithmetic = Arithmetic(Numerics(compute_dtype="f16"), 1)
    x, recorded = np.array([[0.0, 0.0], [1e-4, 0.0], [1.0, 2.0]], np.float32), np.zeros((3, 4), np.float32)
    recorded[2] = 1.0
    at = {rows: np.isin(np.arange(3), rows)[:, None] & np.ones(4, bool) for rows in ((), (1,), (2,), (1, 2))}
    said = {rows: overflow.of_scales(x, 1.0, recorded, wrong, arithmetic) for rows, wrong in at.items()}
    assert [rows for rows, why in said.items() if why] == [(1,)]
    assert "at 1 of 3 tokens a scale" in (said[(1,)] or "")


def test_infinities_where_nothing_is_too_large_are_no_overflow():
    recorded = np.array([[1.0, np.inf, 3.0]], np.float32)
    assert overflow.of_results(recorded, np.array([[1.0, 2.0, 3.0]])) is None
    assert overflow.of_results(recorded, np.array([[1.0, 7e4, 3.0]])) is not None
    assert "binary32" in (overflow.of_results(recorded, np.array([[1.0, 1e39, 3.0]])) or "")
    assert overflow.of_results(recorded, np.array([[1.0, 7e4]])) is None
    assert overflow.of_results(np.array([[np.nan]], np.float32), np.array([[7e4]])) is None


# --- the survey -----------------------------------------------------------------------------------------------


def taken(**arrays: np.ndarray) -> dict[str, TapArray]:
    return {f"blk.0.{name}": TapArray(array.astype(np.float32)) for name, array in arrays.items()}


def random(n: int = 200) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((1, n))


BF16_OF = {name: BF16.round(random()) for name in ("q", "k", "v")}


@pytest.mark.parametrize(
    ("arrays", "dtype"),
    [
        (BF16_OF, "bf16"),  # most values of bfloat16 are of binary16, too
        (dict(list(BF16_OF.items())[: MIN_TAPS - 1]), None),
        ({}, None),
        ({name: BF16.round(random(20)) for name in ("q", "k", "v")}, None),
        ({"q": np.zeros((1, 500)), "k": np.full((1, 500), 0.5), "v": np.full((1, 500), np.nan)}, None),
    ],
    ids=["enough", "few tensors", "none", "few values", "values that say nothing"],
)
def test_a_format_needs_evidence_unless_it_is_stated(arrays, dtype):
    survey = Survey()
    told = Survey(Numerics(compute_dtype="bf16"))
    for one in (survey, told):
        one.add({"inp_embd": TapArray(F16.round(random()).astype(np.float32)), **taken(**arrays)})
    found = survey.found()
    assert (found and found.dtype) == dtype
    stated = told.found()
    assert stated is not None
    assert stated.declared


def test_a_receipt_holds_the_finding_and_where_it_is_missing_nothing_is_said():
    found = Precision("f16", "all", False, 2.0**-11, 5, 5, 900)
    result = AuditResult("x", (), 0, 0, None, "incomplete", precision=found)
    assert summary.to_json(result)["precision"] == {
        name: value for name, value in {**vars(found), "ops": []}.items() if name != "exceptions"
    }
    assert "precision" not in summary.to_json(replace(result, precision=None))
    made = {
        "candidate": {"numerics": Numerics().to_json()},
        "reference": {"numerics": Numerics(compute_dtype="bf16").to_json()},
    }
    assert compute_dtypes(made) == {"f32", "bf16"}
    assert compute_dtypes({**made, "audit": {"candidate": summary.to_json(result)}}) == {"f16", "bf16"}


# --- the reproducer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "name"),
    sampled(
        [
            (Style("bf16"), "128 levels"),
            (Style("f16", norm="wide"), "truncation ffn_gate"),
            (Style("f16"), "kq scale"),
            (Style("f32", kv="bf16", states=True), "kq nudged"),
            (Style("f32", kv="f16", states=True), "kq nudged"),
        ],
        2,
    ),
    ids=lambda value: value if isinstance(value, str) else names(value),
)
def test_the_reproducer_judges_at_this_precision(shipped_model, tmp_path, style, name):
    engine, weights = NarrowEngine(shipped_model, style, Mistake(name)), SpecWeights(shipped_model)
    source = Capture(engine, weights.config, PLANS)
    (result,) = audit([source], weights)
    finding = find("candidate", source, result, weights)
    assert finding is not None
    assert finding.context is not None
    script = repro.write(finding, "narrow engine", tmp_path)

    def judged(*arguments: Path) -> int:
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, timeout=60).returncode

    assert judged() == 1
    given = np.load(tmp_path / "inputs.npz")
    right = right_values(finding, engine, given)
    np.save(tmp_path / "right.npy", right.astype(np.float32))
    assert judged(tmp_path / "right.npy") == 0
    np.save(tmp_path / "wrong.npy", (right * 1.1 + 0.01).astype(np.float32))
    assert judged(tmp_path / "wrong.npy") == 1


def right_values(finding: Any, engine: NarrowEngine, given: Any) -> np.ndarray:
    """What the engine computes from the same inputs without its mistake."""
    engine.mistake = None
    layer, op = 2, finding.context.op.name
    if op == "kq_soft_max":
        scores = engine.round(given["scores"])
        hidden = np.arange(scores.shape[-1]) > finding.check.worst.token
        scaled = np.where(hidden, -np.inf, scores / np.float32(np.sqrt(engine.head_dim)))
        shown = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        return engine.round(shown / shown.sum(axis=-1, keepdims=True))
    if op == "kq":
        keys = engine.stored(given["k"])[:, np.arange(engine.n_heads) // (engine.n_heads // engine.n_kv_heads)]
        return engine.round(np.einsum("qhd,khd->hqk", given["q"], keys))
    tensor = {"q": "attn_q", "ffn_gate": "ffn_gate"}[op]
    return engine._linear(layer, tensor, given["x"])[:, given["features"]]
