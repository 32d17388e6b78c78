"""Dumps of llama.cpp's own tools: printed values beside an engine's, and saved logits as a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_py.resources import default_model_path
from bitnet_py.token_ids import check_ids
from crossval.api.request import silent
from crossval.engines import dumps
from crossval.engines.dumps import PrintedTap
from crossval.engines.record import trace_model
from crossval.engines.registry import find_word, open_candidate
from crossval.engines.session import Given, check_prompt
from crossval.errors import UnavailableError
from crossval.passes import Runner
from crossval.terms import Progress
from crossval.traces.read import TraceInfo


@dataclass(frozen=True)
class PrintedComparison:
    """What was printed of one engine beside the values of another."""

    tap_map: str
    """Whose node names the dump has."""
    engine: str
    """The other engine."""
    n_tokens: int
    rows: tuple[PrintedTap, ...]
    """In execution order."""
    missing: tuple[str, ...]
    """Printed taps that the engine does not have."""

    @property
    def first_beyond(self) -> PrintedTap | None:
        """The first tap with a value more than one printed unit away."""
        return next((row for row in self.rows if row.n_beyond), None)

    @property
    def verdict(self) -> str:
        """``agrees as far as printed`` or ``differs``: a dump of corner values never shows parity."""
        return "agrees as far as printed" if self.first_beyond is None else "differs"


def compare_printed(
    dump: str | Path,
    prompt: Given,
    model: str | Path | None = None,
    *,
    engine: str = "bitnet_py",
    n_threads: int | None = None,
    follow_reference_graph: bool = False,
    progress: Progress = silent,
) -> PrintedComparison:
    """Compare what ``llama-eval-callback`` or ``llama-debug`` printed with an engine, over the same prompt.

    ``engine``: as for a candidate. ``follow_reference_graph``: bitnet_py computes what the dump's generation does.

    Raises:
        BadInputError: an unusable dump, model or prompt, or a dump of other tokens.
        UnavailableError, EngineCrashError: from the engine, or it has none of the printed tensors.
    """
    check_prompt(prompt)
    path = default_model_path() if model is None else Path(model)
    shape = trace_model(path)
    printed = dumps.read_dump(dump, shape.architecture)
    progress("comparing", 0, 1)
    with open_candidate(
        find_word("candidate", engine),
        path,
        n_threads=n_threads,
        numerics=printed.numerics,
        follow_reference_graph=follow_reference_graph,
        as_run=printed.flash_attention,
    ) as runner:
        runner.reset()
        record = runner.eval(_ids(prompt, runner, path, shape.vocab_size), list(printed.tensors))
        rows = dumps.beside(printed, record, shape.head_dim)
        name = runner.identity.name
    progress("comparing", 1, 1)
    if not rows:
        raise UnavailableError(f"{name} gives none of the {len(printed.tensors)} taps that are printed")
    compared = {row.tap for row in rows}
    missing = tuple(tap for tap in printed.tensors if tap not in compared)
    return PrintedComparison(printed.tap_map, name, len(record.plan.token_ids), tuple(rows), missing)


def _ids(given: Given, runner: Runner, path: Path, vocab_size: int) -> Sequence[int]:
    if isinstance(given, str):
        return runner.tokenize(given)
    check_ids(given, vocab_size, path.name)
    return given


def import_dump(
    file: str | Path, out_dir: str | Path, model: str | Path | None = None, *, overwrite: bool = False
) -> TraceInfo:
    """Write the logits that ``llama-debug --save-logits`` saved (``llamacpp-NAME.bin``) as a trace in ``out_dir``.

    Raises:
        BadInputError: unusable files or model, or the directory cannot hold a trace.
    """
    path = default_model_path() if model is None else Path(model)
    return dumps.import_logits(file, trace_model(path), out_dir, overwrite=overwrite)
