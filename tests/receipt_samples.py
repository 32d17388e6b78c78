"""Receipts to test with, made from real arrays by the real comparison; no engine runs."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np

from crossval import compare, evidence, receipt, taps, tolerance, trace
from crossval.answers import Answer, MinCorrect, Side, SmokeResult
from crossval.compare import Coverage, GreedyPrompt, GreedyResult, GreedyStep, LayersResult, Skip, TapRow
from crossval.evidence import Compute, Context, Party
from crossval.runners.base import EngineIdentity, Numerics, PassPlan, TapArray
from crossval.suite import SmokePrompt, digest_of

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
TRACE_MODEL = trace.TraceModel(sha256=MODEL["sha256"], **{k: SHAPE[k] for k in list(SHAPE)[:7]})
_SEED = 20240


def context(**changes: Any) -> Context:
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
    return Context(**{**base, **changes})


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
    names = taps.outline_taps(2) if mode == "outline" else taps.all_taps(2)
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
        first_divergence=compare.first_divergence(rows),
        first_inexact=compare.first_inexact(rows),
        coverage=coverage,
        verdict=compare.decide(rows, coverage),
        plan=plan,
        token_ids=tuple(token for one in plan for token in one.token_ids),
        thresholds=tolerance.describe(policy),  # type: ignore[arg-type]
        n_layers=2,
        mode=mode,  # type: ignore[arg-type]
    )


def greedy_result(
    n_steps: int = 3, differs_at: int | None = None, n_prompts: int = 2, inexact_at: int | None = None
) -> GreedyResult:
    """Compare ``n_prompts``; the first differs in one token, or has one step whose logits are not bit-equal."""
    wanted = [(differs_at, inexact_at), *[(None, None)] * (n_prompts - 1)]
    prompts = tuple(_greedy_prompt(index, n_steps, *one) for index, one in enumerate(wanted))
    return GreedyResult(
        prompts, compare.exact_match_rate(prompts), compare.decide_greedy(prompts), tolerance.describe("same")
    )


def _greedy_prompt(index: int, n_steps: int, differs_at: int | None, inexact_at: int | None) -> GreedyPrompt:
    reference = tuple(50 + index * 10 + step for step in range(n_steps))
    own = tuple(99 if step == differs_at else token for step, token in enumerate(reference))
    steps = tuple(
        GreedyStep(
            step=step,
            candidate_token=own[step],
            reference_token=reference[step],
            forced=differs_at is not None and step > differs_at,
            logits=_logits(index, step, reference, 0.001 if step in (differs_at, inexact_at) else 0.0),
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


def _logits(index: int, step: int, reference: tuple[int, ...], relative_error: float) -> TapRow:
    """Compare the logits of one step: of the prompt's last token, then of each decoded one."""
    plan = PassPlan("decode", (reference[step - 1],), 2 + step) if step else PassPlan("prefill", (1, 17, 42), 0)
    found = row("result_output", step, PassPlan("decode", (0,), 2 + step), relative_error)
    return dataclasses.replace(found, pass_kind=plan.kind)


def layers_receipt(errors: dict[tuple[int, str], float] | None = None, **changes: Any) -> receipt.Receipt:
    return evidence.build("layers", layers_result(errors), context(**changes))


def greedy_receipt(
    differs_at: int | None = None, inexact_at: int | None = None, **changes: Any
) -> receipt.Receipt:
    settings = {"n_threads": 2, "n_decode": None, "n_steps": 3, "full": None}
    result = greedy_result(3, differs_at, inexact_at=inexact_at)
    return evidence.build("greedy", result, context(settings=settings, **changes))


QUESTIONS = (
    SmokePrompt("sum-1", "sum", True, "What is 2+2?", answer="4."),
    SmokePrompt("sum-2", "sum", False, "What is 5+6?", answer="11."),
    SmokePrompt("paris", "capital", None, "What is the capital of France?", pattern="Par[i]s", stop="newline"),
    SmokePrompt("hot", "opposite", False, "What is the opposite of hot?", answer="cold."),
)
EOS, BOS = 299, 298


def smoke_answer(index: int, engine: Side = "candidate", **changes: Any) -> Answer:
    """The right answer to one of ``QUESTIONS``, unless changed."""
    given: dict[str, Any] = (
        {"token_ids": (60, 61, EOS), "finish": "stop", "text": " 4."},
        {"token_ids": (62, 63, 61, EOS), "finish": "stop", "text": " 11."},
        {"token_ids": (70, 71, 72), "finish": "newline", "text": "It is Paris."},
        {"token_ids": (80, 61, EOS), "finish": "stop", "text": " cold."},
    )[index]
    base = {"prompt": QUESTIONS[index], "engine": engine, "prompt_ids": (BOS, 10 + index, 20), **given}
    return Answer(**{**base, **changes})


def smoke_result(
    *replaced: Answer,
    engines: tuple[Side, ...] = ("candidate", "reference"),
    min_correct: MinCorrect | None = None,
) -> SmokeResult:
    """Every question answered rightly by every engine, but for what ``replaced`` says."""
    other = {(answer.prompt.id, answer.engine): answer for answer in replaced}
    answers = tuple(
        other.get((QUESTIONS[index].id, side), smoke_answer(index, side))
        for index in range(len(QUESTIONS))
        for side in engines
    )
    return SmokeResult(
        suite="questions.jsonl",
        suite_digest=digest_of(QUESTIONS),
        n_prompts=len(QUESTIONS),
        engines=engines,
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
    return evidence.build("smoke", result, context(**{**facts, **changes}))


def one_sided(side: Side) -> receipt.Receipt:
    """A smoke receipt for which only one engine was asked."""
    unused = {"candidate": Party("unused", OURS), "reference": Party("unused", THEIRS)}
    changes: dict[str, Any] = {name: party for name, party in unused.items() if name != side}
    if side == "reference":
        changes["compute"] = Compute("none")
    agree = {**TOKENIZER, "engines_agree": None}
    return smoke_receipt(result=smoke_result(engines=(side,)), tokenizer=agree, **changes)


def forge(original: receipt.Receipt, *path_and_value: Any) -> receipt.Receipt:
    """Change one field (path..., value) and recompute the digest, as somebody who cheats would."""
    *path, value = path_and_value
    changed = copy.deepcopy(original)
    place: Any = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return {**changed, "digest": receipt.digest(changed)}
