"""``crossval layers`` and ``crossval triage``: the same examination, shown in two ways."""

from __future__ import annotations

from typing import Any

from crossval import api
from crossval.cli.options import (
    CAUSAL,
    DECODE,
    ENGINES,
    FLOORS,
    FOLLOW,
    FULL,
    PROMPT,
    REPRO,
    TAP_MAP,
    receipt_command,
)
from crossval.receipts.file import Receipt


@receipt_command("layers", PROMPT, DECODE, FULL, FLOORS, CAUSAL, REPRO, FOLLOW, TAP_MAP, *ENGINES)
def command(**options: Any) -> Receipt:
    """Find out which of two engines is wrong, and in which layer and operation.

    Runs the prompt and a few decoded tokens through both engines and compares every layer's output,
    then the operations of the first layer that differs (`=`: bit-identical). Then recomputes every
    operation of each engine from that engine's own inputs and checks it against its error bound:
    the first operation outside its bound is wrong, whichever side it is on.

    \b
    Example:
      crossval layers --prompt "What is 2+2?" --receipt receipt.json
      crossval layers --prompt "What is 2+2?" --candidate bitnet.cpp:../my-fork --reference bitnet.cpp
    """
    return api.compare_engines(**options)


@receipt_command("triage", PROMPT, DECODE, FLOORS, CAUSAL, REPRO, TAP_MAP, *ENGINES, plain_words=True)
def triage(**options: Any) -> Receipt:
    """State in plain words which side causes bad output, and what to do next.

    Runs the same examination as `crossval layers`, with the same receipt and exit codes. If both
    engines give the same output, look at the model or its configuration; if the reference is correct
    and the candidate wrong, the candidate has a bug, which is reported; if both are wrong in
    different ways, look at what both are given: tokens and configuration.

    \b
    Example:
      crossval triage --prompt "What is 2+2?"
    """
    return api.compare_engines(**options)
