"""Record the goldens of the shipped model from live bitnet.cpp (``make record``).

Two short prompts with every tap, eight more with every layer's output and the logits, 32 greedy
steps each: enough to hold parity in CI without a C++ build, in under 10 MB.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from bitnet_py.errors import BitnetError
from bitnet_py.resources import default_model_path
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.engines.recorded import goldens_dir
from crossval.errors import CrossvalError
from crossval.model import taps
from crossval.traces.record import record_trace, trace_model

FULL_PROMPTS = ("What is 2+2?", "The capital of France is")
OUTLINE_PROMPTS = (
    "Hello",
    "Once upon a time, there was a small house at the end of the road.",
    "1, 2, 3, 4, 5,",
    "def add(a, b):\n    return a + b\n",
    "The opposite of hot is cold. The opposite of up is",
    "Monday, Tuesday, Wednesday,",
    "Is a whale larger than a mouse? Answer yes or no.",
    "naïve café, Zürich, 東京, 🙂",
)
N_DECODE = 32
N_DECODE_FULL = 1
"""Decode passes of the full prompts that get every tap too."""


def slug(prompt: str) -> str:
    """Return a directory name for a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"


def record_goldens(model_path: Path, out: Path) -> list[Path]:
    """Record every golden of a model into ``out``; returns the trace directories.

    Raises:
        UnavailableError: bitnet.cpp is not built.
        BadInputError, EngineCrashError: from the runner.
    """
    model = trace_model(model_path)
    outline = taps.outline_taps(model.n_layers)
    written = []
    with BitnetCppRunner(model_path) as runner:
        for prompt in (*FULL_PROMPTS, *OUTLINE_PROMPTS):
            full = prompt in FULL_PROMPTS
            directory = out / slug(prompt)
            record_trace(
                runner,
                model,
                directory,
                prompt_ids=runner.tokenize(prompt),
                prompt_text=prompt,
                n_decode=N_DECODE,
                select_prefill=None if full else outline,
                n_decode_full=N_DECODE_FULL if full else 0,
                overwrite=True,
            )
            written.append(directory)
    return written


@click.command(help=__doc__)
@click.option(
    "--model", type=click.Path(path_type=Path), default=None, help="GGUF file (default: the shipped one)."
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Default: beside the model.")
def main(model: Path | None, out: Path | None) -> None:
    """Command line of this module."""
    try:
        path = model or default_model_path()
        for directory in record_goldens(path, out or goldens_dir(path)):
            size = sum(f.stat().st_size for f in directory.iterdir())
            click.echo(f"{directory}  {size} bytes", err=True)
    except CrossvalError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BitnetError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(4)


if __name__ == "__main__":
    main()
