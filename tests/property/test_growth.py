"""Every reader's time is proportional to its input, whatever is in it: measured at n, 2 n and 4 n."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_py.chat_template import FileTemplate
from bitnet_py.checkpoint import Checkpoint
from bitnet_py.errors import BitnetError
from bitnet_py.gguf import GGUFFile
from bitnet_py.inspection import describe
from bitnet_py.sentencepiece_file import read_pieces
from bitnet_py.tokenizer import Tokenizer
from crossval import registry, schema
from crossval.api.generation import read_prompts
from crossval.audit import receipt_checks
from crossval.bitnet_cpp.manifest import MANIFEST_NAME, read_manifest
from crossval.child.protocol import encode_prefix, read_frame
from crossval.engines.dumps import read_dump
from crossval.errors import BadInputError
from crossval.receipts import file as receipt
from crossval.receipts.journal import Journal
from crossval.receipts.policy import read_policy
from crossval.smoke.suite import read_suite
from crossval.traces import tap_map
from crossval.traces.read import parse_info
from crossval.traces.tap_map import resolve
from tests.support import receipt_samples as samples
from tests.support.extra import sampled
from tests.support.gguf_bytes import ARRAY, STRING, U32, Container, Tensor
from tests.support.growth import MOST, growth

GOOD = json.loads(receipt.canonical_json(samples.layers_receipt({(0, "blk.1.l_out"): 1e-6})))


def keys(n: int) -> str:
    """Return an object of ``n`` keys, the last of which occurs twice."""
    return "{" + ",".join(f'"k{i}":{i}' for i in [*range(n), n - 1]) + "}"


def different_keys(n: int) -> str:
    return "{" + ",".join(f'"k{i}":{i}' for i in range(n)) + "}"


def with_field(name: str, text: str) -> str:
    return json.dumps({**GOOD, name: "HERE"}).replace('"HERE"', text)


def many_rows(n: int) -> str:
    """Return a receipt that is valid by the schema, with one row ``n`` times."""
    made = copy.deepcopy(GOOD)
    made["results"]["rows"] = [made["results"]["rows"][-1]] * n
    return json.dumps(made)


def audited_rows(n: int) -> str:
    """Return one with ``n`` different rows about one audited operation."""
    made = copy.deepcopy(GOOD)
    row = made["audit"]["candidate"]["rows"][0]
    made["audit"]["candidate"]["rows"] = [{**row, "n_elements": i} for i in range(n)]
    return json.dumps(made)


def judged(path: Path) -> Any:
    return registry.judge(receipt.read(path))


def audits(path: Path) -> Any:
    return receipt_checks.complaints(receipt.Receipt(json.loads(path.read_bytes())))


def journal(path: Path) -> list[Any]:
    with Journal(path, {"run": 1}) as opened:
        return list(opened.entries())


def trace(n: int) -> str:
    """Return a ``trace.json`` with one tap ``n`` times."""
    tap = {"name": "result_norm", "dtype": "F32", "shape": [1, 128]}
    model = dict.fromkeys(
        ("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "hidden_dim", "vocab_size"), 128
    )
    one = {"kind": "decode", "start": 0, "token_ids": [1], "file": "pass-0000.safetensors", "sha256": "0" * 64}
    return json.dumps(
        {
            "format": "crossval-trace",
            "format_version": 1,
            "engine": {"name": "x"},
            "model": {"sha256": "0" * 64, **model},
            "prompt": {"token_ids": [1]},
            "passes": [{**one, "taps": [{**tap, "name": f"t{i}"} for i in range(n)]}],
        }
    )


def tokenizer_json(vocab: str, merges: str = "[]", added: str = "[]") -> str:
    return f'{{"model":{{"type":"BPE","vocab":{vocab},"merges":{merges}}},"added_tokens":{added}}}'


def read_trace(path: Path) -> Any:
    return parse_info(path.read_bytes(), "here")


def opened(path: Path) -> Any:
    with GGUFFile.open(path) as gguf:
        return describe(gguf)


def gguf(n_keys: int = 0, n_tensors: int = 0, n_strings: int = 0) -> bytes:
    key = ("words", ARRAY, (STRING, [f"w{i}" for i in range(n_strings)]))
    keys: list[tuple[str, int, object]] = [key, *((f"k{i}", U32, i) for i in range(n_keys))]
    return Container(keys, [Tensor(f"t{i}", (1,), 0, bytes(4)) for i in range(n_tensors)]).to_bytes()


def checkpoint(n_tensors: int) -> bytes:
    """Return a safetensors file of many tensors."""
    entry = {"dtype": "U8", "shape": [1]}
    header = json.dumps({f"t{i}": {**entry, "data_offsets": [i, i + 1]} for i in range(n_tensors)}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(n_tensors)


def read_checkpoint(path: Path) -> Any:
    (path.parent / "config.json").write_text("{}")
    with Checkpoint.open(path) as opened_:
        return [opened_.shape(name) for name in opened_.files]


def tap_map_of(n: int) -> str:
    taps = [{"tap": "blk.{i}.q", "from": f"x{i}.{{i}}*"} for i in range(n)]
    return json.dumps({"format": "crossval-tap-map", "format_version": 1, "taps": taps})


def read_tap_map(path: Path) -> Any:
    return resolve(["x0.1", "y.2"], tap_map.read(path), None)


def printed(n: int) -> str:
    head = "ggml_debug: x-{} = (f32) ADD(a{{6, 1, 1, 1}}, b{{6, 1, 1, 1}}}}) = {{6, 1, 1, 1}}\n"
    return "".join(head.format(i) + " [ 1.0000, 2.0000, 3.0000, 4.0000, 5.0000, 6.0000]\n" for i in range(n))


def pieces(n: int) -> bytes:
    return b"".join(b"\x0a\x08\x0a\x06%06d" % i for i in range(n))


def frame(n: int) -> bytes:
    return encode_prefix({"ok": True}, {f"a{i}": np.zeros(0, np.float32) for i in range(n)})


def read_a_frame(path: Path) -> Any:
    with path.open("rb") as file:
        return read_frame(file.fileno())


def manifest(n: int) -> str:
    made = {
        "version": 1,
        "compiler": {"version": ""},
        "cmake": {"flags": ""},
        "source": {"digest": "", "commit": ""},
    }
    return json.dumps({**made, "libraries": {f"l{i}": "0" * 64 for i in range(n)}})


def template(path: Path) -> Any:
    return FileTemplate.from_metadata({"tokenizer.chat_template": path.read_text()}).digest


CASES: dict[str, tuple[Callable[[Path], Any], Callable[[int], str | bytes], int]] = {
    "a receipt of many keys": (receipt.read, keys, 1000),
    "a receipt of many unknown keys": (receipt.read, different_keys, 2000),
    "a receipt of many notes": (receipt.read, lambda n: with_field("notes", json.dumps([1] * n)), 4000),
    "a receipt of many lists": (receipt.read, lambda n: f"[{','.join(['[]'] * n)}]", 4000),
    "a receipt of lists for rows": (receipt.read, lambda n: with_field("results", f'{{"rows":{[[]] * n}}}'), 4000),
    "a receipt of many rows": (judged, many_rows, 60),
    "a receipt of many audited operations": (audits, audited_rows, 500),
    "a policy": (read_policy, keys, 1000),
    "a trace of many keys": (read_trace, keys, 1000),
    "a trace of many taps": (read_trace, trace, 150),
    "a suite of many prompts": (
        read_suite,
        lambda n: "\n".join(f'{{"prompt":"{i}","answer":"1"}}' for i in range(n)),
        200,
    ),
    "a suite of many keys": (read_suite, keys, 1000),
    "prompts": (read_prompts, lambda n: "\n".join(['"x"'] * n), 500),
    "a journal of many entries": (
        journal,
        lambda n: '{"run":{"run":1}}\n' + "".join(f'{{"entry":{{"n":{i}}}}}\n' for i in range(n)),
        300,
    ),
    "a journal of many keys": (journal, lambda n: '{"run":{"run":1}}\n{"entry":' + keys(n) + "}\n", 1000),
    "a tokenizer.json of many keys": (Tokenizer.from_json, keys, 1000),
    "a tokenizer.json of many tokens": (Tokenizer.from_json, lambda n: tokenizer_json(different_keys(n)), 2000),
    "a tokenizer.json of many merges": (
        Tokenizer.from_json,
        lambda n: tokenizer_json('{"a":0}', json.dumps(["a a"] * n)),
        3000,
    ),
    "a GGUF of many keys": (opened, lambda n: gguf(n_keys=n), 500),
    "a GGUF of many tensors": (opened, lambda n: gguf(n_tensors=n), 400),
    "a GGUF of many strings": (opened, lambda n: gguf(n_strings=n), 20_000),
    "a checkpoint of many tensors": (read_checkpoint, checkpoint, 400),
    "a tap map": (read_tap_map, tap_map_of, 60),
    "a printed dump": (lambda path: read_dump(path, None), printed, 150),
    "a tokenizer.model": (read_pieces, pieces, 1500),
    "a frame of many arrays": (read_a_frame, frame, 1000),
    "a manifest": (lambda path: read_manifest(path.parent), manifest, 3000),
    "a chat template": (template, lambda n: "{{ a }}" * n, 20_000),
}
SUFFIX = {"prompts": ".jsonl", "a checkpoint of many tensors": ".safetensors"}
NAME = {"a manifest": MANIFEST_NAME}


@pytest.mark.parametrize("name", sampled(CASES, 3, lambda name: (CASES[name][0],)))
def test_time_is_proportional_to_the_input(name: str, tmp_path: Path) -> None:
    read, text, n = CASES[name]
    schema.validator("receipt.v1")  # made once

    def make(size: int) -> Path:
        path = tmp_path / str(size) / NAME.get(name, f"file{SUFFIX.get(name, '')}")
        path.parent.mkdir()
        made = text(size)
        path.write_bytes(made if isinstance(made, bytes) else made.encode())
        return path

    assert growth(make, read, n, (BadInputError, BitnetError)) < MOST
