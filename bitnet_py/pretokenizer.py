"""Pre-tokenisers: the rules that cut text into words before byte-pair merging, by the name a GGUF gives them.

Facts from bitnet.cpp at the pinned commit: ``llm_load_vocab`` (llama.cpp: names, ``ignore_merges``,
``add_bos``), ``llm_tokenizer_bpe`` (llama-vocab.cpp: the expressions) and ``unicode_regex_split``
(unicode.cpp: how they are applied). Several expressions are applied one after the other, each to
the pieces the one before it left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from bitnet_py.errors import TokenizerError
from bitnet_py.unicode_ranges import LETTER, NUMBER, PUNCTUATION, WHITESPACE, char_class

_L, _N, _P, _S = (char_class(ranges) for ranges in (LETTER, NUMBER, PUNCTUATION, WHITESPACE))

_LLAMA3 = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
    rf"|[^\r\n{_L}{_N}]?[{_L}]+"
    rf"|[{_N}]{{1,3}}"
    rf"| ?[^{_S}{_L}{_N}]+[\r\n]*"
    rf"|[{_S}]*[\r\n]+"
    rf"|[{_S}]+(?![^{_S}])"
    rf"|[{_S}]+"
)
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{_L}]+| ?[{_N}]+| ?[^{_S}{_L}{_N}]+|[{_S}]+(?![^{_S}])|[{_S}]+"
_DEFAULT_PUNCTUATION = rf"[{_P}\$\+<=>\^~\|]+"


@dataclass(frozen=True)
class PreType:
    """One pre-tokeniser of bitnet.cpp: its expressions, and what else its name implies."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is used as it is, even if merging would not produce it."""
    add_bos: bool = False
    """Whether BOS is added by default (``tokenizer.ggml.add_bos_token`` overrides it)."""


_LLAMA_BPE = PreType("llama-bpe", (_LLAMA3,), ignore_merges=True, add_bos=True)

PRE_TYPES = {
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "default": PreType("default", (_DEFAULT_PUNCTUATION, _GPT2, rf"[{_N}]+", "[0-9][0-9][0-9]")),
    "gpt-2": PreType("gpt-2", (_GPT2,)),
}
"""Known names; bitnet.cpp's aliases share one entry."""


def get_pre_type(name: str | None) -> PreType:
    """Return the pre-tokeniser called ``name``; None or empty (key absent) is ``default``, as in bitnet.cpp.

    Raises ``TokenizerError`` for a name this package does not know.
    """
    pre_type = PRE_TYPES.get(name or "default")
    if pre_type is None:
        known = ", ".join(PRE_TYPES)
        raise TokenizerError(
            f"pre-tokeniser {name!r} (tokenizer.ggml.pre) is not supported; expected one of {known}"
        )
    return pre_type


def build_pre_tokenizer(pre_type: PreType) -> Any:
    """Return ``pre_type`` as a ``tokenizers`` pre-tokeniser whose words are in the byte-level alphabet."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_type.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
