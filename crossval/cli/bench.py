"""``crossval bench``."""

from __future__ import annotations

from typing import Any

import click

from crossval import api
from crossval.bench.measures import BOUNDED
from crossval.cli.metamorphic import check_kernel
from crossval.cli.options import MAX_THREADS, MODEL, count, receipt_command
from crossval.receipts.file import Receipt

MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader represents exactly."""
_RATIOS = [
    click.option(
        f"--min-{name.replace('_', '-')}-ratio",
        f"min_{name}_ratio",
        type=click.FloatRange(0, 1e6, min_open=True),
        metavar="R",
        help=f"Minimum ratio of our speed to the reference's: {name.replace('_', ' ')}. Default: any.",
    )
    for name in BOUNDED
]
"""``--min-NAME-ratio`` of every measure that can have a bound."""


def _kernel(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        check_kernel(value)
    return value


@receipt_command(
    "bench",
    count("--prompt-tokens", "n_prompt", "Length of the prompt.", 128),
    count("--decode", "n_decode", "Tokens to decode after it.", 16),
    count("--rounds", "n_rounds", "Measured rounds, after one warm-up round.", 5, high=1000),
    count(
        "--threads",
        "n_threads",
        "Threads of each engine. Default: as many as there are cores to use.",
        high=MAX_THREADS,
    ),
    click.option(
        "--kernel",
        callback=_kernel,
        metavar="NAME",
        help="Kernel family of our engine. Default: the best of this CPU.",
    ),
    count("--seed", "seed", "Seed of the random token ids.", 0, low=0, high=MAX_SEED),
    click.option(
        "--reference",
        type=click.Choice(["auto", "bitnet.cpp"]),
        default="auto",
        show_default=True,
        help="Live bitnet.cpp only: a recorded trace has no speed.",
    ),
    *_RATIOS,
    MODEL,
)
def command(say: object, **options: Any) -> Receipt:
    """Measure our engine and live bitnet.cpp side by side, and check that they agree.

    Measures prompt processing, decoding, the first token of a fresh process, memory, and the weight
    bandwidth next to the read bandwidth of this machine. Both engines run in every round,
    alternately, on the same tokens; read the ratios, because machines are noisy. Exit 0 when
    everything was measured, all logits are bit-identical and every ratio is at least the minimum
    required; otherwise 1; 3 without bitnet.cpp.

    \b
    Example:
      crossval bench
      crossval bench --model model.gguf --threads 4 --min-decode-ratio 1 --receipt bench.json
    """
    ratios = {name: options.pop(f"min_{name}_ratio") for name in BOUNDED}
    return api.bench_engines(min_ratios=ratios, **options)
