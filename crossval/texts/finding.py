"""A text judged: what it looks like, where it leaves the right one, whom to suspect, and what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from crossval.texts.evidence import Share, Signature, Suspect, evidence
from crossval.texts.signature import READABLE, Right, departure_of, form_of

Judgement = Literal["right", "broken", "not compared"]
AROUND = {
    "tokenizer": "the prompt was read as other tokens",
    "sampling": "another token was picked than the one with the largest logit",
    "end of text": "the text ended, or did not end, at the wrong token",
    "detokenizer": "right tokens were printed wrongly",
}
"""Classes of mistakes that change no tensor."""


@dataclass(frozen=True)
class TextFinding:
    """What can be said of a text; no cause is among it."""

    text: str
    """As it was judged: without a copy of the prompt before it."""
    prompt: str
    model: str | None
    """The model file's name as given; None: nothing was compared."""
    template: str
    prompt_removed: bool
    signature: Signature
    right: Right | None
    n_right: int
    """Right tokens before the first difference; 0 where nothing was compared."""

    @property
    def judgement(self) -> Judgement:
        """Whether the text is right as far as it was computed, broken, or neither is known."""
        if self.signature.departure == "none":
            return "right"
        if self.signature.departure is None and self.signature.form in READABLE:
            return "not compared"
        return "broken"

    @property
    def suspects(self) -> list[Suspect]:
        """Classes of faults that make engines print such texts, most faults first."""
        return [] if self.judgement == "right" else evidence().suspects(self.ranked_by)

    @property
    def ranked_by(self) -> Signature:
        """The signature that suspects are ranked by: without the departure, where no fault ever departed so."""
        return evidence().nearest(self.signature)

    def share(self, *, blind: bool = False) -> Share:
        """Return how often the true class was among the first for such texts of prompts not used for the ranking.

        ``blind``: for the classes with most faults, without looking at the text.
        """
        known = self.ranked_by.departure is not None
        return evidence().share(right_known=known, blind=blind, like=self.ranked_by)

    def differs_at(self) -> tuple[str, str] | None:
        """Return the right token at the first difference and what is there; None: no difference is known."""
        if self.right is None or self.signature.departure in ("none", None):
            return None
        whole = b"".join(self.right.tokens[: self.n_right])
        at = len(whole.lstrip())
        found = self.text.strip().encode()[at:]
        expected = self.right.tokens[self.n_right] if self.n_right < len(self.right.tokens) else b""
        return expected.decode("utf-8", "replace"), found.decode("utf-8", "replace")

    def steps(self) -> Iterator[str]:
        """Yield what to do next, the command that settles most first."""
        words = ["--prompt", self.prompt, *(["--model", self.model] if self.model else [])]
        words += [] if self.template == "raw" else ["--template", self.template]
        if self.judgement == "not compared":
            given = ["crossval", "triage", "--output", "FILE", *words, "--model", "MODEL"]
            yield f"Compare it with the right text: {shlex.join(given)}"
        first = [one.family for one in self.suspects[:1]]
        tokens = shlex.join(["crossval", "tokens", *(["--model", self.model] if self.model else [])])
        layers = shlex.join(["crossval", "layers", *words, "--candidate", "my-trace"])
        checks = [f"Which layer and operation? Record a trace (docs/your-engine.md), then: {layers}"]
        if first and first[0] in ("tokenizer", "detokenizer"):
            checks.insert(0, f"Are its tokens right? {tokens}")
        yield from checks
        yield "Is the engine live, a build of bitnet.cpp? Then --candidate bitnet.cpp:PATH in place of the trace."

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON."""
        differs = self.differs_at()
        return {
            "judgement": self.judgement,
            "form": self.signature.form,
            "departure": self.signature.departure,
            "n_right_tokens": self.n_right if self.right else None,
            "expected": differs[0] if differs else None,
            "found": differs[1] if differs else None,
            "prompt_removed": self.prompt_removed,
            "suspects": [{"class": s.family, "faults": list(s.faults), "of": s.of} for s in self.suspects],
            "ranked_by": str(self.ranked_by),
            "true_class_among_first": vars(self.share()),
            "next": list(self.steps()),
        }


def judge(text: str, prompt: str, right: Right | None, *, model: str | None, template: str = "raw") -> TextFinding:
    """Judge the text an engine printed after a prompt; ``right``: what it should have printed, if known."""
    body, removed = without_prompt(text, prompt)
    departure, n_right = (None, 0) if right is None else departure_of(body, right)
    return TextFinding(body, prompt, model, template, removed, Signature(form_of(body), departure), right, n_right)


def without_prompt(text: str, prompt: str) -> tuple[str, bool]:
    """Return the text without a copy of the prompt before it, and whether there was one."""
    start = text.lstrip()
    if prompt.strip() and start.startswith(prompt.strip()):
        return start[len(prompt.strip()) :], True
    return text, False
