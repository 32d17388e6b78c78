"""Receipts to test with, made from real arrays by the real comparison; no engine runs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_py.bench import READ_BUFFER_BYTES, READ_PASSES
from crossval import schema
from crossval.audit import summary
from crossval.audit.checks import AuditResult, OpCheck, Worst, decide, first_guilty
from crossval.bench.figures import BenchFindings, Further, Pair, Taken
from crossval.bench.measures import MEASURES, TRIED, Work
from crossval.bench.receipt import BENCH, ternary_bytes
from crossval.bench.search import Search, Setting, Tried
from crossval.causal import receipt as causal_receipt
from crossval.causal import view as causal
from crossval.causal.view import CausalView, LayerEffect
from crossval.compare import rows as compare
from crossval.compare.rows import Coverage, GreedyPrompt, GreedyResult, GreedyStep, LayersResult, Skip, TapRow
from crossval.examine.greedy_receipt import GREEDY, GreedyExamined
from crossval.examine.greedy_verdict import PromptAudit
from crossval.examine.layers_receipt import LAYERS, Examined
from crossval.model import taps, tolerance
from crossval.passes import EngineIdentity, Numerics, PassPlan, TapArray
from crossval.receipts import file as receipt
from crossval.receipts.kind import RunFacts
from crossval.receipts.kind import build as write
from crossval.receipts.party import Compute, Party
from crossval.repeat import floors_receipt
from crossval.repeat.floors import CAPTURE, PREFILL_DECODE, Floor, FloorTable
from crossval.repeat.floors_receipt import VARIATIONS
from crossval.repeat.metamorphic.cases import MetamorphicOptions, required
from crossval.repeat.metamorphic.notebook import MetamorphicCheck, MetamorphicResult, check_status
from crossval.repeat.metamorphic.receipt import METAMORPHIC, MetamorphicFindings
from crossval.repeat.metamorphic.scope import Form, n_values
from crossval.score.receipt import SCORE
from crossval.score.run import FirstDifference, Scored, ScoredToken, ScoreResult, Text
from crossval.selftest import catalogue
from crossval.selftest.receipt import SELFTEST, Found, Row, SelftestResult
from crossval.smoke.answers import Answer, MinCorrect, SmokeResult
from crossval.smoke.receipt import SMOKE
from crossval.smoke.suite import SmokePrompt, digest_of
from crossval.terms import SIDES, Side
from crossval.tokens import compare as tokens
from crossval.tokens.receipt import TOKENS
from crossval.traces import read as trace

SHAPE: dict[str, Any] = {
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 64,
    "dim": 128,
    "hidden_dim": 256,
    "vocab_size": 300,
    "context_length": 512,
    "rope_base": 10000.0,
    "rms_eps": 1e-5,
}
MODEL: dict[str, Any] = {
    "sha256": "ab" * 32,
    "file_name": "tiny.gguf",
    "size_bytes": 123456,
    "architecture": "bitnet-b1.58",
    "quantization": "I2_S",
    "separate_output": False,
    "shape": SHAPE,
}
TOKENIZER = {"model": "gpt2", "pre": "llama-bpe", "vocab_size": 300, "digest": "cd" * 32, "engines_agree": True}
NUMERICS = Numerics(simd_width=8, fused_quantizer=False)
OURS = EngineIdentity("bitnet_py", version="0.1.0", library_digest="1" * 64, numerics=NUMERICS)
THEIRS = EngineIdentity(
    "bitnet.cpp", source_commit="01eb4157", library_digest="2" * 64, compiler="clang", numerics=NUMERICS
)
KERNELS = (
    {"name": "i2s_gemv_avx2", "calls": 28, "bytes": 4096},
    {"name": "f16_dot_avx2", "calls": 4, "bytes": 99},
)
PLAN = (PassPlan("prefill", (1, 17, 42), 0), PassPlan("decode", (7,), 3), PassPlan("decode", (9,), 4))
GREEDY_PLAN = (PassPlan("prefill", (1, 17, 42), 0), PassPlan("decode", (50,), 3))
"""The audited passes of a greedy comparison: the first prompt, and the token both chose after it."""
TRACE_MODEL = trace.TraceModel(sha256=MODEL["sha256"], **{k: SHAPE[k] for k in list(SHAPE)[:7]})
_SEED = 20240


def with_numerics(identity: EngineIdentity, numerics: Numerics) -> EngineIdentity:
    """The same engine, stating another arithmetic."""
    return dataclasses.replace(identity, numerics=numerics)


def context(**changes: Any) -> RunFacts:
    base: dict[str, Any] = {
        "model": MODEL,
        "tokenizer": TOKENIZER,
        "text": "What is 2+2?",
        "template": "raw",
        "token_ids": PLAN[0].token_ids,
        "candidate": Party("live", OURS),
        "reference": Party("live", THEIRS),
        "compute": Compute("real", False, KERNELS),
        "settings": {"n_threads": 2, "n_decode": 2, "n_steps": None, "full": False},
        "notes": (),
    }
    return RunFacts(**{**base, **changes})


def array(name: str, plan: PassPlan) -> np.ndarray[Any, np.dtype[np.float32]]:
    shape = trace.expected_shape(name, TRACE_MODEL, plan, None)
    seed = (_SEED, taps.execution_index(name, SHAPE["n_layers"]), plan.start)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def row(name: str, index: int, plan: PassPlan, relative_error: float = 0.0, policy: str = "same") -> TapRow:
    """One tap with every second element moved by ``relative_error`` of itself."""
    ours = array(name, plan)
    theirs = ours.copy()
    ours.reshape(-1)[::2] *= np.float32(1 + relative_error)
    held = tolerance.tolerance_for(name, SHAPE["n_layers"], policy)  # type: ignore[arg-type]
    found = compare.compare_tap(name, index, plan, TapArray(ours), TapArray(theirs), held)
    assert isinstance(found, TapRow)
    return found


def layers_result(
    errors: dict[tuple[int, str], float] | None = None,
    skipped: tuple[Skip, ...] = (),
    mode: str = "outline",
    policy: str = "same",
    plan: tuple[PassPlan, ...] = PLAN,
) -> LayersResult:
    """Compare every outline tap (``full``: every tap); ``errors``: (pass, tap) -> relative error."""
    whole = taps.of_model(2)
    names = taps.of_model(2, outline=True) if mode == "outline" else whole
    left_out = {(skip.pass_index, skip.tap) for skip in skipped}
    extra = {key for key in errors or {} if key[1] not in names}
    rows = sorted(
        (
            row(name, index, one, (errors or {}).get((index, name), 0.0), policy)
            for index, one in enumerate(plan)
            for name in [*names, *(tap for at, tap in extra if at == index)]
            if (index, name) not in left_out
        ),
        key=compare.execution_key,
    )
    coverage = Coverage(len(rows) + len(skipped), len(rows), skipped)
    return LayersResult(
        rows=tuple(rows),
        coverage=coverage,
        plan=plan,
        thresholds=tolerance.describe(policy),  # type: ignore[arg-type]
        n_layers=2,
        mode=mode,  # type: ignore[arg-type]
    )


def greedy_result(
    n_steps: int = 3,
    differs_at: int | None = None,
    n_prompts: int = 2,
    inexact_at: int | None = None,
    policy: tolerance.PolicyName = "same",
    audited: tuple[PassPlan, ...] = GREEDY_PLAN,
    where: int = 0,
) -> GreedyResult:
    """Compare ``n_prompts``; the first, or number ``where``, differs in one token, or in the bits of one step."""
    prompts = tuple(
        _greedy_prompt(index, n_steps, *((differs_at, inexact_at) if index == where else (None, None)), policy)
        for index in range(n_prompts)
    )
    return GreedyResult(prompts, tolerance.describe(policy), audited=audited)


def _greedy_prompt(
    index: int, n_steps: int, differs_at: int | None, inexact_at: int | None, policy: tolerance.PolicyName
) -> GreedyPrompt:
    reference = tuple(50 + index * 10 + step for step in range(n_steps))
    own = tuple(99 if step == differs_at else token for step, token in enumerate(reference))
    steps = tuple(
        GreedyStep(
            step=step,
            candidate_token=own[step],
            reference_token=reference[step],
            forced=differs_at is not None and step > differs_at,
            logits=_logits(step, reference, 0.001 if step in (differs_at, inexact_at) else 0.0, policy),
            candidate_margin=0.5,
            reference_margin=0.5,
            near_tie=True if step == differs_at else None,
            explanation="close" if step == differs_at else None,
        )
        for step in range(n_steps)
    )
    return GreedyPrompt(
        prompt_ids=(1, 17, 42 + index),
        steps_required=n_steps,
        steps=steps,
        candidate_tokens=own,
        reference_tokens=reference,
        free_running_matches=n_steps - (differs_at is not None),
        first_divergence=differs_at,
        teacher_forced_agreement=(n_steps - (differs_at is not None)) / n_steps,
        text="What is 2+2?" if index == 0 else None,
    )


def _logits(step: int, reference: tuple[int, ...], relative_error: float, policy: tolerance.PolicyName) -> TapRow:
    """Compare the logits of one step: of the prompt's last token, then of each decoded one."""
    plan = PassPlan("decode", (reference[step - 1],), 2 + step) if step else PassPlan("prefill", (1, 17, 42), 0)
    found = row("result_output", step, PassPlan("decode", (0,), 2 + step), relative_error, policy)
    return dataclasses.replace(found, pass_kind=plan.kind)


READINGS = {"kq": "q and k in F16", "kqv_out": "v in F16", "result_output": "no F16"}


def audit_check(tap: str, index: int, one: PassPlan, ratio: float | None, n_ops: int = 1) -> OpCheck:
    """A check whose worst element is ``ratio`` of its bound (None: a bound of zero) from what was expected."""
    name = taps.parse(tap).tap
    rows = (len(one.token_ids) - 1,) if tap in taps.HEAD_TAPS else None
    shape = trace.expected_shape(tap, TRACE_MODEL, one, rows)
    per_token = [n for axis, n in enumerate(shape) if axis != taps.token_axis(tap)]
    expected, bound = 1.5, 0.0 if name == "inp_embd" else 2.0**-20
    recorded = float(np.float32(expected + (ratio or 0.0) * bound + (ratio is None)))
    found = abs(recorded - expected)
    true_ratio = 0.0 if found == 0 else None if bound == 0 else found / bound
    single = len(one.token_ids) == 1
    reading = (
        {**READINGS, "kqv_out": "weights and v in F16", "result_output": "input in F16"} if single else READINGS
    )
    return OpCheck(
        pass_index=index,
        pass_kind=one.kind,
        tap=tap,
        status="ok" if true_ratio is not None and true_ratio <= 1 else "guilty",
        ratio=true_ratio,
        n_elements=int(np.prod(shape)),
        n_beyond=0 if true_ratio is not None and true_ratio <= 1 else 2,
        n_ops=n_ops,
        flips=1 if tap == "blk.0.v" else 0,
        worst=Worst(one.positions[-1], tuple(n - 1 for n in per_token), recorded, expected, bound),
        reading=reading.get(name) if n_ops == 1 else None,
        note="segment: relative L2 per token" if n_ops > 1 else None,
    )


def audit_result(
    guilty: dict[tuple[int, str], float | None] | None = None,
    names: Sequence[str] | None = None,
    plan: tuple[PassPlan, ...] = PLAN,
) -> AuditResult:
    """An audit of these taps (all), with segments in between; ``guilty``: (pass, tap) -> times its bound."""
    every = taps.of_model(2)
    names = names or every
    checks = []
    for index, one in enumerate(plan):
        for at, tap in enumerate(names):
            before = every.index(names[at - 1]) if at else -1
            ratio = (guilty or {}).get((index, tap), 0.0 if tap == "inp_embd" else 0.25 + 0.125 * index)
            checks.append(audit_check(tap, index, one, ratio, every.index(tap) - before))
    n_ops = len(every) * len(plan)
    first = first_guilty(checks)
    return AuditResult("engine", tuple(checks), n_ops, n_ops, first, decide(checks, n_ops, n_ops))


def diagnosis_of(side: Side, audit: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A diagnosis of the first wrong operation of an audit."""
    found = audit["first_guilty"]
    place = {name: found[name] for name in ("tap", "layer", "op", "pass_index", "pass_kind")}
    cause = {"name": "skipped", "family": "norms", "explanation": "The norm is skipped."}
    numbers = {"ratio": 1e-8, "runner_up": "doubled", "runner_up_ratio": 0.5, "specification_ratio": 0.25}
    return {
        "party": side,
        **place,
        **cause,
        **numbers,
        "candidates": [cause],
        "command": "crossval layers --prompt 'What is 2+2?' --repro repro",
        **({"segment_ops": [found["tap"]]} if found["n_ops"] > 1 else {}),
        **changes,
    }


def audits(
    candidate: AuditResult | None = None, reference: AuditResult | None = None, plan: tuple[PassPlan, ...] = PLAN
) -> dict[Side, dict[str, Any]]:
    """Both audits as a receipt holds them: clean and complete, unless others are given."""
    whole = audit_result(plan=plan)
    return {"candidate": summary.to_json(candidate or whole), "reference": summary.to_json(reference or whole)}


def build(
    result: LayersResult,
    facts: RunFacts | None = None,
    held: dict[Side, dict[str, Any]] | None = None,
    views: dict[str, Any] | None = None,
) -> receipt.Receipt:
    """A ``layers`` receipt with audits of the result's passes, and a diagnosis of each wrong one."""
    held = held or audits(plan=result.plan)
    found = [diagnosis_of(side, audit) for side, audit in held.items() if audit and audit["first_guilty"]]
    facts = facts or context()
    if views:
        facts = dataclasses.replace(facts, settings={**facts.settings, **dict.fromkeys(views, True)})
    return write(LAYERS, Examined(result, held, found, views or {}), facts)


def floor_table(unmeasured: Sequence[tuple[str, str]] = (), n_tokens: int = len(PLAN[0].token_ids)) -> FloorTable:
    """Floors of the reference on the prompt: token by token differs a little, threads change nothing."""
    plan = PassPlan("prefill", tuple(range(n_tokens)), 0)
    found, left = [], []
    for tap in taps.of_model(SHAPE["n_layers"]):
        head = tap in taps.HEAD_TAPS
        n_elements = int(np.prod(trace.expected_shape(tap, TRACE_MODEL, plan, (n_tokens - 1,) if head else None)))
        if tap.endswith(".kq"):
            n_elements = SHAPE["n_heads"] * n_tokens * (n_tokens + 1) // 2
        exact = tap in ("inp_embd", "blk.0.attn_norm", "blk.0.q")
        for variation in sorted([*VARIATIONS, *([CAPTURE] if tap == "result_output" else [])]):
            differs = variation == PREFILL_DECODE and not exact
            numbers = (1e-5, 1e-5 if head else 2e-5, n_elements, 7) if differs else (0.0, 0.0, n_elements, 0)
            if (tap, variation) in unmeasured:
                left.append((tap, variation, "the engine did not give it"))
            else:
                found.append(Floor(tap, variation, *numbers))
    return FloorTable(THEIRS.name, SHAPE["n_layers"], (n_tokens,), tuple(found), tuple(left))


def floors_of(result: LayersResult, table: FloorTable | None = None) -> dict[str, Any]:
    """The receipt's ``floors``."""
    return floors_receipt.to_json(table or floor_table(), result.rows)


def causal_of(
    baseline: float,
    kls: Sequence[float],
    noise: float = 1e-4,
    own: Sequence[tuple[float, float]] = ((0.3, 1e-5), (0.3, 1e-5), (1e-5, 1e-5)),
) -> dict[str, Any]:
    """The receipt's ``causal``: the KL left after the embedding and each of the two layers; 0: equal states."""
    names = ["inp_embd", "blk.0.l_out", "blk.1.l_out"][-len(kls) :]
    effects = tuple(
        LayerEffect(tap, taps.parse(tap).layer, kl, *share, *own[-len(kls) :][i], kl == 0.0)
        for i, (tap, kl, share) in enumerate(zip(names, kls, causal.shares(baseline, kls), strict=True))
    )
    return causal_receipt.to_json(
        CausalView(
            baseline_kl=baseline,
            effects=effects,
            nothing_recovered_from=causal.nothing_recovered_from(effects),
            largest=causal.largest(effects),
            noise_kl=noise,
            reliable=causal.is_reliable(baseline, noise, effects),
            not_patched=(),
        )
    )


def layers_receipt(
    errors: dict[tuple[int, str], float] | None = None,
    held: dict[Side, dict[str, Any]] | None = None,
    **changes: Any,
) -> receipt.Receipt:
    return build(layers_result(errors), context(**changes), held)


def greedy_receipt(
    differs_at: int | None = None,
    inexact_at: int | None = None,
    policy: tolerance.PolicyName = "same",
    held: dict[Side, dict[str, Any] | None] | None = None,
    **changes: Any,
) -> receipt.Receipt:
    """A greedy receipt with both audits, ``held`` in their place: a missing side was not audited.

    ``policy`` independent: the candidate does not say how it rounds.
    """
    settings = {"n_threads": 2, "n_decode": None, "n_steps": 3, "full": None}
    if policy == "independent":
        changes = {"candidate": Party("live", dataclasses.replace(OURS, numerics=Numerics())), **changes}
    held = {**audits(plan=GREEDY_PLAN)} if held is None else held
    audited = GREEDY_PLAN if any(held.values()) else ()
    result = greedy_result(3, differs_at, inexact_at=inexact_at, policy=policy, audited=audited)
    found = [diagnosis_of(side, audit) for side, audit in held.items() if audit and audit["first_guilty"]]
    facts = context(settings=settings, **changes)
    names = (facts.candidate.identity.name, facts.reference.identity.name)
    return write(GREEDY, GreedyExamined(result, held, found, names), facts)


LATER_PLAN = (PassPlan("prefill", (1, 17, 43), 0), PassPlan("decode", (60,), 3))
"""The same of the second prompt, where tokens differ beside the specification."""


def later_receipt(held: dict[Side, dict[str, Any]] | None = None, differs_at: int = 1) -> receipt.Receipt:
    """A greedy receipt beside the specification; only the second prompt differs, whose audits are ``held``."""
    held = audits(plan=LATER_PLAN) if held is None else held
    wrong = any(audit["first_guilty"] for audit in held.values())
    result = greedy_result(3, differs_at, policy="independent", where=1)
    if wrong:
        steps = tuple(
            step if step.near_tie is None else dataclasses.replace(step, near_tie=False)
            for step in result.prompts[1].steps
        )
        result = dataclasses.replace(
            result, prompts=(result.prompts[0], dataclasses.replace(result.prompts[1], steps=steps))
        )
    found = [diagnosis_of(side, audit) for side, audit in held.items() if audit["first_guilty"]]
    parties = (
        Party("live", dataclasses.replace(OURS, numerics=Numerics())),
        Party("live", dataclasses.replace(THEIRS, name="specification")),
    )
    examined = GreedyExamined(
        result,
        audits(plan=GREEDY_PLAN),
        [],
        (OURS.name, "specification"),
        (PromptAudit(1, LATER_PLAN, held, found),),
    )
    settings = {"n_threads": 2, "n_decode": None, "n_steps": 3, "full": None}
    return write(GREEDY, examined, context(settings=settings, candidate=parties[0], reference=parties[1]))


def coarse_audit(within: float = 0.125) -> dict[str, Any]:
    """An audit of the logits alone: one segment, in which flips may explain what differs."""
    found = summary.to_json(audit_result(names=["result_output"], plan=GREEDY_PLAN))
    (only,) = found["rows"]
    return {**found, "rows": [{**only, "within": within, "n_within": 1, "status": "within"}], "verdict": "within"}


def unaudited(made: receipt.Receipt, verdict: str) -> receipt.Receipt:
    """Return the receipt as it was written before greedy comparisons were audited."""
    results = {name: value for name, value in made["results"].items() if name != "passes"}
    old = {**made, "audit": None, "diagnosis": None, "results": results, "verdict": verdict}
    old["digest"] = receipt.digest(old)
    schema.validate(old)
    return old


QUESTIONS = (
    SmokePrompt("sum-1", "sum", True, "What is 2+2?", answer="4."),
    SmokePrompt("sum-2", "sum", False, "What is 5+6?", answer="11."),
    SmokePrompt("paris", "capital", None, "What is the capital of France?", pattern="Par[i]s", stop="newline"),
    SmokePrompt("hot", "opposite", False, "What is the opposite of hot?", answer="cold."),
)
EOS, BOS = 299, 298


def smoke_answer(index: int, side: Side = "candidate", **changes: Any) -> Answer:
    """The correct answer to one of ``QUESTIONS``, unless changed."""
    given: dict[str, Any] = (
        {"token_ids": (60, 61, EOS), "finish": "stop", "text": " 4."},
        {"token_ids": (62, 63, 61, EOS), "finish": "stop", "text": " 11."},
        {"token_ids": (70, 71, 72), "finish": "newline", "text": "It is Paris."},
        {"token_ids": (80, 61, EOS), "finish": "stop", "text": " cold."},
    )[index]
    base = {"prompt": QUESTIONS[index], "side": side, "prompt_ids": (BOS, 10 + index, 20), **given}
    return Answer(**{**base, **changes})


def smoke_result(
    *replaced: Answer,
    sides: tuple[Side, ...] = SIDES,
    min_correct: MinCorrect | None = None,
) -> SmokeResult:
    """Every question answered correctly by every engine, except for ``replaced``."""
    other = {(answer.prompt.id, answer.side): answer for answer in replaced}
    answers = tuple(
        other.get((QUESTIONS[index].id, side), smoke_answer(index, side))
        for index in range(len(QUESTIONS))
        for side in sides
    )
    return SmokeResult(
        suite="questions.jsonl",
        suite_digest=digest_of(QUESTIONS),
        n_prompts=len(QUESTIONS),
        sides=sides,
        answers=answers,
        min_correct=min_correct or MinCorrect(),
        stop_ids=(EOS,),
        special_ids=(BOS, EOS),
    )


def smoke_receipt(*replaced: Answer, **changes: Any) -> receipt.Receipt:
    """A receipt of both engines; pass ``result`` for another one."""
    result = changes.pop("result", None) or smoke_result(*replaced)
    facts: dict[str, Any] = {
        "settings": {"n_threads": None, "n_decode": None, "n_steps": 24, "full": None},
        "token_ids": result.answers[0].prompt_ids,
    }
    return write(SMOKE, result, context(**{**facts, **changes}))


def one_sided(side: Side) -> receipt.Receipt:
    """A smoke receipt for which only one engine was asked."""
    unused = {"candidate": Party("unused", OURS), "reference": Party("unused", THEIRS)}
    changes: dict[str, Any] = {name: party for name, party in unused.items() if name != side}
    if side == "reference":
        changes["compute"] = Compute("none")
    agree = {**TOKENIZER, "engines_agree": None}
    return smoke_receipt(result=smoke_result(sides=(side,)), tokenizer=agree, **changes)


def tokens_receipt() -> receipt.Receipt:
    """Two tokenizers that read all lines of a file alike, but one that both refuse."""
    side = dict.fromkeys(SIDES, 0)
    rows = tuple(
        tokens.Row(
            mode=mode, category=category, n_texts=3, n_equal=3 - n_refused, n_different=0, n_refused=n_refused,
            n_refused_by=side, n_tokens=20, digests=dict.fromkeys(SIDES, sha * 64), n_lost=side,
        )
        for mode in tokens.MODES
        for category, n_refused, sha in (("a", 0, "a"), ("b", 1, "b"))
    )  # fmt: skip
    result = tokens.TokensResult(
        "lines.txt", "5" * 64, 6, rows, SHAPE["vocab_size"], SHAPE["vocab_size"], None, dict.fromkeys(SIDES, 0.25)
    )
    facts = context(
        text=None, template=None, token_ids=(), compute=Compute("none"),
        settings=dict.fromkeys(("n_threads", "n_decode", "n_steps", "full")),
    )  # fmt: skip
    return write(TOKENS, result, facts)


def selftest_receipt() -> receipt.Receipt:
    """A self-test in which every fault was located correctly."""
    rows = []
    for case in catalogue.cases(SHAPE):
        right = case.expected
        audits = {side: "guilty" if case.side == side else "clean" for side in SIDES}
        found = Found(
            "divergence" if case.side else "parity", audits["candidate"], audits["reference"], right.verdict,
            right.layer, right.op, right.pass_kind, right.names[0] if right.names else None,
        )  # fmt: skip
        rows.append(Row(case, found))
    facts = context(
        tokenizer={**TOKENIZER, "engines_agree": None},
        text=None, template=None, reference=Party("unused", THEIRS),
        token_ids=tuple(range(catalogue.prompt_length(SHAPE))),
        settings={"n_threads": None, "n_decode": catalogue.N_DECODE, "n_steps": None, "full": None},
    )  # fmt: skip
    return write(SELFTEST, SelftestResult(tuple(rows), SHAPE), facts)


def metamorphic_receipt() -> receipt.Receipt:
    """Both engines hold every relation; of the candidate one kernel more is checked."""
    options = MetamorphicOptions((1, 5), (2,), ("scalar",))
    results = []
    for side in SIDES:
        own = options if side == "candidate" else dataclasses.replace(options, kernels=())
        checks = []
        for one in required(own, stated=True, scores_vary=False):
            compared = n_values(one, TRACE_MODEL, "last layer", Form(), sub_norms=True, scope="all")
            where = "blk.0.kqv_out, token 2" if one.part == "attention" else "blk.1.l_out, token 2"
            exact = {"n_compared": compared, "n_different": 0, "worst": 0.0}
            loose = {"n_compared": compared, "n_different": compared // 2, "worst": 0.25, "where": where}
            values: dict[str, Any] = exact if one.expectation == "bits" else loose
            check = MetamorphicCheck(one.relation, one.case, side, one.expectation, "ok", **values)
            assert check_status(check) == "ok"
            checks.append(check)
        name = OURS.name if side == "candidate" else THEIRS.name
        results.append(MetamorphicResult(side, name, tuple(checks), len(checks)))
    facts = context(
        tokenizer={**TOKENIZER, "engines_agree": None}, token_ids=tuple(range(options.n_tokens)),
        settings={"n_threads": None, "n_decode": None, "n_steps": None, "full": None},
    )  # fmt: skip
    return write(METAMORPHIC, MetamorphicFindings(options, tuple(results)), facts)


BENCH_WORK = Work(seed=7, n_prompt=5, n_decode=2, n_rounds=3, n_threads=2, vocab_size=SHAPE["vocab_size"])
BENCH_RAW = {
    "prefill": ((0.5, 0.4, 0.45), (1.0, 0.6, 0.9)),
    "decode": ((0.1, 0.12, 0.11), (0.2, 0.18, 0.22)),
    "greedy": ((0.05, 0.06, 0.05), (0.19, 0.18, 0.2)),
    "first_token": ((0.3, 0.25, 0.28), (0.26, 0.3, 0.31)),
    "peak_memory": ((50_000_000,) * 3, (60_000_000,) * 3),
}
"""Seconds or bytes of candidate and reference."""


BENCH_TRIED = {
    Setting(1): {"prefill": 0.9, "decode": 0.3, "greedy": 0.2, "first_token": 0.35},
    Setting(2): {"prefill": 0.95, "decode": 0.15, "greedy": 0.21, "first_token": 0.3},
    Setting(2, (0, 1)): {"prefill": 0.5, "decode": 0.1, "greedy": 0.22},
}
"""Seconds that each setting takes the first time; later times are a little longer."""


def bench_search(n_threads: int | None = None, factor: float = 1.0) -> Search:
    """Prompts and decoding are fastest with two pinned threads, greedy decoding with one."""
    tried = []
    for setting, seconds in BENCH_TRIED.items():
        raw: dict[str, tuple[float, ...]] = {measure.name: () for measure in TRIED}
        for name, value in seconds.items():
            n = 1 if name == "first_token" else 3
            raw[name] = tuple(factor * value * (1 + 0.01 * i) for i in range(n))
        tried.append(Tried(setting, raw))
    return Search(tuple(tried), n_threads, "sleeps", None)


def bench_pair(
    raw: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] | None = None,
    unequal: dict[str, int] | None = None,
    work: Work = BENCH_WORK,
    **changes: Any,
) -> Pair:
    """Two engines; ``raw``: other measurements; ``unequal``: passes that differ, by measure."""
    taken = {}
    for measure in MEASURES:
        ours, theirs = {**BENCH_RAW, **(raw or {})}[measure.name]
        n = measure.n_compared(work, "same")
        n_tokens = work.n_decode * len(ours)
        reads = {"i2s_gemv_avx2": n_tokens * ternary_bytes(SHAPE), "head_f16_avx2": n_tokens * 2 * 300 * 128}
        equal = n - (unequal or {}).get(measure.name, 0)
        taken[measure.name] = Taken(
            {"candidate": ours, "reference": theirs}, n, equal, reads if measure.reads else {}
        )
    searches = {"candidate": bench_search(), "reference": bench_search(factor=2.0)}
    return Pair(**{"taken": taken, "policy": "same", "search": searches, **changes})


def bench_findings(
    raw: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] | None = None,
    unequal: dict[str, int] | None = None,
    **changes: Any,
) -> BenchFindings:
    """A benchmark of two engines (``bench_pair``)."""
    work = changes.get("work", BENCH_WORK)
    base: dict[str, Any] = {
        "work": work,
        "kernel": None,
        "pairs": (bench_pair(raw, unequal, work),),
        "read_bytes": READ_BUFFER_BYTES * READ_PASSES,
        "read_s": (0.01, 0.011, 0.009),
        "min_ratios": {"prefill": 1.2, "decode": None, "greedy": None},
    }
    return BenchFindings(**{**base, **changes})


def bench_further(**changes: Any) -> Pair:
    """The candidate beside a second build of the reference."""
    theirs = dataclasses.replace(THEIRS, library_digest="e" * 64)
    return bench_pair(further=Further("bitnet.cpp:main", Party("live", theirs), OURS.numerics), **changes)


def bench_receipt(findings: BenchFindings | None = None, **changes: Any) -> receipt.Receipt:
    """Our engine is faster, and both compute the same."""
    findings = findings or bench_findings()
    work = findings.work
    kernels = ("i2s_gemv_avx2", "i2s_gemm_avx2", "head_f16_avx2", "attention_avx2")
    facts: dict[str, Any] = {
        "tokenizer": {**TOKENIZER, "engines_agree": None}, "text": None, "template": None,
        "token_ids": work.prompt_ids,
        "candidate": Party("live", dataclasses.replace(OURS, settings={"kernel": "avx2"})),
        "reference": Party("live", dataclasses.replace(THEIRS, settings={})),
        "compute": Compute("real", False, tuple({"name": k, "calls": 99, "bytes": 10**8} for k in kernels)),
        "settings": {"n_threads": None, "n_decode": work.n_decode, "n_steps": None, "full": None},
    }  # fmt: skip
    return write(BENCH, findings, context(**{**facts, **changes}))


SCORED_IDS = (81, 61, 7, 23, 105, 61)


def score_result(**changes: Any) -> ScoreResult:
    """Six tokens in windows of four, all logits equal; ``n_different``: of the tokens, in order."""
    differ = changes.pop("n_different", (0,) * len(SCORED_IDS))
    nll = [2.5, 0.125, 4.75, 1.5, 0.25, 3.0]
    tokens = [
        ScoredToken(token, n, {"candidate": value + (n > 0), "reference": value})
        for token, n, value in zip(SCORED_IDS, differ, nll, strict=True)
    ]
    at = next((i for i, n in enumerate(differ) if n), None)
    first = None
    if at is not None:
        first = FirstDifference(at, tokens[at].token_id, tokens[at].n_different, 0.5, tokens[at].nll)
    digests: dict[Side, str] = {"candidate": ("1" if any(differ) else "2") * 64, "reference": "2" * 64}
    base: dict[str, Any] = {
        "text": Text("ab" * 32, 19, 19, 4, EOS),
        "scored": Scored(tuple(tokens), digests, first),
        "engines": {"candidate": OURS, "reference": THEIRS},
        "tokenizers_agree": True,
    }
    return ScoreResult(**{**base, **changes})


def score_receipt(result: ScoreResult | None = None, **changes: Any) -> receipt.Receipt:
    """A receipt of a score."""
    facts: dict[str, Any] = {
        "text": None, "template": None, "token_ids": SCORED_IDS,
        "settings": {"n_threads": 2, "n_decode": None, "n_steps": None, "full": None},
    }  # fmt: skip
    return write(SCORE, result or score_result(), context(**{**facts, **changes}))


def forge(original: receipt.Receipt, *path_and_value: Any) -> receipt.Receipt:
    """Change one field (path..., value) and recompute the digest, as a forger would."""
    *path, value = path_and_value
    changed = copy.deepcopy(original)
    place: Any = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return {**changed, "digest": receipt.digest(changed)}
