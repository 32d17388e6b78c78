"""What a kind of receipt is, and how a receipt is made: one protocol for all features.

Each feature describes its receipts by one ``Kind`` (``crossval.registry`` lists them): how a result is written and
read, what follows from it, which checks the gate makes of it. The summary of a receipt is computed from the fields
as a reader will read them, by the same functions that the gate uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from crossval.files import utc_now
from crossval.receipts import provenance, values
from crossval.receipts.file import SCHEMA_VERSION, Receipt, seal
from crossval.receipts.once import once
from crossval.receipts.party import Compute, Party
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import number

SETTINGS = ("n_threads", "n_decode", "n_steps", "full", "reference", "candidate")
VIEWS = ("floors", "causal")
FLAGS = (*VIEWS, "follow_reference_graph")
"""Settings that a receipt states where they were given."""
"""What `--floors` and `--causal` add: a setting and a field, both present or both absent."""

Result = TypeVar("Result")
Checks = Mapping[str, Callable[[Receipt], list[str]]]
"""Name of a check -> function that returns complaints, none if it passes; in the order they are shown."""


@dataclass(frozen=True)
class RunFacts:
    """Everything in a receipt that is not a result."""

    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    text: str | None
    template: str | None
    token_ids: Sequence[int]
    candidate: Party
    reference: Party
    compute: Compute
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Summary:
    """What follows from the rows of a receipt, whatever its kind. Rates are None where nothing was counted."""

    status: str
    """Outcome of the comparisons or checks."""
    required: int
    compared: int
    exact_match_rate: float | None = None
    cosine: float | None = None
    logits_exact_match_rate: float | None = None
    skipped: Sequence[Mapping[str, Any]] = ()
    first_divergence: Mapping[str, Any] | None = None
    first_inexact: Mapping[str, Any] | None = None

    def to_json(self, verdict: str, *, cpp_available: bool) -> dict[str, Any]:
        """Return the receipt's summary fields."""
        return {
            "first_divergence": self.first_divergence,
            "first_inexact": self.first_inexact,
            "coverage": {"required": self.required, "compared": self.compared, "skipped": list(self.skipped)},
            "parity": {
                "cosine_similarity": number(self.cosine),
                "exact_match_rate": number(self.exact_match_rate),
                "logits_exact_match_rate": number(self.logits_exact_match_rate),
                "cpp_available": cpp_available,
                "status": self.status,
            },
            "verdict": verdict,
        }


@dataclass(frozen=True)
class Amount:
    """How much was compared or checked, in numbers and in words."""

    n_compared: int
    n_tokens: int | None
    """None: this kind reads no tokens."""
    words: str


@dataclass(frozen=True)
class Kind(Generic[Result]):
    """One kind of receipt; functions from ``notes`` on have a default that suits most kinds."""

    name: str
    counted: str | None
    """What ``parity.exact_match_rate`` is a fraction of; None: this kind has none."""
    to_json: Callable[[Result], dict[str, Any]]
    """Result -> fields of the receipt that hold it: ``thresholds``, ``results``, and ``audit`` or others."""
    from_json: Callable[[Receipt], Result]
    """A receipt that is valid by the schema -> its result; nothing that follows from the rows is read."""
    summarize: Callable[[Result], Summary]
    checks: Checks
    """Whether everything else in the receipt follows from its rows, its model and its token ids."""
    amount: Callable[[Receipt], Amount]

    notes: Callable[[Result], Sequence[str]] = lambda result: ()
    """Notes that the result itself adds."""
    verdict: Callable[[Result, Summary], str] = lambda result, summary: summary.status
    passing: str = "pass"
    """The verdict that passes the gate."""
    derived: Callable[[Result], dict[str, Any]] = lambda result: {}
    """Further fields of the receipt's ``results`` that follow from the rows."""
    same_tokens: bool = True
    """Whether tokenizers that disagree are a divergence; not where each engine reads the text itself."""
    computes: bool = True
    """Whether engines compute anything, so that the receipt has to say what did."""
    further_checks: Callable[[Receipt], Checks] = lambda receipt: {}
    """Checks of what a receipt holds beyond rows and summary."""
    one_sided: bool = False
    """Whether an engine is checked by itself, also where both take part: a reference is not needed."""

    # What a policy can demand (``gate``).
    demands: Callable[[Receipt, Policy], Iterator[GateCheck]] = lambda receipt, policy: iter(())
    """Checks against a policy that only this kind has."""
    exactness: Callable[[Receipt, Policy], Iterator[GateCheck]] = lambda receipt, policy: iter(())
    """Checks of ``require_bitwise``, ``tolerance`` and ``min_cosine``."""
    ratios: Callable[[Receipt], Mapping[str, float | None]] = lambda receipt: {}
    """Measured speed ratios by name of the measure."""
    within: Callable[[Receipt], float] = lambda receipt: 0.0
    """Distance below which a receipt with verdict ``agrees_within`` shows nothing."""


def build(kind: Kind[Result], result: Result, facts: RunFacts) -> Receipt:
    """Return the sealed receipt of a result.

    Raises:
        BadInputError: the result cannot be written as a valid receipt (a lone surrogate in the prompt, say).
    """
    added = [note for note in kind.notes(result) if note not in facts.notes]
    facts = replace(facts, notes=[*facts.notes, *added])
    written = Receipt({**_frame(kind, facts), **kind.to_json(result)})
    return seal({**written, **_summary(kind, kind.from_json(written), written)})


def build_unavailable(kind: Kind[Any], facts: RunFacts) -> Receipt:
    """Return the sealed receipt of a run that lacked an engine: verdict ``incomplete``."""
    nothing = Summary("incomplete", 0, 0).to_json("incomplete", cpp_available=facts.reference.is_bitnet_cpp)
    return seal({**_frame(kind, facts), "thresholds": None, "results": {"rows": []}, **nothing})


def _frame(kind: Kind[Any], facts: RunFacts) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind.name,
        "created_at": utc_now(),
        "tool": provenance.tool_facts(),
        "host": provenance.host_facts(),
        "model": dict(facts.model),
        "tokenizer": dict(facts.tokenizer),
        "prompt": {
            "text": facts.text,
            "template": facts.template,
            "token_ids": [int(token) for token in facts.token_ids],
        },
        "candidate": facts.candidate.to_json(),
        "reference": facts.reference.to_json(),
        "settings": {
            **{name: facts.settings.get(name) for name in SETTINGS},
            **{name: True for name in FLAGS if facts.settings.get(name)},
        },
        "audit": None,
        "diagnosis": None,
        "compute": facts.compute.to_json(),
        "notes": list(facts.notes),
    }


def _summary(kind: Kind[Result], result: Result, receipt: Receipt) -> dict[str, Any]:
    """Return the summary fields; two tokenizers that disagree are a divergence end to end."""
    summary = kind.summarize(result)
    disagree = kind.same_tokens and receipt["tokenizer"]["engines_agree"] is False
    if disagree:
        summary = replace(summary, status="divergence")
    verdict = kind.verdict(result, summary)
    if disagree and verdict == "near_ties":
        verdict = "divergence"  # what differs is not only the choice between near ties
    cpp_available = Party.from_json(receipt["reference"]).is_bitnet_cpp
    return summary.to_json(verdict, cpp_available=cpp_available)


@once
def recompute(kind: Kind[Any], receipt: Receipt) -> dict[str, Any]:
    """Return the fields that follow from the receipt's rows, parties and audits."""
    result = kind.from_json(receipt)
    derived = kind.derived(result)
    return {**_summary(kind, result, receipt), **({"results": derived} if derived else {})}


def summary_conflicts(kind: Kind[Any], receipt: Receipt) -> list[str]:
    """Check verdict, coverage, parity, first divergence, first inexact row and counts against the rows."""
    expected = dict(recompute(kind, receipt))
    for name in ("first_divergence", "first_inexact"):
        stated = receipt[name]
        if stated is not None and "after" not in stated and expected[name] is not None:
            # a receipt of an older version does not state it
            expected[name] = {key: value for key, value in expected[name].items() if key != "after"}
    return list(values.differences(expected, receipt))
