"""False alarms: healthy engines in many situations, each of which has to be parity (``python -m tests.healthy``).

With ``--recordings``: engines of many arithmetics, and less and less recorded (``healthy_recordings``). With
``--strangers``: the engines of ``examples/``, ours under another name on every architecture, and those in other
precisions (``healthy_strangers``).

Every run draws a model, a prompt, threads and a kernel from its own number, so that run 137 is the same
today and tomorrow. The reference is live bitnet.cpp where it is built, and otherwise our engine in another
configuration. What is checked is what ``crossval layers`` checks: the comparison, both audits and the verdict.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bitnet_py._native import kernel_families
from bitnet_py.resources import default_model_path
from bitnet_py.synth import SynthConfig, write_model
from bitnet_py.synth_random import Stream
from crossval.bitnet_cpp.library import find_library
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.compare import rows as compare
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.examine.examination import Examination, examine
from crossval.examine.verdict import AGREEMENT, Verdict, arbitrate
from crossval.passes import Runner
from tests.support import healthy_recordings, healthy_strangers

SHAPES: dict[str, dict[str, int]] = {
    "two heads share one": {"n_layers": 3, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 640},
    "one head": {"n_layers": 2, "dim": 128, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 384},
    "five heads, one KV head": {"n_layers": 2, "dim": 640, "n_heads": 5, "n_kv_heads": 1, "hidden_dim": 1792},
    "narrow heads": {"n_layers": 2, "dim": 640, "n_heads": 32, "n_kv_heads": 32, "hidden_dim": 384},
}
VOCAB_SIZE = 300
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 33, 48, 64)


@dataclass(frozen=True)
class Situation:
    """One run: the model, the prompt, and how the engines are set up."""

    number: int
    model: str
    n_tokens: int
    n_decode: int
    n_threads: int
    kernel: str

    @classmethod
    def draw(cls, number: int, models: list[str]) -> Situation:
        """Return situation ``number``."""
        stream = Stream(number, "healthy run")
        kernels = [family.name for family in kernel_families() if family.available]

        def one_of(items: Any) -> Any:
            return items[stream.below(len(items))]

        return cls(
            number,
            model=one_of(models),
            n_tokens=one_of(LENGTHS),
            n_decode=stream.below(4),
            n_threads=1 + stream.below(3),
            kernel=one_of(kernels),
        )

    def tokens(self, vocab_size: int) -> list[int]:
        """Return the prompt's token ids."""
        stream = Stream(self.number, "healthy prompt")
        return [stream.below(vocab_size) for _ in range(self.n_tokens)]


def write_models(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Return (path, layers, vocabulary) by name: the shipped model and one of each shape."""
    with BitnetPyRunner(default_model_path(), n_threads=1) as runner:
        config = runner.model.config
        models = {"shipped": (default_model_path(), config.n_layers, config.vocab_size)}
    for number, (name, shape) in enumerate(SHAPES.items()):
        path = folder / f"{number}.gguf"
        write_model(path, SynthConfig(**shape, vocab_size=VOCAB_SIZE, seed=number))
        models[name] = (path, shape["n_layers"], VOCAB_SIZE)
    return models


def verdict_of(found: Examination) -> Verdict:
    """Return the verdict of one run, reached as ``crossval layers`` reaches it."""
    status = compare.decide(found.result.rows, found.result.coverage)
    audits = found.audits
    return arbitrate(AGREEMENT[status], audits["candidate"].verdict, audits["reference"].verdict)


def run(n_runs: int, *, first: int = 0, live: bool | None = None) -> Iterator[tuple[Situation, Verdict]]:
    """Yield every situation and its verdict; ``live``: against bitnet.cpp (None: if it is built)."""
    library = find_library() if live is not False else None
    if live and library is None:
        raise click.UsageError("expected a built bitnet.cpp, found none")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        models = write_models(Path(folder))
        references: dict[str, Runner] = {}
        for number in range(first, first + n_runs):
            situation = Situation.draw(number, list(models))
            path, _, vocab_size = models[situation.model]
            if situation.model not in references:
                references[situation.model] = stack.enter_context(
                    BitnetPyRunner(path, n_threads=1) if library is None
                    else BitnetCppRunner(path, library=library.path)
                )  # fmt: skip
            with BitnetPyRunner(path, n_threads=situation.n_threads, kernel=situation.kernel) as candidate:
                found = examine(
                    candidate, references[situation.model], situation.tokens(vocab_size), path,
                    n_decode=situation.n_decode, full=True,
                )  # fmt: skip
                yield situation, verdict_of(found)


@click.command(help=__doc__)
@click.option("--runs", "n_runs", type=click.IntRange(1), default=500, show_default=True)
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first run.")
@click.option("--recordings", "which", flag_value="recordings", help="Many arithmetics, and fewer taps recorded.")
@click.option("--strangers", "which", flag_value="strangers", help="Engines of other makes.")
def main(n_runs: int, first: int, which: str | None) -> None:
    """Print every run that is not parity, and how many there were."""
    sys.exit({"recordings": _recordings, "strangers": _strangers, None: _live}[which](n_runs, first))


def _strangers(n_runs: int, first: int) -> int:
    """Print every false alarm with the number that repeats it, and the verdicts of each engine's runs."""
    counts: Counter[tuple[str, str]] = Counter()
    start_s, alarms = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        for situation, judged in healthy_strangers.run(range(first, first + n_runs), Path(folder)):
            counts[situation.engine, judged.verdict] += 1
            if judged.verdict not in situation.allowed:
                alarms += 1
                click.echo(f"{judged.verdict}: {situation}, {judged.guilty}")
    click.echo("\n".join(healthy_strangers.table(counts)))
    elapsed_s = time.perf_counter() - start_s
    click.echo(f"{n_runs} runs from {first} on, {alarms} false alarms, in {elapsed_s:.0f} s")
    return 1 if alarms else 0


def _recordings(n_runs: int, first: int) -> int:
    """Print every false alarm with the number that repeats it, and the results of each engine's runs."""
    library = find_library()
    counts: Counter[tuple[str, str, int]] = Counter()
    start_s, alarms = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        for situation, kept, judged in healthy_recordings.run(
            range(first, first + n_runs), Path(folder), library=library.path if library else None
        ):
            counts[situation.engine, kept, judged.exit_code] += 1
            if judged.exit_code not in (0, 3):
                alarms += 1
                click.echo(f"{judged.verdict}: {kept}, {situation}, {judged.guilty}")
    click.echo("\n".join(healthy_recordings.table(counts)))
    by_code = {code: sum(n for (_, _, one), n in counts.items() if one == code) for code in (0, 3)}
    click.echo(
        f"{n_runs} runs against {'live bitnet.cpp' if library else 'our engine'}, {counts.total()} recordings: "
        f"{by_code[0]} parity, {by_code[3]} not shown (exit code 3), "
        f"{alarms} false alarms, in {time.perf_counter() - start_s:.0f} s"
    )
    return 1 if alarms else 0


def _live(n_runs: int, first: int) -> int:
    against = "live bitnet.cpp" if find_library() else "our engine in another configuration"
    start_s, alarms = time.perf_counter(), 0
    for situation, verdict in run(n_runs, first=first):
        if verdict != "parity":
            alarms += 1
            click.echo(f"{verdict}: {situation}")
    elapsed_s = time.perf_counter() - start_s
    click.echo(f"{n_runs - alarms} of {n_runs} runs parity, against {against}, in {elapsed_s:.0f} s")
    return 1 if alarms else 0


if __name__ == "__main__":
    main()
