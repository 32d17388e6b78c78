from __future__ import annotations

import pytest

from bitnet_py.errors import listed


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
