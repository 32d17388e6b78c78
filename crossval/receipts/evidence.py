"""Results as a receipt's JSON and back, and the summary fields that follow from them.

The builder and the gate share these functions: a summary in a receipt is right exactly when it is what this module
computes from the receipt's own rows.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from crossval.audit.summary import audit_verdict
from crossval.bench import receipt as bench_results
from crossval.bench.figures import BenchFindings
from crossval.compare import rows as compare
from crossval.compare.rows import (
    Coverage,
    GreedyPrompt,
    GreedyResult,
    GreedyStep,
    LayersResult,
    Location,
    Skip,
    TapRow,
)
from crossval.compare.tolerance import PolicyName
from crossval.engines.party import REFERENCE_NAME, Compute, Party
from crossval.examine import greedy_verdict
from crossval.examine.verdict import COMPARISON as COMPARISON
from crossval.examine.verdict import arbitrate
from crossval.passes import PassPlan
from crossval.receipts import provenance
from crossval.receipts.file import SCHEMA_VERSION, Receipt, number, seal
from crossval.repeat.metamorphic import receipt as metamorphic_results
from crossval.repeat.metamorphic.receipt import MetamorphicFindings
from crossval.selftest import receipt as selftest_results
from crossval.selftest.receipt import SelftestResult
from crossval.smoke import answers
from crossval.smoke import receipt as smoke_receipt
from crossval.smoke.answers import SmokeResult
from crossval.terms import SIDES, Side

Kind = Literal["layers", "greedy", "diff", "smoke", "selftest", "metamorphic", "bench"]

LOGITS = "result_output"


@dataclass(frozen=True)
class Context:
    """Everything in a receipt that is not a result."""

    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    text: str | None
    template: str | None
    token_ids: Sequence[int]
    candidate: Party
    reference: Party
    compute: Compute
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


SETTINGS = ("n_threads", "n_decode", "n_steps", "full", "reference", "candidate")
VIEWS = ("floors", "causal")
"""What `--floors` and `--causal` add: a setting that says so and a field, both there or both missing."""
NO_NUMBERS: tuple[Kind, ...] = ("smoke", "selftest", "metamorphic", "bench")
"""Kinds of receipt that hold no numbers of one engine beside the other's; their verdicts are pass and fail."""
AUDITED: tuple[Kind, ...] = ("layers", "diff")
"""Kinds of receipt whose verdict rests on the audit of both engines over all passes; that of ``greedy`` rests on
the audit of a few, beside tokens and logits (``crossval.examine.greedy_verdict``)."""

Audits = Mapping[Side, Mapping[str, Any] | None]
"""Each engine's audit as ``crossval.audit.summary.to_json`` gives it; None: not audited."""
Findings = Sequence[Mapping[str, Any]]
"""Diagnoses of the first guilty operation of each guilty engine (``crossval.diagnose.findings``)."""


def build(
    kind: Kind,
    result: LayersResult | GreedyResult | SmokeResult | SelftestResult | MetamorphicFindings | BenchFindings,
    context: Context,
    audits: Audits | None = None,
    diagnosis: Findings | None = None,
    views: Mapping[str, Any] | None = None,
) -> Receipt:
    """Return the sealed receipt of a comparison, of an engine by itself, or of the harness's own test.

    ``audits`` and ``diagnosis`` belong to ``layers``, ``diff`` and ``greedy``, incomplete without an audit.
    ``views``: their ``floors`` and ``causal`` as a receipt holds them, what of it was made.

    Raises:
        BadInputError: the result cannot be written as a valid receipt (a lone surrogate in the prompt, say).
    """
    notes = list(context.notes)
    summary: dict[str, Any]
    if isinstance(result, SmokeResult):
        classes = answers.classify(result.answers, result.special_ids)
        held, found = answers.thresholds(result.min_correct), smoke_receipt.results_to_json(result, classes)
        return _assemble(kind, context, notes, held, found, smoke_receipt.summarize(result, classes))
    if isinstance(result, SelftestResult):
        held, found = selftest_results.criterion(result.shape), selftest_results.to_json(result)
        return _assemble(kind, context, notes, held, found, selftest_results.summarize(result))
    if isinstance(result, MetamorphicFindings):
        held, found = metamorphic_results.criterion(result), metamorphic_results.to_json(result)
        return _assemble(kind, context, notes, held, found, metamorphic_results.summarize(result))
    if isinstance(result, BenchFindings):
        held, found = bench_results.criterion(result), bench_results.to_json(result)
        return _assemble(kind, context, notes, held, found, bench_results.summarize(result))
    if isinstance(result, LayersResult):
        notes += [note for note in result.notes if note not in notes]
        result = replace(result, rows=tuple(map(_as_written, result.rows)))
        summary = summarize_layers(result)
    else:
        result = replace(result, prompts=tuple(map(_prompt_as_written, result.prompts)))
        summary = summarize_greedy(result)
    held, found = dict(result.thresholds), results_to_json(result)
    summary["audit"] = {side: (audits or {}).get(side) for side in SIDES}
    summary["diagnosis"] = list(diagnosis or ())
    summary |= views or {}
    return _assemble(kind, context, notes, held, found, summary)


def build_unavailable(kind: Kind, context: Context) -> Receipt:
    """Return the sealed receipt of what could not happen for want of an engine: verdict ``incomplete``."""
    summary = {
        "first_divergence": None,
        "first_inexact": None,
        "coverage": {"required": 0, "compared": 0, "skipped": []},
        "parity": _parity(None, None, None, "incomplete"),
        "verdict": "incomplete",
    }
    return _assemble(kind, context, list(context.notes), None, {"rows": []}, summary)


def _assemble(
    kind: Kind,
    context: Context,
    notes: list[str],
    thresholds: dict[str, Any] | None,
    results: dict[str, Any],
    summary: dict[str, Any],
) -> Receipt:
    agree = context.tokenizer["engines_agree"]
    finish_summary(kind, summary, context.reference, agree, summary.get("audit"))
    return seal(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "created_at": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tool": provenance.tool_facts(),
            "host": provenance.host_facts(),
            "model": dict(context.model),
            "tokenizer": dict(context.tokenizer),
            "prompt": {
                "text": context.text,
                "template": context.template,
                "token_ids": [int(token) for token in context.token_ids],
            },
            "candidate": context.candidate.to_json(),
            "reference": context.reference.to_json(),
            "settings": {
                **{name: context.settings.get(name) for name in SETTINGS},
                **{name: True for name in VIEWS if context.settings.get(name)},
            },
            "thresholds": thresholds,
            "results": results,
            "audit": None,
            "diagnosis": None,
            "compute": context.compute.to_json(),
            "notes": notes,
            **summary,
        }
    )


def finish_summary(
    kind: Kind,
    summary: dict[str, Any],
    reference: Party,
    tokenizers_agree: bool | None,
    audits: Audits | None,
) -> None:
    """Add to a summary of rows what follows from parties and audits.

    Two tokenizers that disagree are a divergence end to end. Not so in ``smoke``, where each engine reads the text
    itself and is judged by what it answers. The verdict of an audited comparison is reached by arbitration.
    """
    summary["parity"]["cpp_available"] = cpp_available(reference)
    if tokenizers_agree is False and kind not in ("smoke", "metamorphic"):
        summary["verdict"] = summary["parity"]["status"] = "divergence"
    if kind in AUDITED:
        found = {side: audit_verdict((audits or {}).get(side)) for side in SIDES}
        comparison = COMPARISON[summary["parity"]["status"]]
        summary["verdict"] = arbitrate(comparison, found["candidate"], found["reference"])
    if kind == "greedy":
        comparison, exact = COMPARISON[summary["parity"]["status"]], greedy_verdict.is_exact(summary["parity"])
        summary["verdict"] = greedy_verdict.decide(comparison, exact, audits)


def cpp_available(reference: Party) -> bool:
    """Return whether the reference is real bitnet.cpp, live or recorded."""
    return reference.status in ("live", "recorded") and reference.identity.name == REFERENCE_NAME


def summarize_layers(result: LayersResult) -> dict[str, Any]:
    """Return first divergence, first inexact row, coverage, parity and verdict, computed from the rows."""
    verdict = compare.decide(result.rows, result.coverage)
    return {
        "first_divergence": location_to_json(compare.first_divergence(result.rows)),
        "first_inexact": location_to_json(compare.first_inexact(result.rows)),
        "coverage": coverage_to_json(result.coverage),
        "parity": _parity(_min_cosine(result.rows), share_equal(result.rows), _logits_share(result.rows), verdict),
        "verdict": verdict,
    }


def summarize_greedy(result: GreedyResult) -> dict[str, Any]:
    """Return the same summary of a greedy comparison, computed from its steps."""
    rows = [step.logits for prompt in result.prompts for step in prompt.steps]
    policy = result.policy
    verdict = compare.decide_greedy(result.prompts, policy)
    rate = compare.exact_match_rate(result.prompts) if rows else None
    skipped = [
        {
            "prompt_index": index,
            "n_steps": prompt.steps_required - len(prompt.steps),
            "why": prompt.why_incomplete or "not stated",
        }
        for index, prompt in enumerate(result.prompts)
        if len(prompt.steps) < prompt.steps_required
    ]
    return {
        "first_divergence": _first_step(
            result,
            lambda s: s.candidate_token != s.reference_token or not compare.logits_agree(s.logits, policy),
        ),
        "first_inexact": _first_step(result, lambda s: compare.row_status(s.logits) != "equal"),
        "coverage": {
            "required": sum(prompt.steps_required for prompt in result.prompts),
            "compared": len(rows),
            "skipped": skipped,
        },
        "parity": _parity(_min_cosine(rows), rate, _logits_share(rows), verdict),
        "verdict": verdict,
    }


SAME_ARITHMETIC = "the logits differ although both engines state the same arithmetic"


def _why(step: GreedyStep, policy: PolicyName) -> str | None:
    """Return what a step says of itself; of one where only bits differ, which engines of that kind must not."""
    only_bits = step.candidate_token == step.reference_token and compare.row_status(step.logits) == "within"
    return SAME_ARITHMETIC if only_bits and policy == "same" else step.explanation


def _first_step(result: GreedyResult, matches: Callable[[GreedyStep], bool]) -> dict[str, Any] | None:
    for index, prompt in enumerate(result.prompts):
        for step in prompt.steps:
            if matches(step):
                return {
                    "prompt_index": index,
                    "step": step.step,
                    "candidate_token": step.candidate_token,
                    "reference_token": step.reference_token,
                    "near_tie": step.near_tie,
                    "explanation": _why(step, result.policy),
                }
    return None


def _parity(cosine: float | None, rate: float | None, logits: float | None, status: str) -> dict[str, Any]:
    return {
        "cosine_similarity": number(cosine),
        "exact_match_rate": number(rate),
        "logits_exact_match_rate": number(logits),
        "cpp_available": False,
        "status": status,
    }


def _min_cosine(rows: Sequence[TapRow]) -> float | None:
    """Return the smallest cosine; None when there is none, or a row that differs has no cosine.

    Two arrays of zeros have equal bits and no direction: they do not count.
    """
    cosines = [row.cosine for row in rows if not (row.cosine is None and compare.row_status(row) == "equal")]
    known = [cosine for cosine in cosines if cosine is not None]
    return min(known) if known and len(known) == len(cosines) else None


def share_equal(rows: Sequence[TapRow]) -> float | None:
    """Return bit-equal elements over all elements; a row without a rate counts as all different."""
    total = sum(row.n_elements for row in rows)
    return sum((row.exact_match_rate or 0.0) * row.n_elements for row in rows) / total if total else None


def _logits_share(rows: Sequence[TapRow]) -> float | None:
    return share_equal([row for row in rows if row.tap == LOGITS])


def location_to_json(location: Location | None) -> dict[str, Any] | None:
    """Return a location as JSON, with its layer spelt out."""
    if location is None:
        return None
    return {**asdict(location), "layer": location.layer}


def coverage_to_json(coverage: Coverage) -> dict[str, Any]:
    """Return coverage as JSON."""
    return {
        "required": coverage.required,
        "compared": coverage.compared,
        "skipped": [asdict(skip) for skip in coverage.skipped],
    }


def results_to_json(result: LayersResult | GreedyResult) -> dict[str, Any]:
    """Return the rows and what they belong to as the receipt's ``results``."""
    if isinstance(result, GreedyResult):
        found: dict[str, Any] = {"prompts": [prompt_to_json(prompt) for prompt in result.prompts]}
        if result.audited:
            found["passes"] = plan_to_json(result.audited)
        return found if result.from_journal is None else {**found, "from_journal": result.from_journal}
    return {
        "mode": result.mode,
        "n_layers": result.n_layers,
        "passes": plan_to_json(result.plan),
        "rows": [row_to_json(row) for row in result.rows],
    }


def plan_to_json(plan: Sequence[PassPlan]) -> list[dict[str, Any]]:
    """Return passes as a receipt holds them."""
    return [{"kind": one.kind, "start": one.start, "token_ids": list(one.token_ids)} for one in plan]


def plan_from_json(data: Sequence[Mapping[str, Any]]) -> tuple[PassPlan, ...]:
    """Return the passes of a receipt that is valid by the schema."""
    return tuple(PassPlan(one["kind"], tuple(one["token_ids"]), one["start"]) for one in data)


def prompt_to_json(prompt: GreedyPrompt) -> dict[str, Any]:
    """Return one prompt of a greedy comparison as JSON."""
    data = {**vars(prompt)}
    for name in ("prompt_ids", "candidate_tokens", "reference_tokens"):
        data[name] = list(data[name])
    data["steps"] = [
        {
            **vars(step),
            "logits": row_to_json(step.logits),
            "candidate_margin": number(step.candidate_margin),
            "reference_margin": number(step.reference_margin),
        }
        for step in prompt.steps
    ]
    return data


_FLOATS = ("exact_match_rate", "cosine", "worst_token_cosine", "nmse", "worst_token_nmse", "max_abs", "norm_ratio")


def row_to_json(row: TapRow) -> dict[str, Any]:
    """Return a row as JSON: metrics that are not finite become null, and the status says what that makes of it."""
    data = {**vars(row), "floor": number(row.floor), "bound": dict(row.bound)}
    for name in _FLOATS:
        data[name] = number(data[name])
    data["status"] = compare.row_status(row_from_json(data))
    return data


def _as_written(row: TapRow) -> TapRow:
    """Return the row as a reader of the receipt will see it, so that the summary is made from that."""
    return row_from_json(row_to_json(row))


def _prompt_as_written(prompt: GreedyPrompt) -> GreedyPrompt:
    steps = tuple(replace(step, logits=_as_written(step.logits)) for step in prompt.steps)
    return replace(prompt, steps=steps)


def row_from_json(data: Mapping[str, Any]) -> TapRow:
    """Return the row of a receipt that is valid by the schema."""
    return TapRow(**{**data, "bound": dict(data["bound"])})


def layers_from_json(receipt: Receipt) -> LayersResult:
    """Return the result in a valid ``layers`` or ``diff`` receipt; its summary fields are recomputed, not read."""
    results = receipt["results"]
    rows = tuple(row_from_json(row) for row in results["rows"])
    skipped = tuple(Skip(**skip) for skip in receipt["coverage"]["skipped"])
    coverage = Coverage(receipt["coverage"]["required"], receipt["coverage"]["compared"], skipped)
    plan = plan_from_json(results["passes"])
    return LayersResult(
        rows=rows,
        first_divergence=compare.first_divergence(rows),
        first_inexact=compare.first_inexact(rows),
        coverage=coverage,
        verdict=compare.decide(rows, coverage),
        plan=plan,
        token_ids=tuple(token for one in plan for token in one.token_ids),
        thresholds=receipt["thresholds"],
        n_layers=results["n_layers"],
        mode=results["mode"],
        notes=tuple(receipt["notes"]),
    )


def greedy_from_json(receipt: Receipt) -> GreedyResult:
    """Return the result in a valid ``greedy`` receipt; its summary fields are recomputed, not read."""
    results, held = receipt["results"], receipt["thresholds"]
    prompts = tuple(prompt_from_json(prompt) for prompt in results["prompts"])
    return GreedyResult(
        prompts=prompts,
        exact_match_rate=compare.exact_match_rate(prompts),
        verdict=compare.decide_greedy(prompts, held["policy"]),
        thresholds=held,
        from_journal=results.get("from_journal"),
        audited=plan_from_json(results.get("passes", ())),
    )


def prompt_from_json(data: Mapping[str, Any]) -> GreedyPrompt:
    """Return the prompt of a receipt that is valid by the schema."""
    steps = tuple(GreedyStep(**{**step, "logits": row_from_json(step["logits"])}) for step in data["steps"])
    lists = {name: tuple(data[name]) for name in ("prompt_ids", "candidate_tokens", "reference_tokens")}
    return GreedyPrompt(**{**data, **lists, "steps": steps})
