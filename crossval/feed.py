"""What both engines are fed: a trace's own passes when one takes part, else the reference's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crossval.errors import BadInputError
from crossval.passes import PassPlan, PassRecord, Runner, pass_kind, short_list

LOGITS = "result_output"


@dataclass
class Feed:
    """The passes to run, known in advance (``fixed``) or growing by one decoded token at a time."""

    prompt_ids: tuple[int, ...]
    n_decode: int
    fixed: tuple[PassPlan, ...] | None
    """All passes that every recorded party holds alike; None when both engines are live."""
    done: list[PassPlan] = field(default_factory=list)
    ended: str | None = None
    """Why passes are missing at the end, None when none are."""

    @property
    def n_prompt_passes(self) -> int:
        """Passes that feed the prompt: one, unless a trace was fed in pieces."""
        covered = 0
        for index, plan in enumerate(self.fixed or ()):
            covered += len(plan.token_ids)
            if covered >= len(self.prompt_ids):
                return index + 1
        return 1

    @property
    def n_required(self) -> int:
        """Passes a complete comparison needs."""
        return self.n_prompt_passes + self.n_decode

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
        elif index == 0:
            plan = PassPlan("prefill", self.prompt_ids, 0)
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
    plans = [(who, plan) for who, plan in (("candidate", candidate.plan), ("reference", reference.plan)) if plan]
    for who, plan in plans:
        fed = tuple(token for part in plan for token in part.token_ids)
        if fed[: len(prompt)] != prompt:
            raise BadInputError(
                f"the {who}'s trace was recorded with other tokens: it starts {short_list(fed)}, "
                f"the prompt is {short_list(prompt)}"
            )
    fixed = _common([plan for _, plan in plans]) if plans else None
    if fixed is not None and not fixed:
        raise BadInputError(
            "the two traces were not fed in the same pieces: their first passes hold "
            f"{len(plans[0][1][0].token_ids)} and {len(plans[1][1][0].token_ids)} tokens"
        )
    feed = Feed(prompt, 0, fixed)
    if n_decode is None:
        held = default_n_decode if fixed is None else max(0, len(fixed) - feed.n_prompt_passes)
        n_decode = min(default_n_decode, held)
    feed.n_decode = n_decode
    return feed


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


def _common(plans: list[tuple[PassPlan, ...]]) -> tuple[PassPlan, ...]:
    if len(plans) == 1:
        return plans[0]
    same = []
    for a, b in zip(*plans, strict=False):
        if a != b:
            break
        same.append(a)
    return tuple(same)
