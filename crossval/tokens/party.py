"""The tokenizers that can be compared (ours, a live library's, tiktoken's): each gives ids, or says why not."""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from bitnet_py.arithmetic import Generation
from bitnet_py.errors import BitnetError
from bitnet_py.gguf import GGUFFile
from bitnet_py.special_tokens import TokenKind
from bitnet_py.tokenizer import Tokenizer
from bitnet_py.vocabulary import byte_alphabet
from crossval.bitnet_cpp import library
from crossval.bitnet_cpp.runner import identity_of
from crossval.bitnet_cpp.vocabulary import LiveVocabulary, Refused
from crossval.engines import llama_package
from crossval.engines.words import PATH, EngineWord, parse
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import EngineIdentity, Numerics

Ids = list[int] | Refused
NAMES = ("bitnet_py", "bitnet.cpp", "llama.cpp", "tiktoken")
TAKES = dict.fromkeys(("bitnet.cpp", "llama.cpp", "tiktoken"), PATH)
OURS = "bitnet_py"
_LIBRARIES = ("bitnet.cpp", "llama.cpp")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerParty(Protocol):
    """One tokenizer over the vocabulary of one model file; a context manager."""

    identity: EngineIdentity

    def tokenize_each(self, texts: Sequence[bytes], *, add_bos: bool, parse_special: bool) -> Sequence[Ids]:
        """Return the ids of every text, or why there are none."""

    def pieces(self) -> list[bytes]:
        """Return the bytes of every token, special tokens as their text."""

    def __enter__(self) -> TokenizerParty:
        """Load it."""

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Free it."""


@dataclass
class OurTokenizer:
    """``bitnet_py``'s, as a generation of bitnet.cpp."""

    tokenizer: Tokenizer
    identity: EngineIdentity

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> OurTokenizer:
        """Return the party of a tokenizer."""
        numerics = Numerics(generation=tokenizer.vocabulary.generation)
        return cls(tokenizer, EngineIdentity(OURS, importlib.metadata.version("bitnet-parity"), numerics=numerics))

    def tokenize_each(self, texts: Sequence[bytes], *, add_bos: bool, parse_special: bool) -> list[Ids]:
        """Return the ids of every text, or why there are none."""
        found: list[Ids] = []
        for text in texts:
            try:
                found.append(self.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special))
            except BitnetError as error:
                found.append(Refused(str(error)))
        return found

    def pieces(self) -> list[bytes]:
        """Return the bytes of every token, special tokens as their text."""
        return [self.tokenizer.token_bytes(i, skip_special=False) for i in range(self.tokenizer.vocab_size)]

    def __enter__(self) -> OurTokenizer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class LiveTokenizer(LiveVocabulary):
    """A live library's."""

    identity = EngineIdentity("bitnet.cpp")

    def __enter__(self) -> LiveTokenizer:
        super().__enter__()
        self.identity = identity_of(self.facts, Numerics(generation=self.facts["generation"]), {})
        return self


class Tiktoken:
    """OpenAI's tiktoken with Llama 3's expression, over a file of ranks; special tokens are the model file's.

    It has no BOS of its own and reads no bytes that are not UTF-8.
    """

    def __init__(self, ranks: Path, tokenizer: Tokenizer) -> None:
        if tokenizer.pre != "llama-bpe":
            raise BadInputError(f"tiktoken splits text as llama-bpe; this vocabulary's rule is {tokenizer.pre}")
        try:
            tiktoken = importlib.import_module("tiktoken")
        except ImportError:
            raise UnavailableError("tiktoken is not installed: pip install bitnet-parity[tiktoken]") from None
        self._vocabulary = vocabulary = tokenizer.vocabulary
        known = _read_ranks(ranks)
        hidden = (TokenKind.CONTROL, TokenKind.UNKNOWN)
        special = {
            text: i
            for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
            if kind in (*hidden, TokenKind.USER_DEFINED)
        }
        alphabet = byte_alphabet()
        ranked = {rank: "".join(map(alphabet.__getitem__, token)) for token, rank in known.items()}
        plain = {i: text for i, text in enumerate(vocabulary.tokens) if text not in special}
        if ranked != plain:
            raise BadInputError(f"{ranks.name} holds other tokens than the model file")
        self._shown = {text for text, i in special.items() if vocabulary.kinds[i] == TokenKind.USER_DEFINED}
        self._encoding: Any = tiktoken.Encoding(
            "model", pat_str=_LLAMA3_PATTERN, mergeable_ranks=known, special_tokens=special
        )
        digest = hashlib.sha256(ranks.read_bytes()).hexdigest()
        version = importlib.metadata.version("tiktoken")
        self.identity = EngineIdentity("tiktoken", version, settings={"sha256 of ranks": digest})

    def tokenize_each(self, texts: Sequence[bytes], *, add_bos: bool, parse_special: bool) -> list[Ids]:
        """Return the ids of every text, or why there are none."""
        v = self._vocabulary
        before = [v.bos_id] if add_bos and v.add_bos and v.bos_id is not None else []
        after = [v.eos_id] if add_bos and v.add_eos and v.eos_id is not None else []
        found: list[Ids] = []
        for text in texts:
            try:
                allowed = "all" if parse_special else self._shown
                ids = self._encoding.encode(text.decode(), allowed_special=allowed, disallowed_special=())
                found.append([*before, *ids, *after])
            except UnicodeDecodeError:
                found.append(Refused("the text is not UTF-8"))
        return found

    def pieces(self) -> list[bytes]:
        """Return the bytes of every token."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(len(self._vocabulary.tokens))]

    def __enter__(self) -> Tiktoken:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read a file of ``base64 rank`` lines.

    Raises:
        BadInputError: it is another file.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} is no file of tiktoken ranks: {error}") from None


def find(text: str, side: str) -> EngineWord:
    """Return the tokenizer that a word names.

    Raises:
        BadInputError: it names none.
    """
    word = parse(text, NAMES, TAKES, side, traces=False)
    if word.name == "tiktoken" and word.path is None:
        raise BadInputError(f"{side} 'tiktoken': expected tiktoken:PATH, Llama 3's tokenizer.model")
    return word


def open_party(word: EngineWord, path: Path, generation: Generation) -> TokenizerParty:
    """Return the tokenizer that a word names, not yet entered; ours and tiktoken's as ``generation``.

    Raises:
        UnavailableError: it is not built or installed.
        BadInputError: the vocabulary is not usable with it.
        ModelError, TokenizerError: the model file has no usable vocabulary.
    """
    if word.name in _LIBRARIES:
        return LiveTokenizer(path, _library(word))
    with GGUFFile.open(path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf, generation)
    return OurTokenizer.of(tokenizer) if word.name == OURS else Tiktoken(Path(str(word.path)), tokenizer)


def is_live_library(word: EngineWord) -> bool:
    """Return whether a word names a library, which has a generation of its own."""
    return word.name in _LIBRARIES


def _library(word: EngineWord) -> Path:
    if word.path is not None:
        return library.resolve(word.path).path
    if word.name == "bitnet.cpp":
        return library.require_library().path
    found = llama_package.find_library()
    if found is None:
        raise UnavailableError(f"no llama.cpp is installed here; {llama_package.HOW_TO_GET}")
    return Path(found)
