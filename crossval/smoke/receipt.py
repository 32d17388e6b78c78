"""Receipts of kind ``smoke``: answers of a suite as JSON and back, and what must follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from crossval.errors import BadInputError
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.once import once
from crossval.receipts.policy import MIN_CORRECT, GateCheck, Policy
from crossval.receipts.values import vocabulary_conflicts
from crossval.smoke import answers
from crossval.smoke.answers import Answer, MinCorrect, SmokeResult
from crossval.smoke.ask import first_line, room_of
from crossval.smoke.suite import SHIPPED, SmokePrompt, digest_of, load_suite
from crossval.terms import SIDES

_PROMPT_FIELDS = tuple(field.name for field in fields(SmokePrompt))


def to_json(result: SmokeResult) -> dict[str, Any]:
    """Return the fields of the receipt that hold the answers: a row per prompt and engine, and the counts."""
    rows = [
        {
            **asdict(answer.prompt),
            "engine": answer.side,
            "prompt_ids": list(answer.prompt_ids),
            "token_ids": list(answer.token_ids),
            "finish": answer.finish,
            "text": answer.text,
            "class": kind,
        }
        for answer, kind in result.classified
    ]
    results = {
        "suite": {"name": result.suite, "digest": result.suite_digest, "n_prompts": result.n_prompts},
        "engines": list(result.sides),
        "stop_ids": list(result.stop_ids),
        "special_ids": list(result.special_ids),
        "rows": rows,
        **derived(result),
    }
    return {"thresholds": answers.thresholds(result.min_correct), "results": results}


def derived(result: SmokeResult) -> dict[str, Any]:
    """Return the counts that follow from the answers."""
    return {"summary": answers.count(result)}


@once
def from_json(receipt: Receipt) -> SmokeResult:
    """Return the result in a valid ``smoke`` receipt; classes and counts are recomputed, not read."""
    results = receipt["results"]
    return SmokeResult(
        suite=results["suite"]["name"],
        suite_digest=results["suite"]["digest"],
        n_prompts=results["suite"]["n_prompts"],
        sides=tuple(results["engines"]),
        answers=tuple(map(_answer_from_json, results["rows"])),
        min_correct=MinCorrect(**receipt["thresholds"]["min_correct"]),
        stop_ids=tuple(results["stop_ids"]),
        special_ids=tuple(results["special_ids"]),
    )


def _answer_from_json(row: Mapping[str, Any]) -> Answer:
    return Answer(
        prompt=SmokePrompt(**{name: row[name] for name in _PROMPT_FIELDS}),
        side=row["engine"],
        prompt_ids=tuple(row["prompt_ids"]),
        token_ids=tuple(row["token_ids"]),
        finish=row["finish"],
        text=row["text"],
    )


def summarize(result: SmokeResult) -> Summary:
    """Return verdict and coverage; ``exact_match_rate`` is the fraction of prompts with equal texts."""
    texts = answers.count(result)["texts"]
    return Summary(
        status=answers.decide(result),
        required=result.n_prompts * len(result.sides),
        compared=len(result.answers),
        exact_match_rate=texts["equal"] / texts["compared"] if texts is not None and texts["compared"] else None,
    )


def thresholds(receipt: Receipt) -> list[str]:
    """Check that this version's criteria were applied, and that the required fraction can be missed."""
    found = receipt["thresholds"]
    share = MinCorrect(**found["min_correct"])
    expected = answers.thresholds(share)
    complaints = [
        f"thresholds.{name} is {found[name]}, this version checks answers against {value}"
        for name, value in expected.items()
        if found[name] != value
    ]
    if not 0 < share.correct <= share.of:
        complaints.append(f"thresholds.min_correct is {share}, expected a fraction above 0 and at most 1")
    return complaints


def structure(receipt: Receipt) -> list[str]:
    """Check suite, order of the rows, engines, tokenizer and prompt."""
    result = from_json(receipt)
    complaints = []
    sides = [side for side in SIDES if receipt[side]["status"] not in ("unused", "unavailable")]
    if list(result.sides) != sides:
        complaints.append(f"results.engines is {list(result.sides)}, the engines that ran are {sides}")
    asked = [answer.prompt for answer in result.answers if answer.side == result.sides[0]]
    expected = [(prompt, side) for prompt in asked for side in result.sides]
    if [(answer.prompt, answer.side) for answer in result.answers] != expected:
        complaints.append("rows are missing, repeated or out of order: every prompt needs one per engine")
    if len({prompt.id for prompt in asked}) != len(asked):
        complaints.append("a prompt id occurs twice")
    if result.n_prompts != len(asked):
        complaints.append(f"results.suite.n_prompts is {result.n_prompts}, there are {len(asked)}")
    if digest_of(asked) != result.suite_digest:
        complaints.append("results.suite.digest is not that of the prompts")
    complaints += _shipped(result) + _vocabulary(receipt, result)
    if result.answers:
        first = result.answers[0]
        if receipt["prompt"]["text"] != first.prompt.prompt:
            complaints.append("prompt.text is not that of the first prompt")
        if receipt["prompt"]["token_ids"] != list(first.prompt_ids):
            complaints.append("prompt.token_ids are not those of the first prompt")
    return complaints


def _shipped(result: SmokeResult) -> list[str]:
    """Check that a suite under a shipped name is the one that ships with this version."""
    if result.suite not in SHIPPED:
        return []
    try:
        shipped = load_suite(result.suite).digest
    except BadInputError as error:
        return [str(error)]
    if shipped == result.suite_digest:
        return []
    return [f"suite {result.suite} is not the one of this version; run it again, or name the file"]


def _vocabulary(receipt: Receipt, result: SmokeResult) -> list[str]:
    used = [ids for answer in result.answers for ids in (answer.prompt_ids, answer.token_ids)]
    complaints = vocabulary_conflicts(receipt, result.stop_ids, result.special_ids, *used)
    for name, ids in (("stop_ids", result.stop_ids), ("special_ids", result.special_ids)):
        if list(ids) != sorted(set(ids)):
            complaints.append(f"results.{name} are not ascending")
    agree, stated = tokenizers_agree(result), receipt["tokenizer"]["engines_agree"]
    if stated is not agree:
        complaints.append(f"tokenizer.engines_agree is {stated}, the prompts' ids say {agree}")
    return complaints


def tokenizers_agree(result: SmokeResult) -> bool | None:
    """Return whether both engines turned every prompt into the same ids; None when only one ran."""
    if len(result.sides) < 2:
        return None
    ids: dict[str, set[tuple[int, ...]]] = {}
    for answer in result.answers:
        ids.setdefault(answer.prompt.id, set()).add(answer.prompt_ids)
    return all(len(found) == 1 for found in ids.values())


def generation(receipt: Receipt) -> list[str]:
    """Check that every answer is possible as its row states it."""
    result, max_tokens = from_json(receipt), receipt["settings"]["n_steps"]
    complaints = []
    if not max_tokens:
        complaints.append("settings.n_steps, the limit of generated tokens, is missing")
        max_tokens = 0
    texts: dict[tuple[tuple[int, ...], str], str] = {}
    for answer in result.answers:
        where = f"{answer.side}, prompt {answer.prompt.id!r}"
        room = room_of(receipt["model"]["shape"]["context_length"], receipt[answer.side]["settings"].get("n_ctx"))
        complaints += [f"{where}: {what}" for what in _conflicts(answer, set(result.stop_ids), max_tokens, room)]
        how = "newline" if answer.finish == "newline" else "all"
        if texts.setdefault((answer.body, how), answer.text) != answer.text:
            complaints.append(f"{where}: the same tokens have another text elsewhere")
    return complaints


def _conflicts(answer: Answer, stop_ids: set[int], max_tokens: int, room: int) -> Iterator[str]:
    n_tokens, finish = len(answer.token_ids), answer.finish
    if not answer.prompt_ids:
        yield "no prompt tokens"
    if not n_tokens and finish != "invalid":
        yield "nothing was generated"
    if n_tokens > max_tokens or len(answer.prompt_ids) + n_tokens > room + 1:
        yield f"{n_tokens} tokens generated, above the limit of {max_tokens} or the context of {room}"
    ends = [index for index, token in enumerate(answer.token_ids) if token in stop_ids]
    if ends != ([n_tokens - 1] if finish == "stop" else []):
        yield f"finish is {finish}, but the end-of-text tokens are at {ends[:3]} of {n_tokens}"
    if finish == "limit" and n_tokens != max_tokens:
        yield f"finish is limit after {n_tokens} of {max_tokens} tokens"
    if finish == "context" and len(answer.prompt_ids) + n_tokens != room + 1:
        yield f"finish is context, which holds {room}"
    if finish == "newline" and answer.prompt.stop != "newline":
        yield "finish is newline, which does not end this prompt"
    lines = first_line(answer.text)
    if answer.prompt.stop == "newline" and finish != "invalid" and lines is not None:
        yield "the text continues after a newline, which ends this prompt"
    if not answer.body and answer.text:
        yield "a text without tokens"


def classes(receipt: Receipt) -> list[str]:
    """Check the class of every answer against its text, tokens and what was expected.

    Raises:
        BadInputError: a pattern is unusable or takes too long.
    """
    return [
        f"{row['engine']}, prompt {row['id']!r}: class is {row['class']}, the answer is {kind}"
        for row, (_, kind) in zip(receipt["results"]["rows"], from_json(receipt).classified, strict=True)
        if row["class"] != kind
    ]


def amount(receipt: Receipt) -> Amount:
    """Return how many answers there are, of how many tokens."""
    rows = receipt["results"]["rows"]
    n_tokens = sum(len(row["token_ids"]) for row in rows)
    return Amount(len(rows), n_tokens, f"{len(rows)} answers, {n_tokens} tokens generated")


def demands(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check the fraction of correct answers of each engine against the policy's minimum, not the command's."""
    least = MIN_CORRECT if policy.min_correct is None else policy.min_correct
    for counts in derived(from_json(receipt))["summary"]["engines"]:
        correct, n_prompts = counts["all"]["correct"], counts["all"]["n_prompts"]
        met = n_prompts > 0 and correct / n_prompts >= least
        detail = f"{correct} of {n_prompts} correct, {least:g} required"
        yield GateCheck(f"answers of the {counts['engine']}", met, detail)


SMOKE = Kind[SmokeResult](
    name="smoke",
    counted="texts",
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    derived=derived,
    same_tokens=False,
    checks={"thresholds": thresholds, "structure": structure, "generation": generation, "classes": classes},
    amount=amount,
    demands=demands,
)
