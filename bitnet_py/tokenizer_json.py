"""Read a Hugging Face ``tokenizer.json`` as a ``Vocabulary``: byte-level BPE with a known pre-tokeniser.

Anything that would make the ids differ (a normaliser, byte fallback, another pre-tokeniser,
stripping special tokens) is rejected, not ignored.
"""

from __future__ import annotations

import json
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

from bitnet_py.errors import TokenizerError, clip, shortened
from bitnet_py.pretokenizer import PreType, get_pre_type
from bitnet_py.special_tokens import TokenKind
from bitnet_py.vocabulary import Vocabulary

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_BYTES = 128 << 20
"""Of a file; those of the largest known vocabularies have a third of it."""
MAX_ID = 1 << 31
_EOS_TEXTS = ("<|end_of_text|>", "<|endoftext|>", "</s>")
"""Tokens that end a text by convention; a tokenizer.json does not state them."""


def read_vocabulary(path: str | Path, pre_type: PreType | None = None) -> Vocabulary:
    """Read the vocabulary of the ``tokenizer.json`` at ``path``.

    ``pre_type``: the pre-tokeniser to use, whatever the file's own is. BOS and EOS are added as the
    file's template post-processor does. Raises ``TokenizerError`` for a file that cannot be read, is
    not JSON, or describes a tokenizer this package would tokenise differently.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TokenizerError(f"{path}: not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise TokenizerError(f"{path}: larger than {MAX_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not a JSON file: {error}") from error
    try:
        return _vocabulary(data, pre_type)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {shortened(str(error))}"
        raise TokenizerError(f"{path}: not a tokenizer.json of the expected layout ({reason})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        raise ValueError(f"key {clip(next(a for a, b in pairwise(keys) if a == b))} occurs twice")
    return found


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _vocabulary(data: dict[str, Any], pre_type: PreType | None) -> Vocabulary:
    model = data["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(f"the model is {model.get('type')!r}, expected 'BPE'")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise TokenizerError(f"the model sets {key} = {model[key]!r}, which byte-level BPE here does not have")
    if data.get("normalizer"):
        raise TokenizerError(f"the normaliser {data['normalizer'].get('type')!r} is not supported, expected none")
    tokens, kinds = _tokens(model["vocab"], data.get("added_tokens") or [])
    first, last = _template_ids(data.get("post_processor"))
    eos_id = (
        last if last is not None else next((tokens.index(text) for text in _EOS_TEXTS if text in tokens), None)
    )
    return Vocabulary.build(
        tokens=tokens,
        kinds=kinds,
        merges=[_merge(item) for item in model["merges"]],
        pre_type=pre_type or _pre_type(data.get("pre_tokenizer")),
        ids={"bos": first, "eos": eos_id},
        add_bos=first is not None,
        add_eos=last is not None,
        ignore_merges=bool(model.get("ignore_merges")) if pre_type is None else pre_type.ignore_merges,
    )


def _tokens(vocab: dict[str, int], added: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
    by_id: dict[int, tuple[str, int]] = {_id(i): (text, int(TokenKind.NORMAL)) for text, i in vocab.items()}
    if len(by_id) != len(vocab):
        raise TokenizerError("two tokens of the vocabulary have the same id")
    for item in added:
        text, token_id = str(item["content"]), _id(item["id"])
        if item.get("lstrip") or item.get("rstrip") or item.get("single_word"):
            raise TokenizerError(f"added token {clip(text)} strips its surroundings or matches whole words only")
        if token_id in by_id and by_id[token_id][0] != text:
            both = f"{clip(by_id[token_id][0])} and also the added token {clip(text)}"
            raise TokenizerError(f"id {token_id} is {both}")
        by_id[token_id] = (text, int(TokenKind.CONTROL if item.get("special") else TokenKind.USER_DEFINED))
    if by_id and (min(by_id) < 0 or max(by_id) >= 2 * len(by_id) + 1024):
        raise TokenizerError(f"ids run from {min(by_id)} to {max(by_id)} for {len(by_id)} tokens")
    unused = ("", int(TokenKind.UNUSED))
    rows = [by_id.get(i, unused) for i in range(max(by_id, default=-1) + 1)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _id(value: Any) -> int:
    """Return a token id: a whole number, written as one."""
    if type(value) is not int or not 0 <= value < MAX_ID:
        raise TokenizerError(f"a token id is {clip(str(value))}, expected a whole number from 0 to {MAX_ID - 1}")
    return value


def _merge(item: Any) -> tuple[str, str]:
    left, right = item.split(" ") if isinstance(item, str) else item
    return str(left), str(right)


def _pre_type(spec: dict[str, Any] | None) -> PreType:
    spec = spec or {}
    steps = spec["pretokenizers"] if spec.get("type") == "Sequence" else [spec]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return get_pre_type("gpt-2")
        if len(steps) == 2 and not last.get("use_regex", True) and steps[0].get("type") == "Split":
            split = steps[0]
            isolated = split.get("behavior") == "Isolated" and not split.get("invert")
            if isolated and split["pattern"].get("Regex") == _LLAMA3_PATTERN:
                return get_pre_type("llama-bpe")
    raise TokenizerError("the pre-tokeniser is not one of llama-bpe (Split + ByteLevel) and gpt-2 (ByteLevel)")


def _template_ids(spec: dict[str, Any] | None) -> tuple[int | None, int | None]:
    """Return the ids the post-processor puts before and after the text."""
    steps = spec["processors"] if spec and spec.get("type") == "Sequence" else [spec]
    templates = [step for step in steps if step and step.get("type") == "TemplateProcessing"]
    if not templates:
        return None, None
    template = templates[-1]
    pieces = template["single"]
    at = next((i for i, piece in enumerate(pieces) if "Sequence" in piece), None)
    if at is None:
        raise TokenizerError("the template of the post-processor has no place for the text (Sequence)")
    before, after = pieces[:at], pieces[at + 1 :]
    if len(before) > 1 or len(after) > 1:
        raise TokenizerError("the post-processor adds more than one token before or after the text")

    def token_id(part: list[dict[str, Any]]) -> int | None:
        if not part:
            return None
        (only,) = template["special_tokens"][part[0]["SpecialToken"]["id"]]["ids"]
        return _id(only)

    return token_id(before), token_id(after)
