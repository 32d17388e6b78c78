"""``crossval selftest``."""

from __future__ import annotations

from typing import Any

import crossval
from crossval.cli.options import MODEL, receipt_command
from crossval.receipts.file import Receipt


@receipt_command("selftest", MODEL)
def command(say: object, **options: Any) -> Receipt:
    """Check on this machine that crossval finds injected faults, and reports none in healthy runs.

    Injects faults into the model file or the output of our engine, as candidate and as reference,
    and runs the examination of `crossval layers`: side, layer, operation and cause must be correct.
    Needs neither a compiler nor bitnet.cpp. Exit 0 when every fault is located correctly and every
    healthy run is parity, else 1.

    \b
    Example:
      crossval selftest
      crossval selftest --receipt selftest.json && crossval gate selftest.json
    """
    return crossval.self_test(**options)
