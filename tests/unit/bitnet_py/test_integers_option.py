"""Token ids in place of a text: what is read, and what is refused."""

from __future__ import annotations

import click
import pytest

from bitnet_py.integers_option import TOKEN_IDS


def test_ids_are_read():
    assert TOKEN_IDS.convert("1, 306,42", None, None) == (1, 306, 42)
    assert TOKEN_IDS.convert((1, 2), None, None) == (1, 2)


@pytest.mark.parametrize("text", ["", "1,,2", "1;2", "-1", "1.0", "a", "²", "2147483648", "9" * 5000])
def test_what_is_no_list_of_ids_is_a_usage_error(text):
    with pytest.raises(click.BadParameter, match="expected token ids") as error:
        TOKEN_IDS.convert(text, None, None)
    assert len(error.value.message) < 200
