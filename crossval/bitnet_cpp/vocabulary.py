"""The tokenizer of a library of the llama.cpp family: a model file's vocabulary alone, without its weights.

Some texts end the library's process (bytes that are not UTF-8, long runs that overflow the stack of a regular
expression). Texts go to it in batches; where a batch ends it, it is started again and a copy of the process takes
each text of that batch, so that each has either ids or the reason why there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.bitnet_cpp.runner import CHILD, open_in, overrides_of
from crossval.child.client import EngineProcess, array_of
from crossval.child.protocol import ProtocolError, joined, split
from crossval.errors import EngineCrashError

_BATCH_BYTES = 1 << 16
_BATCH = 256


@dataclass(frozen=True)
class Refused:
    """A text that ended the library's process."""

    reason: str
    """In one line, without what it printed."""


class LiveVocabulary(EngineProcess):
    """``llama_tokenize`` and ``llama_token_to_piece`` of one model file; a context manager.

    ``timeout_s``: limit for a batch.
    """

    def __init__(
        self,
        model_path: str | Path,
        library: str | Path,
        *,
        timeout_s: float = 60.0,
    ) -> None:
        super().__init__("bitnet.cpp", CHILD, timeout_s)
        self._model_path = Path(model_path)
        self._library = Path(library)
        self.facts: dict[str, Any] = {}
        """What ``Engine.open`` found: generation, files, ...; after entering."""
        self.vocab_size = 0

    def __enter__(self) -> LiveVocabulary:
        try:
            self.facts = open_in(self.start(), self._library)
            params = {"model": str(self._model_path.resolve()), "overrides": overrides_of(self._model_path)}
            answer = self.request("load_vocabulary", params, what=f"loading {self._model_path.name}").header
        except BaseException:
            self.close()
            raise
        self.vocab_size = int(answer["vocab_size"])
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def tokenize_each(
        self, texts: Sequence[bytes], *, add_bos: bool, parse_special: bool
    ) -> list[list[int] | Refused]:
        """Return the ids of every text, or why there are none.

        Raises:
            EngineCrashError: the library failed and cannot be started again.
        """
        found: list[list[int] | Refused] = []
        for batch in _batches(texts):
            params = {"add_bos": add_bos, "parse_special": parse_special}
            try:
                found += self._tokenize(batch, params)
            except EngineCrashError:
                self.__enter__()
                found += self._tokenize(batch, {**params, "guarded": True})
        return found

    def _tokenize(self, texts: Sequence[bytes], params: dict[str, bool]) -> list[list[int] | Refused]:
        answer = self.request("tokenize", params, arrays=joined(texts), what=f"tokenizing {len(texts)} texts")
        ids, counts = array_of(answer, "token_ids", "int32"), array_of(answer, "n_ids", "int32")
        if counts.size != len(texts) or (counts < 0).any() or int(counts.sum()) != ids.size:
            raise EngineCrashError("the engine's process returned a wrong number of token ids")
        parts: list[npt.NDArray[Any]] = np.split(ids, np.cumsum(counts)[:-1])
        ended = answer.header.get("ended", {})
        return [
            Refused(f"its process ends: {ended[str(i)]}") if str(i) in ended else part.tolist()
            for i, part in enumerate(parts)
        ]

    def apply_template(self, template: str, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return a conversation in a chat template, the assistant's turn begun; None: it is not known."""
        params = {"template": template, "messages": [dict(message) for message in messages]}
        answer = self.request("apply_template", params, what="applying a chat template").header
        text: str | None = answer["text"]
        return text

    def pieces(self, *, special: bool = True) -> list[bytes]:
        """Return the bytes of every token; ``special``: control tokens as their text, not nothing."""
        answer = self.request("pieces", {"special": special}, what="reading the pieces of the vocabulary")
        try:
            found = split(array_of(answer, "text", "uint8"), array_of(answer, "n_bytes", "int32"))
        except ProtocolError as error:
            raise EngineCrashError(f"the engine's process returned unusable pieces: {error}") from error
        if len(found) != self.vocab_size:
            raise EngineCrashError(f"the engine's process returned {len(found)} pieces of {self.vocab_size}")
        return found


def _batches(texts: Sequence[bytes]) -> list[list[bytes]]:
    """Return the texts in groups of limited size; a long text is a group of its own."""
    groups: list[list[bytes]] = []
    size = 0
    for text in texts:
        if not groups or len(groups[-1]) >= _BATCH or size + len(text) > _BATCH_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(text)
        size += len(text)
    return groups
