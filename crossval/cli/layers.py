"""``crossval layers``."""

from __future__ import annotations

from typing import Any

import crossval
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
    return crossval.compare_engines(**options)
