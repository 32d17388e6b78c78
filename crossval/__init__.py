"""A parity harness for BitNet b1.58 engines: which one is wrong, in which layer, in which operation, and why.

The public API: what the commands do, as functions that return a receipt (``crossval.api``), and receipts as
objects with tables (``Receipt``). docs/python.md shows how to use it.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossval.api.benchmark import bench_engines
    from crossval.api.comparison import audit_trace, compare_engines, compare_traces
    from crossval.api.dumps import compare_printed, import_dump
    from crossval.api.fetch import fetch_model
    from crossval.api.generation import greedy, read_prompts
    from crossval.api.report import write_report
    from crossval.api.score import score_text
    from crossval.api.single import metamorphic, record, self_test, smoke_test
    from crossval.api.snapshots import changed_ops, environments
    from crossval.api.texts import explain_text
    from crossval.api.tokens import compare_tokens
    from crossval.api.weights import check_weights
    from crossval.errors import CrossvalError
    from crossval.receipts.file import Receipt
    from crossval.receipts.file import read as open_receipt
    from crossval.receipts.policy import Policy
    from crossval.registry import judge
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

_PLACES = {
    "CrossvalError": "crossval.errors:CrossvalError",
    "Policy": "crossval.receipts.policy:Policy",
    "Receipt": "crossval.receipts.file:Receipt",
    "audit_trace": "crossval.api.comparison:audit_trace",
    "bench_engines": "crossval.api.benchmark:bench_engines",
    "changed_ops": "crossval.api.snapshots:changed_ops",
    "check_weights": "crossval.api.weights:check_weights",
    "compare_engines": "crossval.api.comparison:compare_engines",
    "compare_printed": "crossval.api.dumps:compare_printed",
    "compare_tokens": "crossval.api.tokens:compare_tokens",
    "compare_traces": "crossval.api.comparison:compare_traces",
    "environments": "crossval.api.snapshots:environments",
    "explain_text": "crossval.api.texts:explain_text",
    "fetch_model": "crossval.api.fetch:fetch_model",
    "greedy": "crossval.api.generation:greedy",
    "import_dump": "crossval.api.dumps:import_dump",
    "judge": "crossval.registry:judge",
    "metamorphic": "crossval.api.single:metamorphic",
    "open_receipt": "crossval.receipts.file:read",
    "read_history": "crossval.report.pages:read_history",
    "read_prompts": "crossval.api.generation:read_prompts",
    "record": "crossval.api.single:record",
    "score_text": "crossval.api.score:score_text",
    "self_test": "crossval.api.single:self_test",
    "smoke_test": "crossval.api.single:smoke_test",
    "write_report": "crossval.api.report:write_report",
}
"""Public name -> where it is: ``module:name``."""


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Load a public name on first access: ``import crossval.engines`` must not load diagnosis or bench."""
    if name not in _PLACES:
        raise AttributeError(f"module 'crossval' has no attribute {name!r}")
    return pkgutil.resolve_name(_PLACES[name])
