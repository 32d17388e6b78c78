"""Traces on disk: what is written is read back; malformed traces are rejected in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.engines.record import record_trace
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.passes import PassPlan, PassRecord, TapArray
from crossval.traces import tap_map
from crossval.traces.read import SHAPE_FIELDS, Trace, expected_shape
from crossval.traces.write import TraceWriter, write_safetensors
from tests.support.numpy_engine import MODEL, NumpyRunner

PROMPT = (3, 14, 15, 9)


@pytest.fixture
def trace_dir(tmp_path: Path) -> Path:
    out = tmp_path / "trace"
    with NumpyRunner(last_rows=True) as runner:
        record_trace(runner, MODEL, out, prompt_ids=PROMPT, prompt_text="π", n_decode=2, notes=["a note"])
    return out


def edit(trace_dir: Path, change: Any) -> None:
    path = trace_dir / "trace.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(trace_dir: Path, match: str) -> None:
    with pytest.raises(BadInputError, match=match) as caught:
        Trace.open(trace_dir).verify()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_round_trip_keeps_every_bit_and_fact(trace_dir: Path) -> None:
    trace = Trace.open(trace_dir)
    trace.verify()
    runner = NumpyRunner(last_rows=True)
    assert trace.info.engine == runner.identity
    assert trace.info.model == MODEL
    assert (trace.info.prompt_text, trace.info.prompt_ids, trace.info.notes) == ("π", PROMPT, ("a note",))
    assert [plan.kind for plan in trace.info.plan] == ["prefill", "decode", "decode"]
    for index, plan in enumerate(trace.info.plan):
        fresh = runner.eval(plan.token_ids, taps.all_taps(MODEL.n_layers)).taps
        stored = trace.taps(index)
        assert set(stored) == (set(fresh) if index == 0 else set(taps.outline_taps(3)))
        for name, tap in stored.items():
            assert tap.rows == fresh[name].rows
            assert tap.array.dtype == np.float32
            assert tap.array.flags.c_contiguous
            assert tap.array.tobytes() == fresh[name].array.tobytes()


def test_reading_is_lazy(trace_dir: Path) -> None:
    for path in trace_dir.glob("pass-*"):
        path.unlink()
    trace = Trace.open(trace_dir)
    stored = trace.taps(0)
    assert "blk.0.q" in stored
    assert len(stored) == len(taps.all_taps(3))
    with pytest.raises(BadInputError, match="pass-0000"):
        stored["blk.0.q"]
    with pytest.raises(KeyError):
        stored["blk.9.q"]


def test_nan_is_data(tmp_path: Path) -> None:
    array = np.array([[np.nan, np.inf] + [1.0] * 6], dtype=np.float32)
    write_one(tmp_path / "t", {"inp_embd": TapArray(array)})
    assert np.array_equal(Trace.open(tmp_path / "t").taps(0)["inp_embd"].array, array, equal_nan=True)


def write_one(out: Path, arrays: dict[str, TapArray], ids: tuple[int, ...] = (1,)) -> None:
    with TraceWriter(out, MODEL) as writer:
        writer.add_pass(PassRecord(PassPlan("prefill", ids, 0), arrays))
        writer.finish(engine=NumpyRunner().identity, prompt_ids=ids)


def test_cut_off_recording_leaves_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "t"

    def cut_off() -> None:
        with TraceWriter(out, MODEL) as writer:
            writer.add_pass(NumpyRunner().eval(PROMPT, ["inp_embd"]))
            assert (out / "pass-0000.safetensors").exists()
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cut_off()
    assert list(out.iterdir()) == []
    refused(out, "no finished trace")


def test_writer_refuses_what_a_reader_would(tmp_path: Path) -> None:
    embd = np.zeros((1, 8), np.float32)

    def add(number: int, plan: PassPlan, arrays: dict[str, TapArray]) -> None:
        with TraceWriter(tmp_path / str(number), MODEL) as writer:
            writer.add_pass(PassRecord(plan, arrays))

    first = PassPlan("prefill", (1,), 0)
    cases: list[tuple[PassPlan, dict[str, TapArray], str]] = [
        (first, {}, "no taps"),
        (PassPlan("prefill", (1,), 3), {"inp_embd": TapArray(embd)}, "starts at 3"),
        (PassPlan("decode", (1,), 0), {"inp_embd": TapArray(embd)}, "is not decode"),
        (first, {"inp_embd": TapArray(embd.astype(np.float64))}, "float64"),  # type: ignore[arg-type]
        (first, {"inp_embd": TapArray(embd[:, :7])}, r"\(1, 7\)"),
        (first, {"inp_embd": TapArray(embd, rows=(1,))}, "rows"),
        (first, {"blk.3.l_out": TapArray(embd)}, "has 3 layers"),
        (first, {"blk.0.zzz": TapArray(embd)}, "unknown tap"),
    ]
    for number, (plan, arrays, match) in enumerate(cases):
        with pytest.raises(BadInputError, match=match):
            add(number, plan, arrays)


def test_a_directory_with_anything_in_it_is_not_touched(trace_dir: Path) -> None:
    before = (trace_dir / "trace.json").read_bytes()
    with pytest.raises(BadInputError, match=r"not empty.*overwrite"):
        TraceWriter(trace_dir, MODEL)
    (trace_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInputError, match="not empty"):
        TraceWriter(trace_dir, MODEL, overwrite=True)
    assert (trace_dir / "trace.json").read_bytes() == before
    (trace_dir / "thesis.tex").unlink()
    with TraceWriter(trace_dir, MODEL, overwrite=True):
        assert (trace_dir / "trace.json").read_bytes() == before
    assert (trace_dir / "trace.json").read_bytes() == before
    assert [path.name for path in trace_dir.parent.iterdir()] == [trace_dir.name]


def test_finish_refuses_a_prompt_that_was_not_fed(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", MODEL) as writer:
        writer.add_pass(NumpyRunner().eval(PROMPT, ["inp_embd"]))
        with pytest.raises(BadInputError, match="not what the passes were fed"):
            writer.finish(engine=NumpyRunner().identity, prompt_ids=(3, 14, 16))
        with pytest.raises(BadInputError, match="cover 4 tokens of a prompt of 5"):
            writer.finish(engine=NumpyRunner().identity, prompt_ids=(*PROMPT, 1))


def set_in(*path: Any) -> Any:
    *keys, last, new = path

    def change(value: Any) -> None:
        for key in keys:
            value = value[key]
        if new is None:
            del value[last]
        else:
            value[last] = new

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_in("format", "other"), "format"),
        (set_in("format_version", 2), "format_version"),
        (set_in("surprise", 1), "surprise"),
        (set_in("passes", []), "passes"),
        (set_in("engine", None), "'engine' is a required"),
        (set_in("engine", "name", ""), "engine.name"),
        (set_in("engine", "settings", {"a": [1]}), "engine.settings.a"),
        (set_in("model", "sha256", "AB" * 32), "model.sha256"),
        (set_in("model", "sha256", "ab" * 32 + "\n"), "model.sha256"),
        (set_in("model", "n_layers", 10**30), "n_layers"),
        (set_in("model", "dim", -8), "dim"),
        (set_in("model", "n_layers", True), "n_layers"),
        (set_in("model", "n_layers", 2), "has 2 layers"),
        (set_in("model", "vocab_size", 5), "vocabulary"),
        (set_in("prompt", "token_ids", [3, 14]), None),
        (set_in("prompt", "token_ids", [3, 13]), "not what the passes were fed"),
        (set_in("prompt", "text", "\ud800"), "surrogates"),
        (set_in("passes", 1, "start", 5), r"passes.1.start"),
        (set_in("passes", 0, "kind", "decode"), "passes.0.kind"),
        (set_in("passes", 1, "file", "pass-0000.safetensors"), "passes.1.file"),
        (set_in("passes", 0, "file", "../../etc/passwd"), "passes.0.file"),
        (set_in("passes", 0, "file", "pass-0000.safetensors\n"), "passes.0.file"),
        (set_in("passes", 0, "sha256", "0" * 64), "sha256"),
        (set_in("engine", "numerics", "fused", ["l_out"]), "engine.numerics.fused"),
        (set_in("engine", "numerics", "fused", ["nonsense"]), "fused: no layer has an operation 'nonsense'"),
        (set_in("engine", "numerics", "fused", ["ffn_act"]), r"blk\.0\.ffn_act is recorded, and engine\.numerics"),
        (set_in("passes", 0, "elapsed_s", -1), "elapsed_s"),
        (set_in("passes", 0, "taps", 0, "dtype", "F64"), "dtype"),
        (set_in("passes", 0, "taps", 0, "name", "blk.0.nope"), "missing from the file"),
        (set_in("passes", 0, "taps", 0, "name", "blk.9.q"), "has 3 layers"),
        (set_in("passes", 0, "taps", 0, "shape", [4, 9]), "has shape"),
        (set_in("passes", 0, "taps", 0, "shape", [4]), "shape"),
        (set_in("passes", 0, "taps", 0, "rows", [0, 1, 1, 2]), "ascending"),
        (set_in("passes", 0, "taps", 0, "rows", [4]), "below 4"),
        (set_in("passes", 0, "taps", 0, "rows", []), "rows"),
        (set_in("passes", 0, "taps", 0, None), "missing from trace.json"),
        (lambda value: value["passes"][0]["taps"].append(value["passes"][0]["taps"][0]), "listed twice"),
        (set_in("passes", 1, None), "passes.1.(start|file)"),
    ],
)
def test_malformed_trace_json_is_refused(trace_dir: Path, change: Any, match: str | None) -> None:
    edit(trace_dir, change)
    if match is None:
        Trace.open(trace_dir).verify()
    else:
        refused(trace_dir, match)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": 1e999}', "out of range"),
        (b"1" * 10_000, "not valid JSON"),
        (b"null", "violates"),
        (b"[]", "violates"),
    ],
)
def test_bytes_that_are_no_trace_json_are_refused(trace_dir: Path, data: bytes, match: str) -> None:
    (trace_dir / "trace.json").write_bytes(data)
    refused(trace_dir, match)


def test_huge_trace_json_is_refused_unread(trace_dir: Path) -> None:
    with (trace_dir / "trace.json").open("wb") as file:
        file.truncate(1 << 33)
    refused(trace_dir, "larger than")


def test_long_lists_are_refused_at_once(trace_dir: Path) -> None:
    edit(trace_dir, set_in("prompt", "token_ids", [0] * 1_100_000))
    refused(trace_dir, "token_ids")


def test_missing_directory_file_and_pipe_are_refused(trace_dir: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no finished trace")
    refused(trace_dir / "trace.json", "cannot read|no finished trace")
    path = trace_dir / "pass-0001.safetensors"
    path.unlink()
    refused(trace_dir, "pass-0001")
    os.mkfifo(path)
    refused(trace_dir, "not a regular file")
    path = trace_dir / "trace.json"
    path.unlink()
    os.mkfifo(path)
    refused(trace_dir, "not a regular file")


def replace_pass(trace_dir: Path, data: bytes) -> None:
    """Put other bytes in place of a pass, with the digest that fits them."""
    (trace_dir / "pass-0001.safetensors").write_bytes(data)
    edit(trace_dir, set_in("passes", 1, "sha256", hashlib.sha256(data).hexdigest()))


def with_header(data: bytes, change: Any) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: b"", "safetensors"),
        (lambda d: d[:5], "safetensors"),
        (lambda d: d[:40], "safetensors"),
        (lambda d: d[:-1], "safetensors"),
        (lambda d: d + b"\0", "safetensors"),
        (lambda d: struct.pack("<Q", 1 << 60) + d[8:], "safetensors"),
        (lambda d: struct.pack("<Q", 0) + d[8:], "safetensors"),
        (lambda d: d[:8] + b"\xff" * 8 + d[16:], "safetensors"),
        (lambda d: with_header(d, lambda h: h.pop("p1.blk.0.l_out")), "safetensors|missing from the file"),
        (lambda d: with_header(d, lambda h: h.update(x=h.pop("p1.blk.0.l_out"))), "missing from"),
        (lambda d: with_header(d, lambda h: h["p1.blk.0.l_out"].update(data_offsets=[0, 1 << 40])), "safetensors"),
        (lambda d: with_header(d, lambda h: h["p1.blk.0.l_out"].update(shape=[1 << 62, 8])), "safetensors"),
        (lambda d: with_header(d, lambda h: h["p1.blk.0.l_out"].update(shape=[8, 1])), r"\(8, 1\)"),
        (lambda d: with_header(d, lambda h: h["p1.blk.0.l_out"].update(dtype="I32")), "I32"),
    ],
)
def test_malformed_pass_files_are_refused_even_with_a_fitting_digest(
    trace_dir: Path, change: Any, match: str
) -> None:
    replace_pass(trace_dir, change((trace_dir / "pass-0001.safetensors").read_bytes()))
    refused(trace_dir, match)


def test_one_changed_bit_is_found_on_first_read(trace_dir: Path) -> None:
    path = trace_dir / "pass-0002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    trace = Trace.open(trace_dir)
    assert trace.taps(1)["result_output"].array.shape == (1, 40)
    with pytest.raises(BadInputError, match="record it again"):
        trace.taps(2)["result_output"]


def test_safetensors_are_readable_by_the_official_library(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((1, 1), np.float32)}
    arrays["t"] = np.asfortranarray(arrays["b"])
    taps = {key: TapArray(array) for key, array in arrays.items()}
    digest = write_safetensors(tmp_path / "x.safetensors", taps)
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(loaded[key], array)


def test_shapes_follow_the_vocabulary() -> None:
    plan = PassPlan("prefill", (1, 2, 3), 2)
    record = NumpyRunner().eval((1, 2), [])
    assert record.plan.start == 0
    runner = NumpyRunner()
    runner.eval((4, 5), [])
    given = runner.eval(plan.token_ids, taps.all_taps(3)).taps
    for name, tap in given.items():
        assert tap.array.shape == expected_shape(name, MODEL, plan, tap.rows), name


def test_the_documented_writer_makes_a_valid_trace(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "trace-format.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.DOTALL)
    assert match is not None
    scope: dict[str, Any] = {}
    exec(match.group(1), scope)
    model = {key: value for key, value in vars(MODEL).items() if value is not None}
    logits = [float(i) for i in range(MODEL.vocab_size)]
    scope["write_trace"](str(tmp_path / "mine"), model, [1, 2, 3], logits)
    trace = Trace.open(tmp_path / "mine")
    trace.verify()
    tap = trace.taps(0)["result_output"]
    assert tap.rows == (2,)
    assert tap.array[0].tolist() == logits


def test_the_document_names_every_tap_and_field() -> None:
    root = Path(__file__).parents[3]
    text = (root / "docs" / "trace-format.md").read_text(encoding="utf-8")
    for tap in (*taps.LAYER_TAPS, *taps.INPUT_TAPS, *taps.HEAD_TAPS):
        assert tap in text, tap
    schema = json.loads((root / "schemas" / "trace.v1.schema.json").read_text(encoding="utf-8"))
    objects = [schema, *(item for item in schema["$defs"].values() if item.get("type") == "object")]
    fields = {field for item in objects for field in item["properties"]}
    assert not [field for field in fields if field not in text]
    assert all(item["additionalProperties"] is False for item in objects)


# --- an engine's own names and layouts ------------------------------------------------------------------------


def write_foreign(out: Path, tensors: dict[str, np.ndarray], rows: dict[str, list[int]] | None = None) -> Path:
    """Write a trace of one pass whose tensors have any names and shapes."""
    record_trace(NumpyRunner(), MODEL, out, prompt_ids=PROMPT)
    digest = write_safetensors(
        out / "pass-0000.safetensors", {f"p0.{name}": TapArray(a) for name, a in tensors.items()}
    )
    entries = [{"name": name, "dtype": "F32", "shape": list(array.shape)} for name, array in tensors.items()]
    for one in entries:
        if one["name"] in (rows or {}):
            one["rows"] = (rows or {})[one["name"]]

    def change(value: Any) -> None:
        value["passes"][0].update(taps=entries, sha256=digest)

    edit(out, change)
    return out


@pytest.fixture
def given() -> dict[str, np.ndarray]:
    record = NumpyRunner().eval(PROMPT, taps.all_taps(MODEL.n_layers))
    return {name: tap.array for name, tap in record.taps.items()}


A_MAP = """{"format": "crossval-tap-map", "format_version": 1, "taps": [
  {"tap": "inp_embd", "from": "embed"},
  {"tap": "blk.{i}.q", "from": "layers.{i}.q", "do": [{"transpose": [1, 0, 2]}]},
  {"tap": "blk.{i}.ffn_gate", "from": "layers.{i}.gate_up",
   "do": [{"take": {"part": 0, "of": ["hidden_dim", "hidden_dim"]}}]},
  {"tap": "blk.{i}.ffn_up", "from": "layers.{i}.gate_up",
   "do": [{"take": {"part": 1, "of": ["hidden_dim", "hidden_dim"]}}]},
  {"tap": "result_output", "from": "head"}], "ignore": ["debug.*"]}"""


def test_an_engines_tensors_are_read_by_its_map_to_the_bit(tmp_path: Path, given: dict[str, np.ndarray]) -> None:
    out = write_foreign(
        tmp_path / "t",
        {
            "embed": given["inp_embd"][None],
            "layers.1.q": np.ascontiguousarray(given["blk.1.q"].swapaxes(0, 1)[None]),
            "layers.1.gate_up": np.concatenate([given["blk.1.ffn_gate"], given["blk.1.ffn_up"]], axis=1),
            "head": given["result_output"][-1:],
            "debug.7": np.zeros((1,), np.float32),
            "cache.3": np.zeros((2, 2), np.float32),
            "blk.2.l_out": given["blk.2.l_out"][None, None],
        },
        {"head": [3]},
    )
    trace = Trace.open(out, tap_map.parse(A_MAP.encode(), "m", "m"))
    trace.verify()
    stored = trace.taps(0)
    names = {"inp_embd", "blk.1.q", "blk.1.ffn_gate", "blk.1.ffn_up", "blk.2.l_out", "result_output"}
    assert set(stored) == names
    for name in names - {"result_output"}:
        assert stored[name].array.tobytes() == given[name].tobytes(), name
        assert stored[name].array.flags.c_contiguous
    assert (stored["result_output"].rows, stored["result_output"].array.shape) == ((3,), (1, MODEL.vocab_size))
    assert (trace.info.ignored, trace.info.unknown) == (("debug.7",), ("cache.3",))


def test_without_a_map_only_the_taps_own_names_count(tmp_path: Path, given: dict[str, np.ndarray]) -> None:
    out = write_foreign(tmp_path / "t", {"embed": given["inp_embd"], "inp_embd": given["inp_embd"]})
    info = Trace.open(out).info
    assert (set(info.passes[0].taps), info.unknown) == ({"inp_embd"}, ("embed",))


def test_a_trace_without_any_tap_is_refused(tmp_path: Path, given: dict[str, np.ndarray]) -> None:
    out = write_foreign(tmp_path / "t", {"model.0.x": given["inp_embd"], "model.1.x": given["inp_embd"]})
    refused(out, r"none of its tensors is a tap: model\.\{i\}\.x \(2\); name what they are with --tap-map")


def test_a_tensor_that_is_no_tap_is_checked_like_any_other(tmp_path: Path, given: dict[str, np.ndarray]) -> None:
    out = write_foreign(tmp_path / "t", {"x": given["blk.0.ffn_up"], "inp_embd": given["inp_embd"]})
    edit(out, set_in("passes", 0, "taps", 0, "shape", [1, 1]))
    refused(out, r"tensor 'p0\.x' is F32 \(4, 12\), trace\.json says F32 \(1, 1\)")


def test_a_transposed_tensor_is_recognised_by_its_shape(tmp_path: Path, given: dict[str, np.ndarray]) -> None:
    out = write_foreign(tmp_path / "t", {"inp_embd": np.ascontiguousarray(given["inp_embd"].T)[None]})
    refused(
        out,
        r"inp_embd has shape \[1, 8, 4\], the model and rows give \[4, 8\]: the axes are in another order: write "
        r"\(token, feature\), the last running fastest; or give a tap map with the step .\"transpose\": \[1, 0\].",
    )


def test_an_order_that_the_shape_leaves_open_is_not_named(tmp_path: Path) -> None:
    one = np.zeros((2, 4, 4), np.float32)  # as (heads, tokens, values) and in other orders, too
    out = write_foreign(tmp_path / "t", {"blk.0.q": one})
    with pytest.raises(BadInputError, match="another order") as caught:
        Trace.open(out)
    assert "transpose" not in str(caught.value)


def test_a_mapped_tensor_of_another_shape_names_both(tmp_path: Path, given: dict[str, np.ndarray]) -> None:
    out = write_foreign(tmp_path / "t", {"layers.0.gate_up": given["blk.0.ffn_up"]})
    with pytest.raises(
        BadInputError, match=r"layers\.0\.gate_up, which is blk\.0\.ffn_gate, has shape \[4, 12\]: take"
    ):
        Trace.open(out, tap_map.parse(A_MAP.encode(), "m", "m"))


# --- the model ------------------------------------------------------------------------------------------------


def test_a_trace_of_another_file_is_refused(trace_dir: Path) -> None:
    assert Trace.open(trace_dir, model=MODEL).info.model == MODEL
    with pytest.raises(BadInputError, match=r"another model \(numpy\.gguf, sha256 abab.*\) than other\.gguf"):
        Trace.open(trace_dir, model=replace(MODEL, sha256="cd" * 32, file_name="other.gguf"))


@pytest.mark.parametrize("field", SHAPE_FIELDS)
def test_a_trace_that_states_another_shape_is_refused(trace_dir: Path, field: str) -> None:
    real = getattr(MODEL, field)
    other = replace(MODEL, **{field: real + 1})
    with pytest.raises(BadInputError, match=rf"model\.{field} is {real}, numpy\.gguf has {real + 1}"):
        Trace.open(trace_dir, model=other)
