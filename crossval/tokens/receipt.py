"""Receipts of kind ``tokens``: results as JSON and back, and what must follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.once import once
from crossval.receipts.values import vocabulary_conflicts
from crossval.terms import SIDES, PassFail, Side
from crossval.tokens import corpus
from crossval.tokens.compare import MODES, Difference, Row, Seen, TokensResult, thresholds
from crossval.tokens.corpus import OWN
from crossval.tokens.party import NAMES

SHIPPED = "shipped"
_MOST_TEXTS = 10_000
_NOTHING = hashlib.sha256().hexdigest()


def to_json(result: TokensResult) -> dict[str, Any]:
    """Return the fields of the receipt that hold the results."""
    first = result.first_difference
    return {
        "thresholds": thresholds(),
        "results": {
            "corpus": {"name": result.corpus, "digest": result.corpus_digest, "n_texts": result.n_texts},
            "rows": [asdict(row) for row in result.rows],
            "pieces": {"n": result.n_pieces, "n_equal": result.n_pieces_equal},
            "first_difference": None if first is None else _difference_to_json(first),
            "elapsed_s": dict(result.elapsed_s),
            **derived(result),
        },
    }


def _difference_to_json(first: Difference) -> dict[str, Any]:
    data = asdict(first)
    for side in SIDES:
        data["seen"][side] |= {name: list(data["seen"][side][name]) for name in ("ids", "pieces")}
    return data


def derived(result: TokensResult) -> dict[str, Any]:
    """Return the counts over all rows."""
    names = ("n_texts", "n_equal", "n_different", "n_refused", "n_tokens")
    total: dict[str, Any] = {name: sum(getattr(row, name) for row in result.rows) for name in names}
    for name in ("n_refused_by", "n_lost"):
        total[name] = {side: sum(getattr(row, name)[side] for row in result.rows) for side in SIDES}
    return {"total": total}


@once
def from_json(receipt: Receipt) -> TokensResult:
    """Return the result in a valid ``tokens`` receipt; totals are recomputed, not read."""
    results = receipt["results"]
    return TokensResult(
        corpus=results["corpus"]["name"],
        corpus_digest=results["corpus"]["digest"],
        n_texts=results["corpus"]["n_texts"],
        rows=tuple(Row(**row) for row in results["rows"]),
        n_pieces=results["pieces"]["n"],
        n_pieces_equal=results["pieces"]["n_equal"],
        first_difference=_difference_from_json(results["first_difference"]),
        elapsed_s=results["elapsed_s"],
    )


def _difference_from_json(data: Mapping[str, Any] | None) -> Difference | None:
    if data is None:
        return None
    seen = {
        side: Seen(one["n_ids"], tuple(one["ids"]), tuple(one["pieces"]), one["refused"])
        for side, one in data["seen"].items()
    }
    return Difference(**{**data, "seen": seen})


def n_compared(result: TokensResult) -> int:
    """Return how many times both tokenizers gave ids for a text."""
    return sum(row.n_equal + row.n_different for row in result.rows)


def agree(result: TokensResult) -> bool | None:
    """Return whether both gave the same ids for every text that both read; None when they read none."""
    return all(row.n_different == 0 for row in result.rows) if n_compared(result) else None


def verdict(result: TokensResult) -> PassFail:
    """Return ``pass`` when every text was read alike, ids and pieces; ``incomplete`` when that could not be seen.

    A text that only the reference refuses was not compared; one that only the candidate refuses is
    a failure.
    """
    wrong = any(
        row.n_different or row.n_refused_by["candidate"] or any(row.n_lost.values()) for row in result.rows
    )
    if wrong or result.n_pieces_equal != result.n_pieces:
        return "fail"
    unseen = any(row.n_refused_by["reference"] for row in result.rows)
    return "incomplete" if unseen or not any(row.n_equal and row.n_tokens for row in result.rows) else "pass"


def summarize(result: TokensResult) -> Summary:
    """Return verdict and coverage; ``exact_match_rate`` is the fraction of texts with equal ids."""
    compared = n_compared(result)
    n_equal = sum(row.n_equal for row in result.rows)
    return Summary(
        verdict(result),
        required=len(MODES) * result.n_texts,
        compared=compared,
        exact_match_rate=n_equal / compared if compared else None,
    )


def criterion(receipt: Receipt) -> list[str]:
    """Check that this version's criteria were applied."""
    expected = thresholds()
    return [
        f"thresholds.{name} is {receipt['thresholds'][name]}, this version requires {value}"
        for name, value in expected.items()
        if receipt["thresholds"][name] != value
    ]


def structure(receipt: Receipt) -> list[str]:
    """Check the corpus, and that every category of it has a row in each mode with all its texts."""
    result = from_json(receipt)
    complaints = vocabulary_conflicts(receipt)
    for side in SIDES:
        name, status = receipt[side]["name"], receipt[side]["status"]
        if name not in NAMES or status != "live":
            complaints.append(f"the {side} is {status} {name}; compared are live {', '.join(NAMES)}")
    stated = receipt["tokenizer"]["engines_agree"]
    if stated is not agree(result):
        complaints.append(f"tokenizer.engines_agree is {stated}, the rows say {agree(result)}")
    if receipt["prompt"]["text"] is not None or receipt["prompt"]["token_ids"]:
        complaints.append("there is no prompt; one is named")
    found = [(row.mode, row.category) for row in result.rows]
    categories = list(dict.fromkeys(category for _, category in found))
    if found != [(mode, category) for mode in MODES for category in categories]:
        complaints.append("rows are missing, repeated or out of order: every category needs one per mode")
    for mode in MODES:
        n_texts = sum(row.n_texts for row in result.rows if row.mode == mode)
        if n_texts != result.n_texts:
            complaints.append(f"the rows of mode {mode} have {n_texts} texts, the corpus {result.n_texts}")
    vocab_size = receipt["tokenizer"]["vocab_size"]
    if result.n_pieces != vocab_size:
        complaints.append(f"pieces of {result.n_pieces} tokens, the vocabulary has {vocab_size}")
    return complaints + (_shipped(result) if result.corpus == SHIPPED else [])


def _shipped(result: TokensResult) -> list[str]:
    """Check that the corpus is the one that ships with this version, and the rows are of its categories."""
    shipped = corpus.shipped()
    if result.corpus_digest != shipped.digest:
        return ["the corpus is not the one of this version; run it again"]
    expected = [(mode, text.category) for mode in MODES for text in shipped.texts]
    found = [(row.mode, row.category) for row in result.rows for _ in range(min(row.n_texts, _MOST_TEXTS))]
    if [one for one in found if one[1] != OWN] != expected:
        return ["the rows are not those of the corpus's categories, with as many texts as they have"]
    return []


def rows(receipt: Receipt) -> list[str]:
    """Check the counts of every row, and that digests are equal exactly where nothing differs."""
    complaints = []
    for n, row in enumerate(from_json(receipt).rows):
        where = f"row {n} ({row.mode}, {row.category})"
        counted = row.n_equal + row.n_different + row.n_refused + sum(row.n_refused_by.values())
        if counted != row.n_texts:
            complaints.append(f"{where}: {counted} texts are accounted for, it has {row.n_texts}")
        alike = not row.n_different and not any(row.n_refused_by.values())
        if (row.digests["candidate"] == row.digests["reference"]) != alike:
            complaints.append(
                f"{where}: the digests of the ids and the number of differences contradict each other"
            )
        if not row.n_equal and row.n_tokens:
            complaints.append(f"{where}: {row.n_tokens} tokens of no equal texts")
        for side in SIDES:
            if row.n_lost[side] > row.n_texts - row.n_refused - row.n_refused_by[side]:
                complaints.append(f"{where}: more texts lost than read by the {side}")
        if row.n_texts and _NOTHING in row.digests.values():
            complaints.append(f"{where}: a digest of no ids")
    pieces = receipt["results"]["pieces"]
    if pieces["n_equal"] > pieces["n"]:
        complaints.append(f"{pieces['n_equal']} pieces are equal, there are {pieces['n']}")
    return complaints


def first_difference(receipt: Receipt) -> list[str]:
    """Check the first difference: in the first row that has one, of a text of the corpus, where ids differ."""
    result = from_json(receipt)
    first = result.first_difference
    having = [row for row in result.rows if row.n_different or any(row.n_refused_by.values())]
    if first is None or not having:
        return [] if first is None and not having else ["first_difference and the rows contradict each other"]
    row, complaints = having[0], []
    if (first.mode, first.category) != (row.mode, row.category):
        complaints.append(
            f"first_difference is in {first.mode}, {first.category}; the first row with one is another"
        )
    refusing = [side for side in SIDES if first.seen[side].refused is not None]
    if len(refusing) == 2 or (refusing and not row.n_refused_by[refusing[0]]) or not (refusing or row.n_different):
        complaints.append("first_difference and the refusals of its row contradict each other")
    complaints += _tokens_shown(first, receipt["tokenizer"]["vocab_size"])
    if first.category != OWN and result.corpus == SHIPPED and result.corpus_digest == corpus.shipped().digest:
        texts = corpus.shipped().texts
        text = texts[first.index] if first.index < len(texts) else None
        if text is None or text.category != first.category or not text.data.hex().startswith(first.text):
            complaints.append(f"first_difference.text is not text {first.index} of the corpus")
    return complaints


def _tokens_shown(first: Difference, vocab_size: int) -> list[str]:
    complaints = []
    ids: dict[Side, tuple[int, ...]] = {}
    for side in SIDES:
        seen = first.seen[side]
        if (seen.refused is None) == (seen.n_ids is None):
            complaints.append(f"first_difference: the {side} either refused or has a number of tokens")
        if len(seen.pieces) != len(seen.ids) or first.start + len(seen.ids) > (seen.n_ids or first.start):
            complaints.append(f"first_difference: more tokens shown of the {side} than it has, or other pieces")
        if any(token >= vocab_size for token in seen.ids):
            complaints.append(f"first_difference: a token of the {side} is outside the vocabulary")
        ids[side] = seen.ids
    before = first.at - first.start
    ours, theirs = ids["candidate"], ids["reference"]
    if not any(first.seen[side].refused for side in SIDES):
        alike = ours[:before] == theirs[:before] and before >= 0
        if not alike or ours[before : before + 1] == theirs[before : before + 1]:
            complaints.append(f"first_difference: the tokens shown do not differ first at {first.at}")
    return complaints


def amount(receipt: Receipt) -> Amount:
    """Return how many comparisons of texts were made, over how many tokens."""
    result = from_json(receipt)
    n_tokens = sum(row.n_tokens for row in result.rows)
    return Amount(n_compared(result), n_tokens, f"{n_compared(result)} texts, {n_tokens} equal tokens")


TOKENS = Kind[TokensResult](
    name="tokens",
    counted="texts",
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    derived=derived,
    checks={
        "thresholds": criterion,
        "structure": structure,
        "row status": rows,
        "first difference": first_difference,
    },
    amount=amount,
    same_tokens=False,
    computes=False,
)
