"""The interface of a measured engine, and our engine in its own process."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from bitnet_py.model import KernelCount
from crossval.child.client import EngineProcess
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray, pass_kind
from crossval.terms import LOGITS


class Engine(Protocol):
    """An engine in its own process; a context manager, as ``crossval.passes.Runner`` is.

    Errors: ``BadInputError`` (model or tokens), ``UnavailableError``, ``EngineCrashError`` (crash, time-out).
    """

    @property
    def identity(self) -> EngineIdentity:
        """Identity of the engine; complete only after entering."""

    @property
    def pid(self) -> int:
        """Id of the engine's process."""

    def reset(self) -> None:
        """Empty the KV cache."""

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass; ``elapsed_s`` is the engine's own time."""

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
    """The token that greedy decoding chooses, and its logit."""

    token_id: int
    logit: float
    elapsed_s: float


class BitnetPyProcess(EngineProcess):
    """``bitnet_py`` in its own process; gives logits only.

    ``kernel``: family to force; None: ``BITNET_KERNEL``, else the best. ``timeout_s`` limits each
    request, the load included. ``follow_reference_graph``: compute what the engine that states
    ``numerics`` computes, even where that is not the model.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        n_threads: int,
        numerics: Numerics,
        follow_reference_graph: bool = False,
        kernel: str | None = None,
        n_ubatch: int = 512,
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__("bitnet_py", "crossval.bench.serve", timeout_s)
        self._options: Mapping[str, Any] = {
            "model": str(Path(model_path).resolve()),
            "n_threads": n_threads,
            "numerics": numerics.to_json(),
            "follow_reference_graph": follow_reference_graph,
            "kernel": kernel,
            "n_ubatch": n_ubatch,
        }
        self._identity = EngineIdentity("bitnet_py")

    def __enter__(self) -> BitnetPyProcess:
        self.start()
        try:
            facts = self.request("load", self._options, what="loading the model").header
        except BaseException:
            self.close()
            raise
        self._identity = EngineIdentity(**{**facts, "numerics": Numerics.from_json(facts["numerics"])})
        return self

    @property
    def identity(self) -> EngineIdentity:
        """Version, library digest, kernel family and numerics; complete after entering."""
        return self._identity

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass and return its logits, the only tap there is.

        Raises:
            BadInputError: another tap, or tokens the model cannot take.
            EngineCrashError: the process ended.
        """
        ids, start = [int(token) for token in token_ids], self._n_past
        answer = self.run_pass(ids)
        logits = TapArray(answer.arrays[LOGITS], (len(ids) - 1,))
        plan = PassPlan(pass_kind(len(ids), start), tuple(ids), start)
        return PassRecord(plan, {LOGITS: logits}, float(answer.header["elapsed_s"][0]))

    def best_each(self, token_ids: Sequence[int]) -> list[BestToken]:
        """Run one decode pass per token, in one request, and return the best next tokens, by ``Model.largest``.

        Raises:
            BadInputError: tokens the model cannot take.
            EngineCrashError: the process ended.
        """
        ids = [int(token) for token in token_ids]
        answer = self.request(
            "best_each", None, ids, what=f"{len(ids)} greedy tokens from position {self._n_past}"
        )
        self._n_past += len(ids)
        found = zip(answer.arrays["ids"], answer.arrays["logits"], answer.header["elapsed_s"], strict=True)
        return [BestToken(int(token_id), float(logit), elapsed_s) for token_id, logit, elapsed_s in found]

    def counters(self) -> list[KernelCount]:
        """Return the C library's own counters since the model was loaded."""
        found = self.request("counters", what="reading counters").header["counters"]
        return [KernelCount(**count) for count in found]
