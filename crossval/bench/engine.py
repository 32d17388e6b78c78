"""What a measured engine offers, and ours in a process of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitnet_py.model import KernelCount
from crossval.bitnet_cpp.runner import decode_records
from crossval.child.process import ChildProcess, child_command
from crossval.child.protocol import Frame
from crossval.errors import CrossvalError
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray


class Engine(Protocol):
    """An engine in a process of its own; a context manager, as ``crossval.passes.Runner`` is.

    Errors: ``BadInputError`` (model or tokens), ``UnavailableError``, ``EngineCrashError`` (crash, time-out).
    """

    @property
    def identity(self) -> EngineIdentity:
        """Who this is; complete only after entering."""

    @property
    def pid(self) -> int:
        """Id of the engine's process."""

    def reset(self) -> None:
        """Empty the KV cache."""

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass; ``elapsed_s`` is what the engine took."""

    def eval_each(self, token_ids: Sequence[int]) -> list[PassRecord]:
        """Run one decode pass per token, one directly after the other."""

    def __enter__(self) -> Engine:
        """Start the process and load the model."""

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """End the process."""


@dataclass(frozen=True)
class BestToken:
    """The token greedy decoding takes, and its logit."""

    token_id: int
    logit: float
    elapsed_s: float


class BitnetPyProcess:
    """``bitnet_py`` in a process of its own; gives logits only.

    ``kernel``: family to force; None: ``BITNET_KERNEL``, else the best. ``timeout_s`` limits each request, the
    load included.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        n_threads: int,
        numerics: Numerics,
        kernel: str | None = None,
        n_ubatch: int = 512,
        timeout_s: float = 600.0,
    ) -> None:
        self._options: Mapping[str, Any] = {
            "model": str(Path(model_path).resolve()),
            "n_threads": n_threads,
            "simd_width": numerics.simd_width or 8,
            "fused_quantizer": bool(numerics.fused_quantizer),
            "kernel": kernel,
            "n_ubatch": n_ubatch,
        }
        self._timeout_s = timeout_s
        self._child: ChildProcess | None = None
        self._identity = EngineIdentity("bitnet_py")
        self._n_past = 0

    def __enter__(self) -> BitnetPyProcess:
        self._child = ChildProcess("bitnet_py", child_command("crossval.bench.serve"))
        try:
            facts = self._request("load", self._options, what="loading the model").header
        except BaseException:
            self.close()
            raise
        self._identity = EngineIdentity(**{**facts, "numerics": Numerics(**facts["numerics"])})
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
            self._child = None

    @property
    def identity(self) -> EngineIdentity:
        """Version, library digest, kernel family and numerics; complete after entering."""
        return self._identity

    @property
    def pid(self) -> int:
        """Id of the engine's process; only after entering."""
        return self._live().pid

    def reset(self) -> None:
        """Empty the KV cache."""
        self._request("reset", what="emptying the KV cache")
        self._n_past = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass and return its logits, the only tap there is.

        Raises:
            BadInputError: another tap, or tokens the model cannot take.
            EngineCrashError: the process ended.
        """
        ids, start = [int(token) for token in token_ids], self._n_past
        what = f"a pass of {len(ids)} tokens at position {start}"
        answer = self._request("eval", None, {"token_ids": np.array(ids, np.int32)}, what=what)
        self._n_past += len(ids)
        plan = PassPlan("decode" if start and len(ids) == 1 else "prefill", tuple(ids), start)
        logits = TapArray(answer.arrays["result_output"], (len(ids) - 1,))
        return PassRecord(plan, {"result_output": logits}, float(answer.header["elapsed_s"][0]))

    def eval_each(self, token_ids: Sequence[int]) -> list[PassRecord]:
        """Run one decode pass per token, in one request, and return their logits; the cache must not be empty.

        Raises:
            BadInputError: tokens the model cannot take.
            EngineCrashError: the process ended.
        """
        ids = [int(token) for token in token_ids]
        what = f"{len(ids)} decoded tokens from position {self._n_past}"
        answer = self._request("eval_each", None, {"token_ids": np.array(ids, np.int32)}, what=what)
        records = decode_records(ids, self._n_past, answer)
        self._n_past += len(ids)
        return records

    def best_each(self, token_ids: Sequence[int]) -> list[BestToken]:
        """Run one decode pass per token, in one request, and return the best next tokens, by ``Model.largest``.

        Raises:
            BadInputError: tokens the model cannot take.
            EngineCrashError: the process ended.
        """
        ids = [int(token) for token in token_ids]
        what = f"{len(ids)} greedy tokens from position {self._n_past}"
        answer = self._request("best_each", None, {"token_ids": np.array(ids, np.int32)}, what=what)
        self._n_past += len(ids)
        found = zip(answer.arrays["ids"], answer.arrays["logits"], answer.header["elapsed_s"], strict=True)
        return [BestToken(int(token_id), float(logit), elapsed_s) for token_id, logit, elapsed_s in found]

    def counters(self) -> list[KernelCount]:
        """Return the C library's own counters since the model was loaded."""
        return [
            KernelCount(**count) for count in self._request("counters", what="reading counters").header["counters"]
        ]

    def _request(
        self,
        command: str,
        params: Mapping[str, Any] | None = None,
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
        *,
        what: str,
    ) -> Frame:
        return self._live().request(command, params, arrays, what=what, timeout_s=self._timeout_s)

    def _live(self) -> ChildProcess:
        if self._child is None:
            raise CrossvalError("the process of bitnet_py is not running")
        return self._child
