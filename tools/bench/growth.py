"""How this engine's cost grows with prompt length, context, threads, layers and width: a Markdown table each.

    python tools/bench/growth.py [--model MODEL] [--rounds 3]

``--model`` is used for length, context and threads (default: the shipped one). Layers and width are
measured on synthetic models written for the purpose. Within one table the settings alternate, so that
a machine whose speed changes treats them alike.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np

from bitnet_py import Model, synth
from bitnet_py.bench import random_ids
from bitnet_py.model import available_cores
from bitnet_py.resources import default_model_path

LENGTHS = (16, 64, 256, 1024, 4096)
CONTEXTS = (128, 512, 2048, 4096)
LAYERS = (2, 4, 8, 16)
DIMS = (512, 1024, 2048, 4096)
N_PROMPT = 64
N_DECODE = 8

Timing = Callable[[], float]


def prefill_s(model: Model, n_tokens: int) -> float:
    """Seconds of a prompt with an empty cache."""
    ids = random_ids(0, n_tokens, model.config.vocab_size)
    cache = model.new_cache()
    begun = time.perf_counter()
    model.forward(ids, cache)
    return time.perf_counter() - begun


def decode_s(model: Model, n_context: int) -> float:
    """Seconds per decoded token after a context of ``n_context`` tokens, which grows by a few tokens meanwhile.

    The context is random numbers, as small as those of a model, so no prompt has to be run. The cost of a
    pass depends on them only where scores differ by more than 86.
    """
    generator = np.random.default_rng(0)
    cache = model.new_cache()
    cache.reserve(n_context + N_DECODE)
    for keys, values in zip(cache.keys[:, :n_context], cache.values[:, :, :n_context], strict=True):
        for stored in (keys, values):
            numbers = 0.1 * generator.standard_normal(stored.shape, np.float32)
            stored[...] = numbers.astype(np.float16).view(np.uint16)
    cache.n_tokens = n_context
    ids = random_ids(0, N_DECODE, model.config.vocab_size)
    begun = time.perf_counter()
    for token in ids:
        model.forward([token], cache)
    return (time.perf_counter() - begun) / N_DECODE


def in_turn(timings: Sequence[Timing], n_rounds: int) -> list[float]:
    """Median seconds of each, alternating, after one warm-up round."""
    taken: list[list[float]] = [[] for _ in timings]
    for index in range(n_rounds + 1):
        for values, timing in zip(taken, timings, strict=True):
            seconds = timing()
            if index:
                values.append(seconds)
    return [statistics.median(values) for values in taken]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one Markdown table."""
    for cells in (head, ["---"] * len(head), *rows):
        click.echo(f"| {' | '.join(cells)} |")
    click.echo()


def ms(seconds: float) -> str:
    """Milliseconds with three significant digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def lengths(model: Model, n_rounds: int) -> None:
    """Prompt lengths of one model."""
    known = [n for n in LENGTHS if n <= model.config.context_length]
    found = in_turn([partial(prefill_s, model, n) for n in known], n_rounds)
    rows = [[str(n), ms(s), ms(s / n)] for n, s in zip(known, found, strict=True)]
    table(("prompt tokens", "ms", "ms per token"), rows)


def contexts(model: Model, n_rounds: int) -> None:
    """Context lengths after which one token is decoded."""
    most = model.config.context_length
    known = [min(n, most - N_DECODE) for n in CONTEXTS if n <= most]
    found = in_turn([partial(decode_s, model, n) for n in known], n_rounds)
    table(("context", "ms per decoded token"), [[str(n), ms(s)] for n, s in zip(known, found, strict=True)])


def both(models: Sequence[tuple[str, Model]], n_rounds: int, head: str) -> None:
    """A prompt and decoding on several models."""
    prompts = in_turn([partial(prefill_s, model, N_PROMPT) for _, model in models], n_rounds)
    tokens = in_turn([partial(decode_s, model, N_PROMPT) for _, model in models], n_rounds)
    rows = [[name, ms(a / N_PROMPT), ms(b)] for (name, _), a, b in zip(models, prompts, tokens, strict=True)]
    table((head, f"ms per token of a prompt of {N_PROMPT}", "ms per decoded token"), rows)


def synthetic(folder: Path, *, dim: int, n_layers: int) -> Model:
    """A model with a small LM head, so that the layers dominate."""
    path = folder / f"{dim}-{n_layers}.gguf"
    heads = {"n_heads": dim // 128, "n_kv_heads": dim // 512}
    synth.write_model(path, synth.SynthConfig(n_layers=n_layers, dim=dim, hidden_dim=3 * dim, **heads))
    return Model.from_gguf(path)


@click.command(help=__doc__)
@click.option("--model", "path", type=click.Path(path_type=Path), help="GGUF file. Default: the shipped one.")
@click.option("--rounds", "n_rounds", type=click.IntRange(1), default=3, show_default=True)
def main(path: Path | None, n_rounds: int) -> None:
    """Print every table."""
    path = path or default_model_path()
    with Model.from_gguf(path) as model:
        click.echo(f"{path.name}, {model.n_threads} threads, kernel {model.kernel_name}\n")
        lengths(model, n_rounds)
        contexts(model, n_rounds)
    counts = range(1, available_cores() + 1)
    both([(str(n), Model.from_gguf(path, n_threads=n)) for n in counts], n_rounds, "threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        deep = [(str(n), synthetic(folder, dim=1024, n_layers=n)) for n in LAYERS]
        both(deep, n_rounds, "layers, dim 1024")
        wide = [(str(dim), synthetic(folder, dim=dim, n_layers=4)) for dim in DIMS]
        both(wide, n_rounds, "dim, 4 layers")


if __name__ == "__main__":
    main()
