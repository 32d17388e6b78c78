"""Lists of integers as options, above all ``--tokens ID,ID,...``: token ids in place of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from bitnet_py.errors import clip

Option = Callable[[Callable[..., Any]], Callable[..., Any]]


class Integers(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """Comma-separated integers from ``low`` to ``high``, as a tuple; ``what`` they are, for messages."""

    def __init__(self, name: str, what: str, low: int, high: int) -> None:
        self.name = name
        self.what, self.low, self.high = what, low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the integers.

        Raises:
            click.BadParameter: anything else.
        """
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        digits = len(str(self.high))
        plain = all(word.isascii() and word.isdigit() and len(word) <= digits for word in words)
        if not plain or not all(self.low <= int(word) <= self.high for word in words):
            message = f"{clip(str(value))}: expected {self.what} with commas between them, such as 1,2,33"
            self.fail(message, param, ctx)
        return tuple(map(int, words))


TOKEN_IDS = Integers("ID,ID,...", "token ids", 0, 2**31 - 1)


def tokens_option(help_text: str) -> Option:
    """Return the option ``--tokens``, whose value is a tuple of ids or None."""
    return click.option("--tokens", type=TOKEN_IDS, metavar=TOKEN_IDS.name, help=help_text)
