"""The check of token ids that a user gives in place of a text."""

from __future__ import annotations

from collections.abc import Iterable

from bitnet_py.errors import InputError


def check_ids(ids: Iterable[int], vocab_size: int, model: str) -> None:
    """Check that ids are in a vocabulary; ``model``: its file, for the message.

    Raises:
        InputError: one is not.
    """
    wrong = next((one for one in ids if not 0 <= one < vocab_size), None)
    if wrong is not None:
        raise InputError(f"token {wrong} is not in the vocabulary of {model}, which ends with {vocab_size - 1}")
