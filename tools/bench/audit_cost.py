"""Cost of the audit by prompt length and by layer count, on synthetic models; both should grow linearly.

    python tools/bench/audit_cost.py [--dim 640] [--rounds 3]

One engine, one prompt pass and two decoded tokens, every tap. Each row is the fastest of several rounds,
which alternate over the sizes. The last column is the time per additional token or layer, relative to
the smallest size.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np

from bitnet_py.synth import SynthConfig, write_model
from crossval.audit.audit import audit
from crossval.capture import Capture
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan

LENGTHS = (16, 32, 64, 128, 256)
LAYERS = (2, 4, 8, 16)
VOCAB_SIZE = 1024


def audit_s(path: Path, n_tokens: int) -> float:
    """Return the seconds of one audit of our engine, which must be clean."""
    ids = [int(i) for i in np.random.default_rng(n_tokens).integers(0, VOCAB_SIZE, n_tokens + 2)]
    plan = [
        PassPlan("prefill", tuple(ids[:n_tokens]), 0),
        *(PassPlan("decode", (ids[n_tokens + i],), n_tokens + i) for i in range(2)),
    ]
    with BitnetPyRunner(path) as runner:
        start_s = time.perf_counter()
        weights = SpecWeights(path)
        (found,) = audit([Capture(runner, weights.config, plan)], weights)
        elapsed_s = time.perf_counter() - start_s
    if found.verdict != "clean":
        raise click.ClickException(f"expected a clean audit, found {found.verdict}")
    return elapsed_s


def table(what: str, sizes: Sequence[int], measure: Callable[[int], float], rounds: int) -> None:
    """Measure every size in every round and print one row per size."""
    best = {size: min(times) for size, times in _rounds(sizes, measure, rounds).items()}
    click.echo(f"\n{what:>8}  seconds  ms per {what} beyond {sizes[0]}")
    for size, found_s in best.items():
        more = size - sizes[0]
        slope = f"{1e3 * (found_s - best[sizes[0]]) / more:.1f}" if more else ""
        click.echo(f"{size:>8}  {found_s:7.3f}  {slope}")


def _rounds(sizes: Sequence[int], measure: Callable[[int], float], rounds: int) -> dict[int, list[float]]:
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            times[size].append(measure(size))
    return times


@click.command(help=__doc__)
@click.option("--dim", type=click.IntRange(128), default=640, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def main(dim: int, rounds: int) -> None:
    """Command line of this module."""
    with tempfile.TemporaryDirectory() as folder:

        def model(n_layers: int) -> Path:
            path = Path(folder) / f"{n_layers}.gguf"
            if not path.exists():
                shape = SynthConfig(
                    n_layers=n_layers, dim=dim, n_heads=dim // 128, n_kv_heads=1, hidden_dim=dim * 3,
                    vocab_size=VOCAB_SIZE,
                )  # fmt: skip
                write_model(path, shape)
            return path

        table("token", LENGTHS, lambda n_tokens: audit_s(model(4), n_tokens), rounds)
        table("layer", LAYERS, lambda n_layers: audit_s(model(n_layers), 64), rounds)


if __name__ == "__main__":
    main()
