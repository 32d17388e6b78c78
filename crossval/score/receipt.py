"""Receipts of kind ``score``: tokens with their likelihoods as JSON and back, and what must follow from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bitnet_py import score as scoring
from bitnet_py.errors import InputError
from crossval.examine import graph
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.once import once
from crossval.receipts.party import Party
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import vocabulary_conflicts
from crossval.score.run import FirstDifference, Scored, ScoredToken, ScoreResult, Text
from crossval.terms import SIDES

CRITERION = {"least_equal": 1.0}
"""Fraction of the scored tokens whose logits have to be equal in every bit."""
OTHER_ARITHMETIC = "the engines do not state the same arithmetic, so correct ones may differ in their bits"


def to_json(result: ScoreResult) -> dict[str, Any]:
    """Return the fields of the receipt that hold the results."""
    first = result.scored.first_difference
    results = {
        "text": asdict(result.text),
        "rows": [asdict(token) for token in result.scored.tokens],
        "digests": dict(result.scored.digests),
        "first_difference": None if first is None else asdict(first),
        **derived(result),
    }
    return {"thresholds": dict(CRITERION), "results": results}


def derived(result: ScoreResult) -> dict[str, Any]:
    """Return counts and figures, which follow from the tokens."""
    return {
        "n_scored": result.n_scored,
        "n_equal_logits": result.n_equal_logits,
        "n_equal_nll": result.n_equal_nll,
        "figures": {side: result.figures(side) for side in SIDES},
    }


@once
def from_json(receipt: Receipt) -> ScoreResult:
    """Return the result in a valid ``score`` receipt; counts and figures are recomputed, not read."""
    results = receipt["results"]
    first = results["first_difference"]
    return ScoreResult(
        text=Text(**results["text"]),
        scored=Scored(
            tokens=tuple(ScoredToken(**row) for row in results["rows"]),
            digests=results["digests"],
            first_difference=None if first is None else FirstDifference(**first),
        ),
        engines={side: Party.from_json(receipt[side]).identity for side in SIDES},
        tokenizers_agree=receipt["tokenizer"]["engines_agree"] is True,
    )


def summarize(result: ScoreResult) -> Summary:
    """Return verdict and coverage; both rates are the fraction of tokens whose logits have equal bits."""
    rate = result.n_equal_logits / result.n_scored if result.n_scored else None
    return Summary(result.verdict, result.n_scored, result.n_scored, rate, logits_exact_match_rate=rate)


def notes(result: ScoreResult) -> list[str]:
    """Return why unequal bits show no fault, where they do not."""
    return [] if result.same_arithmetic else [OTHER_ARITHMETIC]


def thresholds(receipt: Receipt) -> list[str]:
    """Check that this version's criterion was applied."""
    found = receipt["thresholds"]
    return [] if found == CRITERION else [f"thresholds are {found}, this version requires {CRITERION}"]


def structure(receipt: Receipt) -> list[str]:
    """Check that the scored tokens are those that the text's tokens give, window by window."""
    result, ids = from_json(receipt), receipt["prompt"]["token_ids"]
    text, scored = result.text, [token.token_id for token in result.scored.tokens]
    start = [] if text.bos_id is None else [text.bos_id]
    complaints = vocabulary_conflicts(receipt, scored, start)
    if receipt["prompt"]["text"] is not None or receipt["prompt"]["template"] is not None:
        complaints.append("a prompt is stated; the text of a score is known by its digest")
    try:
        expected = [token for one in scoring.windows(ids, text.bos_id, text.n_context) for token in one.scored]
    except InputError as error:
        return [*complaints, f"no text can be cut so: {error}"]
    if scored != expected:
        complaints.append("the rows are not the tokens that windows of the text's tokens score")
    limit = receipt["model"]["shape"]["context_length"]
    for side in SIDES:
        held = receipt[side]["settings"].get("n_ctx")
        limit = min(limit, held) if isinstance(held, int) else limit
        if receipt[side]["status"] != "live":
            complaints.append(f"the {side} is {receipt[side]['status']}; a text is scored by live engines")
    if text.n_context > limit:
        complaints.append(f"windows of {text.n_context} tokens, the engines hold {limit}")
    whole = text.n_scored_bytes == text.n_bytes
    if not 0 < text.n_scored_bytes <= text.n_bytes or (text.bos_id is not None and not whole):
        complaints.append(f"{text.n_scored_bytes} bytes are scored of a text of {text.n_bytes}")
    return complaints


def tokens(receipt: Receipt) -> list[str]:
    """Check every token, and that digests are equal exactly where no logit differs."""
    result, vocab_size = from_json(receipt), receipt["model"]["shape"]["vocab_size"]
    complaints = []
    for n, token in enumerate(result.scored.tokens):
        complaints += [f"token {n}: {what}" for what in _impossible(token, vocab_size)]
    digests = result.scored.digests
    if (digests["candidate"] == digests["reference"]) != (result.n_equal_logits == result.n_scored):
        complaints.append("the digests of the logits and the number of differences contradict each other")
    return complaints


def _impossible(token: ScoredToken, vocab_size: int) -> Iterator[str]:
    if token.n_different > vocab_size:
        yield f"{token.n_different} logits differ of {vocab_size}"
    if not token.n_different and token.nll["candidate"] != token.nll["reference"]:
        yield "equal logits give one negative log likelihood, two are stated"
    # A logarithm of a sum that holds the token's own term: not below 0 but for its rounding.
    if min(token.nll.values()) < -1e-9:
        yield "a negative log likelihood below 0"


def first_difference(receipt: Receipt) -> list[str]:
    """Check that the first difference is the first token whose logits differ."""
    scored = from_json(receipt).scored
    at = next((n for n, token in enumerate(scored.tokens) if token.n_different), None)
    first = scored.first_difference
    if at is None or first is None:
        return [] if at is None and first is None else ["first_difference and the rows contradict each other"]
    token = scored.tokens[at]
    stated = (first.position, first.token_id, first.n_different, dict(first.nll))
    if stated != (at, token.token_id, token.n_different, dict(token.nll)) or first.largest_difference < 0:
        return [f"first_difference is at token {first.position}, the rows say {at}, or its values are others"]
    return []


def exactness(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check ``require_bitwise`` and ``tolerance``: of logits, of which nothing but equal bits is accepted."""
    result = from_json(receipt)
    if policy.require_bitwise:
        equal = 0 < result.n_scored == result.n_equal_logits
        yield GateCheck("bitwise", equal, f"{result.n_equal_logits} of {result.n_scored} tokens have equal logits")
    if policy.tolerance == "same":
        yield GateCheck("tolerance", result.same_arithmetic, notes(result)[0] if notes(result) else "equal bits")


def amount(receipt: Receipt) -> Amount:
    """Return over how many tokens how many logits were compared."""
    result = from_json(receipt)
    n_logits = result.n_scored * receipt["model"]["shape"]["vocab_size"]
    return Amount(n_logits, result.n_scored, f"{n_logits} logits of {result.n_scored} tokens")


SCORE = Kind[ScoreResult](
    name="score",
    counted="tokens",
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    derived=derived,
    notes=notes,
    checks={
        "thresholds": thresholds,
        "structure": structure,
        "tokens": tokens,
        "first difference": first_difference,
    },
    amount=amount,
    same_tokens=False,
    demands=graph.demands,
    exactness=exactness,
)
