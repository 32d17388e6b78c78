"""``crossval greedy``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import crossval
from crossval.cli.options import ENGINES, FOLLOW, TAP_MAP, count, file, prompt_option, receipt_command
from crossval.engines.session import Given
from crossval.errors import BadInputError
from crossval.receipts.file import Receipt

MAX_RECEIPT_STEPS = 50_000
"""Limit over all prompts: a step takes 130 to 330 bytes, and a receipt over 32 MiB cannot be read back."""


@receipt_command(
    "greedy",
    prompt_option("Text both engines continue.", required=False),
    file(
        "--prompts",
        "prompts_path",
        "Many prompts: one per line, or JSON lines (*.jsonl: strings, or objects with a `prompt` or `tokens`).",
    ),
    count("--steps", "n_steps", "Tokens to generate per prompt.", 32),
    file(
        "--journal",
        "journal",
        "Append every finished prompt to this file; prompts that are already there are not run again.",
    ),
    click.option(
        "--no-audit",
        "audit",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Skip the audit of the arithmetic: saves one run of each engine (seconds to minutes with a large "
        "model), but where tokens agree the verdict stays incomplete (exit 3).",
    ),
    FOLLOW,
    TAP_MAP,
    *ENGINES,
)
def command(prompt: Given | None, prompts_path: Path | None, n_steps: int, **options: Any) -> Receipt:
    """Generate greedily with two engines and compare token by token.

    Free-running (each engine follows its own choices) and teacher-forced (both read the reference's
    tokens); where tokens differ, shows whether the logits agree within their bounds. Equal tokens
    alone do not show parity: engines that state the same arithmetic must give bit-identical logits,
    and every operation of both engines is recomputed from its own inputs in the first prompt's pass
    and one decoded token, which takes one more run of each engine. Beside the specification, every
    prompt with other tokens is recomputed as far as these go. With --journal, rerun the same command
    to resume a run that was stopped.

    \b
    Example:
      crossval greedy --steps 32 --prompt "What is 2+2?"
      crossval greedy --steps 32 --prompts prompts.txt --journal run.jsonl --receipt r.json
    """
    if (prompt is None) == (prompts_path is None):
        raise click.UsageError("give one of --prompt TEXT, --tokens ID,ID,... and --prompts FILE")
    texts: list[Given] = [prompt] if prompt is not None else crossval.read_prompts(str(prompts_path))
    given = click.get_current_context().params
    if (given["as_json"] or given["receipt_path"]) and len(texts) * n_steps > MAX_RECEIPT_STEPS:
        raise BadInputError(
            f"{len(texts)} prompts of {n_steps} steps make a receipt too large to be read; "
            f"run at most {MAX_RECEIPT_STEPS} steps in total, or write no receipt"
        )
    return crossval.greedy(texts, n_steps=n_steps, **options)
