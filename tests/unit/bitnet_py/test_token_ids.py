"""Token ids in place of a text."""

from __future__ import annotations

import pytest

from bitnet_py.errors import InputError
from bitnet_py.token_ids import check_ids


def test_ids_are_held_to_the_vocabulary():
    check_ids([0, 299], 300, "m.gguf")
    for wrong in (300, -1, 9999999999):
        with pytest.raises(InputError, match=f"token {wrong} is not in .* m.gguf, which ends with 299"):
            check_ids([0, wrong], 300, "m.gguf")
