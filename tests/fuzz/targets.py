"""The fuzzed readers: a row each, bytes in, an answer or a documented refusal out.

What costs a child process per input is left out: patterns of suites are not matched, chat templates are parsed and
not rendered. Both children run under limits of their own (tests/unit/smoke/test_patterns.py,
tests/unit/bitnet_py/test_chat_template.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bitnet_py.chat_template import FileTemplate
from bitnet_py.checkpoint_model import CheckpointModel
from bitnet_py.checkpoint_tokenizer import read_tokenizer
from bitnet_py.errors import BitnetError, InputError
from bitnet_py.gguf import GGUFFile
from bitnet_py.inspection import describe, describe_deep, print_description
from bitnet_py.sentencepiece_file import read_pieces
from bitnet_py.tokenizer import Tokenizer
from bitnet_py.weights import Weights
from crossval import registry
from crossval.api.generation import read_prompts
from crossval.bitnet_cpp.manifest import CMAKE_CACHE, CMAKE_DIR, MANIFEST_NAME, manifest_for
from crossval.child.protocol import PeerClosedError, ProtocolError, read_frame
from crossval.console import console
from crossval.engines import dumps, tap_maps
from crossval.errors import BadInputError
from crossval.model.weights import SpecWeights
from crossval.receipts import file as receipt
from crossval.receipts.gate import GateCheck
from crossval.receipts.journal import Journal
from crossval.receipts.policy import read_policy
from crossval.receipts.show import show_checks
from crossval.report.history import table
from crossval.smoke import patterns
from crossval.smoke.suite import read_suite
from crossval.traces import tap_map
from crossval.traces.read import Trace, TraceInfo, parse_info
from crossval.weights.compare import read_file
from crossval.weights.header import compare_config, compare_template, compare_tokenizer
from tests.fuzz import seeds
from tests.fuzz.run_one import Target, fresh, refusable

TEXTS = ("Hello wörld, 12+34 <|eot_id|>\n\n", "▁a\u2028b\x00c", "")


# --- model files ----------------------------------------------------------------------------------------------


def model_file(data: bytes, scratch: Path) -> None:
    """Open, describe and load a GGUF: header from the input, data always those of the small model."""
    with GGUFFile.open(fresh(scratch, "m.gguf", data + seeds.MODEL_DATA)) as gguf:
        found, problem = describe(gguf)
        with contextlib.redirect_stdout(io.StringIO()):
            print_description(json.loads(json.dumps(found)))
        with refusable():
            describe_deep(gguf)
        with refusable():
            use(Tokenizer.from_gguf(gguf))
        with refusable():
            FileTemplate.from_metadata(gguf.metadata).digest  # noqa: B018
        assert (problem is None) == (found["config"] is not None)
        Weights.load(gguf).check_finite()


def specification(data: bytes, scratch: Path) -> None:
    """Load a GGUF as the specification does: where the engine loads it, too, both have to read the same header."""
    path = fresh(scratch, "m.gguf", data + seeds.MODEL_DATA)
    weights = SpecWeights(path)
    for name in (*weights._shapes, *weights._reader.plain, *weights._reader.tables):
        with refusable():
            weights[name]
    with GGUFFile.open(path) as gguf:
        ours, theirs = Weights.load(gguf).config, weights.config
        for name in seeds.SHAPE_FIELDS:
            assert getattr(ours, name) == getattr(theirs, name), name


def weights_of_file(data: bytes, scratch: Path) -> None:
    """Compare a GGUF's header with a checkpoint's, and read its tensors as `crossval weights` does."""
    checkpoint = _checkpoint(scratch)
    with GGUFFile.open(fresh(scratch, "m.gguf", data + seeds.MODEL_DATA)) as gguf:
        with CheckpointModel.open(checkpoint) as model:
            compare_config(gguf.metadata, model.header)
            compare_tokenizer(gguf, checkpoint, model.header.vocab_size)
            compare_template(gguf, checkpoint)
        read_file(gguf, lambda *_: None)


def _checkpoint(scratch: Path) -> Path:
    folder = scratch / "checkpoint"
    if not folder.is_dir():
        seeds.write_checkpoint(folder, json.loads(seeds.checkpoint()))
    return folder


def checkpoint(data: bytes, scratch: Path) -> None:
    """Open a checkpoint; the input has its files by name, and the header of its safetensors."""
    with contextlib.suppress(ValueError, RecursionError):
        parts = json.loads(data)
        if isinstance(parts, dict):
            folder = scratch / "given"
            seeds.write_checkpoint(folder, parts)
            with refusable():
                read_tokenizer(folder, 300)
            with refusable(), CheckpointModel.open(folder) as model:
                for source in model.sources:
                    with refusable():
                        model.checkpoint.tensor(source.name)


# --- tokenizers -----------------------------------------------------------------------------------------------


def use(tokenizer: Tokenizer) -> None:
    """Encode and decode: what was encoded with the vocabulary's own pieces has to be decodable."""
    for text in TEXTS:
        for special in (False, True):
            with refusable():
                ids = tokenizer.encode(text, parse_special=special)
                assert all(0 <= i < tokenizer.vocab_size for i in ids)
                tokenizer.decode(ids, skip_special=special)


def tokenizer_json(data: bytes, scratch: Path) -> None:
    """Read a ``tokenizer.json`` and use it."""
    use(Tokenizer.from_json(fresh(scratch, "tokenizer.json", data)))


def tokenizer_model(data: bytes, scratch: Path) -> None:
    """Read a SentencePiece ``tokenizer.model``."""
    for piece in read_pieces(fresh(scratch, "tokenizer.model", data)):
        piece.text.encode()


def template(data: bytes, scratch: Path) -> None:
    """Parse a chat template as the child that renders it does."""
    source = data.decode("utf-8", "replace")
    made = FileTemplate.from_metadata({"tokenizer.chat_template": source})
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    with contextlib.suppress(TemplateSyntaxError, RecursionError):
        environment.parse(made.source)


# --- receipts -------------------------------------------------------------------------------------------------


def stored_receipt(data: bytes, scratch: Path) -> None:
    """Read a receipt; sealed again, as somebody who edits one would, it is judged, shown and listed."""
    given = receipt.read(fresh(scratch, "r.json", data))
    for one in (given, receipt.Receipt({**given, "digest": receipt.digest(given)})):
        judged(one)
        registry.show_receipt(console(io.StringIO()), one)
        one.frames()
        table([("r.json", one)])
    path = scratch / "again.json"
    given.save(path)
    assert receipt.read(path) == given


def judged(one: receipt.Receipt) -> list[GateCheck]:
    """Return the gate's checks of a receipt, printed once."""
    checks = registry.judge(one)
    show_checks(console(io.StringIO()), "r.json", checks, all(check.passed for check in checks))
    return checks


def policy(data: bytes, scratch: Path) -> None:
    """Read a policy, and judge a good receipt of every kind by it."""
    _judge_by(fresh(scratch, "p.json", data))


def policy_yaml(data: bytes, scratch: Path) -> None:
    """The same of one in YAML."""
    _judge_by(fresh(scratch, "p.yaml", data))


def _judge_by(path: Path) -> None:
    made = read_policy(path)
    for one in seeds.receipts():
        registry.judge(one, made)


def journal(data: bytes, scratch: Path) -> None:
    """Read a journal to its end and append to it: it is readable afterwards."""
    path = fresh(scratch, "j.jsonl", data)
    with Journal(path, seeds.JOURNAL_HEADER) as opened:
        found = [entry for _, entry in opened.entries()]
        opened.append({"last": 1})
    with Journal(path, seeds.JOURNAL_HEADER) as opened:
        assert [entry for _, entry in opened.entries()] == [*found, {"last": 1}]


# --- traces ---------------------------------------------------------------------------------------------------


def trace_json(data: bytes, scratch: Path) -> None:
    """Parse a ``trace.json``, its names as they are and by a shipped map."""
    for one in (None, _maps()[0]):
        with refusable():
            info = parse_info(data, "trace.json", one)
            assert isinstance(info, TraceInfo)
            assert all(type(side) is int for p in info.passes for tap in p.taps.values() for side in tap.shape)


@functools.cache
def _maps() -> tuple[tap_map.TapMap, ...]:
    return tuple(tap_maps.load(name) for name in tap_maps.shipped())


def trace_pass(data: bytes, scratch: Path) -> None:
    """Read a pass file whose digest ``trace.json`` states: what is read has the stated shape.

    The input's first byte says which type ``trace.json`` states.
    """
    which, rest = seeds.DTYPES[(data[0] if data else 0) % len(seeds.DTYPES)], data[1:]
    text = seeds.trace_json_of(which).replace("0" * 64, hashlib.sha256(rest).hexdigest())
    fresh(scratch, "trace.json", text.encode())
    fresh(scratch, "pass-0000.safetensors", rest)
    opened = Trace.open(scratch)
    for name, tap in opened.info.passes[0].taps.items():
        assert opened.taps(0)[name].array.shape == tap.shape


def map_of_taps(data: bytes, scratch: Path) -> None:
    """Parse a tap map and apply it to names and shapes of a model."""
    made = tap_map.parse(data, "map.json", "map.json")
    for name in seeds.TENSOR_NAMES:
        made.ignores(name)
    with contextlib.suppress(ValueError):  # two names of one tap: the caller turns it into a refusal
        for _, entry in tap_map.resolve(seeds.TENSOR_NAMES, made, "bitnet-b1.58").found.values():
            for shape in ((3, 128), (1, 3, 2, 64), (), (0,)):
                with contextlib.suppress(ValueError):
                    entry.check(shape, (3, 2, 64), seeds.TRACE_MODEL)


def printed_dump(data: bytes, scratch: Path) -> None:
    """Read a dump of llama.cpp's tools, and hold it beside an engine's pass."""
    found = dumps.read_dump(fresh(scratch, "d.txt", data), "bitnet-b1.58")
    with np.errstate(all="ignore"):
        dumps.beside(found, seeds.engine_pass(), seeds.TRACE_MODEL.head_dim)


def saved_logits(data: bytes, scratch: Path) -> None:
    """Import saved logits: the input is the tokens; the logits are as many as the model has."""
    fresh(scratch, "llamacpp-m.bin", struct.pack("<300f", *range(300)))
    fresh(scratch, "llamacpp-m-tokens.bin", data)
    dumps.import_logits(scratch / "llamacpp-m.bin", seeds.TRACE_MODEL, scratch / "imported", overwrite=True)


# --- lists, children ------------------------------------------------------------------------------------------


def suite(data: bytes, scratch: Path) -> None:
    """Read a suite; no pattern is matched."""
    with mock.patch.object(patterns, "_ask", lambda pairs: [False] * len(pairs)):
        read_suite(fresh(scratch, "s.jsonl", data)).digest  # noqa: B018


def prompts(data: bytes, scratch: Path) -> None:
    """Read prompts as lines and as JSON lines."""
    for name in ("p.txt", "p.jsonl"):
        with refusable():
            assert all(read_prompts(fresh(scratch, name, data)))


def frame(data: bytes, scratch: Path) -> None:
    """Read what a child process of somebody's engine sent."""
    opened = os.open(fresh(scratch, "f", data), os.O_RDONLY)
    try:
        read_frame(opened)
    finally:
        os.close(opened)


def manifest(data: bytes, scratch: Path) -> None:
    """Read the manifest beside a library, in a build directory with CMake's own record."""
    lib, cmake = scratch / "lib", scratch / CMAKE_DIR
    for folder in (lib, cmake):
        folder.mkdir(exist_ok=True)
    entries = {"CMAKE_CACHEFILE_DIR": cmake, "CMAKE_HOME_DIRECTORY": "/source", "A": "ON"}
    fresh(cmake, CMAKE_CACHE, "".join(f"{name}:STRING={value}\n" for name, value in entries.items()).encode())
    fresh(lib, MANIFEST_NAME, data)
    manifest_for({str(lib / "libllama.so"): "0" * 64})


_ENGINE: Any = (BitnetError,)
_HARNESS: Any = (BadInputError,)
_BOTH: Any = (BitnetError, BadInputError)
_JUDGED = ("schema", "receipts", "examine", "audit", "compare", "smoke", "score", "selftest", "tokens", "weights")
_RECEIPTS = tuple(f"crossval.{name}" for name in (*_JUDGED, "bench", "repeat", "causal", "report.history"))
_TRACES = ("crossval.traces", "crossval.schema", "crossval.model.taps", "crossval.passes")
_MAPS = ("crossval.traces.tap_map", "crossval.schema")
TARGETS: dict[str, Target] = {
    "gguf": Target(model_file, _ENGINE, ("bitnet_py",)),
    "gguf-spec": Target(specification, _BOTH, ("crossval.model", "bitnet_py.gguf", "bitnet_py.config")),
    "weights": Target(weights_of_file, _BOTH, ("crossval.weights", "bitnet_py.gguf")),
    "checkpoint": Target(checkpoint, _ENGINE, ("bitnet_py",), json=True),
    "tokenizer-json": Target(tokenizer_json, _ENGINE, ("bitnet_py",), json=True),
    "tokenizer-model": Target(tokenizer_model, _ENGINE, ("bitnet_py.sentencepiece_file",)),
    "template": Target(template, (InputError,), ("jinja2", "bitnet_py.chat_template")),
    "receipt": Target(stored_receipt, _HARNESS, _RECEIPTS, json=True),
    "policy": Target(policy, _HARNESS, ("crossval.receipts", "crossval.schema"), json=True),
    "policy-yaml": Target(policy_yaml, _HARNESS, ("crossval.receipts", "crossval.schema", "yaml")),
    "journal": Target(journal, _HARNESS, ("crossval.receipts", "crossval.schema"), json=True),
    "trace": Target(trace_json, _HARNESS, _TRACES, json=True),
    "trace-pass": Target(trace_pass, _HARNESS, _TRACES),
    "tap-map": Target(map_of_taps, _HARNESS, _MAPS, json=True),
    "printed": Target(printed_dump, _HARNESS, ("crossval.bitnet_cpp.printed", "crossval.engines.dumps")),
    "logits": Target(saved_logits, _HARNESS, ("crossval.engines.dumps",)),
    "suite": Target(suite, _HARNESS, ("crossval.smoke", "crossval.schema"), json=True),
    "prompts": Target(prompts, _HARNESS, ("crossval.api.generation", "crossval.schema"), json=True),
    "frame": Target(frame, (ProtocolError, PeerClosedError), ("crossval.child",)),
    "manifest": Target(manifest, (), ("crossval.bitnet_cpp.manifest",), json=True),
}
"""By the word that `make fuzz TARGET=` takes."""
