"""The results of the NumPy engine, as the harness reads them: a recording, or a trace on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from crossval.passes import EngineIdentity, Numerics, PassKind, PassPlan, PassRecord, TapArray
from crossval.traces.read import TraceModel
from crossval.traces.write import TraceWriter
from tests.support.numpy_bitnet.engine import Engine, Mistake
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.styles import PLAIN, Style
from tests.zoo.recording import Recording

HEAD = ("result_norm", "result_output")


def record(
    model: Model,
    prompt: Sequence[int],
    n_decode: int,
    style: Style = PLAIN,
    mistakes: Sequence[Mistake] = (),
    *,
    forced: Sequence[int] | None = None,
    numerics: Numerics | None = None,
) -> Recording:
    """Run a prompt and a few greedy tokens with every tap; ``numerics``: what the engine states.

    ``forced``: tokens to decode instead of its own.
    """
    engine = Engine(model, style, mistakes)
    size = style.split or len(prompt)
    pieces = [tuple(prompt[at : at + size]) for at in range(0, len(prompt), size)]
    passes = [one_pass(engine, piece) for piece in pieces]
    for i in range(n_decode):
        logits = passes[-1].taps["result_output"].array[-1]
        token = int(np.nan_to_num(logits).argmax()) if forced is None else forced[i]
        passes.append(one_pass(engine, (token,)))
    return Recording(EngineIdentity("numpy", numerics=numerics or Numerics()), passes)


def one_pass(engine: Engine, tokens: tuple[int, ...]) -> PassRecord:
    """Run the next pass with every tap."""
    start = engine.start
    kind: PassKind = "decode" if start and len(tokens) == 1 else "prefill"
    taps = {
        name: TapArray(np.ascontiguousarray(value, np.float32), (len(tokens) - 1,) if name in HEAD else None)
        for name, value in engine.forward(tokens).items()
    }
    return PassRecord(PassPlan(kind, tokens, start), taps)


def only(recording: Recording, keeps: Callable[[str], bool]) -> Recording:
    """Return the recording with fewer taps; arrays are shared."""
    passes = [
        PassRecord(one.plan, {name: tap for name, tap in one.taps.items() if keeps(name)})
        for one in recording.passes
    ]
    return Recording(recording.identity, passes)


def write_trace(recording: Recording, model: Model, prompt: Sequence[int], text: str | None, folder: Path) -> Path:
    """Write a recording as a trace and return its folder."""
    shape = TraceModel(
        model.sha256, model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim, model.dim, model.hidden_dim,
        len(model.embedding),
    )  # fmt: skip
    with TraceWriter(folder, shape) as writer:
        for one in recording.passes:
            writer.add_pass(one)
        writer.finish(engine=recording.identity, prompt_ids=tuple(prompt), prompt_text=text)
    return folder
