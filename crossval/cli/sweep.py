"""``crossval sweep``."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import crossval
from bitnet_py import _native
from bitnet_py.resources import default_model_path
from crossval.cli import output
from crossval.cli.options import PATH, REFERENCE, TEMPLATE, THREADS, count, file, plain_command
from crossval.console import show_line
from crossval.engines.registry import words
from crossval.errors import UsageError
from crossval.files import write_atomically
from crossval.receipts.file import to_text
from crossval.sweep import cluster, memory, run, summary
from crossval.sweep.page import make_page
from crossval.sweep.plan import Sweep
from crossval.sweep.show import show_sweep

NO_LIMIT_BYTES = 1 << 62
"""Where Dask counts the memory."""


def _many(word: str, name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return click.option(word, name, multiple=True, metavar=metavar, help=f"{help_text} Repeatable.", **more)


@plain_command(
    "sweep",
    _many("--models", "models", "PATH", "GGUF model. Default: the model that ships with crossval.", type=PATH),
    file(
        "--prompts",
        "prompts_path",
        "One prompt per line, or JSON lines, as `crossval greedy` reads.",
        required=True,
    ),
    _many("--candidates", "candidates", "|".join(words("candidate")), "Engine under test. Default: bitnet_py."),
    _many(
        "--kernels",
        "kernels",
        "NAME",
        "Kernel family of bitnet_py; candidates of other names have none. Default: its own choice.",
        type=click.Choice([family.name for family in _native.kernel_families()]),
    ),
    file("--out", "out", "Folder for the summary and the receipts.", "DIR", required=True),
    count("--steps", "n_steps", "Compare that many greedy tokens (`crossval greedy`), not tensors."),
    count("--decode", "n_decode", "Tokens to decode after the prompt, where tensors are compared.", low=0),
    REFERENCE,
    TEMPLATE,
    THREADS,
    count("--jobs", "n_jobs", "Cells that run at a time, if they fit into memory.", 1, high=1024),
    click.option(
        "--memory",
        "memory_gib",
        type=click.FloatRange(0, min_open=True),
        metavar="GIB",
        help="Memory that cells may take together. Default: what is available when the sweep starts.",
    ),
    click.option("--dask", "address", metavar="ADDRESS", help="Run the cells on this Dask cluster (extra dask)."),
    file("--html", "html", "Write the page of the sweep to this file.", "OUT"),
    click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout."),
)
def command(
    models: tuple[Path, ...],
    prompts_path: Path,
    candidates: tuple[str, ...],
    out: Path,
    n_jobs: int,
    memory_gib: float | None,
    address: str | None,
    html: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Compare every model with every prompt, candidate and kernel family.

    Each cell is a comparison by `crossval layers`, or `crossval greedy` with --steps, in a process of
    its own; its receipt goes to DIR/cells. DIR/sweep.json is the summary, which `crossval gate`
    checks together with the receipts. Rerun the same command to resume: a cell whose receipt is there
    and states the same inputs is not run again. Exit 0 when every cell shows parity, 1 when one does
    not, 3 when one could not be compared, 4 or 5 when the command of one failed.

    \b
    Example:
      crossval sweep --prompts prompts.txt --kernels scalar --kernels avx2 --out my-sweep --jobs 2
      crossval gate my-sweep/sweep.json
    """
    if asked["n_steps"] is not None and asked["n_decode"] is not None:
        raise UsageError("--decode is for tensors: give --steps N or --decode N")
    read = crossval.read_prompts(prompts_path)
    prompts = [text for text in read if isinstance(text, str)]
    if len(prompts) < len(read):
        raise UsageError("prompts of a sweep are texts, not token ids")
    sweep = Sweep(models or (default_model_path(),), tuple(prompts), candidates or ("bitnet_py",), **asked)
    with output.progress() as progress, _executors(address, n_jobs, memory_gib) as (executor_of, n, memory_bytes):
        rows = run.run(
            sweep,
            out,
            executor_of=executor_of,
            n_jobs=n,
            memory_bytes=memory_bytes,
            progress=progress,
            say=lambda line: click.echo(line, err=True),
        )
    made = summary.build(sweep, rows)
    path = summary.save(out, made)
    if html is not None:
        write_atomically(html, make_page(made).encode())
    if as_json:
        output.write_json(to_text(made))
    else:
        show_sweep(output.screen(), made)
        show_line(output.screen(), f"summary: {path}")
    raise click.exceptions.Exit(summary.exit_code(made))


@contextmanager
def _executors(address: str | None, n_jobs: int, memory_gib: float | None) -> Any:
    """Yield what runs cells, how many at a time, and the bytes that they may take together."""
    if address is not None:
        with cluster.workers(address) as (executor_of, n_threads):
            yield executor_of, n_threads, NO_LIMIT_BYTES
        return
    given = memory.available_bytes() if memory_gib is None else int(memory_gib * (1 << 30))
    with run.local_processes(n_jobs) as executor_of:
        yield executor_of, n_jobs, given
