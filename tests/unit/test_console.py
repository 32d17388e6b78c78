"""Tables on narrow terminals: every line fits, and no number loses a digit."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.table import Table

from crossval.console import Screen, console, new_table
from crossval.receipts import file as receipt
from crossval.registry import show_receipt

ROOT = Path(__file__).parents[2]
OF_KIND = {json.loads(path.read_bytes())["kind"]: path for path in sorted((ROOT / "receipts").glob("*.json"))}
WIDEST = 1000


def tables_of(made, monkeypatch):
    """Return the tables that show a receipt."""
    found = []

    def kept(self, *objects, **how):
        found.extend(one for one in objects if isinstance(one, Table))

    with monkeypatch.context() as patched:
        patched.setattr(Screen, "print", kept)
        show_receipt(console(io.StringIO()), made)
    return found


def printed(table, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.StringIO()
    console(stream).print(table)
    return stream.getvalue()


def numbers(text):
    return set(re.findall(r"[-+\d.]*\d[-+\w.%]*", text))


def words(text):
    return set(text.split())


@pytest.mark.parametrize("kind", sorted(OF_KIND))
def test_tables_fit_and_keep_every_number(kind, monkeypatch):
    tables = tables_of(receipt.read(OF_KIND[kind]), monkeypatch)
    assert tables
    for table in tables:
        whole = printed(table, WIDEST, monkeypatch)
        for width in (60, 61, 72, 80, 100, 120):
            text = printed(table, width, monkeypatch)
            assert max(map(len, text.splitlines())) <= width, text
            assert numbers(whole) <= numbers(text), (width, numbers(whole) - numbers(text))
            assert "…" not in text or "…" in whole


CELLS = st.lists(st.integers(1, 10**12).map(str), min_size=1, max_size=12)


@given(
    width=st.integers(60, 120), row=CELLS, titles=st.lists(st.sampled_from(["a", "a longer title"]), min_size=12)
)
@example(width=60, row=["123456789012"] * 12, titles=["x"] * 12)
@settings(max_examples=60, deadline=None)
def test_any_table_of_numbers_fits(width, row, titles):
    table = new_table()
    table.add_column("name", no_wrap=True)
    for title in titles[: len(row)]:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row("of one", *row)
    stream = io.StringIO()
    out = console(stream)
    out.width = width
    out.print(table)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert set(row) <= words(stream.getvalue())
    n_parts = sum("of one" in line for line in lines)
    assert sum("name" in line for line in lines) == n_parts  # every part says what its rows are


def test_a_table_that_fits_is_left_alone(monkeypatch):
    table = new_table()
    table.add_column("a", overflow="fold")
    table.add_row("b" * 90)
    assert printed(table, 120, monkeypatch).count("b" * 90) == 1
    narrow = printed(table, 60, monkeypatch)
    assert "".join(narrow.split()).count("b") == 90
    assert max(map(len, narrow.splitlines())) <= 60


def test_numbers_do_not_wrap_where_texts_may(monkeypatch):
    table = new_table()
    table.add_column("text", overflow="fold")
    table.add_column("number", overflow="fold", justify="right")
    table.add_row("word " * 20, "1234567890" * 3)
    text = printed(table, 60, monkeypatch)
    assert "1234567890" * 3 in text
    assert text.count("word") == 20
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("", 120), ("0", 120), ("wide", 120), ("99999", 120)])
def test_the_width_where_there_is_no_terminal(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert console(io.StringIO()).width == width
