"""The schema's judgement of many edited copies of one receipt: what a copy shares with it is looked at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from crossval import schema

Parts = dict[tuple[int, int], Any]


class EditedCopies:
    """``schemas/receipt.v1`` for copies of valid receipts that share with them all but what was edited.

    Whether a part is valid depends on the part and on the schema asked of it, and on nothing around it: a member
    of an original that was found valid is skipped wherever a copy holds the very same object. The originals must
    not be changed.
    """

    def __init__(self, *originals: Any) -> None:
        self._valid: Parts = {}  # by identity of part and schema; it keeps the part alive
        self._learning = True
        members = {"properties": self._properties, "items": self._items}
        whole = schema.validator("receipt.v1")
        self._validator = extend(type(whole), members)(whole.schema)
        for original in originals:
            assert self._validator.is_valid(original)
        self._learning = False

    def is_valid(self, made: Any) -> bool:
        """Return what ``schema.validator("receipt.v1").is_valid`` does."""
        return bool(self._validator.is_valid(made))

    def _properties(self, check: Any, properties: Any, value: Any, around: Any) -> Iterator[ValidationError]:
        if check.is_type(value, "object"):
            for name, asked in properties.items():
                if name in value:
                    yield from self._member(check, value[name], asked)

    def _items(self, check: Any, asked: Any, value: Any, around: Any) -> Iterator[ValidationError]:
        if isinstance(asked, bool) or "prefixItems" in around:
            yield from Draft202012Validator.VALIDATORS["items"](check, asked, value, around) or ()
        elif check.is_type(value, "array"):
            for item in value:
                yield from self._member(check, item, asked)

    def _member(self, check: Any, part: Any, asked: Any) -> Iterator[ValidationError]:
        key = (id(part), id(asked))
        if key in self._valid:
            return
        wrong = False
        for error in check.descend(part, asked):
            wrong = True
            yield error
        if self._learning and not wrong:
            self._valid[key] = part
