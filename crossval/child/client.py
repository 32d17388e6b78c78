"""An engine in its own process, seen from the harness: the base of all such runners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.child.command import child_command
from crossval.child.process import ChildProcess
from crossval.child.protocol import Frame
from crossval.errors import EngineCrashError
from crossval.passes import PassPlan, PassRecord, TapArray
from crossval.terms import LOGITS


class EngineProcess:
    """An engine in a child process: started, sent requests, and closed permanently when it fails.

    A subclass starts it in ``__enter__``. ``engine``: its name in messages. ``module``: what the
    child runs. ``timeout_s`` limits each request, the load included.
    """

    def __init__(self, engine: str, module: str, timeout_s: float) -> None:
        self._engine = engine
        self._module = module
        self._timeout_s = timeout_s
        self._child: ChildProcess | None = None
        self._closed_because = "the runner has not been entered"
        self._n_past = 0

    def start(self) -> ChildProcess:
        """Start the process.

        Raises:
            UnavailableError: it cannot be started.
        """
        self._child = ChildProcess(self._engine, child_command(self._module))
        self._n_past = 0
        return self._child

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self, because: str = "the runner has been closed") -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
            self._child = None
            self._closed_because = because

    @property
    def pid(self) -> int:
        """Id of the engine's process; only after entering."""
        return self.live().pid

    def live(self) -> ChildProcess:
        """Return the process.

        Raises:
            EngineCrashError: it was not started, or has ended.
        """
        if self._child is None:
            raise EngineCrashError(f"{self._engine} is not running: {self._closed_because}")
        return self._child

    def request(
        self,
        command: str,
        params: Mapping[str, Any] | None = None,
        ids: Sequence[int] | None = None,
        *,
        what: str,
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> Frame:
        """Send a command, with token ids or other arrays if it takes any, and return the answer.

        Raises:
            EngineCrashError: the engine failed; the runner is closed.
            BadInputError, UnavailableError: from the child's own checks.
        """
        if ids is not None:
            arrays = {**(arrays or {}), "token_ids": np.array(ids, np.int32)}
        try:
            return self.live().request(command, params, arrays, what=what, timeout_s=self._timeout_s)
        except EngineCrashError as error:
            self.close(f"it was closed after this failure: {error}")
            raise

    def reset(self) -> None:
        """Empty the KV cache."""
        self.request("reset", what="emptying the KV cache")
        self._n_past = 0

    def run_pass(self, ids: Sequence[int], params: Mapping[str, Any] | None = None) -> Frame:
        """Run one pass over token ids and return the answer."""
        what = f"a pass of {len(ids)} tokens at position {self._n_past}"
        answer = self.request("eval", params, ids, what=what)
        self._n_past += len(ids)
        return answer

    def eval_each(self, token_ids: Sequence[int]) -> list[PassRecord]:
        """Run one decode pass per token, in one request, and return their logits; the cache must not be empty.

        As in a program that generates text, no pass waits for the harness.

        Raises:
            BadInputError: tokens the model cannot take.
            EngineCrashError: the engine failed; the runner is closed.
        """
        ids, start = [int(token) for token in token_ids], self._n_past
        answer = self.request("eval_each", None, ids, what=f"{len(ids)} decoded tokens from position {start}")
        self._n_past += len(ids)
        return decode_records(ids, start, answer)


def decode_records(ids: Sequence[int], start: int, answer: Frame) -> list[PassRecord]:
    """Return the records in an answer to ``eval_each``.

    Raises:
        EngineCrashError: it does not hold one time and one row of logits per token.
    """
    times, logits = answer.header.get("elapsed_s"), array_of(answer, LOGITS, "float32")
    if not isinstance(times, list) or not len(times) == len(logits) == len(ids):
        raise EngineCrashError(f"the engine's process returned a wrong number of results for {len(ids)} passes")
    return [
        PassRecord(
            PassPlan("decode", (token,), start + i), {LOGITS: TapArray(logits[i : i + 1], (0,))}, float(times[i])
        )
        for i, token in enumerate(ids)
    ]


def array_of(answer: Frame, name: str, dtype: str) -> npt.NDArray[Any]:
    """Return an array of an answer.

    Raises:
        EngineCrashError: the answer does not hold it, or holds another type.
    """
    array = answer.arrays.get(name)
    if array is None or array.dtype.name != dtype:
        raise EngineCrashError(f"the engine's process did not return {name} as {dtype}")
    return array
