"""Engines run over passes, and what they gave: held within a memory budget, run again for what was let go.

``Feed`` says which passes both engines are fed. A ``Capture`` is one engine over these passes: its ``records``
returns tensors that are still held, or runs the engine for them. What is read layer by layer is captured ahead, as
many layers in one run as the budget allows.

Where everything fits, everything is held. A comparison then runs each engine twice, over one half of the layers
each time; otherwise once per group of layers. The outline (every layer's output, and the logits) is captured every
time and must hold the same bits: this finds an engine that is not deterministic, or that computes something else
when its tensors are captured.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.passes import (
    PassPlan,
    PassRecord,
    Runner,
    TapArray,
    cut_prompt,
    longest_pass,
    pass_kind,
    prompt_passes,
    short_list,
)
from crossval.terms import LOGITS

MAX_BYTES = 320 << 20
"""Arrays of one engine held at a time: half of what 64 tokens of the 2B-4T shape take."""

Place = tuple[int, str]
"""Index of a pass and full name of a tap."""
T = TypeVar("T")


# --- what is fed ----------------------------------------------------------------------------------------------


@dataclass
class Feed:
    """The passes to run, known in advance (``fixed``) or growing by one decoded token at a time."""

    prompt_ids: tuple[int, ...]
    n_decode: int
    fixed: tuple[PassPlan, ...] | None
    """All passes that every recorded party holds alike; None when both engines are live."""
    longest: int | None = None
    """Tokens of the longest pass that the engines take; a longer prompt is cut. None: no limit."""
    done: list[PassPlan] = field(default_factory=list)
    ended: str | None = None
    """Why passes are missing at the end, None when none are."""

    @property
    def n_prompt_passes(self) -> int:
        """Passes that feed the prompt: one, unless it is longer than a pass or a trace was fed in pieces."""
        if self.fixed is None:
            return len(self._cut)
        return prompt_passes(self.fixed, len(self.prompt_ids))

    @property
    def _cut(self) -> tuple[PassPlan, ...]:
        return cut_prompt(self.prompt_ids, self.longest)

    @property
    def n_required(self) -> int:
        """Passes a complete comparison needs."""
        return self.n_prompt_passes + self.n_decode

    @property
    def expected(self) -> tuple[PassPlan, ...]:
        """The required passes, as far as their sizes are concerned: decoded tokens are not known yet."""
        if self.fixed is not None:
            return self.fixed[: self.n_required]
        n_prompt = len(self.prompt_ids)
        decoded = (PassPlan(pass_kind(1, n_prompt + i), (0,), n_prompt + i) for i in range(self.n_decode))
        return *self._cut, *decoded

    def next_plan(self, next_token: int | None) -> PassPlan | None:
        """Return the next pass, or None when done or ``ended``; ``next_token`` is the reference's choice."""
        index = len(self.done)
        if index >= self.n_required or self.ended is not None:
            return None
        if self.fixed is not None:
            if index >= len(self.fixed):
                self.ended = f"only {len(self.fixed)} of {self.n_required} passes are recorded alike"
                return None
            plan = self.fixed[index]
        elif index < self.n_prompt_passes:
            plan = self._cut[index]
        elif next_token is None:
            self.ended = "the reference's logits are not usable, so there is no next token"
            return None
        else:
            start = self.done[-1].start + len(self.done[-1].token_ids)
            plan = PassPlan(pass_kind(1, start), (next_token,), start)
        self.done.append(plan)
        return plan


def make_feed(
    candidate: Runner, reference: Runner, prompt_ids: Sequence[int], n_decode: int | None, default_n_decode: int
) -> Feed:
    """Plan the passes; ``n_decode`` None means ``default_n_decode``, or fewer where a trace holds fewer.

    Raises:
        BadInputError: empty prompt, negative ``n_decode``, or a trace that was recorded with other tokens.
    """
    prompt = tuple(map(int, prompt_ids))
    if not prompt:
        raise BadInputError("the prompt has no tokens; comparing nothing is not a comparison")
    if n_decode is not None and n_decode < 0:
        raise BadInputError(f"the number of decoded tokens must not be negative, got {n_decode}")
    plans = [(side, plan) for side, plan in (("candidate", candidate.plan), ("reference", reference.plan)) if plan]
    for side, plan in plans:
        fed = tuple(token for part in plan for token in part.token_ids)
        if fed[: len(prompt)] != prompt:
            raise BadInputError(
                f"the {side}'s trace was recorded with other tokens: it starts {short_list(fed)}, "
                f"the prompt is {short_list(prompt)}"
            )
    fixed = _common([plan for _, plan in plans]) if plans else None
    if fixed is not None and not fixed:
        raise BadInputError(
            "the two traces were not fed in the same pieces: their first passes hold "
            f"{len(plans[0][1][0].token_ids)} and {len(plans[1][1][0].token_ids)} tokens"
        )
    feed = Feed(prompt, 0, fixed, longest_pass(candidate, reference))
    if n_decode is None:
        held = default_n_decode if fixed is None else max(0, len(fixed) - feed.n_prompt_passes)
        n_decode = min(default_n_decode, held)
    feed.n_decode = n_decode
    return feed


def check_pooled(n_decode: int | None) -> None:
    """Refuse decoded tokens of a model whose result is one vector of the text.

    Raises:
        BadInputError: some are asked for.
    """
    if n_decode:
        raise BadInputError(
            f"{n_decode} decoded tokens of an embedding model: its result is one vector of the whole prompt, and "
            "llama.cpp pools the tokens of a pass only; decode 0"
        )


def check_whole(feed: Feed) -> None:
    """Refuse a prompt of several passes: each would be pooled by itself.

    Raises:
        BadInputError: the prompt is longer than the longest pass.
    """
    if feed.n_prompt_passes > 1:
        raise BadInputError(
            f"a prompt of {len(feed.prompt_ids)} tokens is fed in {feed.n_prompt_passes} passes, and llama.cpp "
            f"pools the tokens of a pass only; give a prompt of at most {feed.longest or 'one pass'} tokens"
        )


def _common(plans: list[tuple[PassPlan, ...]]) -> tuple[PassPlan, ...]:
    if len(plans) == 1:
        return plans[0]
    same = []
    for a, b in zip(*plans, strict=False):
        if a != b:
            break
        same.append(a)
    return tuple(same)


def greedy_token(record: PassRecord) -> int | None:
    """Return the argmax of the last token's logits, lowest id on ties; None when missing or not finite."""
    logits = last_logits(record)
    return None if logits is None else int(np.argmax(logits))


def last_logits(record: PassRecord) -> npt.NDArray[np.float32] | None:
    """Return the logits of the last token, shape ``(vocab_size,)``; None when missing or not finite."""
    if LOGITS not in record.taps:
        return None
    tap = record.taps[LOGITS]
    last = len(record.plan.token_ids) - 1
    if tap.array.ndim != 2 or not tap.array.size or (tap.rows is not None and tap.rows[-1] != last):
        return None
    logits = tap.array[-1]
    return logits if bool(np.isfinite(logits).all()) else None


# --- memory ---------------------------------------------------------------------------------------------------


def groups(items: Iterable[T], size: Callable[[T], int], max_bytes: int) -> Iterator[list[T]]:
    """Yield consecutive items whose sizes add up to ``max_bytes`` at most, and one at least."""
    group: list[T] = []
    used = 0
    for item in items:
        if group and used + size(item) > max_bytes:
            yield group
            group, used = [], 0
        group.append(item)
        used += size(item)
    if group:
        yield group


def model_taps(config: SpecConfig, *, outline: bool = False) -> list[str]:
    """Return the taps that a model has at most, or of its outline, in execution order."""
    form = {"input_norms": config.input_norms, "pooled": config.pooling is not None}
    return taps.of_model(config.n_layers, config.architecture, outline=outline, **form)


def stages(config: SpecConfig) -> list[list[str]]:
    """Return every tap in execution order: the embedding, layer by layer, the final norm and what follows it."""
    known = frozenset(model_taps(config))
    layers = (taps.layer_taps(layer) for layer in range(config.n_layers))
    return [[tap for tap in stage if tap in known] for stage in (taps.INPUT_TAPS, *layers, taps.HEAD_TAPS)]


def _stage_bytes(stage: Collection[str], config: SpecConfig, plans: Sequence[PassPlan]) -> int:
    """Return the bytes of a stage's arrays over all passes, every tap with all of its rows."""
    n_tokens = sum(len(plan.token_ids) for plan in plans)
    n_scores = sum(len(plan.token_ids) * (plan.start + len(plan.token_ids)) for plan in plans)
    one = {name: 4 * math.prod(taps.op_of(name).shape(config, 1, 1)) for name in stage}
    return sum(size * (n_scores if taps.has_keys(name) else n_tokens) for name, size in one.items())


def held_bytes(config: SpecConfig, plans: Sequence[PassPlan]) -> int:
    """Return the bytes of tensors of one engine that a ``Capture`` holds at most over these passes."""
    sizes = [_stage_bytes(stage, config, plans) for stage in stages(config)]
    return min(sum(sizes), max(MAX_BYTES, *sizes))


# --- running --------------------------------------------------------------------------------------------------


def run(runner: Runner, chunks: Iterable[Sequence[int]], select: Collection[str]) -> tuple[PassRecord, ...]:
    """Empty the cache and feed the chunks of token ids; one record per pass."""
    runner.reset()
    return tuple(runner.eval(chunk, select) for chunk in chunks)


class Source(Protocol):
    """The passes of one engine, and what it gave in them."""

    @property
    def runner(self) -> Runner:
        """The engine itself."""

    @property
    def plans(self) -> Sequence[PassPlan]:
        """The passes, as they are to be read."""

    def records(
        self, names: Collection[str], n_passes: int | None = None, *, ahead: bool = False
    ) -> tuple[PassRecord, ...]:
        """Return the named taps of the first passes (None: of all), as far as the engine gives them."""


class Capture:
    """One entered engine over a sequence of passes, and the tensors of it that are held."""

    def __init__(
        self, runner: Runner, config: SpecConfig, plans: Sequence[PassPlan] = (), *, max_bytes: int | None = None
    ) -> None:
        """``plans`` may stay empty where ``start`` and ``extend`` find the passes out."""
        self.runner = runner
        self.plans = list(plans)
        self.unsteady: set[Place] = set()
        """Where two runs gave different bits."""
        self.config = config
        self._max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        self._outline = model_taps(config, outline=True)
        self._held: list[dict[str, TapArray]] = [{} for _ in plans]
        self._known: set[str] = set()
        """What was captured in all passes so far, whether the engine gives it or not."""
        self._digests: dict[Place, dict[int, bytes]] = {}
        self._size(self.plans)

    def _size(self, plans: Sequence[PassPlan]) -> None:
        self._stages = stages(self.config)
        self._bytes = [_stage_bytes(stage, self.config, plans) for stage in self._stages]
        self._fits = sum(self._bytes) <= self._max_bytes

    # --- the first run, where the passes are found ------------------------------------------------------------

    def start(self, expected: Sequence[PassPlan]) -> None:
        """Begin a first run over passes that are known by size only; ``extend`` runs them one by one."""
        self._size(expected)
        whole = sum(self._bytes)
        if self.runner.status == "live" and self._fits:
            whole //= 2  # a second run has to give the same outline
        self._known = set(self._from(0, min(whole, self._max_bytes)))
        self.runner.reset()

    def extend(self, plan: PassPlan) -> PassRecord:
        """Run one more pass and return its outline."""
        taken = self._eval(len(self.plans), plan, {*self._known, *self._outline})
        self.plans.append(plan)
        self._held.append({name: tap for name, tap in taken.items() if name in self._known})
        return PassRecord(plan, {name: taken[name] for name in self._outline if name in taken})

    # --- all that follow --------------------------------------------------------------------------------------

    def records(
        self, names: Collection[str], n_passes: int | None = None, *, ahead: bool = False
    ) -> tuple[PassRecord, ...]:
        """Return the named taps of the first passes (None: of all), as far as the engine gives them.

        ``ahead``: what follows in execution order will be asked for next.

        Raises:
            UnavailableError, EngineCrashError: from the runner.
        """
        plans = self.plans[:n_passes]
        missing = [name for name in names if name not in self._known]
        if missing and (ahead or self._fits):
            self._fetch(missing if self._fits else names)
            missing = []
        fresh = self._run(plans, missing) if missing else ({} for _ in plans)
        found = (held | more for held, more in zip(self._held, fresh, strict=False))
        return tuple(
            PassRecord(plan, {name: taken[name] for name in names if name in taken})
            for plan, taken in zip(plans, found, strict=False)
        )

    def note(self, records: Iterable[PassRecord]) -> None:
        """Hold the outline of another run of the engine beside what it gave before."""
        for index, record in enumerate(records):
            self._note(index, record.taps)

    def _from(self, first: int, max_bytes: int) -> list[str]:
        """Return the taps from a stage on, as many stages as fit."""
        rest = range(first, len(self._stages))
        return [name for i in next(groups(rest, self._bytes.__getitem__, max_bytes)) for name in self._stages[i]]

    def _fetch(self, names: Collection[str]) -> None:
        """Capture these, and what comes after the first of them as far as memory allows."""
        if not self._fits:
            self._held, self._known = [{} for _ in self.plans], set()
        first = next((i for i, stage in enumerate(self._stages) if not set(names).isdisjoint(stage)), 0)
        wanted = {*names, *self._from(first, self._max_bytes)} - self._known
        for held, taken in zip(self._held, self._run(self.plans, wanted | set(self._outline)), strict=True):
            held |= {name: tap for name, tap in taken.items() if name in wanted}
        self._known |= wanted

    def _run(self, plans: Iterable[PassPlan], names: Collection[str]) -> Iterator[dict[str, TapArray]]:
        self.runner.reset()
        for index, plan in enumerate(plans):
            yield self._eval(index, plan, names)

    def _eval(self, index: int, plan: PassPlan, names: Collection[str]) -> dict[str, TapArray]:
        given = self.runner.eval(plan.token_ids, names).taps
        taken = {name: given[name] for name in names if name in given}
        self._note(index, taken)
        return taken

    def _note(self, index: int, taken: Mapping[str, TapArray]) -> None:
        """Compare the outline with what earlier runs gave, row by row: an engine may give more rows when asked
        for more tensors."""
        if self.runner.status == "recorded":
            return
        for name in self._outline:
            if name not in taken:
                continue
            found = _row_digests(taken[name])
            before = self._digests.setdefault((index, name), found)
            if any(before.get(row, digest) != digest for row, digest in found.items()):
                self.unsteady.add((index, name))


def _row_digests(tap: TapArray) -> dict[int, bytes]:
    array = np.atleast_1d(tap.array)
    rows = range(len(array)) if tap.rows is None else tap.rows
    return {
        row: hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()
        for row, values in zip(rows, array, strict=False)
    }
