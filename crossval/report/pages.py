"""Receipts that were written before, for people: read, then a page or a history of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from crossval.console import console
from crossval.errors import BadInputError
from crossval.files import write_atomically
from crossval.receipts.file import Receipt, in_folder, read
from crossval.report import history
from crossval.report.page import make_page

if TYPE_CHECKING:
    import pandas as pd


def write(receipts: Sequence[str | Path], html: str | Path, show: Callable[[Console, Receipt], None]) -> None:
    """Write one self-contained HTML page about one receipt or several: no script, nothing from the network.

    ``show`` prints a receipt as on the terminal.

    Raises:
        BadInputError: a receipt cannot be read, or there is none.
        UnavailableError: the renderer of figures is not installed (extra ``report``).
        OSError: the page cannot be written.
    """
    page = make_page([(name, receipt, _text(receipt, show)) for name, receipt in _read(receipts)])
    write_atomically(Path(html), page.encode())


def read_history(receipts: Sequence[str | Path]) -> pd.DataFrame:
    """Return one row per receipt, oldest first, with what changed since the last of the same comparison.

    ``receipts``: files, or folders whose ``*.json`` and ``*.json.gz`` files are receipts. Columns:
    ``report.history``.

    Raises:
        BadInputError: a receipt cannot be read, or there is none.
    """
    return history.table(list(_read(receipts)))


def _text(receipt: Receipt, show: Callable[[Console, Receipt], None]) -> str:
    stream = io.StringIO()
    show(console(stream), receipt)
    return stream.getvalue()


def _read(paths: Sequence[str | Path]) -> Iterator[tuple[str, Receipt]]:
    """Yield every receipt with the name to show for it: its path within the folder that was given."""
    n_read = 0
    for path in map(Path, paths):
        files = in_folder(path) if path.is_dir() else [path]
        for file in files:
            yield str(file.relative_to(path)) if path.is_dir() else file.name, read(file)
            n_read += 1
    if not n_read:
        raise BadInputError(f"no receipt in {', '.join(map(str, paths)) or 'an empty list'}")
