"""``crossval diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crossval import api
from crossval.cli.options import CAUSAL, FULL, MODEL, PATH, REPRO, TAP_MAP, count, receipt_command
from crossval.receipts.file import Receipt


@receipt_command(
    "diff",
    click.argument("trace_a", type=PATH),
    click.argument("trace_b", type=PATH),
    count("--decode", "n_decode", "Decoded tokens to compare. Default: all that the shorter trace holds.", low=0),
    FULL,
    CAUSAL,
    REPRO,
    TAP_MAP,
    MODEL,
)
def command(trace_a: Path, trace_b: Path, **options: Any) -> Receipt:
    """Find out which of two recorded traces of one model is wrong, and where; no engine is needed.

    TRACE_A is the candidate, TRACE_B the reference. Both must hold the same tokens in the same
    passes. Where a trace lacks taps, the operations between two recorded taps are checked as one.

    \b
    Example:
      crossval diff my-engine-trace/ bitnet-cpp-trace/ --model model.gguf
    """
    return api.compare_traces(trace_a, trace_b, **options)
