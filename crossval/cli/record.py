"""``crossval record``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import crossval
from crossval.cli import output
from crossval.cli.options import (
    MODEL,
    TEMPLATE,
    THREADS,
    count,
    engine_option,
    file,
    plain_command,
    prompt_option,
)
from crossval.console import show_line
from crossval.engines.registry import live_words


@plain_command(
    "record",
    prompt_option("Text the engine reads."),
    file("--out", "out_dir", "New trace.", "DIR", required=True),
    engine_option("engine", live_words(), "bitnet.cpp", "Engine to record.", envvar=None),
    count("--decode", "n_decode", "Decoded tokens. Default: 4, of an embedding model 0.", low=0),
    click.option("--outline", is_flag=True, help="Record layer outputs and logits only, not every tap."),
    TEMPLATE,
    THREADS,
    click.option("--overwrite", is_flag=True, help="Replace an earlier trace in DIR."),
    MODEL,
)
def command(out_dir: Path, **options: Any) -> None:
    """Record an engine's taps for one prompt: a golden when the engine is real bitnet.cpp.

    With the trace, anyone can compare against this engine later without having it.

    \b
    Example:
      crossval record --prompt "What is 2+2?" --out traces/sum
    """
    with output.progress() as progress:
        info = crossval.record(out_dir=out_dir, progress=progress, **options)
    out = output.screen()
    n_taps = sum(len(one.taps) for one in info.passes)
    show_line(out, f"recorded {len(info.passes)} passes, {n_taps} taps of {info.engine.name}")
    show_line(out, f"trace: {out_dir}")
