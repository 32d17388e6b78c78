"""Our token ids of every text of the corpus are those that live bitnet.cpp gave, for every kind of vocabulary."""

import pytest

from bitnet_py.errors import BitnetError
from crossval.bitnet_cpp.vocabulary import Refused
from crossval.tokens.compare import MODES
from crossval.tokens.corpus import shipped
from tests.support import token_goldens, vocabularies

RUNS = [(kind, generation) for kind in vocabularies.KINDS for generation in vocabularies.known_to(kind)]
WHOLE = (("llama-bpe", "march"), ("sentencepiece", "main"))
"""Compared in both modes, long texts too; of the others, which split text otherwise, every text in one mode."""


def changes_from(kind, generation):
    """The texts of a run of main to compare: those whose ids are others than March's, and every tenth."""
    runs = token_goldens.load()["runs"][kind]
    if generation == "march" or "march" not in runs:
        return set(range(len(shipped().texts)))
    pairs = {mode: zip(runs["march"][mode], runs["main"][mode], strict=True) for mode in MODES}
    differs = {n for mode in MODES for n, (a, b) in enumerate(pairs[mode]) if a != b}
    return differs | set(range(0, len(shipped().texts), 10))


def test_the_goldens_are_of_this_corpus_and_of_every_vocabulary():
    goldens = token_goldens.load()
    assert goldens["corpus"] == shipped().digest
    assert [(kind, generation) for kind, runs in goldens["runs"].items() for generation in runs] == RUNS
    assert set(goldens["recorded_with"]) == {"march", "main"}
    assert token_goldens.PATH.stat().st_size < 300_000
    n_ids = sum(isinstance(ids, list) for different in goldens["table"] for ids in different)
    assert n_ids > 10_000


@pytest.mark.parametrize(("kind", "generation"), RUNS)
def test_ids_are_those_of_bitnet_cpp(kind, generation):
    goldens = token_goldens.load()
    tokenizer = vocabularies.tokenizer_of(kind, generation)
    chosen = changes_from(kind, generation)
    differ = []
    for n, text in enumerate(shipped().texts):
        if n not in chosen or (text.category == "long" and (kind, generation) not in WHOLE):
            continue
        for way, (mode, special) in enumerate(MODES.items()):
            if (kind, generation) not in WHOLE and n % 2 != way:
                continue
            try:
                ids = tokenizer.encode(text.data, add_bos=special, parse_special=special)
            except BitnetError as error:
                ids = Refused(str(error))
            right = goldens["table"][n][goldens["runs"][kind][generation][mode][n]]
            if token_goldens.stored(ids) != right:
                differ.append((mode, n, text.data, ids, right))
    assert not differ, f"{len(differ)} differ, the first: {differ[0]}"


def test_generations_differ_where_they_are_known_to():
    runs = token_goldens.load()["runs"]
    assert runs["falcon3"]["march"] != runs["falcon3"]["main"]
    assert "main" not in runs["falcon_e"]
    table = token_goldens.load()["table"]
    run = runs["gpt-2"]
    refused = {g: sum(table[n][i] is None for n, i in enumerate(run[g]["plain"])) for g in run}
    assert refused == {"march": 48, "main": 7}
