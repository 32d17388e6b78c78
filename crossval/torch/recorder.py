"""Record a trace from any PyTorch model: one call, no copy of the model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from crossval.capture import greedy_token
from crossval.engines import tap_maps as maps
from crossval.engines.record import trace_model
from crossval.errors import BadInputError
from crossval.passes import EngineIdentity
from crossval.torch.hooked import Forward, HookedModel
from crossval.traces.read import TraceInfo
from crossval.traces.write import TraceWriter


def record(
    model: Any,
    token_ids: Sequence[int],
    model_file: str | Path,
    out: str | Path,
    *,
    tap_map: str | Path = "huggingface",
    steps: int = 0,
    forward: Forward | None = None,
    prompt_text: str | None = None,
    overwrite: bool = False,
) -> TraceInfo:
    """Run a prompt and ``steps`` greedily decoded tokens through a model, and write what its modules compute.

    ``model``: a ``torch.nn.Module`` in evaluation mode. ``model_file``: the GGUF file of the same model.
    ``out``: the trace's directory (docs/trace-format.md). ``tap_map``: a shipped map's name or a file
    (docs/tap-maps.md). ``forward(token_ids, start)`` runs one pass of a model that is not a causal model of
    transformers, keys and values of earlier passes included, and returns the logits.

    Raises:
        BadInputError: no tokens, an unusable model file or tap map, a model of another shape, logits that are not
            finite, or a directory that cannot hold a trace.
    """
    ids = tuple(map(int, token_ids))
    if not ids:
        raise BadInputError("the prompt has no tokens; there is nothing to record")
    if steps < 0:
        raise BadInputError(f"steps must not be negative, got {steps}")
    shape = trace_model(model_file)
    hooked = HookedModel(model, maps.load(tap_map), shape, forward)
    with TraceWriter(out, shape, overwrite=overwrite) as writer, hooked:
        fed = ids
        for step in range(steps + 1):
            recorded = hooked.eval(fed)
            writer.add_pass(recorded)
            token = greedy_token(recorded)
            if token is None and step < steps:
                raise BadInputError(f"pass {step}: the logits of the last token are not finite")
            fed = (token or 0,)
        return writer.finish(engine=identity(model, hooked), prompt_ids=ids, prompt_text=prompt_text)


def identity(model: Any, hooked: HookedModel, name: str | None = None) -> EngineIdentity:
    """Describe a model that was recorded; ``name``: what to call it, else its class."""
    config = getattr(model, "config", None)
    linears = {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}
    settings = {
        "model_class": type(model).__name__,
        "linear_classes": ", ".join(sorted(linears)),
        "attention": getattr(config, "_attn_implementation", None),
        "tensors": ", ".join(f"{count} in {dtype}" for dtype, count in hooked.dtypes().items()),
        "n_threads": torch.get_num_threads(),
        "device": str(next((p.device for p in model.parameters()), "cpu")),
    }
    return EngineIdentity(
        name=name or type(model).__name__,
        version=versions(),
        numerics=hooked.numerics(),
        settings=settings,
    )


def versions() -> str:
    """Return the versions of PyTorch and transformers."""
    found = [f"torch {torch.__version__}"]
    with suppress(importlib.metadata.PackageNotFoundError):
        found.append(f"transformers {importlib.metadata.version('transformers')}")
    return ", ".join(found)
