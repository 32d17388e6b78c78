"""Text read by the tokenizer that a model file describes, for engines that have none of their own."""

from __future__ import annotations

from pathlib import Path

from bitnet_py.arithmetic import Generation
from bitnet_py.errors import BitnetError
from bitnet_py.gguf import GGUFFile
from bitnet_py.tokenizer import Tokenizer
from crossval.errors import BadInputError


class FileTokenizer:
    """``bitnet_py``'s tokenizer of a file, read when first asked, by ``rules`` (``passes.tokenizer_rules``)."""

    def __init__(self, model_path: Path, rules: Generation) -> None:
        self._path, self.rules = model_path, rules
        self._tokenizer: Tokenizer | None = None

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text.

        Raises:
            BadInputError: the model's tokenizer metadata is missing or unusable.
        """
        try:
            if self._tokenizer is None:
                with GGUFFile.open(self._path) as gguf:
                    self._tokenizer = Tokenizer.from_gguf(gguf, self.rules)
            return self._tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)
        except BitnetError as error:
            raise BadInputError(str(error)) from error
