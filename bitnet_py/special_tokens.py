"""Which tokens are special because of their text, whatever the file says, in each generation of bitnet.cpp.

Sources: ``llm_load_vocab`` (llama.cpp of March 2026) and ``llama_vocab::impl::load``
(llama-vocab.cpp of main): a token with one of these texts is CONTROL and so is cut out of prompts;
some of them end generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from bitnet_py.arithmetic import Generation


class TokenKind(IntEnum):
    """``tokenizer.ggml.token_type``; the numbers are the GGUF format's."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


ENDING_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""Roles whose token ends generation."""
ROLES = ("bos", *ENDING_ROLES, "fim_pre", "fim_suf", "fim_mid")
"""Roles that a metadata key ``tokenizer.ggml.<role>_token_id`` can give to a token."""
OLD_KEYS = {"prefix": "fim_pre", "suffix": "fim_suf", "middle": "fim_mid"}
"""Earlier names of roles."""

_DEEPSEEK_END = "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class SpecialTexts:
    """What a generation reads off the texts of tokens."""

    end: frozenset[str]
    """Each of these is CONTROL and ends generation."""
    roles: Mapping[str, tuple[str, ...]]
    """A role that no key has given goes to the token with one of these texts, which becomes CONTROL. Of
    several, bitnet.cpp takes the one that its hash table yields first; here it is the first listed."""
    shown: frozenset[str] = field(default_factory=frozenset)
    """Each of these is USER_DEFINED."""
    not_end: tuple[tuple[str, frozenset[str], TokenKind], ...] = ()
    """A text that does not end generation when all the others do, and its kind then."""


_MARCH = SpecialTexts(
    end=frozenset(
        {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>"}
    ),
    roles={
        "eot": (
            *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>"),
            _DEEPSEEK_END,
        ),
        "eom": ("<|eom_id|>",),
        "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<｜fim▁begin｜>", "<PRE>"),
        "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<｜fim▁hole｜>", "<SUF>"),
        "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<｜fim▁end｜>", "<MID>"),
        "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<PAD>"),
        "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>"),
        "fim_sep": ("<|file_sep|>",),
    },
)
_MAIN = SpecialTexts(
    end=_MARCH.end
    | {"<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"}
    | {"<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", _DEEPSEEK_END},
    roles={
        "eot": (*_MARCH.roles["eot"], "<|end_of_text|>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
        "eom": _MARCH.roles["eom"],
        "fim_pre": (*_MARCH.roles["fim_pre"], "<fim_prefix>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
        "fim_suf": (*_MARCH.roles["fim_suf"], "<fim_suffix>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
        "fim_mid": (*_MARCH.roles["fim_mid"], "<fim_middle>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
        "fim_pad": (*_MARCH.roles["fim_pad"], "<fim_pad>", "[PAD]"),
        "fim_rep": (*_MARCH.roles["fim_rep"], "<reponame>"),
        "fim_sep": _MARCH.roles["fim_sep"],
    },
    shown=frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}),
    not_end=(
        ("<|end|>", frozenset({"<|return|>", "<|call|>"}), TokenKind.USER_DEFINED),
        ("<|end|>", frozenset({"<|return|>", "<|calls|>"}), TokenKind.USER_DEFINED),
        ("<|end|>", frozenset({"<|flush|>", "<|call|>"}), TokenKind.USER_DEFINED),
        ("<|end|>", frozenset({"<|flush|>", "<|calls|>"}), TokenKind.USER_DEFINED),
        ("</s>", frozenset({"<|tool_response>"}), TokenKind.NORMAL),
    ),
)
SPECIAL_TEXTS: dict[Generation, SpecialTexts] = {"march": _MARCH, "main": _MAIN}


@dataclass(frozen=True)
class Roles:
    """What the special tokens of a vocabulary are."""

    kinds: tuple[int, ...]
    """``TokenKind`` of every token; unknown numbers count as UNDEFINED."""
    end_ids: frozenset[int]
    """Ids that end generation; may be empty."""


def assign(
    index: Mapping[str, int], kinds: Sequence[int], stated: Mapping[str, int | None], generation: Generation
) -> Roles:
    """Return the kinds of all tokens and those that end generation.

    ``index``: text of each token -> its id; ``kinds``: as the file states them; ``stated``: role ->
    id that a key of the file gives, or None.
    """
    texts = SPECIAL_TEXTS[generation]
    final = list(kinds)
    ids = {role: token_id for role, token_id in stated.items() if token_id is not None}
    for role, candidates in texts.roles.items():
        found = next((index[text] for text in candidates if text in index), None)
        if role not in ids and found is not None:
            ids[role] = found
            final[found] = int(TokenKind.CONTROL)
    by_text = {index[text] for text in texts.end if text in index}
    for token_id in by_text:
        final[token_id] = int(TokenKind.CONTROL)
    for text in texts.shown & index.keys():
        final[index[text]] = int(TokenKind.USER_DEFINED)
    end_ids = by_text | {ids[role] for role in ENDING_ROLES if role in ids}
    for text, others, kind in texts.not_end:
        if index.get(text) in end_ids and all(index.get(other) in end_ids for other in others):
            end_ids.discard(index[text])
            final[index[text]] = int(kind)
    return Roles(tuple(final), frozenset(end_ids))
