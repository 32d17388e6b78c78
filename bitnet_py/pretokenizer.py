"""Pre-tokenisers: the rules that cut text into words before byte-pair merging, by the name a GGUF gives them.

Facts from bitnet.cpp of March 2026, ``llm_load_vocab`` (llama.cpp: names, ``ignore_merges``,
``add_bos``), ``llm_tokenizer_bpe`` (llama-vocab.cpp: the expressions) and ``unicode_regex_split``
(unicode.cpp: how they are applied), and of its main, ``llama_vocab::impl::load``
(llama-vocab.cpp). Several expressions are applied one after the other, each to the pieces the one
before it left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from bitnet_py.arithmetic import Generation
from bitnet_py.errors import TokenizerError
from bitnet_py.unicode_ranges import LETTER, NUMBER, PUNCTUATION, WHITESPACE, char_class

_L, _N, _P, _S = (char_class(ranges) for ranges in (LETTER, NUMBER, PUNCTUATION, WHITESPACE))

_CONTRACTIONS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"


def _llama3(numbers: str) -> str:
    """Return Llama 3's expression; ``numbers`` says how long a run of digits may be."""
    return (
        _CONTRACTIONS + rf"|[^\r\n{_L}{_N}]?[{_L}]+"
        rf"|[{_N}]{numbers}"
        rf"| ?[^{_S}{_L}{_N}]+[\r\n]*"
        rf"|[{_S}]*[\r\n]+"
        rf"|[{_S}]+(?![^{_S}])"
        rf"|[{_S}]+"
    )


_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{_L}]+| ?[{_N}]+| ?[^{_S}{_L}{_N}]+|[{_S}]+(?![^{_S}])|[{_S}]+"
_PUNCTUATION = rf"{_P}\$\+<=>\^~\|"
_DIGITS_BY_THREE = "[0-9][0-9][0-9]"


@dataclass(frozen=True)
class PreType:
    """One pre-tokeniser of bitnet.cpp: its expressions, and what else its name implies."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is used as it is, even if merging would not produce it."""
    add_bos: bool = False
    """Whether BOS is added by default (``tokenizer.ggml.add_bos_token`` overrides it)."""


_LLAMA_BPE = PreType("llama-bpe", (_llama3("{1,3}"),), ignore_merges=True, add_bos=True)
_DEFAULT = PreType("default", (rf"[{_PUNCTUATION}]+", _GPT2, rf"[{_N}]+", _DIGITS_BY_THREE))
_FALCON = (rf"[{_PUNCTUATION}`]+", _GPT2)
_EACH_DIGIT = (rf"[{_N}]", _GPT2)

_COMMON = {
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "default": _DEFAULT,
    "gpt-2": PreType("gpt-2", (_GPT2,)),
    "mpt": PreType("mpt", (_GPT2,)),
    "falcon": PreType("falcon", (*_FALCON, _DIGITS_BY_THREE)),
    "qwen2": PreType("qwen2", (_llama3(""),)),
    "starcoder": PreType("starcoder", _EACH_DIGIT),
    "refact": PreType("refact", _EACH_DIGIT),
    "command-r": PreType("command-r", _EACH_DIGIT),
}
PRE_TYPES: dict[Generation, dict[str, PreType]] = {
    "march": {
        **_COMMON,
        "falcon3": PreType("falcon3", (*_FALCON, "[0-9]")),
        "falcon_e": PreType("falcon_e", (*_FALCON, "[0-9]")),
    },
    # main reads falcon3 as Llama 3's, BOS included, and refuses files that name falcon_e.
    "main": {**_COMMON, "falcon3": PreType("falcon3", _LLAMA_BPE.patterns, ignore_merges=True, add_bos=True)},
}
"""Known names of each generation; bitnet.cpp's aliases share one entry."""


def get_pre_type(name: str | None, generation: Generation = "march") -> PreType:
    """Return the pre-tokeniser called ``name``; None or empty (key absent) is ``default``, as in bitnet.cpp.

    Raises ``TokenizerError`` for a name that this package or this generation of bitnet.cpp does
    not know.
    """
    known = PRE_TYPES[generation]
    pre_type = known.get(name or "default")
    if pre_type is not None:
        return pre_type
    elsewhere = next((other for other, types in PRE_TYPES.items() if name in types), None)
    if elsewhere is not None:
        raise TokenizerError(
            f"pre-tokeniser {name!r} (tokenizer.ggml.pre) is unknown to bitnet.cpp {generation}, which refuses "
            f"the file; bitnet.cpp {elsewhere} has it"
        )
    raise TokenizerError(
        f"pre-tokeniser {name!r} (tokenizer.ggml.pre) is not supported; expected one of {', '.join(known)}"
    )


def build_splits(pre_type: PreType) -> Any:
    """Return ``pre_type`` as a ``tokenizers`` pre-tokeniser that cuts text into words and changes nothing."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(one), "isolated") for one in pre_type.patterns])


def build_pre_tokenizer(pre_type: PreType) -> Any:
    """Return ``pre_type`` as a ``tokenizers`` pre-tokeniser whose words are in the byte-level alphabet."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([build_splits(pre_type), byte_level])
