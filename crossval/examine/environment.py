"""What is different around two results: build, flags, instruction sets, kernels, model, tokenizer, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossval.receipts.file import Receipt
from crossval.traces.read import TraceInfo

UNSTATED = "not stated"
ENGINE = ("name", "version", "source_commit", "source_digest", "library_digest", "compiler", "flags")
Facts = Mapping[str, Mapping[str, Any]]
"""Group -> field -> value; None, or no field: not stated."""


@dataclass(frozen=True)
class Difference:
    """One fact that differs; of lists, what only one side has."""

    group: str
    field: str
    before: str
    after: str


def of_trace(info: TraceInfo) -> Facts:
    """Return the facts that a trace states."""
    prompt = {"text": info.prompt_text, "token_ids": list(info.prompt_ids)}
    return {"engine": _engine(info.engine.to_json()), "model": vars(info.model), "prompt": prompt}


def of_receipt(receipt: Receipt) -> Facts:
    """Return the facts that a receipt states."""
    kernels = [one["name"] for one in receipt["compute"]["kernels"]]
    return {
        "candidate": _engine(receipt["candidate"]),
        "reference": _engine(receipt["reference"]),
        "kernels": {"path": receipt["compute"]["path"], "run": kernels},
        "model": _flat(receipt["model"]),
        "tokenizer": _flat(receipt["tokenizer"]),
        "prompt": _flat(receipt["prompt"]),
        "settings": _flat(receipt["settings"]),
        "host": _flat(receipt["host"]),
        "tool": _flat(receipt["tool"]),
    }


def differences(before: Facts, after: Facts) -> list[Difference]:
    """Return every fact that differs, or that only one side states."""
    found = []
    for group in dict.fromkeys([*before, *after]):
        ours, theirs = before.get(group, {}), after.get(group, {})
        for name in dict.fromkeys([*ours, *theirs]):
            a, b = ours.get(name), theirs.get(name)
            if a != b:
                found.append(Difference(group, name, *_shown(a, b)))
    return found


def same_groups(before: Facts, after: Facts) -> list[str]:
    """Return the groups whose facts are all equal."""
    return [group for group in before if before[group] == after.get(group)]


def unstated(before: Facts, after: Facts) -> list[str]:
    """Return the facts that neither side states: of these nothing is known, so nothing is equal."""
    known = [group for group in before if group in after]
    return [
        f"{group}.{name}"
        for group in known
        for name in before[group]
        if before[group][name] is None and after[group].get(name) is None
    ]


def _engine(engine: Mapping[str, Any]) -> dict[str, Any]:
    facts = {name: engine.get(name) for name in ENGINE}
    facts |= _flat(engine.get("numerics") or {}, "numerics")
    return facts | _flat(engine.get("settings") or {}, "settings")


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    return dict(_walk(value, above))


def _walk(value: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for name, one in value.items():
        full = f"{above}.{name}" if above else name
        if isinstance(one, Mapping):
            yield from _walk(one, full)
        else:
            yield full, one


def _shown(before: Any, after: Any) -> tuple[str, str]:
    if _is_names(before) and _is_names(after):
        less, more = ([one for one in a if one not in b] for a, b in ((before, after), (after, before)))
        if less or more:
            return (f"also {', '.join(less)}" if less else "-", f"also {', '.join(more)}" if more else "-")
    return _text(before), _text(after)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, str) for one in value)
    )


def _text(value: Any) -> str:
    return UNSTATED if value is None else str(value)
