"""Our engine against live bitnet.cpp, every tap of every layer, bit for bit (``python -m tests.same_bits``).

Five models (the shipped one and four synthetic shapes), prompts of 1 to 128 tokens and decoded tokens behind each,
every kernel this CPU runs. ``--library`` names a build of bitnet.cpp, of March 2026 or of main; how it rounds is
found out by probing it, and where main computes something else than the model, our engine does the same.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from bitnet_py.synth_random import Stream
from crossval.bitnet_cpp.library import find_library
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.compare.metrics import ulp_distance
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from tests.healthy import write_models
from tests.support.families import FAMILIES

LONGEST = 128
N_DECODE = 2


@dataclass
class Score:
    """What was compared for one model, and what differed."""

    n_prompts: int = 0
    n_taps: int = 0
    n_values: int = 0
    different: dict[str, list[int]] = field(default_factory=dict)
    """By kind of tap: how many values differ, and the largest distance in ulp."""

    def add(self, name: str, theirs: npt.NDArray[np.float32], ours: npt.NDArray[np.float32]) -> None:
        """Compare one tap of one pass.

        Raises:
            AssertionError: the shapes differ.
        """
        assert theirs.shape == ours.shape, (name, theirs.shape, ours.shape)
        self.n_taps += 1
        self.n_values += theirs.size
        n_different = int(np.count_nonzero(theirs.view(np.uint32) != ours.view(np.uint32)))
        if n_different:
            entry = self.different.setdefault(taps.parse(name).tap, [0, 0])
            entry[0] += n_different
            entry[1] = max(entry[1], int(ulp_distance(theirs, ours).max()))

    def __str__(self) -> str:
        """Return the score as a line."""
        found = "; ".join(f"{tap}: {n} differ, up to {ulp} ulp" for tap, (n, ulp) in self.different.items())
        return f"{self.n_prompts} prompts, {self.n_taps} taps, {self.n_values} values: {found or 'all bits equal'}"


def lengths(n_prompts: int) -> list[int]:
    """Return the lengths of the prompts: 1 and ``LONGEST``, the rest drawn between."""
    stream = Stream(0, "same bits lengths")
    return [1, LONGEST, *(1 + stream.below(LONGEST) for _ in range(n_prompts - 2))][:n_prompts]


def compare(
    model: Path,
    library: Path,
    kernel: str | None,
    lengths: Sequence[int],
    n_decode: int = N_DECODE,
    *,
    flash_attention: bool = False,
    n_threads: int = 2,
) -> Score:
    """Run prompts of these lengths on one model and compare every tap of every pass that the library computes."""
    score = Score()
    with ExitStack() as stack:
        reference = stack.enter_context(
            BitnetCppRunner(model, library=library, n_threads=n_threads, flash_attention=flash_attention)
        )
        numerics = reference.identity.numerics
        engine = stack.enter_context(
            BitnetPyRunner(model, n_threads=2, kernel=kernel, numerics=numerics, follow_reference_graph=True)
        )
        config = engine.model.config
        spec = SpecWeights(model).config
        names = [op.output for op in op_table(spec)]
        inside = numerics.inside_others(config.arch, spec.input_norms)
        hidden = {"kq", "kq_soft_max"} & inside  # all else ours has as tensors, whatever the library does
        of_engine = {name for name in names if taps.parse(name).tap not in hidden}
        of_library = {name for name in of_engine if taps.parse(name).tap not in inside}
        for number, length in enumerate(lengths):
            stream = Stream(number, "same bits prompt")
            ids = [stream.below(config.vocab_size) for _ in range(length)]
            reference.reset()
            engine.reset()
            for _ in range(1 + n_decode):
                theirs, ours = reference.eval(ids, names), engine.eval(ids, names)
                assert set(ours.taps) == of_engine
                assert set(theirs.taps) == of_library
                for name in theirs.taps:
                    score.add(name, theirs.taps[name].array, ours.taps[name].array)
                ids = [int(theirs.taps["result_output"].array[-1].argmax())]
            score.n_prompts += 1
    return score


@click.command(help=__doc__)
@click.option("--prompts", "n_prompts", type=click.IntRange(2), default=50, show_default=True)
@click.option(
    "--library", type=click.Path(exists=True, path_type=Path), help="libllama.so; default: the built one."
)
@click.option("--flash-attention", is_flag=True, help="Of main: attention as one operation.")
def main(n_prompts: int, library: Path | None, flash_attention: bool) -> None:
    """Print one line per model and kernel; exit 1 when any bit differs."""
    found = find_library() if library is None else None
    path = library or (found.path if found else None)
    if path is None:
        raise click.UsageError("expected a built bitnet.cpp (make fetch-cpp, or --library), found none")
    start_s, same = time.perf_counter(), True
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, _, _) in write_models(Path(folder)).items():
            for kernel in FAMILIES:
                score = compare(model, path, kernel, lengths(n_prompts), flash_attention=flash_attention)
                same = same and not score.different
                click.echo(f"{name}, {kernel}: {score}")
    click.echo(f"{time.perf_counter() - start_s:.0f} s")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
