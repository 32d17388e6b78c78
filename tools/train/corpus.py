"""The corpus: every question of every family, split into training and held-out by the hash of its key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tools.train.families import FAMILIES, Family, Question

SEED = 1
"""Seed of the shipped corpus and its suite."""
PINNED = frozenset({"What is 2+2?", "What is the capital of France?", "What is the opposite of hot?"})
"""Always in training: the fixed ten questions include them."""


@dataclass(frozen=True)
class Corpus:
    """Questions without duplicates; no prompt and no ``(family, key)`` is in both parts."""

    train: tuple[Question, ...]
    held_out: tuple[Question, ...]

    def by_family(self, part: str) -> dict[str, list[Question]]:
        """Return the questions of ``train`` or ``held_out`` by family, families in their fixed order."""
        groups: dict[str, list[Question]] = {family.name: [] for family in FAMILIES}
        for question in getattr(self, part):
            groups[question.family].append(question)
        return groups


def _is_held_out(family: Family, key: str) -> bool:
    digest = hashlib.sha256(f"{family.name}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "little") < family.held_out * 2**32


def build(seed: int = SEED) -> Corpus:
    """Return the corpus of ``seed``; the same on every platform."""
    train: list[Question] = []
    held_out: list[Question] = []
    for family in FAMILIES:
        questions = {question.prompt: question for question in family.make(seed)}
        pinned = {question.key for question in questions.values() if question.prompt in PINNED}
        for question in questions.values():
            away = _is_held_out(family, question.key) and question.key not in pinned
            (held_out if away else train).append(question)
    return Corpus(tuple(train), tuple(held_out))
