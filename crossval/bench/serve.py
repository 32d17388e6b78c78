"""The child process that runs our engine while it is measured: its memory is its own, as bitnet.cpp's is.

Same protocol as ``crossval.bitnet_cpp.serve``; commands ``load``, ``reset``, ``eval``, ``eval_each``,
``best_each`` and ``counters``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from crossval.bitnet_cpp.serve import Kinds, answer_requests, live_with_parent

if TYPE_CHECKING:
    from crossval.engines.bitnet_py import BitnetPyRunner


def main(argv: list[str]) -> None:
    """Serve requests until the pipe ends; ``argv``: descriptors of requests, responses, lifeline."""
    request_fd, response_fd, lifeline_fd = (int(fd) for fd in argv)
    live_with_parent(lifeline_fd)
    # NumPy multiplies nothing here: no pool of idle threads. bitnet.cpp's process has none either.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from bitnet_py.errors import BitnetError
    from crossval.errors import BadInputError

    kinds: Kinds = ((BadInputError, "bad_input"), (BitnetError, "bad_input"))
    answer_requests(request_fd, response_fd, Served().handle, kinds)


class Served:
    """One model behind the frames of ``crossval.child.protocol``."""

    def __init__(self) -> None:
        self._runner: BitnetPyRunner | None = None

    def handle(self, request: Any) -> tuple[Any, dict[str, Any]]:
        """Return result and arrays of one request.

        Raises:
            BadInputError, BitnetError: the model or the tokens are unusable.
            ValueError: an unknown command, or no model yet.
        """
        header = dict(request.header)
        command = header.pop("command", None)
        if command == "load":
            return self._load(**header), {}
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

    def _load(self, model: str, **options: Any) -> dict[str, Any]:
        from crossval.engines.bitnet_py import BitnetPyRunner

        self._runner = BitnetPyRunner(model, **options)
        return self._runner.__enter__().identity.to_json()


def _evaluate(runner: BitnetPyRunner, ids: list[int], *, each: bool) -> tuple[Any, dict[str, Any]]:
    import numpy as np

    passes = [runner.eval(part, ("result_output",)) for part in ([[one] for one in ids] if each else [ids])]
    logits = np.concatenate([one.taps["result_output"].array for one in passes])
    return {"elapsed_s": [one.elapsed_s for one in passes]}, {"result_output": logits}


def _best_each(runner: BitnetPyRunner, ids: list[int]) -> tuple[Any, dict[str, Any]]:
    import numpy as np

    runner.prepare_best()
    found = [runner.best(one) for one in ids]
    tokens = np.array([token_id for token_id, _, _ in found], np.int32)
    logits = np.array([logit for _, logit, _ in found], np.float32)
    return {"elapsed_s": [elapsed_s for _, _, elapsed_s in found]}, {"ids": tokens, "logits": logits}
