"""Bugs of an engine that does not state how it rounds, on every choice of taps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import product

from bitnet_py.resources import default_model_path
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model.config import SpecConfig
from crossval.model.weights import SpecWeights
from tests.support.healthy_recordings import ours
from tests.support.judged import judge
from tests.support.numpy_bitnet.engine import Mistake
from tests.support.numpy_bitnet.mistakes import MISTAKES, first_place, in_layers
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.recorded import only, record
from tests.support.numpy_bitnet.runner import NumpyBitnetRunner
from tests.support.recordings import RECORDINGS
from tests.zoo.coarse import COLUMNS, GREEDY, Cell, judged_greedy, leaves_no_trace, placed, said
from tests.zoo.detect import Replay

PROMPT = (1019, 273, 271, 220, 17, 10, 17, 30)
"""What is 2+2?"""
N_DECODE = 3
LAYER = 2
IN_ALL_LAYERS_A_DEVIATION = "float activations"
"""What is found out as a property of the engine, where projections were recorded with what they read."""
INVISIBLE = frozenset({"eps x 10"})
"""Bugs that are smaller than a rounding in the middle of the model: not tried there."""


def unstated_cells(
    names: Sequence[str] = tuple(MISTAKES),
    recordings: Collection[str] = COLUMNS,
    layers: Sequence[int | None] = (None, LAYER),
    n_decode: int = N_DECODE,
) -> Iterator[Cell]:
    """Yield every mistake, in all layers (None) and in one, with every recording."""
    path = default_model_path()
    model, config = Model(path), SpecWeights(path).config
    with BitnetPyRunner(path, n_threads=1) as reference:
        for name, layer in product(names, layers):
            mistake = MISTAKES[name] if layer is None else in_layers(MISTAKES[name], [layer])
            if layer is None or name not in INVISIBLE:
                yield from _cells(model, config, reference, mistake, recordings, n_decode)


def _cells(
    model: Model,
    config: SpecConfig,
    reference: BitnetPyRunner,
    mistake: Mistake,
    recordings: Collection[str],
    n_decode: int,
) -> Iterator[Cell]:
    faulty = record(model, PROMPT, n_decode, mistakes=[mistake])
    decoded = [one.plan.token_ids[0] for one in faulty.passes[1:]]
    healthy = record(model, PROMPT, n_decode, forced=decoded)
    reference.reset()
    right = ours(reference, [one.plan for one in faulty.passes], model.n_layers)
    layers = range(model.n_layers) if mistake.layers is None else sorted(mistake.layers)
    places = [first_place(in_layers(mistake, [layer]), op) for layer in layers for op in mistake.ops]
    where = "all layers" if mistake.layers is None else f"layer {layers[0]}"
    for kept in RECORDINGS:
        if kept.name not in recordings:
            continue
        found = judge(
            Replay(only(faulty, kept.keeps)), Replay(right), PROMPT, model.path,
            n_decode=n_decode, diagnosed=False,
        )  # fmt: skip
        place = placed(found, places, "prefill", kept.keeps, config)
        place = "found" if _is_said(mistake, found.verdict) else place
        if place == "parity" and leaves_no_trace(healthy, faulty, kept.keeps):
            place = "no trace"
        yield Cell(mistake.name, f"{mistake.name}, {where}", kept.name, place, found.verdict, said(found.guilty))
    if GREEDY in recordings:
        candidate = NumpyBitnetRunner(model, mistakes=[mistake])
        verdict, place, at = judged_greedy(candidate, reference, PROMPT, SpecWeights(model.path), places)
        place = "found" if _is_said(mistake, verdict) else place
        yield Cell(mistake.name, f"{mistake.name}, {where}", GREEDY, place, verdict, at)


def _is_said(mistake: Mistake, verdict: str) -> bool:
    """Return whether a verdict says of a mistake in all layers that it is how the engine computes."""
    return verdict == "deviates" and mistake == MISTAKES[IN_ALL_LAYERS_A_DEVIATION]
