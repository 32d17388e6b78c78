"""A receipt's own command, run again here: same model, prompts and engines, and every row compared."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crossval
from bitnet_py.errors import listed
from bitnet_py.resources import default_model_path
from crossval.files import file_sha256
from crossval.receipts.file import Receipt
from crossval.receipts.policy import GateCheck
from crossval.receipts.values import same, show
from crossval.terms import SIDES

IDENTITY = ("status", "name", "version", "source_digest", "library_digest", "trace_digest", "numerics")
"""What has to be the same of an engine here, so that its results have to be."""
WHOLE = (
    "verdict",
    "audit",
    "floors",
    "causal",
    "first_divergence",
    "first_inexact",
    "coverage",
    "parity",
    "thresholds",
)
"""Compared beside rows and prompt when nothing was left out: they are of everything."""
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Rerun:
    """How to run receipts again. Words and paths: what a receipt's own lead to here; None: the receipt's."""

    fraction: float = 1.0
    """Of the prompts, or of the steps or decoded tokens where there is one prompt."""
    model: Path | None = None
    candidate: str | None = None
    reference: str | None = None
    tap_map: str | Path | None = None
    """What the engines of traces call their tensors: a receipt does not hold it."""

    def checks(self, receipt: Receipt) -> Iterator[GateCheck]:
        """Run a receipt's command again and check that it gives the same rows, or say why that cannot be done.

        Raises:
            CrossvalError: from the model, the traces and the engines.
        """
        again = _AGAIN.get(receipt["kind"])
        if again is None:
            kinds = ", ".join(_AGAIN)
            yield GateCheck("rerun", False, f"a {receipt['kind']} receipt cannot be rerun; only {kinds} can")
            return
        if receipt["thresholds"] is None:
            yield GateCheck("rerun", False, "there is nothing to rerun: an engine was unavailable")
            return
        path = self.model or default_model_path()
        found, stated = file_sha256(path), receipt["model"]["sha256"]
        if found != stated:
            yield GateCheck("rerun", False, f"the model here is {found[:16]}…, the receipt's {stated[:16]}…")
            return
        fresh, part = again(receipt, path, self)
        yield from _same(receipt, fresh, part)

    def word(self, receipt: Receipt, side: str) -> str:
        """Return the word of an engine here."""
        given = self.candidate if side == "candidate" else self.reference
        return given or receipt["settings"][side] or {"candidate": "bitnet_py"}.get(side, "auto")

    def amount(self, n: int, least: int) -> int:
        """Return how many of ``n`` are run again."""
        return min(n, max(least, math.ceil(self.fraction * n)))


@dataclass(frozen=True)
class Part:
    """What of a receipt was run again: in words, and the rows of both receipts that have to be equal."""

    words: str
    pairs: tuple[tuple[str, Any, Any], ...]
    whole: bool


def _layers(receipt: Receipt, model: Path, how: Rerun) -> tuple[Receipt, Part]:
    settings = receipt["settings"]
    n_passes = len(receipt["results"]["passes"])
    kept = how.amount(n_passes, 1)
    options: dict[str, Any] = {
        "n_decode": kept - 1,
        "full": bool(settings["full"]),
        "causal": bool(settings.get("causal")),
        "tap_map": how.tap_map,
    }
    if receipt["kind"] == "diff":
        fresh = crossval.compare_traces(
            how.word(receipt, "candidate"), how.word(receipt, "reference"), model, **options
        )
    else:
        fresh = crossval.compare_engines(
            _given(receipt["prompt"]["text"], receipt["prompt"]["token_ids"]),
            model,
            candidate=how.word(receipt, "candidate"),
            reference=how.word(receipt, "reference"),
            n_threads=settings["n_threads"],
            template=receipt["prompt"]["template"] or "raw",
            floors=bool(settings.get("floors")),
            follow_reference_graph=bool(settings.get("follow_reference_graph")),
            **options,
        )
    rows = [row for row in receipt["results"]["rows"] if row["pass_index"] < kept]
    pairs = (
        ("results.passes", receipt["results"]["passes"][:kept], fresh["results"]["passes"]),
        ("results.rows", rows, fresh["results"]["rows"]),
    )
    return fresh, Part(f"{kept} of {n_passes} passes, {len(rows)} rows", pairs, kept == n_passes)


def _greedy(receipt: Receipt, model: Path, how: Rerun) -> tuple[Receipt, Part]:
    settings, prompts = receipt["settings"], receipt["results"]["prompts"]
    n_steps = settings["n_steps"]
    if len(prompts) > 1:  # the first is the one that is audited
        others = random.Random(receipt["digest"]).sample(range(1, len(prompts)), how.amount(len(prompts), 1) - 1)
        chosen, kept = [0, *sorted(others)], n_steps
    else:
        chosen, kept = [0], how.amount(n_steps, 2)
    fresh = crossval.greedy(
        [_given(prompts[index]["text"], prompts[index]["prompt_ids"]) for index in chosen],
        model,
        candidate=how.word(receipt, "candidate"),
        reference=how.word(receipt, "reference"),
        n_threads=settings["n_threads"],
        template=receipt["prompt"]["template"] or "raw",
        n_steps=kept,
        audit=any(side is not None for side in (receipt["audit"] or {}).values()),
        follow_reference_graph=bool(settings.get("follow_reference_graph")),
        tap_map=how.tap_map,
    )
    whole = kept == n_steps and len(chosen) == len(prompts)
    pairs = []
    for at, index in enumerate(chosen):
        for name in ("text", "prompt_ids"):
            pairs.append(
                (f"results.prompts.{index}.{name}", prompts[index][name], fresh["results"]["prompts"][at][name])
            )
        steps = [one["steps"][:kept] for one in (prompts[index], fresh["results"]["prompts"][at])]
        pairs.append((f"results.prompts.{index}.steps", *steps))
    words = f"{len(chosen)} of {len(prompts)} prompts, {kept} of {n_steps} steps"
    return fresh, Part(words, tuple(pairs), whole)


def _given(text: str | None, token_ids: list[int]) -> str | list[int]:
    """Return a prompt as it was given: without a text, as ids."""
    return token_ids if text is None else text


_AGAIN: Mapping[str, Callable[[Receipt, Path, Rerun], tuple[Receipt, Part]]] = {
    "layers": _layers,
    "diff": _layers,
    "greedy": _greedy,
}


def _same(receipt: Receipt, fresh: Receipt, part: Part) -> Iterator[GateCheck]:
    for side in SIDES:
        ours, theirs = ({name: one[side][name] for name in IDENTITY} for one in (receipt, fresh))
        differs = next(_differences(ours, theirs, side), None)
        if differs is not None:
            yield GateCheck("rerun", False, f"another {side} is here than the receipt's: {differs}")
            return
    pairs = [*part.pairs, ("prompt", receipt["prompt"], fresh["prompt"])]
    if part.whole:
        pairs += [(name, receipt.get(name), fresh.get(name)) for name in WHOLE]
        pairs += [("results.further", *(one["results"].get("further") for one in (receipt, fresh)))]
        pairs += _kernels(receipt, fresh)
    found = [one for name, ours, theirs in pairs for one in _differences(ours, theirs, name)]
    detail = listed(found, _MAX_SHOWN, "; ") or f"{part.words}: equal"
    yield GateCheck("rerun", not found, detail)


def _kernels(receipt: Receipt, fresh: Receipt) -> list[tuple[str, Any, Any]]:
    """Return the counters of both, where both ran the same family of kernels."""
    if len({one["candidate"]["settings"].get("kernel") for one in (receipt, fresh)}) > 1:
        return []
    return [("compute", receipt["compute"], fresh["compute"])]


def _differences(stated: Any, found: Any, name: str) -> Iterator[str]:
    """Yield every place in which what a receipt states is not what was found."""
    if isinstance(stated, dict) and isinstance(found, dict) and set(stated) == set(found):
        for key, value in stated.items():
            yield from _differences(value, found[key], f"{name}.{key}")
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        for index, value in enumerate(stated):
            yield from _differences(value, found[index], f"{name}.{index}")
    elif not same(stated, found):
        yield f"{name}: {show(stated)} stated, {show(found)} found"
