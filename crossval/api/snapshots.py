"""Two snapshots of one engine: what changed in its results, and what around them."""

from __future__ import annotations

from pathlib import Path

from crossval.compare.changes import Changes, changes
from crossval.engines import tap_maps
from crossval.errors import BadInputError
from crossval.examine.environment import Facts, of_receipt, of_trace
from crossval.receipts import file as receipts
from crossval.traces.read import Trace


def changed_ops(before: str | Path, after: str | Path, *, tap_map: str | Path | None = None) -> Changes:
    """Return, operation by operation, what changed from one trace to another of the same model and tokens.

    Raises:
        BadInputError: an unusable trace, or traces of different models.
    """
    named = None if tap_map is None else tap_maps.load(tap_map)
    ours = Trace.open(before, named)
    return changes(ours, Trace.open(after, named, ours.info.model))


def environments(before: str | Path, after: str | Path) -> tuple[Facts, Facts]:
    """Return what two receipts, or two traces, state of build, machine, kernels, model, tokenizer and prompt.

    Raises:
        BadInputError: one of each, or unusable.
    """
    if Path(before).is_dir() != Path(after).is_dir():
        raise BadInputError(f"{before} and {after} are a receipt and a trace; give two of a kind")
    ours, theirs = (_facts(Path(path)) for path in (before, after))
    return ours, theirs


def _facts(path: Path) -> Facts:
    return of_trace(Trace.open(path).info) if path.is_dir() else of_receipt(receipts.read(path))
