"""Our engine beside live bitnet.cpp: prefill and decode, interleaved in one run, same threads, same tokens.

    python bench/compare_engines.py [--model MODEL] [--prompt-tokens 128] [--decode 16] [--rounds 5] [--threads 2]

Needs bitnet.cpp (`make fetch-cpp`, or BITNET_CPP_LIB). Machines are noisy: read the ratios, which compare passes
that ran next to each other, not the absolute figures. The share of each in a round alternates in order.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np

from bitnet_py.resources import default_model_path
from crossval.errors import CrossvalError
from crossval.runners.base import Runner
from crossval.runners.bitnet_cpp import BitnetCppRunner
from crossval.runners.bitnet_py import BitnetPyRunner

LOGITS = ("result_output",)
REST_S = 0.3
"""Between engines: OpenMP workers of bitnet.cpp keep spinning for about 0.2 s after a pass."""


def prefill_s(runner: Runner, tokens: list[int]) -> float:
    """Time one prompt pass, as the engine itself measured it."""
    runner.reset()
    elapsed = runner.eval(tokens, LOGITS).elapsed_s
    assert elapsed is not None
    return elapsed


def decode_s(runner: Runner, tokens: list[int]) -> float:
    """Time single-token passes, appended to what the cache holds; seconds per token."""
    times = [runner.eval([token], LOGITS).elapsed_s or 0.0 for token in tokens]
    return sum(times) / len(times)


def show(what: str, ours: list[float], theirs: list[float], tokens: int) -> None:
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    click.echo(
        f"{what:<10} bitnet_py {tokens / statistics.median(ours):8.1f} tok/s   "
        f"bitnet.cpp {tokens / statistics.median(theirs):8.1f} tok/s   "
        f"speed ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


@click.command(help=__doc__)
@click.option(
    "--model", type=click.Path(path_type=Path), default=None, help="GGUF file (default: the shipped one)."
)
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--decode", "n_decode", default=16, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(model: Path | None, prompt_tokens: int, n_decode: int, rounds: int, threads: int) -> None:
    path = model or default_model_path()
    try:
        with BitnetCppRunner(path, n_threads=threads) as theirs:
            width = theirs.identity.numerics.simd_width or 8
            fused = bool(theirs.identity.numerics.fused_quantizer)
            with BitnetPyRunner(path, n_threads=threads, simd_width=width, fused_quantizer=fused) as ours:
                vocab = ours.model.config.vocab_size
                rng = np.random.default_rng(0)
                prompt = rng.integers(0, vocab, prompt_tokens).tolist()
                following = rng.integers(0, vocab, n_decode).tolist()
                times: dict[str, dict[str, list[float]]] = {
                    n: {"prefill": [], "decode": []} for n in ("ours", "theirs")
                }
                for round_index in range(rounds + 1):
                    pair = [("ours", ours), ("theirs", theirs)]
                    for name, runner in pair if round_index % 2 else reversed(pair):
                        time.sleep(REST_S)
                        a, b = prefill_s(runner, prompt), decode_s(runner, following)
                        if round_index:  # the first round warms caches and page tables
                            times[name]["prefill"].append(a)
                            times[name]["decode"].append(b)
                click.echo(f"{path.name}, {threads} threads, kernel {ours.model.kernel_name}, {rounds} rounds")
                show(
                    f"prefill {prompt_tokens}", times["ours"]["prefill"], times["theirs"]["prefill"], prompt_tokens
                )
                show("decode", times["ours"]["decode"], times["theirs"]["decode"], 1)
    except CrossvalError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
