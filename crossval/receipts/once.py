"""What many checks of one judgement read of a receipt, read once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

Asked = ParamSpec("Asked")
Read = TypeVar("Read")

_kept: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def judgement() -> Iterator[None]:
    """Within, a function marked with ``once`` returns of the same objects what it returned before.

    Nobody may change them meanwhile, nor what it returned.
    """
    before = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(before)


def once(read: Callable[Asked, Read]) -> Callable[Asked, Read]:
    """Run a function of receipts, or of parts of them, once for each during a judgement; always outside of one."""

    @functools.wraps(read)
    def remembered(*args: Asked.args, **kwargs: Asked.kwargs) -> Read:
        kept = _kept.get()
        if kept is None or kwargs:
            return read(*args, **kwargs)
        key = (read, *map(id, args))
        if key not in kept:
            kept[key] = read(*args, **kwargs), args  # which keeps them alive, and so their ids theirs
        result: Read = kept[key][0]
        return result

    return remembered
