"""Two opened engines and everything a receipt says about them."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bitnet_py import _native
from crossval.engines.recorded import RecordedRunner
from crossval.engines.registry import open_candidate, open_reference
from crossval.errors import BadInputError, UnavailableError
from crossval.model.file import ModelFile
from crossval.passes import EngineIdentity, Runner
from crossval.receipts.party import Compute, Party
from crossval.terms import Side
from crossval.traces.read import TRACE_FILE

KERNEL_VARIABLE = "BITNET_KERNEL"


@dataclass(frozen=True)
class Prompt:
    """A prompt as both engines are fed it; ``tokenizers_agree`` is None when only one of them could tokenize."""

    text: str | None
    token_ids: tuple[int, ...]
    tokenizers_agree: bool | None
    note: str | None = None


class Session:
    """Opens candidate and reference as words on the command line name them; use as a context manager.

    Engines that can run any prompt stay open from prompt to prompt; a recorded reference found by itself
    (``auto``) is opened per prompt.
    """

    def __init__(self, model: ModelFile, candidate: str, reference: str, n_threads: int | None = None) -> None:
        self.model = model
        self.words = (candidate, reference)
        self.n_threads = n_threads
        self._stack = ExitStack()
        self._candidate: Runner | None = None
        self._reference: Runner | None = None
        self._counts: dict[str, list[int]] = {}
        self._candidate_traces: list[str] = []
        self._reference_traces: list[str] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def open(self, text: str | None = None) -> tuple[Runner, Runner]:
        """Return candidate and reference, both entered, for a prompt.

        The reference opens first: a live candidate rounds where the reference says it rounds.

        Raises:
            UnavailableError, BadInputError, EngineCrashError: from the runners.
            BadInputError: prompts of one comparison would be held against different builds of the reference.
        """
        reference = self._open_reference(text)
        candidate = self._open_candidate(reference)
        return candidate, reference

    def open_alone(self, side: Side) -> Runner:
        """Return one of the two, entered, without opening the other; a lone candidate rounds by its default.

        Raises:
            UnavailableError, BadInputError, EngineCrashError: from the runner.
        """
        return self._open_candidate(None) if side == "candidate" else self._open_reference(None)

    def another_reference(self, *, n_threads: int | None = None) -> Runner:
        """Return the live reference once more, not entered; ``n_threads`` None: as many as the first one's.

        Raises:
            UnavailableError, BadInputError: it cannot be had.
        """
        return open_reference(self.words[1], self.model.path, n_threads=n_threads or self.n_threads)

    def _open_reference(self, text: str | None) -> Runner:
        before = self._reference
        if before is not None and (before.status == "live" or self.words[1] != "auto"):
            return before
        runner = open_reference(self.words[1], self.model.path, text, n_threads=self.n_threads)
        runner = self._stack.enter_context(runner)
        if before is not None and before.identity != runner.identity:
            raise BadInputError(
                "the recorded references of these prompts come from different builds of "
                f"{runner.identity.name}; compare them in separate commands"
            )
        self._reference = runner
        self._reference_traces += _digests(runner)
        return runner

    def _open_candidate(self, reference: Runner | None) -> Runner:
        if self._candidate is not None:
            return self._candidate
        numerics = None if reference is None else reference.identity.numerics
        runner = open_candidate(self.words[0], self.model.path, numerics=numerics, n_threads=self.n_threads)
        self._candidate = self._stack.enter_context(runner)
        self._candidate_traces += _digests(runner)
        return self._candidate

    @property
    def candidate(self) -> Party:
        """Return the candidate as a receipt names it."""
        return _party(self._candidate, self._candidate_traces, self.words[0])

    @property
    def reference(self) -> Party:
        """Return the reference as a receipt names it."""
        return _party(self._reference, self._reference_traces, self.words[1])

    def unavailable(self, why: str) -> Party:
        """Return the reference that could not be opened."""
        name = "specification" if self.words[1] == "spec" else "bitnet.cpp"
        return Party("unavailable", EngineIdentity(name), note=why)

    def compute(self) -> Compute:
        """Return what computed the candidate's numbers, read from its C library now."""
        runner = self._candidate
        if runner is None:
            return Compute("none")
        if runner.status == "recorded":
            return Compute("recorded")
        if runner.identity.name == "specification":
            return Compute("specification")
        if not hasattr(runner, "counters"):
            return Compute("none")
        kernels = tuple({"name": c.name, "calls": int(c.calls), "bytes": int(c.bytes)} for c in runner.counters())
        return Compute("real", is_fallback(runner.identity.settings.get("kernel")), kernels)


def is_fallback(kernel: Any) -> bool:
    """Return whether a kernel family slower than this machine's best runs without ``BITNET_KERNEL`` asking."""
    if os.environ.get(KERNEL_VARIABLE):
        return False
    best = next((family.name for family in _native.kernel_families() if family.available), None)
    return best is None or kernel != best


def trace_digest(runner: Runner) -> str | None:
    """Return the sha256 of a recorded runner's ``trace.json``, which holds the sha256 of every pass file."""
    if not isinstance(runner, RecordedRunner):
        return None
    return hashlib.sha256((Path(runner.trace.directory) / TRACE_FILE).read_bytes()).hexdigest()


def _digests(runner: Runner) -> list[str]:
    digest = trace_digest(runner)
    return [] if digest is None else [digest]


def _party(runner: Runner | None, traces: list[str], word: str) -> Party:
    if runner is None:
        return Party("unavailable", EngineIdentity(_NAMES.get(word, Path(word).name or word)), note="not opened")
    digest = traces[0] if len(traces) == 1 else None
    if len(traces) > 1:
        digest = hashlib.sha256("".join(traces).encode()).hexdigest()
    return Party(runner.status, runner.identity, digest)


_NAMES = {"spec": "specification", "bitnet_py": "bitnet_py"}


def encode(candidate: Runner, reference: Runner, text: str, rendered: str, context_length: int) -> Prompt:
    """Return the token ids of ``rendered`` by the reference, and whether the candidate's tokenizer agrees.

    Raises:
        BadInputError: empty or not Unicode, longer than the context, or no engine can tokenize it.
    """
    if not text:
        raise BadInputError("the prompt is empty; give at least one character")
    try:
        rendered.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"the prompt is not valid Unicode at character {error.start}") from error
    ours, theirs = _try_tokenize(candidate, rendered), _try_tokenize(reference, rendered)
    ids = ours if theirs is None else theirs
    if ids is None:
        raise BadInputError("neither engine can tokenize this prompt: both are traces of another one")
    if not ids:
        raise BadInputError("the prompt has no tokens")
    if len(ids) > context_length:
        raise BadInputError(f"the prompt has {len(ids)} tokens, the model's context holds {context_length}")
    if ours is None or theirs is None:
        return Prompt(text, tuple(ids), None)
    return Prompt(text, tuple(ids), ours == theirs, _difference(ours, theirs))


def _try_tokenize(runner: Runner, text: str) -> list[int] | None:
    try:
        return runner.tokenize(text)
    except UnavailableError:
        return None


def _difference(ours: list[int], theirs: list[int]) -> str | None:
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return (
        f"the tokenizers disagree at token {at}: candidate {ours[at : at + 4]} of {len(ours)} tokens, "
        f"reference {theirs[at : at + 4]} of {len(theirs)}; both engines were fed the reference's"
    )
