from __future__ import annotations

import pytest

from bitnet_py.errors import InputError, ModelError, listed
from crossval.errors import BadInputError


@pytest.mark.parametrize(
    ("items", "separator", "shown"),
    [
        ("", ", ", ""),
        ("ab", ", ", "a, b"),
        ("abc", ", ", "a, b and 1 more"),
        ("abcd", "; ", "a; b; and 2 more"),
    ],
)
def test_a_list_is_shown_up_to_a_number_of_items(items, separator, shown):
    assert listed(list(items), 2, separator) == shown


@pytest.mark.parametrize("kind", [ModelError, InputError, BadInputError])
@pytest.mark.parametrize("end", ["\n", "\r", "\x1c", "\x85", "\u2028", "\x1b[31m"])
def test_what_a_file_holds_cannot_end_the_line_of_an_error(kind: type[Exception], end: str) -> None:
    shown = str(kind(f"tensor a{end}b"))
    assert len(shown.splitlines()) == 1
    assert shown.isprintable()
    assert shown == f"tensor a{end.encode('unicode_escape').decode()}b"
    assert str(kind("größer ▁ 2")) == "größer ▁ 2"
