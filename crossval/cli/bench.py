"""``crossval bench``."""

from __future__ import annotations

from typing import Any

import click

import crossval
from crossval.bench.measures import BOUNDED
from crossval.cli.metamorphic import check_kernel
from crossval.cli.options import FOLLOW, MAX_THREADS, MODEL, count, engine_option, receipt_command
from crossval.engines.registry import live_words
from crossval.receipts.file import Receipt

MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader represents exactly."""
_RATIOS = [
    click.option(
        f"--min-{name.replace('_', '-')}-ratio",
        f"min_{name}_ratio",
        type=click.FloatRange(0, 1e6, min_open=True),
        metavar="R",
        help=f"Minimum ratio of the candidate's {name} speed to every reference's. Default: any.",
    )
    for name in BOUNDED
]
"""``--min-NAME-ratio`` of every measure that can have a bound."""
_LIVE = [word for word in live_words() if word != "spec"]


def _kernel(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        check_kernel(value)
    return value


@receipt_command(
    "bench",
    count("--prompt-tokens", "n_prompt", "Length of the prompt.", 128),
    count("--decode", "n_decode", "Tokens to decode after it.", 16),
    count("--rounds", "n_rounds", "Measured rounds, after one warm-up round.", 9, high=1000),
    count(
        "--threads",
        "n_threads",
        "Threads of each engine. Default: for each engine and measure as many as are fastest here.",
        high=MAX_THREADS,
    ),
    click.option(
        "--kernel",
        callback=_kernel,
        metavar="NAME",
        help="Kernel family of bitnet_py as the candidate. Default: the best of this CPU.",
    ),
    count("--seed", "seed", "Seed of the random token ids.", 0, low=0, high=MAX_SEED),
    engine_option(
        "candidate",
        _LIVE,
        "bitnet_py",
        "Engine under test: ours, or a build of bitnet.cpp or llama.cpp (PATH: a library, a build directory "
        "or a source checkout).",
    ),
    engine_option(
        "reference",
        ("auto", *_LIVE),
        ["auto"],
        "What it is measured beside; may be repeated. auto: live bitnet.cpp. Only live engines: a recorded "
        "trace has no speed.",
        multiple=True,
        show_default="auto",
        envvar=None,
    ),
    *_RATIOS,
    FOLLOW,
    MODEL,
)
def command(say: object, **options: Any) -> Receipt:
    """Measure engines side by side, each with the threads that suit it, and check that they agree.

    Measures prompt processing, decoding, the first token of a fresh process, memory, and the weight
    bandwidth next to the read bandwidth of this machine. First every engine is tried with several
    numbers of threads, pinned and free. Then all engines run in every round, in turn, on the same
    tokens; read the ratios, because machines are noisy. A measure with two speeds, or slower than a
    single thread, is flagged and makes no ratio. Exit 0 when everything was measured, all logits
    agree (bit-identical where the engines state the same arithmetic) and every ratio is at least
    the minimum required; 1 when logits or a ratio do not; 3 when something could not be measured.

    \b
    Example:
      crossval bench
      crossval bench --reference bitnet.cpp --reference bitnet.cpp:../BitNet-main
      crossval bench --candidate bitnet.cpp:../my-fork --min-decode-ratio 1 --receipt bench.json
    """
    ratios = {name: options.pop(f"min_{name}_ratio") for name in BOUNDED}
    return crossval.bench_engines(min_ratios=ratios, **options)
