"""A small byte-level BPE vocabulary, trained on sentences generated here; deterministic on every platform.

It has its own trainer, because the shipped model's bytes must not change with the version of a
library.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from bitnet_py.errors import ModelError
from bitnet_py.special_tokens import TokenKind
from bitnet_py.synth_random import Stream
from bitnet_py.vocabulary import byte_alphabet

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_FIRST_SPECIALS = (
    BOS,
    EOS,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    EOT,
)
"""In the order of Llama 3's vocabulary, whose tokenizer the 2B-4T model uses."""
_MANY_SPECIALS = 256
_MANY_SPECIALS_FROM = 8192

MIN_VOCAB_SIZE = 256 + len(_FIRST_SPECIALS) + 1
"""With one merge: bitnet.cpp rejects a vocabulary without any."""
MAX_VOCAB_SIZE = 1 << 18


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split("|")]


_SUBJECTS = _phrases(
    """the old river | a small engine | every careful student | the city library | my neighbour |
    the quick brown fox | our first experiment | the night train | a patient teacher | the new kernel |
    this long winter | the captain of the ship | nobody in the village | the computer | a flock of birds |
    the youngest daughter | their favourite song | the weather | what we call memory | a good question |
    the second law of motion | your program | an honest answer | the function that sorts a list |
    the king of France | once upon a time, a dragon | the doctor from London | each layer of the network |
    she | he | the people who live here | some kind of music | the price of gold | artificial intelligence"""
)
_VERBS = _phrases(
    """moves slowly toward | remembers | was built beside | explains | cannot find | quietly follows | measures |
    writes about | turned into | carries | should compare | has forgotten | learns from | returned to |
    is waiting for | belongs to | will always protect | would rather describe | broke | discovered |
    depends upon | could hardly understand | is the same as | looked through | brought | might become"""
)
_OBJECTS = _phrases(
    """the mountain | a letter from home | two broken clocks | the answer to the question | an open window |
    the value of every number | the green garden | bread and warm milk | the history of science |
    a map of the stars | the language of machines | the last page of the book | a better way |
    the capital of the country | water and light | the difference between yesterday and today |
    a hundred different colours | her father's house | the shortest path | three hundred thousand dollars |
    the result of the calculation | a friend she had not seen for years | the world under the sea |
    something strange | the government | a simple example | several important problems | the human body"""
)
_ENDINGS = (
    ". ",
    ", because it was late. ",
    ", and so do we. ",
    "! ",
    "? ",
    "; then everything changed.\n",
    ". However, nothing is certain. ",
    " in the morning. ",
    ".\n\n",
    ": it isn't easy, but they'll try. ",
    ' (see page 12), "perhaps". ',
    " without any reason, I think. ",
)
_PRETOKEN = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s+")
"""The ASCII part of the llama-bpe pre-tokeniser's expression: merges never cross its pieces."""


@dataclass(frozen=True)
class Vocab:
    """Byte-level BPE as GGUF stores it: tokens and merges spelled in GPT-2's byte alphabet."""

    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    bos_id: int
    eos_id: int


def sentences(seed: int, count: int) -> Iterator[str]:
    """Yield made-up English sentences with numbers and punctuation, the same for the same seed."""
    stream = Stream(seed, "corpus")
    for _ in range(count):
        subject = stream.choice(_SUBJECTS)
        amount = f" {stream.below(2100)} times" if stream.below(6) == 0 else ""
        text = f"{subject} {stream.choice(_VERBS)} {stream.choice(_OBJECTS)}{amount}{stream.choice(_ENDINGS)}"
        yield text[0].upper() + text[1:] if stream.below(4) else text


def train_merges(words: Counter[tuple[str, ...]], limit: int) -> list[tuple[str, str]]:
    """Return up to ``limit`` BPE merges, most frequent pair first, ties by spelling; stop at pairs seen once."""
    pieces = [list(word) for word in words]
    weights = list(words.values())
    counts: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)

    def account(index: int, sign: int) -> None:
        word = pieces[index]
        for pair in itertools.pairwise(word):
            counts[pair] += sign * weights[index]
            if sign > 0:
                where[pair].add(index)

    for index in range(len(pieces)):
        account(index, +1)
    merges: list[tuple[str, str]] = []
    made = set(byte_alphabet().values())
    while len(merges) < limit and counts:
        best = min(counts.items(), key=lambda item: (-item[1], item[0]))
        pair = best[0]
        if best[1] < 2:
            break
        for index in where.pop(pair):
            account(index, -1)
            pieces[index] = _merge(pieces[index], pair)
            account(index, +1)
        counts = +counts
        # Two merges can spell the same token; GGUF token texts are unique, so the later one is
        # dropped.
        if pair[0] + pair[1] not in made:
            made.add(pair[0] + pair[1])
            merges.append(pair)
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _extend(merges: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """Append merges that join two known words into a longer one, until there are ``limit``.

    A large vocabulary needs more merges than the generated text provides; these are still valid
    BPE.
    """
    known = {left + right for left, right in merges}
    words = [left + right for left, right in merges if (left + right).lstrip("Ġ").isalpha()]
    tails = [word for word in words if not word.startswith("Ġ")]
    out = list(merges)
    for tail in tails:
        for word in words:
            if len(out) >= limit:
                return out
            if word + tail not in known:
                known.add(word + tail)
                out.append((word, tail))
    return out


@lru_cache(maxsize=8)
def build_vocab(vocab_size: int, seed: int) -> Vocab:
    """Return a vocabulary of exactly ``vocab_size`` tokens: 256 bytes, merges, then control tokens.

    Raises:
        ModelError: ``vocab_size`` below ``MIN_VOCAB_SIZE`` or above ``MAX_VOCAB_SIZE``.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ModelError(f"vocabulary: expected {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE} tokens, found {vocab_size}")
    specials = list(_FIRST_SPECIALS)
    if vocab_size >= _MANY_SPECIALS_FROM:
        specials += [f"<|reserved_special_token_{i}|>" for i in range(3, 3 + _MANY_SPECIALS - len(specials))]
    n_merges = vocab_size - 256 - len(specials)
    alphabet = byte_alphabet()
    words: Counter[tuple[str, ...]] = Counter()
    for sentence in sentences(seed, 3000):
        for piece in _PRETOKEN.findall(sentence):
            words[tuple(alphabet[byte] for byte in piece.encode())] += 1
    merges = train_merges(words, n_merges)
    merges = _extend(merges, n_merges)
    if len(merges) < n_merges:
        raise ModelError(f"vocabulary: expected {n_merges} merges, only {len(merges)} could be made")
    tokens = (*sorted(alphabet.values()), *(left + right for left, right in merges), *specials)
    types = (int(TokenKind.NORMAL),) * (256 + n_merges) + (int(TokenKind.CONTROL),) * len(specials)
    first = 256 + n_merges
    return Vocab(tokens, types, tuple(f"{left} {right}" for left, right in merges), first, first + 1)
