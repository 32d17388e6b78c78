"""The audit behind a greedy comparison: both engines, in the first prompt's pass and one decoded token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

from crossval.audit import summary
from crossval.compare.layers import Progress
from crossval.compare.rows import GreedyPrompt
from crossval.diagnose.findings import Finding
from crossval.examine.examination import audit_both
from crossval.feed import LOGITS, make_feed
from crossval.model.weights import SpecWeights
from crossval.passes import EngineIdentity, PassPlan, PassRecord, Runner
from crossval.terms import Side

N_DECODED = 1
"""Decoded tokens that are audited, behind the prompt."""


@dataclass(frozen=True)
class GreedyAudit:
    """Both engines' audits over the same passes, and what was found."""

    passes: tuple[PassPlan, ...]
    audits: Mapping[Side, dict[str, Any] | None]
    """As a receipt holds them; None for an engine that computes something else while it is watched."""
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def audited_passes(candidate: Runner, reference: Runner, prompt: GreedyPrompt) -> tuple[PassPlan, ...]:
    """Return the passes of the prompt, and the first decoded token when the comparison had more than one step.

    Raises:
        BadInputError: a trace that was recorded with other tokens.
    """
    n_decoded = min(N_DECODED, prompt.steps_required - 1)
    feed = make_feed(candidate, reference, prompt.prompt_ids, n_decoded, n_decoded)
    token = prompt.steps[0].reference_token if prompt.steps else None
    while feed.next_plan(token) is not None:
        pass
    return tuple(feed.done)


def audit_prompt(
    candidate: Runner,
    reference: Runner,
    prompt: GreedyPrompt,
    weights: SpecWeights,
    *,
    progress: Progress | None = None,
) -> GreedyAudit:
    """Audit two entered runners over the first passes of a prompt that was compared, and diagnose what is guilty.

    A live engine runs again, with every tensor captured (once per group of layers). An engine whose logits differ
    from those it gives unwatched has not been audited: what was judged is not what was compared.

    Raises:
        BadInputError: a trace recorded with other tokens, or a model the specification cannot run.
        UnavailableError, EngineCrashError: from a runner.
    """
    plan = audited_passes(candidate, reference, prompt)
    ours, theirs = _Watched(candidate), _Watched(reference)
    audits, findings = audit_both(ours, theirs, plan, weights, progress=progress)
    held: dict[Side, dict[str, Any] | None] = {side: summary.to_json(found) for side, found in audits.items()}
    notes = []
    watched: dict[Side, _Watched] = {"candidate": ours, "reference": theirs}
    for side, one in watched.items():
        if not one.computes_the_same(plan):
            held[side] = None
            notes.append(f"the {side} was not audited: its logits change when its tensors are captured")
    kept = tuple(found for found in findings if held[found.side] is not None)
    return GreedyAudit(plan, held, kept, tuple(notes))


class _Watched:
    """An engine that is being captured; remembers the logits it gave in each pass."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._at = 0
        self._seen: set[tuple[int, bytes]] = set()

    @property
    def identity(self) -> EngineIdentity:
        """Who this is."""
        return self._runner.identity

    @property
    def status(self) -> Literal["live", "recorded"]:
        """Whether it runs or is a trace."""
        return self._runner.status

    @property
    def plan(self) -> tuple[PassPlan, ...] | None:
        """The only passes it can give."""
        return self._runner.plan

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return token ids by the engine's own tokenizer."""
        return self._runner.tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def reset(self) -> None:
        """Empty the KV cache."""
        self._at = 0
        self._runner.reset()

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass, note its logits, and return what was selected."""
        wanted = [*select, *(() if LOGITS in select else (LOGITS,))]
        record = self._runner.eval(token_ids, wanted)
        self._note(record)
        self._at += 1
        if LOGITS in select:
            return record
        return replace(record, taps={name: record.taps[name] for name in select if name in record.taps})

    def _note(self, record: PassRecord) -> None:
        if self._runner.status == "live" and LOGITS in record.taps:
            # The last token's: an engine may give more of them when it is captured.
            self._seen.add((self._at, record.taps[LOGITS].array[-1].tobytes()))

    def computes_the_same(self, plan: Sequence[PassPlan]) -> bool:
        """Return whether the engine, unwatched, gives the logits it gave every time it was captured."""
        if self._runner.status == "recorded":
            return True
        self.reset()
        for one in plan:
            self._note(self._runner.eval(one.token_ids, (LOGITS,)))
            self._at += 1
        return len(self._seen) == len({index for index, _ in self._seen})

    def __enter__(self) -> _Watched:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None
