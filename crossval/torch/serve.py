"""The child process that runs transformers' model, and the commands it answers for ``TransformersRunner``.

Nothing is compiled by ``torch.compile`` here, so that what runs does not depend on a compiler, and nothing is
downloaded. ``crossval.child.serve`` describes requests and answers.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.integrations import bitnet

from crossval.child.protocol import Frame
from crossval.child.serve import serve
from crossval.engines import tap_maps
from crossval.engines.record import trace_model
from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256
from crossval.passes import PassRecord
from crossval.terms import LOGITS
from crossval.torch import huggingface
from crossval.torch.hooked import HookedModel
from crossval.torch.recorder import identity

LIBRARY = "libtorch_cpu.so"
"""Of PyTorch: what computes on the CPU."""


class Engine:
    """One model with hooks on it."""

    def __init__(self) -> None:
        self.hooked: HookedModel | None = None

    def load(self, path: str, dtype: str, linear_class: str | None, n_threads: int) -> dict[str, Any]:
        """Build the model and return what the runner states about it."""
        torch.set_num_threads(n_threads)
        torch.compiler.set_stance("force_eager")
        model = huggingface.from_gguf(path, dtype, linear_class)
        shape = trace_model(path)
        self.hooked = HookedModel(model, tap_maps.load("huggingface"), shape)
        self.hooked.__enter__()
        described = identity(model, self.hooked)
        digest = hashlib.sha256()
        for source in (inspect.getfile(type(model)), inspect.getfile(bitnet)):
            digest.update(Path(source).read_bytes())
        return {
            "version": described.version,
            "source_digest": digest.hexdigest(),
            "library_digest": file_sha256(Path(torch.__file__).parent / "lib" / LIBRARY),
            "settings": {name: value for name, value in described.settings.items() if name != "tensors"},
        }

    def eval(self, ids: list[int], select: list[str]) -> tuple[PassRecord, float]:
        """Run one pass; return the taps and how long it took, with the copying."""
        if self.hooked is None:
            raise ValueError("no model is loaded")
        begun = time.perf_counter()
        return self.hooked.eval(ids, select), time.perf_counter() - begun


def main(argv: list[str]) -> None:
    """Serve requests until the pipe closes; ``argv``: descriptors of requests, responses and lifeline."""
    engine = Engine()
    kinds = ((BadInputError, "bad_input"), (UnavailableError, "unavailable"))
    serve([int(fd) for fd in argv], lambda request: handle(engine, request), kinds)


def handle(engine: Engine, request: Frame) -> tuple[Any, dict[str, Any]]:
    """Return result and arrays of one request.

    Raises:
        BadInputError, UnavailableError: from the engine.
        ValueError: an unknown command.
    """
    header = request.header
    command = header.get("command")
    if command == "load":
        return engine.load(header["model"], header["dtype"], header["linear_class"], header["n_threads"]), {}
    if command == "reset" and engine.hooked is not None:
        engine.hooked.reset()
        return {}, {}
    if command == "eval":
        done, elapsed_s = engine.eval(request.arrays["token_ids"].tolist(), header["select"])
        rows = {name: tap.rows for name, tap in done.taps.items() if tap.rows is not None}
        return {"elapsed_s": elapsed_s, "rows": rows}, {name: tap.array for name, tap in done.taps.items()}
    if command == "eval_each":
        passes = [engine.eval([token], [LOGITS]) for token in request.arrays["token_ids"].tolist()]
        logits = np.concatenate([done.taps[LOGITS].array for done, _ in passes])
        return {"elapsed_s": [elapsed_s for _, elapsed_s in passes]}, {LOGITS: logits}
    raise ValueError(f"unknown command {command!r}")
