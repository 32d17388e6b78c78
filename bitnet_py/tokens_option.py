"""The option ``--tokens ID,ID,...``: token ids that a user gives in place of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

MAX_DIGITS = 10
"""Of a token id: it is an int32."""
Option = Callable[[Callable[..., Any]], Callable[..., Any]]


class TokenIds(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """Comma-separated token ids, as a tuple."""

    name = "ID,ID,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the ids.

        Raises:
            click.BadParameter: anything else.
        """
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isascii() and word.isdigit() and len(word) <= MAX_DIGITS for word in words):
            shown = str(value) if len(str(value)) <= 60 else f"{str(value)[:59]}…"
            self.fail(f"{shown!r}: expected token ids with commas between them, such as 1,306,42", param, ctx)
        return tuple(map(int, words))


def tokens_option(help_text: str) -> Option:
    """Return the option ``--tokens``, whose value is a tuple of ids or None."""
    return click.option("--tokens", type=TokenIds(), metavar=TokenIds.name, help=help_text)
