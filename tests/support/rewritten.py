"""A recorded trace rewritten with some arrays changed: a correct engine with a recording error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from crossval.passes import PassRecord, TapArray
from crossval.traces.read import Trace
from crossval.traces.write import TraceWriter

Passes = list[dict[str, TapArray]]
"""The taps of each pass."""
Change = Callable[[Passes], None]


def rewritten(source: Path, target: Path, change: Change) -> Path:
    """Copy a trace through a change of its arrays; digests and shapes are those of the changed ones."""
    trace = Trace.open(source)
    info = trace.info
    passes: Passes = []
    for index in range(len(info.passes)):
        given = trace.taps(index)
        passes.append({name: TapArray(given[name].array.copy(), given[name].rows) for name in given})
    change(passes)
    with TraceWriter(target, info.model) as writer:
        for recorded, taps in zip(info.passes, passes, strict=True):
            writer.add_pass(PassRecord(recorded.plan, taps))
        writer.finish(engine=info.engine, prompt_ids=info.prompt_ids, prompt_text=info.prompt_text)
    return target


def put(passes: Passes, index: int, name: str, array: np.ndarray) -> None:
    """Replace one array; its shape stays."""
    old = passes[index][name]
    new = np.ascontiguousarray(array, dtype=np.float32).reshape(old.array.shape)
    passes[index][name] = TapArray(new, old.rows)
