"""The byte-level BPE vocabulary: trained with ``tokenizers``, used through the engine's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from bitnet_py.pretokenizer import build_pre_tokenizer, get_pre_type
from bitnet_py.special_tokens import TokenKind
from bitnet_py.tokenizer import Tokenizer
from bitnet_py.vocabulary import Vocabulary, byte_alphabet
from tools.train.families import Question

PRE = "llama-bpe"
BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIALS = (BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", EOT)


def corpus_texts(questions: Iterable[Question]) -> Iterator[str]:
    """Yield the text that the vocabulary is trained on.

    Plurals are left out, so that "cats" stays two tokens, "cat" and "s", and the rule can be learned.
    """
    for question in questions:
        yield question.prompt if question.family == "plural" else f"{question.prompt} {question.answer}"


def train_vocabulary(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """Train a vocabulary of at most ``vocab_size`` tokens on ``texts`` and return it as GGUF metadata.

    ``llama-bpe`` keeps up to three digits together, so a merge of digits would turn "17" into one token.
    Digits are split here, so that no such merge is learned and every digit is a token of its own.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = build_pre_tokenizer(get_pre_type(PRE))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    kinds = [int(TokenKind.NORMAL)] * len(tokens) + [int(TokenKind.CONTROL)] * len(SPECIALS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE,
        "tokenizer.ggml.tokens": tokens + list(SPECIALS),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) + SPECIALS.index(BOS),
        "tokenizer.ggml.eos_token_id": len(tokens) + SPECIALS.index(EOS),
        "tokenizer.ggml.add_bos_token": True,
    }


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the engine's tokenizer for ``metadata``, so that training and inference see the same ids."""
    return Tokenizer(Vocabulary.from_metadata(metadata))
