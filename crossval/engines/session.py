"""Two opened engines, the prompt they are fed, and what a receipt states about them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bitnet_py import _native
from bitnet_py.errors import listed
from bitnet_py.model import DEFAULT_UBATCH, KERNEL_VARIABLE, KernelCount
from crossval.engines.model_file import ModelFile
from crossval.engines.recorded import RecordedRunner
from crossval.engines.registry import engine_name, find_word, open_candidate, open_reference, row_of
from crossval.engines.words import TRACE, EngineWord
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import EngineIdentity, Runner
from crossval.receipts.party import PATH_OF_NAME, Compute, Party, joint_digest
from crossval.terms import SIDES, Side
from crossval.traces.read import TRACE_FILE, TraceInfo
from crossval.traces.tap_map import PLAIN, TapMap, counted

MAX_NAMES = 12
"""Unknown names that a note lists."""
Given = str | Sequence[int]
"""A prompt as a user gives it: a text, or token ids."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is fed to both engines.

    ``text``: None where token ids were given. ``tokenizers_agree``: None unless both tokenized it.
    """

    text: str | None
    token_ids: tuple[int, ...]
    tokenizers_agree: bool | None
    note: str | None = None


class Session:
    """Opens candidate and reference by their words; use as a context manager.

    Engines that can run any prompt stay open from prompt to prompt; a reference that is chosen per
    prompt (``auto``) and is a recorded one is opened again for each.
    """

    def __init__(
        self,
        model: ModelFile,
        candidate: str,
        reference: str,
        n_threads: int | None = None,
        *,
        follow_reference_graph: bool = False,
        as_run: bool = False,
        tap_map: TapMap | None = None,
    ) -> None:
        """Raise ``BadInputError`` where a word names no engine.

        ``as_run``: engines run as they do unless told otherwise, that is with flash attention where
        that is on by default, which hides attention's scores and weights. ``tap_map``: what the
        engines of traces call their tensors.
        """
        self.model = model
        self.words: dict[Side, EngineWord] = {
            "candidate": find_word("candidate", candidate),
            "reference": find_word("reference", reference),
        }
        self.n_threads = n_threads
        self.follow_reference_graph = follow_reference_graph
        self.as_run = as_run
        self.tap_map = tap_map
        self.failed: Side | None = None
        """The engine that was not available."""
        self._stack = ExitStack()
        self._runners: dict[Side, Runner] = {}
        self._given: dict[Side, dict[str, Any]] = {}
        """What each engine was opened with."""
        self._traces: dict[Side, list[str]] = {side: [] for side in SIDES}
        """Digests of the traces that were opened."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def open(self, text: Given | None = None) -> tuple[Runner, Runner]:
        """Return candidate and reference, both entered, for a prompt.

        The engine that states how it computes opens first; one that can follow then rounds, and cuts
        its passes, as the other does.

        Raises:
            UnavailableError, BadInputError, EngineCrashError: from the runners.
            BadInputError: prompts of one comparison would be compared with different builds of the
            reference.
        """
        opened = self.open_sides(SIDES, text)
        return opened["candidate"], opened["reference"]

    def open_sides(self, sides: Sequence[Side], text: Given | None = None) -> dict[Side, Runner]:
        """Return the engines of these sides, entered; a lone engine rounds by its default.

        Raises:
            UnavailableError, BadInputError, EngineCrashError: from the runners.
        """
        for side in sorted(sides, key=self._rank):
            self._open(side, text)
        return {side: self._runners[side] for side in sides}

    def _rank(self, side: Side) -> tuple[int, bool]:
        """Return when an engine opens: traces, live engines, those that follow the other; the reference first."""
        row = row_of(self.words[side])
        last = row.follows or not row.reads
        return (0 if self.words[side].name == TRACE else 2 if last else 1), side == "candidate"

    def reopen(self, side: Side, **options: Any) -> Runner:
        """Return another instance of an engine, not entered, with its ``n_threads`` or ``kernel`` overridden.

        Raises:
            UnavailableError, BadInputError: it is not available.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return self._unopened(side, None, **{**self._given[side], **given})

    def _open(self, side: Side, text: Given | None) -> None:
        word, before = self.words[side], self._runners.get(side)
        if before is not None and (before.status == "live" or row_of(word).live is None):
            return
        self._given[side] = options = self._options(self._other(side))
        try:
            runner = self._stack.enter_context(self._unopened(side, text, **options))
        except UnavailableError:
            self.failed = side
            raise
        if before is not None and before.identity != runner.identity:
            raise BadInputError(
                f"the recorded {side}s of these prompts come from different builds of "
                f"{runner.identity.name}; compare them in separate commands"
            )
        self._runners[side] = runner
        digest = trace_digest(runner)
        self._traces[side] += [] if digest is None else [digest]

    def _other(self, side: Side) -> Runner | None:
        return self._runners.get("reference" if side == "candidate" else "candidate")

    def _options(self, stated: Runner | None) -> dict[str, Any]:
        """Return what an engine is opened with, given the one whose arithmetic and passes it follows."""
        if stated is None:
            return {"n_threads": self.n_threads, "as_run": self.as_run}
        longest = max((len(one.token_ids) for one in stated.plan or ()), default=0)
        return {
            "n_threads": self.n_threads,
            "as_run": self.as_run,
            "numerics": stated.identity.numerics,
            "follow_reference_graph": self.follow_reference_graph,
            "n_ubatch": longest if longest > DEFAULT_UBATCH else None,
        }

    def _unopened(self, side: Side, text: Given | None, **options: Any) -> Runner:
        word = self.words[side]
        options["tap_map"] = self.tap_map
        if side == "reference":
            return open_reference(word, self.model.path, text, **options)
        return open_candidate(word, self.model.path, **options)

    @property
    def candidate(self) -> Party:
        """Return the candidate as a receipt states it."""
        return self._party("candidate")

    @property
    def reference(self) -> Party:
        """Return the reference as a receipt states it."""
        return self._party("reference")

    def _party(self, side: Side) -> Party:
        runner, traces = self._runners.get(side), self._traces[side]
        if runner is None:
            return Party("unavailable", EngineIdentity(engine_name(self.words[side])), note="not opened")
        return Party(runner.status, runner.identity, joint_digest(traces) if traces else None)

    def trace_notes(self) -> list[str]:
        """Return what is to be said of the names of the tensors that traces hold."""
        found = ((side, self._runners.get(side)) for side in SIDES)
        return [
            note
            for side, runner in found
            if isinstance(runner, RecordedRunner)
            for note in _names_notes(side, runner.info, self.tap_map)
        ]

    def compute(self) -> Compute:
        """Return what computed the candidate's numbers, read from its C library now."""
        return compute_of(self._runners.get("candidate"))


def _names_notes(side: Side, info: TraceInfo, tap_map: TapMap | None) -> list[str]:
    notes = []
    if tap_map is not None and any(tap.entry is not PLAIN for one in info.passes for tap in one.taps.values()):
        which = "" if tap_map.digest is None else f", sha256 {tap_map.digest}"
        notes.append(f"the {side}'s tensors were read as taps by the tap map {tap_map.name}{which}")
    if info.unknown:
        names = listed(counted(info.unknown), MAX_NAMES)
        notes.append(f"not compared, for the {side}'s trace has no tap of that name: {names}")
    return notes


def compute_of(runner: Runner | None) -> Compute:
    """Return what computes an engine's numbers, with the counters of its kernels if it has any."""
    if runner is None:
        return Compute("none")
    if runner.status == "recorded":
        return Compute("recorded")
    if not hasattr(runner, "counters"):
        return Compute(PATH_OF_NAME.get(runner.identity.name, "none"))
    return Compute("real", is_fallback(runner.identity.settings.get("kernel")), kernel_counts(runner.counters()))


def kernel_counts(counters: Iterable[KernelCount]) -> tuple[dict[str, Any], ...]:
    """Return the C library's counters as a receipt states them."""
    return tuple({"name": one.name, "calls": int(one.calls), "bytes": int(one.bytes)} for one in counters)


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


def check_prompt(given: Given) -> None:
    """Reject a prompt that is empty, or a text that is not valid Unicode.

    Raises:
        BadInputError: either of them.
    """
    if not given:
        raise BadInputError(f"the prompt is empty; give at least one {_unit(given)}")
    try:
        if isinstance(given, str):
            given.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"the prompt is not valid UTF-8 at character {error.start}") from error


def _unit(given: Given) -> str:
    return "character" if isinstance(given, str) else "token"


def encode(
    candidate: Runner, reference: Runner, given: Given, rendered: Given, context_length: int, n_after: int = 0
) -> Prompt:
    """Return the token ids of ``rendered`` by the reference, and whether the candidate's tokenizer agrees.

    ``given``: the prompt, checked by ``check_prompt``; ``rendered``: the same in its chat template. Token ids are
    fed as they are, checked before. ``n_after``: how many tokens the engines will read after the prompt.

    Raises:
        BadInputError: longer than the context, without tokens, or no engine can tokenize it.
    """
    ours = theirs = None
    if isinstance(rendered, str):
        ours, theirs = (_try_tokenize(one, rendered) for one in (candidate, reference))
        ids = ours if theirs is None else theirs
    else:
        ids = list(rendered)
    if ids is None:
        raise BadInputError("neither engine can tokenize this prompt: both are traces of other prompts")
    if not ids:
        raise BadInputError("the prompt has no tokens")
    check_room(len(ids), n_after, context_length)
    text = given if isinstance(given, str) else None
    if ours is None or theirs is None:
        return Prompt(text, tuple(ids), None)
    return Prompt(text, tuple(ids), ours == theirs, _difference(ours, theirs))


def check_room(n_prompt: int, n_after: int, context_length: int) -> None:
    """Check that a prompt and what follows it fit the model's context.

    Raises:
        BadInputError: they do not; the message says which of the two has to be shorter.
    """
    room = context_length - n_prompt
    if room < 0:
        raise BadInputError(
            f"the prompt has {n_prompt} tokens, the model's context holds {context_length}: shorten the prompt"
        )
    if n_after > room:
        raise BadInputError(
            f"the prompt has {n_prompt} tokens and {n_after} are to follow, the model's context holds "
            f"{context_length}: let at most {room} follow"
        )


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
