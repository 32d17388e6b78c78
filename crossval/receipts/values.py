"""JSON values of receipts: written, compared, and shown in messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crossval.passes import Numerics, PassPlan, pass_kind, tokenizer_rules
from crossval.terms import SIDES

MAX_NUMBER = 1e100
"""The largest that a receipt holds, by its schema: above any ratio of binary32 values, with a finite square."""


def number(value: float | None) -> float | None:
    """Return a float as a receipt can hold it: None for NaN, infinities and what is beyond ``MAX_NUMBER``."""
    return float(value) if value is not None and abs(value) <= MAX_NUMBER else None


def same(expected: Any, found: Any) -> bool:
    """Return whether two values of a receipt are equal, and of the same type."""
    if isinstance(expected, float) and isinstance(found, int) and not isinstance(found, bool):
        return expected == found  # JSON does not tell 1 from 1.0
    return type(expected) is type(found) and bool(expected == found)


def differences(expected: Any, found: Any, name: str = "") -> Iterator[str]:
    """Yield every field of a receipt that differs from what follows from its rows."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            yield from differences(value, found.get(key), f"{name}.{key}".lstrip("."))
    elif not same(expected, found):
        yield f"{name} is {show(found)}, the rows say {show(expected)}"


def show(value: Any) -> str:
    """Return a value for a message, cut when it is long."""
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def plan_to_json(plan: Sequence[PassPlan]) -> list[dict[str, Any]]:
    """Return passes as a receipt states them."""
    return [{"kind": one.kind, "start": one.start, "token_ids": list(one.token_ids)} for one in plan]


def plan_from_json(data: Sequence[Mapping[str, Any]]) -> tuple[PassPlan, ...]:
    """Return the passes of a receipt that is valid by the schema."""
    return tuple(PassPlan(one["kind"], tuple(one["token_ids"]), one["start"]) for one in data)


def plan_conflicts(plan: Sequence[PassPlan], what: str = "pass") -> Iterator[str]:
    """Check that each pass continues the one before it, and that its kind follows from its tokens."""
    start = 0
    for index, one in enumerate(plan):
        if one.start != start or not one.token_ids or one.kind != pass_kind(len(one.token_ids), start):
            yield f"{what} {index} does not follow the one before it"
        start += len(one.token_ids)


def vocabulary_conflicts(receipt: Mapping[str, Any], *ids: Sequence[int]) -> list[str]:
    """Check that tokenizer and token ids (the prompt's and ``ids``) belong to the model's vocabulary.

    And that text was read by the rules that follow from the engines, where the receipt states whose.
    """
    rules = receipt["tokenizer"].get("rules")
    expected = tokenizer_rules({side: Numerics.from_json(receipt[side]["numerics"]) for side in SIDES})
    if rules not in (None, expected):
        return [f"tokenizer.rules is {rules}, from the engines follows {expected}"]
    size, stated = receipt["model"]["shape"]["vocab_size"], receipt["tokenizer"]["vocab_size"]
    if stated != size:
        return [f"tokenizer.vocab_size is {stated}, the model's is {size}"]
    bad = [token for one in (receipt["prompt"]["token_ids"], *ids) for token in one if token >= size]
    return [f"token id {bad[0]} is outside the vocabulary of {size}"] if bad else []
