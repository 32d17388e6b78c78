"""Which of the zoo's faults make engines print such texts: measured, in a file by ``python -m tests.zoo --texts``.

Every fault that the shipped model can have was built into its engine, in several places, and asked the same
prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

from crossval.texts.signature import Departure, Form

FILE = Path(__file__).resolve().parents[1] / "data" / "triage" / "texts.json"
FIRST = 3
"""Suspects that are shown, and the rank within which a class counts as found."""
Kind = str
"""``everywhere``, ``prefill only``, ``decode only``: passes in which an engine was wrong."""


@dataclass(frozen=True)
class Signature:
    """What a text looks like, and where it leaves the right one: None where no right one is known."""

    form: Form
    departure: Departure | None = None

    def fits(self, seen: Signature) -> bool:
        """Return whether a measured text looks like this one; a right text is no sign of anything."""
        departs = seen.departure != "none" if self.departure is None else seen.departure == self.departure
        return seen.form == self.form and departs

    def __str__(self) -> str:
        return self.form if self.departure is None else f"{self.form} | {self.departure}"

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Undo ``str``."""
        form, _, departure = text.partition(" | ")
        return cls(cast(Form, form), cast("Departure", departure) if departure else None)


@dataclass(frozen=True)
class Fault:
    """One fault: its class, and how many of its texts had each signature."""

    name: str
    family: str
    what: str
    seen: Mapping[Signature, int]
    """For the prompts that evidence is taken from."""
    held_out: Mapping[Signature, int]
    """For other prompts, which only measure how good the ranking is."""

    def shows(self, signature: Signature) -> bool:
        """Return whether it made an engine print such a text."""
        return any(signature.fits(one) for one in self.seen)

    @property
    def silent(self) -> bool:
        """Whether every text was right."""
        return all(one.departure == "none" for one in self.seen)


@dataclass(frozen=True)
class Suspect:
    """A class of faults, those of them that made an engine print such a text, and how many there are."""

    family: str
    faults: tuple[str, ...]
    of: int


@dataclass(frozen=True)
class Share:
    """Held-out texts whose true class was among the first ``FIRST`` suspects."""

    found: int
    of: int

    def __str__(self) -> str:
        return f"{self.found} of {self.of}" + (f" ({self.found / self.of:.0%})" if self.of else "")


@dataclass(frozen=True)
class Evidence:
    """What was measured."""

    faults: tuple[Fault, ...]
    n_engines: int
    passes: Mapping[Departure, Mapping[Kind, int]]
    """Texts by where they leave the right one, and by the passes in which their engine was wrong."""

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Class -> number of its faults."""
        return Counter(fault.family for fault in self.faults)

    def suspects(self, signature: Signature, without: str = "") -> list[Suspect]:
        """Return the classes with faults that made an engine print such a text, most of them first.

        ``without``: leave out this fault, as if it had never been seen. Where equally many faults did, the class
        of which that is the larger share comes first.
        """
        shown: dict[str, list[str]] = {}
        for fault in self._showing(signature):
            if fault.name != without:
                shown.setdefault(fault.family, []).append(fault.name)
        found = [Suspect(family, tuple(names), self.sizes[family]) for family, names in shown.items()]
        return sorted(found, key=lambda one: (-len(one.faults), -len(one.faults) / one.of, one.family))

    def _showing(self, signature: Signature) -> list[Fault]:
        """Return the faults that made an engine print such a text; found once for each signature."""
        if signature not in self._found:
            self._found[signature] = [fault for fault in self.faults if fault.shows(signature)]
        return self._found[signature]

    @cached_property
    def _found(self) -> dict[Signature, list[Fault]]:
        return {}

    def nearest(self, signature: Signature) -> Signature:
        """Return the signature to rank by: the form alone, where no fault ever departed like that."""
        return signature if self._showing(signature) else Signature(signature.form)

    def share(
        self,
        *,
        right_known: bool,
        unseen_faults: bool = False,
        blind: bool = False,
        like: Signature | None = None,
    ) -> Share:
        """Return how often the true class is among the first suspects, over the held-out texts that are not right.

        ``right_known``: the right text is compared as well. ``unseen_faults``: the evidence of the fault itself is
        left out. ``blind``: without looking at the text, the classes with most faults. ``like``: over texts that
        look like this only.
        """
        largest = [family for family, _ in Counter(dict(self.sizes)).most_common(FIRST)]
        found = of = 0
        for fault in self.faults:
            for seen, count in fault.held_out.items():
                if seen.departure == "none" or not (like is None or like.fits(seen)):
                    continue
                signature = self.nearest(seen) if right_known else Signature(seen.form)
                without = fault.name if unseen_faults else ""
                first = [one.family for one in self.suspects(signature, without)[:FIRST]]
                found += count * (fault.family in (largest if blind else first))
                of += count
        return Share(found, of)


@cache
def evidence() -> Evidence:
    """Return what was measured."""
    return parse(json.loads(FILE.read_text(encoding="utf-8")))


def parse(data: Mapping[str, Any]) -> Evidence:
    """Return the evidence in the JSON object of the file."""

    def counts(of: Mapping[str, int]) -> dict[Signature, int]:
        return {Signature.parse(text): count for text, count in of.items()}

    faults = [{**one, "seen": counts(one["seen"]), "held_out": counts(one["held_out"])} for one in data["faults"]]
    return Evidence(tuple(Fault(**one) for one in faults), data["n_engines"], data["passes"])


def to_json(faults: Iterable[Fault], n_engines: int, passes: Mapping[str, Mapping[Kind, int]]) -> dict[str, Any]:
    """Undo ``parse``."""

    def counts(of: Mapping[Signature, int]) -> dict[str, int]:
        return {str(one): of[one] for one in sorted(of, key=str)}

    rows = [{**vars(one), "seen": counts(one.seen), "held_out": counts(one.held_out)} for one in faults]
    return {"n_engines": n_engines, "passes": passes, "faults": rows}
