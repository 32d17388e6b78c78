"""Everything the commands do, as functions for programs and notebooks; most return a receipt.

Nothing here reads a command line or prints. Errors are ``crossval.errors.CrossvalError``. A
``model`` is the path of a GGUF file, by default the model that ships with the project. Engines are
given by the words that ``crossval.engines.registry`` lists, or as a directory with a trace.
``progress`` is called with the current activity, the steps done and their total; ``say`` with a line
to show, such as where a file was written.
"""

from crossval.api.benchmark import bench_engines
from crossval.api.comparison import audit_trace, compare_engines, compare_traces
from crossval.api.dumps import compare_printed, import_dump
from crossval.api.fetch import fetch_model
from crossval.api.generation import greedy, read_prompts
from crossval.api.score import score_text
from crossval.api.single import metamorphic, record, self_test, smoke_test
from crossval.api.snapshots import changed_ops, environments
from crossval.api.texts import MAX_TEXT_BYTES, explain_text
from crossval.api.tokens import compare_tokens
from crossval.api.weights import check_weights

__all__ = [
    "MAX_TEXT_BYTES",
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
    "metamorphic",
    "read_prompts",
    "record",
    "score_text",
    "self_test",
    "smoke_test",
]
