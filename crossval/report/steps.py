"""Figures of greedy receipts: every step of every prompt, and how sure the engines were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crossval.compare.rows import GreedyPrompt, GreedyStep, row_status
from crossval.examine import greedy_receipt
from crossval.receipts.file import Receipt
from crossval.report.figure import Figure
from crossval.report.heat import heat_map
from crossval.report.states import COMPARED


def greedy_figures(receipt: Receipt) -> Iterator[Figure]:
    """Yield the timeline of all prompts, then the margins of the first that differs, or of the first."""
    prompts = greedy_receipt.from_json(receipt).result.prompts
    if not any(prompt.steps for prompt in prompts):
        return
    cells = [_cell(index, step) for index, prompt in enumerate(prompts) for step in prompt.steps]
    columns = [str(step) for step in range(max(len(prompt.steps) for prompt in prompts))]
    yield Figure(
        "Every step of every prompt. Both engines read the same tokens; a cross is another token.",
        heat_map(cells, columns, [str(index) for index in range(len(prompts))], "step"),
    )
    differing = [index for index, prompt in enumerate(prompts) if prompt.first_divergence is not None]
    index = differing[0] if differing else 0
    yield Figure(
        f"Margin between the best and the second logit, prompt {index}: the smaller, the sooner rounding decides.",
        _margins(prompts[index]),
    )


def _cell(index: int, step: GreedyStep) -> dict[str, Any]:
    same = step.candidate_token == step.reference_token
    state = COMPARED[row_status(step.logits)]
    if not same:
        state = "within, not settled" if step.near_tie else "beyond its bound"
    tokens = (
        f"both choose {step.candidate_token}" if same else f"{step.candidate_token} for {step.reference_token}"
    )
    return {
        "column": str(step.step),
        "row": str(index),
        "state": state,
        "says": f"prompt {index}, step {step.step}: {tokens}, logits NMSE {step.logits.nmse}",
    }


def _margins(prompt: GreedyPrompt) -> dict[str, Any]:
    values = [
        {"step": step.step, "margin": margin, "engine": side}
        for step in prompt.steps
        for side, margin in (("candidate", step.candidate_margin), ("reference", step.reference_margin))
        if margin is not None and margin > 0
    ]
    return {
        "data": {"values": values},
        "width": {"step": 18},
        "height": 140,
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {"field": "step", "type": "ordinal", "axis": {"labelAngle": 0}},
            "y": {"field": "margin", "type": "quantitative", "scale": {"type": "log"}},
            "color": {
                "field": "engine",
                "type": "nominal",
                "scale": {"domain": ["candidate", "reference"], "range": ["var(--fine)", "var(--open)"]},
            },
            "strokeDash": {"field": "engine", "type": "nominal", "legend": None},
        },
    }
