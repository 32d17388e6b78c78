"""What a shell completes: the words of options that name an engine, a suite or a map, else paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from crossval.engines.words import TRACE

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def of_words(accepted: Iterable[str], otherwise: str = "dir") -> Complete:
    """Return the completion of one of the words ``accepted``, as the help lists them (``bitnet.cpp[:PATH]``).

    ``otherwise``: what else may stand there, ``dir`` or ``file``; after a colon always a file.
    """
    names = [word.partition("[")[0] for word in accepted if word not in (TRACE, "FILE")]

    def complete(context: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        kind = "file" if ":" in incomplete else otherwise
        return found or [CompletionItem(incomplete, type=kind)]

    return complete
