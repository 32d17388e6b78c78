"""Our token ids beside live bitnet.cpp's, for every kind of vocabulary and both generations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bitnet_py.gguf import GGUFFile
from bitnet_py.overrides import overriding
from bitnet_py.tokenizer import Tokenizer
from crossval.api.request import silent
from crossval.bitnet_cpp.vocabulary import LiveVocabulary
from crossval.cli import cli
from crossval.errors import EngineCrashError
from crossval.tokens.compare import compare
from crossval.tokens.corpus import Corpus, shipped
from crossval.tokens.party import LiveTokenizer, OurTokenizer
from tests.support import vocabularies

pytestmark = pytest.mark.live
MakeModel = Callable[..., Path]
THIN = Corpus("thin", shipped().texts[::40])
"""The goldens have all texts; here it is seen that they still are what the library gives."""
OF_MAIN = ("llama-bpe", "falcon3", "falcon_e", "no roles", "sentencepiece", "gemma-like")
"""Kinds on which main may differ; it splits text for the others as March does."""
RUNS = [("march", kind) for kind in vocabularies.KINDS] + [("main", kind) for kind in OF_MAIN]


@pytest.mark.parametrize(("generation", "kind"), RUNS)
def test_ids_and_pieces(generation: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    library = request.getfixturevalue(f"{generation}_library")
    path = vocabularies.write(tmp_path / "vocabulary.gguf", kind)
    if generation not in vocabularies.known_to(kind):
        with pytest.raises(EngineCrashError, match="unknown pre-tokenizer type"), LiveTokenizer(path, library):
            pass
        return
    tokenizer = vocabularies.tokenizer_of(kind, generation)  # type: ignore[arg-type]
    with LiveTokenizer(path, library) as live:
        result = compare({"candidate": OurTokenizer.of(tokenizer), "reference": live}, tokenizer, THIN, silent)
    assert all(row.ok for row in result.rows), result.first_difference
    assert result.n_pieces_equal == result.n_pieces == tokenizer.vocab_size
    assert sum(row.n_equal for row in result.rows) > 100


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_mainline_reads_as_main(kind: str, llama_cpp: Path, tmp_path: Path) -> None:
    path = vocabularies.write(tmp_path / "vocabulary.gguf", kind)
    if "main" not in vocabularies.known_to(kind):
        with pytest.raises(EngineCrashError, match="unknown pre-tokenizer type"), LiveTokenizer(path, llama_cpp):
            pass
        return
    tokenizer = vocabularies.tokenizer_of(kind, "main")
    with LiveTokenizer(path, llama_cpp) as live:
        result = compare({"candidate": OurTokenizer.of(tokenizer), "reference": live}, tokenizer, THIN, silent)
    assert all(row.ok for row in result.rows), result.first_difference
    assert result.n_pieces_equal == result.n_pieces == tokenizer.vocab_size
    assert sum(row.n_equal for row in result.rows) > 100


def test_smoke_tests_of_main_read_and_stop_as_main(
    main_library: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    """Falcon3's prompts have BOS there, and none in March's rules."""
    model, suite, out = make_model(arch="llama", pre="falcon3"), tmp_path / "q.jsonl", tmp_path / "r.json"
    suite.write_text(json.dumps({"prompt": "It's 1234", "answer": "x"}))
    words = ["smoke", "--suite", str(suite), "--model", str(model), "--engine", "both", "--max-tokens", "2"]
    words += ["--reference", f"bitnet.cpp:{main_library}", "--receipt", str(out)]
    CliRunner().invoke(cli, words)
    made = json.loads(out.read_text())
    assert (made["tokenizer"]["rules"], made["tokenizer"]["engines_agree"]) == ("main", True)
    assert made["prompt"]["token_ids"][0] == made_bos(model)


def made_bos(model: Path) -> int | None:
    with GGUFFile.open(model) as gguf:
        return Tokenizer.from_gguf(gguf, "main").bos_id


def test_the_command_and_its_receipt(march_library: Path, tmp_path: Path) -> None:
    path = vocabularies.write(tmp_path / "vocabulary.gguf", "no pre")
    corpus = tmp_path / "lines.txt"
    corpus.write_bytes(b"\n".join(text.data for text in THIN.texts))
    receipt = tmp_path / "tokens.json"
    words = ["tokens", "--model", str(path), "--reference", f"bitnet.cpp:{march_library}"]
    words += ["--corpus", str(corpus)]
    result = CliRunner().invoke(
        cli, [*words, "--override", "tokenizer.ggml.pre=llama-bpe", "--receipt", str(receipt)]
    )
    assert result.exit_code == 0, result.output
    made = json.loads(receipt.read_text())
    assert made["tokenizer"]["pre"] == "llama-bpe"
    assert made["notes"] == ["tokenizer.ggml.pre is 'llama-bpe' by --override, whatever the file says"]
    assert made["results"]["total"]["n_equal"] > 100
    assert CliRunner().invoke(cli, ["gate", str(receipt)]).exit_code == 0


def test_overrides_reach_the_library(march_library: Path, tmp_path: Path) -> None:
    path = vocabularies.write(tmp_path / "vocabulary.gguf", "gpt-2")
    given = {
        "tokenizer.ggml.pre": "falcon3",
        "tokenizer.ggml.add_bos_token": "true",
        "tokenizer.ggml.eos_token_id": "7",
    }
    found = []
    for values in ({}, given, {**given, "tokenizer.ggml.add_eos_token": "true"}):
        with overriding(values), LiveVocabulary(path, march_library) as live, GGUFFile.open(path) as gguf:
            ours = Tokenizer.from_gguf(gguf).encode("a 123")
            assert live.tokenize_each([b"a 123"], add_bos=True, parse_special=True) == [ours]
            found.append(ours)
    plain, split, ended = found
    assert len(split) > len(plain)
    assert ended == [*split, 7]


def test_a_missing_pre_is_warned_of(march_library: Path, tmp_path: Path) -> None:
    path = vocabularies.write(tmp_path / "vocabulary.gguf", "no pre")
    corpus = tmp_path / "lines.txt"
    corpus.write_text("a b\nDon't 1234\n")
    words = ["tokens", "--model", str(path), "--reference", f"bitnet.cpp:{march_library}", "--corpus", str(corpus)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "warning: tokenizer.ggml.pre is missing" in result.stderr
    assert "try --override tokenizer.ggml.pre=llama-bpe" in result.stderr


def test_two_generations_are_told_apart(march_library: Path, main_library: Path, tmp_path: Path) -> None:
    path = vocabularies.write(tmp_path / "vocabulary.gguf", "falcon3")
    corpus = tmp_path / "lines.txt"
    corpus.write_text("It's 1234\n")
    words = ["--candidate", f"bitnet.cpp:{main_library}", "--reference", f"bitnet.cpp:{march_library}"]
    result = CliRunner().invoke(cli, ["tokens", "--model", str(path), *words, "--corpus", str(corpus)])
    assert result.exit_code == 1, result.output
    assert "first difference: text 0 (lines), as prompt, token 0" in result.output
    assert "'<|begin_of_text|>'" in result.output
