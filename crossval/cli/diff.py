"""``crossval diff``: two traces, or two snapshots of one engine; two receipts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import crossval
from crossval.cli import output
from crossval.cli.exits import EXIT_OF_VERDICT
from crossval.cli.options import (
    CAUSAL,
    FULL,
    MODEL,
    OUTPUT,
    PATH,
    REPRO,
    TAP_MAP,
    count,
    plain_command,
    receipt_command,
    refuse_others,
)
from crossval.examine.changes_show import show_changes, show_environment
from crossval.examine.environment import differences
from crossval.receipts.file import Receipt

OPTIONS = (
    click.argument("trace_a", type=PATH, metavar="A"),
    click.argument("trace_b", type=PATH, metavar="B"),
    count("--decode", "n_decode", "Decoded tokens to compare. Default: all that the shorter trace holds.", low=0),
    FULL,
    CAUSAL,
    REPRO,
    TAP_MAP,
    MODEL,
)
ENVIRONMENT = click.option(
    "--environment", is_flag=True, help="Compare only what the traces state of build, settings, model and prompt."
)

OF_ENVIRONMENTS = ("trace_a", "trace_b", "environment", "as_json")
"""Options of a comparison of environments."""


def _changed(out: Console, trace_a: Path, trace_b: Path, tap_map: Path | None, **_: Any) -> None:
    names = _names(trace_a, trace_b)
    show_changes(out, crossval.changed_ops(trace_a, trace_b, tap_map=tap_map), names)
    show_environment(out, *crossval.environments(trace_a, trace_b), names)


@receipt_command("diff", *OPTIONS, also=_changed)
def _compared(trace_a: Path, trace_b: Path, **options: Any) -> Receipt:
    return crossval.compare_traces(trace_a, trace_b, **options)


@plain_command("diff", *OPTIONS[:2], ENVIRONMENT, *OPTIONS[2:], *OUTPUT)
@click.pass_context
def command(context: click.Context, /, trace_a: Path, trace_b: Path, environment: bool, **options: Any) -> None:
    """Find out which of two traces is wrong, or what changed between two; no engine is needed.

    A and B are traces of one model with the same prompt: A is the candidate, B the reference. Where a
    trace lacks taps, the operations between two recorded taps are checked as one. Then follows, for two
    snapshots of one engine, what changed from A to B, operation by operation, and around the engine.

    If A and B are receipts, their environments are compared: build, flags, instruction sets, kernels,
    model, tokenizer. Exit code 1: something differs.

    \b
    Example:
      crossval diff my-engine-trace/ bitnet-cpp-trace/ --model model.gguf
      crossval diff my-trace-before/ my-trace-after/
      crossval diff my-receipt-before.json my-receipt-after.json
    """
    if not environment and (trace_a.is_dir() or trace_b.is_dir()):
        assert _compared.callback is not None
        _compared.callback(trace_a=trace_a, trace_b=trace_b, **options)
        return
    refuse_others(context, OF_ENVIRONMENTS, "is about traces that are compared tensor by tensor")
    before, after = crossval.environments(trace_a, trace_b)
    found = differences(before, after)
    if options["as_json"]:
        output.write_json(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False) + "\n")
    else:
        show_environment(output.screen(), before, after, _names(trace_a, trace_b))
    context.exit(EXIT_OF_VERDICT["divergence" if found else "pass"])


def _names(trace_a: Path, trace_b: Path) -> tuple[str, str]:
    """Return what to call two results: the last part of their paths, or all where these are equal."""
    names = (trace_a.resolve().name, trace_b.resolve().name)
    return names if names[0] != names[1] else (str(trace_a), str(trace_b))
