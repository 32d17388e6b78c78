"""``crossval record``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crossval import api
from crossval.cli import output
from crossval.cli.options import MODEL, PATH, TEMPLATE, plain_command
from crossval.engines.registry import live_words
from crossval.reports import render


@plain_command(
    "record",
    click.option("--prompt", required=True, metavar="TEXT", help="Text the engine reads."),
    click.option("--out", "out_dir", required=True, type=PATH, metavar="DIR", help="New trace."),
    click.option(
        "--engine",
        type=click.Choice(live_words()),
        default="bitnet.cpp",
        show_default=True,
        help="Engine to record.",
    ),
    click.option(
        "--decode",
        "n_decode",
        type=click.IntRange(0, 100_000),
        default=4,
        show_default=True,
        help="Decoded tokens.",
    ),
    click.option("--outline", is_flag=True, help="Record layer outputs and logits only, not every tap."),
    TEMPLATE,
    click.option(
        "--threads", "n_threads", type=click.IntRange(1, 1024), metavar="N", help="Threads of the engine."
    ),
    click.option("--overwrite", is_flag=True, help="Replace an earlier trace in DIR."),
    MODEL,
)
def command(out_dir: Path, **options: Any) -> None:
    """Record an engine's taps for one prompt: a golden when the engine is real bitnet.cpp.

    The trace lets anyone compare against this engine later without having it.

    \b
    Example:
      crossval record --prompt "What is 2+2?" --out traces/sum
    """
    with output.progress() as progress:
        info = api.record(out_dir=out_dir, progress=progress, **options)
    console = render.console()
    n_taps = sum(len(one.taps) for one in info.passes)
    render.show_line(console, f"recorded {len(info.passes)} passes, {n_taps} taps of {info.engine.name}")
    render.show_path(console, "trace", out_dir)
