import base64
import json

import gguf
import pytest
from click.testing import CliRunner

from bitnet_py.synth_vocab import build_vocab
from bitnet_py.vocabulary import byte_alphabet
from crossval.api.request import silent
from crossval.cli import cli
from crossval.errors import BadInputError
from crossval.tokens import party
from crossval.tokens.compare import compare
from crossval.tokens.corpus import Corpus, shipped

RANKS = "ranks.tiktoken"


def write_model(path, pre="llama-bpe"):
    vocab = build_vocab(600, 0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("model", "gpt2"), ("pre", pre)):
        writer.add_string(f"tokenizer.ggml.{key}", value)
    for key, items in (("tokens", vocab.tokens), ("token_type", vocab.token_types), ("merges", vocab.merges)):
        writer.add_array(f"tokenizer.ggml.{key}", list(items))
    writer.add_uint32("tokenizer.ggml.bos_token_id", vocab.bos_id)
    writer.add_uint32("tokenizer.ggml.eos_token_id", vocab.eos_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    back = {char: byte for byte, char in byte_alphabet().items()}
    normal = [text for text in vocab.tokens if not text.startswith("<|")]
    lines = [base64.b64encode(bytes(map(back.__getitem__, text))) + b" %d" % i for i, text in enumerate(normal)]
    (path.parent / RANKS).write_bytes(b"\n".join(lines) + b"\n")
    return path


def open_tiktoken(path):
    return party.open_party(party.find(f"tiktoken:{path.parent / RANKS}", "reference"), path, "march")


def test_tiktoken_gives_our_ids(tmp_path):
    pytest.importorskip("tiktoken", reason="tiktoken is missing: pip install bitnet-parity[tiktoken]")
    path = write_model(tmp_path / "m.gguf")
    with (
        open_tiktoken(path) as theirs,
        party.open_party(party.find("bitnet_py", "candidate"), path, "march") as ours,
    ):
        corpus = Corpus("some", shipped().texts[::25])
        result = compare({"candidate": ours, "reference": theirs}, ours.tokenizer, corpus, silent)
    assert result.n_pieces_equal == result.n_pieces == 600
    assert not any(row.n_different or any(row.n_lost.values()) for row in result.rows)
    assert sum(row.n_equal for row in result.rows) > 200


def test_tiktoken_is_for_llama_bpe_and_its_own_ranks(tmp_path):
    pytest.importorskip("tiktoken", reason="tiktoken is missing: pip install bitnet-parity[tiktoken]")
    path = write_model(tmp_path / "m.gguf", "gpt-2")
    with pytest.raises(BadInputError, match="this vocabulary's rule is gpt-2"):
        open_tiktoken(path)
    write_model(path)
    ranks = tmp_path / RANKS
    lines = ranks.read_bytes().splitlines()
    ranks.write_bytes(b"\n".join([lines[1].split()[0] + b" 0", *lines[1:]]))
    with pytest.raises(BadInputError, match="holds other tokens than the model file"):
        open_tiktoken(path)
    ranks.write_bytes(b"no ranks\n")
    with pytest.raises(BadInputError, match="no file of tiktoken ranks"):
        open_tiktoken(path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("spec", "is neither bitnet_py"),
        ("tiktoken", "expected tiktoken:PATH"),
        ("bitnet_py:x", "bitnet_py takes no path"),
    ],
)
def test_other_words_are_refused(word, message):
    with pytest.raises(BadInputError, match=message):
        party.find(word, "reference")


def run(*words):
    return CliRunner().invoke(cli, ["tokens", *map(str, words)])


def test_the_command_without_a_library_says_so_in_a_receipt(tmp_path, monkeypatch):
    for name in ("BITNET_CPP_LIB", "BITNET_CPP_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(party.library, "find_library", lambda: None)
    path, receipt = write_model(tmp_path / "m.gguf"), tmp_path / "r.json"
    result = run("--model", path, "--receipt", receipt)
    assert result.exit_code == 3, result.output
    made = json.loads(receipt.read_text())
    assert (made["verdict"], made["reference"]["status"]) == ("incomplete", "unavailable")
    assert CliRunner().invoke(cli, ["gate", str(receipt)]).exit_code == 1


def test_a_tokenizer_beside_itself_passes_but_not_the_gate(tmp_path):
    path, receipt, corpus = write_model(tmp_path / "m.gguf"), tmp_path / "r.json", tmp_path / "lines.txt"
    corpus.write_text("a b\nthe old river\n")
    result = run("--model", path, "--reference", "bitnet_py", "--corpus", corpus, "--receipt", receipt)
    assert result.exit_code == 0, result.output
    assert "shows only that one tokenizer gives the same twice" in result.output
    assert "vocabulary 600" in result.output
    assert CliRunner().invoke(cli, ["gate", str(receipt)]).exit_code == 1


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "holds no text"), (b"\n\n", "holds no text"), (None, "cannot read the corpus")]
)
def test_a_corpus_without_texts_is_bad_input(tmp_path, content, message):
    path, corpus = write_model(tmp_path / "m.gguf"), tmp_path / "lines.txt"
    if content is not None:
        corpus.write_bytes(content)
    result = run("--model", path, "--reference", "bitnet_py", "--corpus", corpus)
    assert result.exit_code == 4
    assert message in result.stderr


def test_a_vocabulary_of_another_kind_is_bad_input(tmp_path):
    path = write_model(tmp_path / "m.gguf", "tekken")
    result = run("--model", path, "--reference", "bitnet_py")
    assert result.exit_code == 4
    assert "pre-tokeniser 'tekken' (tokenizer.ggml.pre) is not supported" in result.stderr
    assert "Traceback" not in result.output
