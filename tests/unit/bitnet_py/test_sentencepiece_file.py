"""``tokenizer.model`` read, and written into a GGUF that the engine's tokenizer reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

import crossval
from bitnet_py.errors import TokenizerError
from bitnet_py.gguf import GGUFFile
from bitnet_py.quantize import quantize
from bitnet_py.sentencepiece_file import read_pieces
from bitnet_py.tokenizer import Tokenizer
from tests.support.checkpoints import Small

PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("▁he", -1.0, 1),
    ("▁", -3.5, 1),
    ("he", -2.0, 1),
    ("h", -4.0, 1),
    ("e", -5.0, 1),
]


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def blob(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def model_bytes() -> bytes:
    """Pieces among fields that a reader has to skip: a long one, a varint, 8 and 4 bytes."""
    out = blob(2, b"x" * 300) + varint(7 << 3) + varint(1 << 40) + varint(9 << 3 | 1) + bytes(8)
    for text, score, kind in PIECES:
        piece = blob(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        out += blob(1, piece + (varint(3 << 3) + varint(kind) if kind != 1 else b""))
    return out + varint(10 << 3 | 5) + bytes(4)


def test_pieces_scores_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_bytes())
    assert [(one.text, one.score, int(one.kind)) for one in read_pieces(path)] == PIECES


@pytest.mark.parametrize(
    "data",
    [
        b"",
        model_bytes()[:-2],
        b"\xff" * 20,
        blob(1, blob(1, b"\xff\xfe")),
        blob(1, varint(3 << 3) + varint(9)),
        varint(1 << 3 | 3),
        blob(1, varint(2 << 3 | 2) + varint(2) + b"ab"),
        b"!base64 ranks of tiktoken 0\n" * 9,
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=r"not a SentencePiece model"):
        read_pieces(path)


def test_a_checkpoint_with_sentencepiece_is_converted_and_compared(tmp_path: Path) -> None:
    folder = Small("large", n_layers=1, dim=128, hidden=128, vocab=270).write(tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "byte_fallback": True}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 264, "</s>": 2}))
    (folder / "tokenizer.model").write_bytes(model_bytes())
    quantize(folder, folder / "m.gguf")
    with GGUFFile.open(folder / "m.gguf") as gguf:
        keys = gguf.metadata
        assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.tokens"][264:267]) == (
            "llama",
            ["<pad>", "[PAD265]", "[PAD266]"],
        )
        assert list(keys["tokenizer.ggml.token_type"][262:266]) == [1, 1, 4, 5]
        assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")] == [1, 2]
        tokenizer = Tokenizer.from_gguf(gguf)
    assert tokenizer.encode("he hé") == [1, 259, 260, 262, 3 + 0xC3, 3 + 0xA9]
    assert crossval.check_weights(folder / "m.gguf", against=folder).verdict == "pass"
    (folder / "tokenizer.model").write_bytes(
        model_bytes().replace(struct.pack("<f", -3.5), struct.pack("<f", -3.0))
    )
    receipt = crossval.check_weights(folder / "m.gguf", against=folder)
    assert [(one["subject"], one["cause"]) for one in receipt["results"]["findings"]] == [
        ("tokenizer.ggml.scores", "differs")
    ]
