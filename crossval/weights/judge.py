"""What is wrong with a model file: findings that follow from its rows, with their causes where established."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from bitnet_py import layout_evidence
from bitnet_py.layouts import LAYOUTS
from crossval.terms import PassFail
from crossval.weights import scales
from crossval.weights.readings import HOW
from crossval.weights.rows import KeyRow, Match, TensorRow, WeightsResult
from crossval.weights.scales import Scale

Aspect = Literal["presence", "size", "shape", "codes", "scale", "values", "layout", "key"]
Level = Literal["wrong", "note"]
UNDETERMINED = "undetermined"
HEAD = "output.weight"
PADDING = 64 << 10
"""Bytes behind a tensor up to which they are padding to the file's alignment, whose largest value this is."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    subject: str
    """Tensor or key; ``file``: all of it."""
    aspect: Aspect
    cause: str
    """``undetermined`` where none, or more than one, explains it."""
    sentence: str
    level: Level = "wrong"


def findings(result: WeightsResult) -> list[Finding]:
    """Return everything that is wrong, in the order of the rows."""
    expected = {
        row.name: row.expected.scale
        for row in result.rows
        if row.expected is not None and row.expected.scale is not None
    }
    found = [one for row in result.rows for one in _of_tensor(row, expected, result.has_checkpoint)]
    found += list(_of_layout(result))
    return [*found, *(one for row in result.keys for one in _of_key(row))]


def verdict(result: WeightsResult) -> PassFail:
    """Return ``pass`` when everything was compared with a checkpoint and nothing is wrong."""
    if any(one.level == "wrong" for one in findings(result)):
        return "fail"
    required, compared = coverage(result)
    complete = required == compared > 0 and not result.not_compared
    return "pass" if complete else "incomplete"


def coverage(result: WeightsResult) -> tuple[int, int]:
    """Return how many tensors and keys had to be compared, and how many were."""
    if not result.has_checkpoint:
        return len(result.rows), 0
    required = len(result.rows) + len(result.keys)
    return required, required - sum(row.skipped is not None for row in result.rows)


def _of_tensor(row: TensorRow, expected: Mapping[str, float], has_checkpoint: bool) -> Iterator[Finding]:
    if row.facts is None:
        yield _missing(row)
        return
    yield from _unusable(row)
    if has_checkpoint and row.expected is None:
        yield _extra(row)
    if row.expected is None or row.compared is None:
        return
    if row.facts.shape != row.expected.shape:
        sentence = f"shape {_shape(row.facts.shape)}, the checkpoint has {_shape(row.expected.shape)}"
        yield _explained(row, "shape", sentence)
    elif row.compared.n_different > row.compared.n_at_ties:
        aspect: Aspect = "codes" if row.expected.role == "matrix" else "values"
        sentence = f"{row.compared.n_different} of {row.compared.n_values} {aspect} differ"
        yield _explained(row, aspect, sentence)
    yield from _of_scale(row, expected)


def _missing(row: TensorRow) -> Finding:
    assert row.expected is not None
    if row.name == HEAD:
        sentence = "the file has no head of its own, so that the embedding is used; the checkpoint's is separate"
        return Finding(row.name, "presence", "tied head", sentence)
    return Finding(row.name, "presence", "missing", f"the file lacks it; the checkpoint has {row.expected.source}")


def _extra(row: TensorRow) -> Finding:
    if row.name == HEAD:
        copy = " (the same bytes as the embedding)" if row.copy_of else ""
        sentence = f"the file has a head of its own{copy}; the checkpoint's is the embedding"
        return Finding(row.name, "presence", "separate head", sentence)
    return Finding(row.name, "presence", "not in the checkpoint", "the checkpoint has no such tensor")


def _unusable(row: TensorRow) -> Iterator[Finding]:
    facts = row.facts
    assert facts is not None
    if facts.stored_bytes - facts.declared_bytes >= PADDING:
        more = facts.stored_bytes - facts.declared_bytes
        yield Finding(row.name, "size", UNDETERMINED, f"{more} bytes behind it belong to no tensor")
    if facts.histogram is not None and facts.histogram[3] and not _named(row):
        sentence = f"code 3 occurs {facts.histogram[3]} times; it does not exist"
        yield Finding(row.name, "codes", "code 3", sentence)
    if facts.histogram is not None and facts.scale is None:
        yield Finding(row.name, "scale", "not finite", "the scale is NaN or infinite")
    elif facts.scale is not None and facts.scale <= 0 and row.expected is None:
        yield Finding(row.name, "scale", "not above 0", f"the scale is {facts.scale:.9g}")
    if facts.values is not None and facts.values.n_invalid:
        yield Finding(row.name, "values", "not finite", f"{facts.values.n_invalid} values are NaN or infinite")


def _named(row: TensorRow) -> bool:
    return row.compared is not None and len(row.compared.matches) == 1


def _explained(row: TensorRow, aspect: Aspect, sentence: str) -> Finding:
    """Return the finding with the one reading that explains it, or the reason why none is named."""
    assert row.compared is not None
    matches = row.compared.matches
    if len(matches) == 1:
        return Finding(
            row.name, aspect, cause_of(matches[0], row.name), f"{sentence}: {_words(matches[0], row.name)}"
        )
    if not matches:
        return Finding(row.name, aspect, UNDETERMINED, f"{sentence}; no known reading gives the checkpoint's")
    several = " or ".join(cause_of(match, row.name) for match in matches[:4])
    return Finding(row.name, aspect, UNDETERMINED, f"{sentence}; explained equally by {several}")


def cause_of(match: Match, own: str) -> str:
    """Return the name of the cause that a match establishes."""
    parts = [*match.how, *([f"holds {match.tensor}"] if match.tensor != own else [])]
    return ", ".join(parts)


def _words(match: Match, own: str) -> str:
    parts = [HOW[one] for one in match.how]
    if match.tensor != own:
        parts.append(f"it holds {match.tensor}")
    return "; ".join(parts)


def _of_scale(row: TensorRow, expected: Mapping[str, float]) -> Iterator[Finding]:
    facts, compared = row.facts, row.compared
    if (
        facts is None
        or facts.scale is None
        or row.expected is None
        or compared is None
        or row.name not in expected
    ):
        return
    holder = compared.matches[0].tensor if len(compared.matches) == 1 else row.name
    scale = Scale(
        facts.scale, expected[holder], compared.n_values, row.expected.dtype, facts.type, row.expected.largest
    )
    others = {name: value for name, value in expected.items() if name != holder}
    causes = scales.explain(scale, others)
    if causes is None:
        return
    sentence = f"the scale is {facts.scale:.9g}, it should be {scale.expected:.9g}"
    if len(causes) == 1:
        yield Finding(row.name, "scale", causes[0], sentence)
    elif causes:
        yield Finding(
            row.name, "scale", UNDETERMINED, f"{sentence}; explained equally by {' or '.join(causes[:4])}"
        )
    else:
        yield Finding(row.name, "scale", UNDETERMINED, sentence)


def _of_layout(result: WeightsResult) -> Iterator[Finding]:
    """Judge the order of the codes from the file alone, where no checkpoint does it value by value."""
    if result.has_checkpoint:
        return
    found = layout(result)
    if found is not None and found != "i2_s":
        what = LAYOUTS[found].sentence if found in LAYOUTS else found
        sentence = f"the file's own norms show that its codes are packed as {what}"
        yield Finding("file", "layout", found, sentence)


def layout(result: WeightsResult) -> str | None:
    """Return the order of the codes that the file itself shows, or None: undetermined."""
    return layout_evidence.established(layout_evidence_of(result))


def layout_evidence_of(result: WeightsResult) -> list[dict[str, float]]:
    """Return the z of every matrix that has a norm before it."""
    return [row.facts.layout_z for row in result.rows if row.facts is not None and row.facts.layout_z is not None]


def _of_key(row: KeyRow) -> Iterator[Finding]:
    if type(row.expected) is type(row.found) and row.expected == row.found:
        return
    cause = "missing" if row.found is None else "differs"
    detail = "" if row.detail is None else f": {row.detail}"
    sentence = f"{_value(row.found)}, the checkpoint says {_value(row.expected)}{detail}"
    yield Finding(row.key, "key", cause, sentence, row.level)


def _value(value: object) -> str:
    return "missing" if value is None else str(value)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
