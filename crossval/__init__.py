"""A parity harness for BitNet b1.58 engines: which one is wrong, in which layer, in which operation, and why.

The public API: what the commands do, as functions that return a receipt (``crossval.api``), and receipts as
objects with tables (``Receipt``). docs/python.md shows how to use it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossval.api import (
        audit_trace,
        bench_engines,
        changed_ops,
        check_weights,
        compare_engines,
        compare_printed,
        compare_tokens,
        compare_traces,
        environments,
        explain_text,
        fetch_model,
        greedy,
        import_dump,
        metamorphic,
        read_prompts,
        record,
        score_text,
        self_test,
        smoke_test,
    )
    from crossval.errors import CrossvalError
    from crossval.receipts.file import Receipt
    from crossval.receipts.file import read as open_receipt
    from crossval.receipts.policy import Policy
    from crossval.registry import judge, write_report
    from crossval.report.pages import read_history

__all__ = [
    "CrossvalError",
    "Policy",
    "Receipt",
    "audit_trace",
    "bench_engines",
    "changed_ops",
    "check_weights",
    "compare_engines",
    "compare_printed",
    "compare_tokens",
    "compare_traces",
    "environments",
    "explain_text",
    "fetch_model",
    "greedy",
    "import_dump",
    "judge",
    "metamorphic",
    "open_receipt",
    "read_history",
    "read_prompts",
    "record",
    "score_text",
    "self_test",
    "smoke_test",
    "write_report",
]

_ELSEWHERE = {
    "CrossvalError": ("crossval.errors", "CrossvalError"),
    "Policy": ("crossval.receipts.policy", "Policy"),
    "Receipt": ("crossval.receipts.file", "Receipt"),
    "judge": ("crossval.registry", "judge"),
    "read_history": ("crossval.report.pages", "read_history"),
    "write_report": ("crossval.registry", "write_report"),
    "open_receipt": ("crossval.receipts.file", "read"),
}
"""Public names from outside ``crossval.api``: their module, and their name in it."""


def __getattr__(name: str) -> Any:
    """Load a public name on first access: ``import crossval.engines`` must not load diagnosis or bench."""
    if name not in __all__:
        raise AttributeError(f"module 'crossval' has no attribute {name!r}")
    module, found = _ELSEWHERE.get(name, ("crossval.api", name))
    return getattr(importlib.import_module(module), found)
