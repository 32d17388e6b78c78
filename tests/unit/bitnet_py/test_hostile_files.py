"""Files made to cost memory or to break a message: refused before work, in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bitnet_py.cli import main
from bitnet_py.errors import MAX_LINE, TokenizerError, error_line
from bitnet_py.gguf import GGUFFile
from bitnet_py.tokenizer import Tokenizer
from tests.support.gguf_bytes import ARRAY, STRING, U32, string


def gguf(n_keys: int, body: bytes, n_tensors: int = 0) -> bytes:
    return (
        b"GGUF" + (3).to_bytes(4, "little") + n_tensors.to_bytes(8, "little") + n_keys.to_bytes(8, "little") + body
    )


def texts(n: int, prefix: str) -> bytes:
    return b"".join(string(f"{prefix}{i}") for i in range(n))


def array(key: str, n: int, body: bytes) -> bytes:
    head = ARRAY.to_bytes(4, "little") + STRING.to_bytes(4, "little") + n.to_bytes(8, "little")
    return string(key) + head + body


def tensors(n: int) -> bytes:
    tail = (1).to_bytes(4, "little") + (1).to_bytes(8, "little") + bytes(12)
    return b"".join(string(f"t{i}") + tail for i in range(n))


def keys(n: int) -> bytes:
    return b"".join(string(f"k{i}") + U32.to_bytes(4, "little") + bytes(4) for i in range(n))


MODEL = string("tokenizer.ggml.model") + STRING.to_bytes(4, "little") + string("gpt2")
N = 530_000
LARGE = {
    "tokens": lambda: gguf(2, MODEL + array("tokenizer.ggml.tokens", N, texts(N, "token"))),
    "merges": lambda: gguf(2, MODEL + array("tokenizer.ggml.merges", N, texts(N, "a b"))),
    "keys": lambda: gguf(N, keys(N)),
    "tensors": lambda: gguf(0, tensors(N), N),
    "escapes": lambda: gguf(
        1, string("general.architecture") + STRING.to_bytes(4, "little") + string(b"\x1b" * 12_000_000)
    ),
}


PEAK = """
import sys
from bitnet_py.bench import peak_resident_bytes
from bitnet_py.cli import main
try:
    main(sys.argv[1:])
finally:
    print(peak_resident_bytes(), file=sys.stderr)
"""


def run(*words: str | Path) -> tuple[int, list[str], int]:
    """Return exit code, lines on stderr and peak memory in bytes of a command in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, words)], capture_output=True, check=False)
    *lines, peak = done.stderr.decode().splitlines()
    assert b"\x1b" not in done.stdout
    return done.returncode, lines, int(peak)


@pytest.fixture(scope="module")
def least_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Peak memory of the command on a file with nothing in it."""
    path = tmp_path_factory.mktemp("least") / "m.gguf"
    path.write_bytes(gguf(0, b""))
    return run("inspect", "--model", path)[2]


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_at_most_twice_the_file_and_the_error_one_line(
    name: str, least_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(LARGE[name]())
    command = ("tokenize", "hi") if name == "tokens" else ("inspect",)
    code, (line,), peak = run(command[0], "--model", path, *command[1:])
    assert code == 4
    assert "m.gguf" in line
    assert line.isprintable()
    assert len(line) <= MAX_LINE + len("error: ")
    assert peak - least_bytes <= 2 * path.stat().st_size + (4 << 20)


def test_a_long_text_is_shown_by_its_length(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key = string("general.name") + STRING.to_bytes(4, "little")
    for n, shown in ((1 << 16, "x" * (1 << 16)), ((1 << 16) + 1, {"length": (1 << 16) + 1, "first": "x" * 64})):
        path.write_bytes(gguf(1, key + string("x" * n)))
        result = CliRunner().invoke(main, ["inspect", "--json", "--model", str(path)])
        assert json.loads(result.stdout)["metadata"]["general.name"] == shown


def test_a_tokenizer_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(1, string("tokenizer.ggml.model") + STRING.to_bytes(4, "little") + string("\x1b" * 400)))
    with GGUFFile.open(path) as opened, pytest.raises(TokenizerError) as error:
        Tokenizer.from_gguf(opened)
    assert str(error.value).startswith(f"{path}: tokenizer.ggml.model is '\\x1b")
    assert len(str(error.value)) < len(str(path)) + 400


def test_an_error_line_is_printable_and_keeps_both_ends() -> None:
    assert error_line("a\nb\x1b[0m\t\u2028é ") == "a\\nb\\x1b[0m\\t\\u2028é"
    for text in ("x" * 301, "\x00" * 10_000_000, "é" * 400):
        line = error_line(f"begins {text} ends")
        assert len(line) <= MAX_LINE
        assert line.startswith("begins ")
        assert line.endswith(" ends")


GOOD: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
}
TEMPLATE = {"type": "TemplateProcessing", "special_tokens": {"a": {"ids": [0]}}}
NO_TEXT = {**TEMPLATE, "single": [{"SpecialToken": {"id": "a"}}]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (json.dumps(GOOD).replace('"b": 1', '"b": 1e999'), "a token id is 'inf', expected a whole number"),
        (json.dumps(GOOD).replace('"b": 1', '"b": NaN'), "NaN is not JSON"),
        (json.dumps(GOOD).replace('"b": 1', '"b": 1.0'), "a token id is '1.0'"),
        (json.dumps(GOOD).replace('"b": 1', '"b": true'), "a token id is 'True'"),
        (json.dumps(GOOD).replace('"b": 1', '"b": -1'), "a token id is '-1'"),
        (json.dumps(GOOD).replace('"b": 1', '"b": 1' + "0" * 4000), "a token id is '1000"),
        (json.dumps(GOOD).replace('"b": 1', '"a": 1'), "key 'a' occurs twice"),
        (json.dumps(GOOD)[:-1] + ', "model": {}}', "key 'model' occurs twice"),
        (json.dumps({**GOOD, "post_processor": NO_TEXT}), "no place for the text (Sequence)"),
        (json.dumps({**GOOD, "added_tokens": [{"content": "c", "id": float("inf")}]}), "Infinity is not JSON"),
        (json.dumps({**GOOD, "added_tokens": [{"content": "c" * 9999, "id": 0}]}), "id 0 is 'a' and also"),
        ("[" * 100_000, "not a JSON file"),
    ],
)
def test_a_malformed_tokenizer_json_is_one_line(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert complaint in str(error.value)
    assert len(str(error.value)) < len(str(path)) + MAX_LINE


def test_the_same_file_unharmed_is_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(GOOD))
    assert Tokenizer.from_json(path).vocab_size == 2


def test_a_tokenizer_json_that_is_no_file_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(TokenizerError, match="not a regular file"):
        Tokenizer.from_json(fifo)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(GOOD))
    monkeypatch.setattr("bitnet_py.tokenizer_json.MAX_BYTES", 10)
    with pytest.raises(TokenizerError, match="larger than 10 bytes"):
        Tokenizer.from_json(path)
