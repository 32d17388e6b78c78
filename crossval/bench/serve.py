"""The child process in which our engine is measured, so that its memory is its own, as bitnet.cpp's is.

``crossval.child.serve`` describes requests and answers; the commands are those of
``crossval.bench.engine.BitnetPyProcess``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_py.errors import BitnetError
from crossval.child.protocol import Frame
from crossval.child.serve import serve
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.errors import BadInputError
from crossval.passes import Numerics


def main(argv: list[str]) -> None:
    """Serve requests until the pipe closes; ``argv``: descriptors of requests, responses, lifeline."""
    kinds = ((BadInputError, "bad_input"), (BitnetError, "bad_input"))
    serve([int(fd) for fd in argv], Served().handle, kinds)


class Served:
    """One model, served by frames of ``crossval.child.protocol``."""

    def __init__(self) -> None:
        self._runner: BitnetPyRunner | None = None

    def handle(self, request: Frame) -> tuple[Any, dict[str, Any]]:
        """Return result and arrays of one request.

        Raises:
            BadInputError, BitnetError: the model or the tokens are unusable.
            ValueError: an unknown command, or no model yet.
        """
        header = dict(request.header)
        command = header.pop("command", None)
        if command == "load":
            numerics = Numerics.from_json(header.pop("numerics"))
            self._runner = BitnetPyRunner(header.pop("model"), numerics=numerics, **header)
            return self._runner.__enter__().identity.to_json(), {}
        runner = self._runner
        if runner is None:
            raise ValueError(f"{command!r} before a model was loaded")
        if command == "reset":
            runner.reset()
            return {}, {}
        if command == "counters":
            return {"counters": [vars(count) for count in runner.counters()]}, {}
        if command in ("eval", "eval_each"):
            return _evaluate(runner, request.arrays["token_ids"].tolist(), each=command == "eval_each")
        if command == "best_each":
            return _best_each(runner, request.arrays["token_ids"].tolist())
        raise ValueError(f"unknown command {command!r}")


def _evaluate(runner: BitnetPyRunner, ids: list[int], *, each: bool) -> tuple[Any, dict[str, Any]]:
    passes = [runner.eval(part, ("result_output",)) for part in ([[one] for one in ids] if each else [ids])]
    logits = np.concatenate([one.taps["result_output"].array for one in passes])
    return {"elapsed_s": [one.elapsed_s for one in passes]}, {"result_output": logits}


def _best_each(runner: BitnetPyRunner, ids: list[int]) -> tuple[Any, dict[str, Any]]:
    runner.prepare_best()
    found = [runner.best(one) for one in ids]
    tokens = np.array([token_id for token_id, _, _ in found], np.int32)
    logits = np.array([logit for _, logit, _ in found], np.float32)
    return {"elapsed_s": [elapsed_s for _, _, elapsed_s in found]}, {"ids": tokens, "logits": logits}
