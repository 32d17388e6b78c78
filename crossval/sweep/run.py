"""Run the cells of a sweep that are not there yet, no more of them at a time than fit into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from bitnet_py import _native
from bitnet_py.model import KERNEL_VARIABLE
from crossval.bitnet_cpp.remedies import BUILD_DIR_VARIABLE, GENERATION_VARIABLE, LIBRARY_VARIABLE
from crossval.errors import BadInputError, EngineCrashError
from crossval.receipts.columns import unpack
from crossval.receipts.file import Receipt, digest, read, write
from crossval.schema import parse_json, validate
from crossval.sweep import job
from crossval.sweep.memory import needed_bytes
from crossval.sweep.plan import Cell, Sweep
from crossval.sweep.summary import Row, other_inputs
from crossval.terms import Progress

DEFAULT_DECODE = 4
PASSED_ON = (
    LIBRARY_VARIABLE,
    BUILD_DIR_VARIABLE,
    GENERATION_VARIABLE,
    _native.LIBRARY_VARIABLE,
    KERNEL_VARIABLE,
)
"""Variables that choose libraries and kernels: a worker of a cluster gets them as they are here."""
Say = Callable[[str], None]
ExecutorOf = Callable[[int], Executor]
"""Returns what runs a cell that needs so many bytes."""


def run(
    sweep: Sweep,
    folder: Path,
    *,
    executor_of: ExecutorOf,
    n_jobs: int,
    memory_bytes: int,
    progress: Progress,
    say: Say,
) -> list[Row]:
    """Return one row per cell, in order; receipts are written to ``folder`` as cells end.

    A cell whose receipt is there and states the same inputs is not run again. At most ``n_jobs`` run at a
    time, and only as many as need ``memory_bytes`` together.

    Raises:
        BadInputError: a model is unusable, a cell needs more memory than there is, or nothing can be written.
    """
    rows: dict[Cell, Row] = {}
    waiting: list[Cell] = []
    for cell in sweep.cells:
        found = _existing(sweep, cell, folder, say)
        if found is None:
            waiting.append(cell)
        else:
            rows[cell] = Row.of(cell, sweep.file(cell), found)
    n_cells = len(sweep.cells)
    if rows:
        say(f"{len(rows)} of {n_cells} cells are there already")
    needs = {cell: _needed(sweep, cell) for cell in waiting}
    for cell, needed in needs.items():
        if needed > memory_bytes:
            raise BadInputError(
                f"a comparison of {sweep.models[cell.model].name} takes up to {needed >> 20} MiB, and there are "
                f"{memory_bytes >> 20}; free some, or give --memory what it may take"
            )
    running: dict[Future[job.Outcome], Cell] = {}
    progress("cells", len(rows), n_cells)
    while waiting or running:
        free = memory_bytes - sum(needs[cell] for cell in running.values())
        while waiting and len(running) < n_jobs and needs[waiting[0]] <= free:
            cell = waiting.pop(0)
            future = executor_of(needs[cell]).submit(job.run, sweep.arguments(cell), _environment(cell))
            running[future] = cell
            free -= needs[cell]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell = running.pop(future)
            rows[cell] = _finished(sweep, cell, folder, future.result())
            progress("cells", len(rows), n_cells)
    return [rows[cell] for cell in sweep.cells]


@contextmanager
def local_processes(n_jobs: int) -> Iterator[ExecutorOf]:
    """Yield what runs cells in processes of this machine; they are terminated when the block is left early."""
    with ThreadPoolExecutor(n_jobs) as pool:
        try:
            yield lambda needed: pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            job.stop()
            raise


def _needed(sweep: Sweep, cell: Cell) -> int:
    n_after = sweep.n_steps if sweep.n_steps is not None else sweep.n_decode
    return needed_bytes(
        sweep.models[cell.model], sweep.prompts[cell.prompt], DEFAULT_DECODE if n_after is None else n_after
    )


def _environment(cell: Cell) -> dict[str, str]:
    held = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return held if cell.kernel is None else {**held, KERNEL_VARIABLE: cell.kernel}


def _finished(sweep: Sweep, cell: Cell, folder: Path, outcome: job.Outcome) -> Row:
    """Write the receipt that a cell printed; a cell without one is an error of this cell."""
    code = outcome.exit_code
    if not outcome.printed or code not in (0, 1, 3):
        # Of a process that was killed, or told us nothing: what it printed is not a receipt.
        code = code if code in (2, 3, 4, 5) else EngineCrashError.exit_code
        return Row.failed(cell, code, outcome.message or f"ended with {outcome.exit_code} and no receipt")
    name = sweep.file(cell)
    try:
        made = Receipt(unpack(parse_json(outcome.printed, name), len(outcome.printed), name))
        validate(made, name)
    except BadInputError as error:
        return Row.failed(cell, EngineCrashError.exit_code, str(error))
    why = conflict(sweep, cell, made)
    if why is not None:
        return Row.failed(cell, EngineCrashError.exit_code, f"the receipt is of another comparison: {why}")
    write(folder / name, made)
    return Row.of(cell, name, made)


def _existing(sweep: Sweep, cell: Cell, folder: Path, say: Say) -> Receipt | None:
    """Return the receipt of a cell that has to be run no more; an engine that was missing may be there now."""
    path = folder / sweep.file(cell)
    if not path.exists():
        return None
    try:
        found = read(path)
    except BadInputError as error:
        say(f"run again: {error}")
        return None
    why = conflict(sweep, cell, found)
    if why is not None:
        say(f"run again: {path.name}: {why}")
    return None if why is not None or found["thresholds"] is None else found


def conflict(sweep: Sweep, cell: Cell, receipt: Receipt) -> str | None:
    """Return in what a receipt is not one of this cell, None where it is."""
    others = [] if digest(receipt) == receipt["digest"] else ["digest"]
    others += other_inputs(sweep.stated, cell, receipt)
    return f"other {others[0]}" if others else None
