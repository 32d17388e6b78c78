"""``crossval selftest``."""

from __future__ import annotations

from typing import Any

from crossval import api
from crossval.cli.options import MODEL, receipt_command
from crossval.receipts.file import Receipt


@receipt_command("selftest", MODEL)
def command(say: object, **options: Any) -> Receipt:
    """Check on this machine that crossval finds known faults, and finds none where there is none.

    Puts faults into the model file or the output of our engine, as candidate and as reference, and
    asks for a verdict as `crossval layers` reaches it: side, layer, operation and cause must be
    right. Needs neither a compiler nor bitnet.cpp. Exit 0 when every fault is found in its place
    and every healthy run is parity, else 1.

    \b
    Example:
      crossval selftest
      crossval selftest --receipt selftest.json && crossval gate selftest.json
    """
    return api.self_test(**options)
