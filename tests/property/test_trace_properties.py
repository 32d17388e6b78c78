"""Traces: anything written is read back; corrupted files are rejected in one line, never with a traceback or a
wrong number."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossval.errors import BadInputError
from crossval.model import taps
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray, pass_kind
from crossval.traces.read import Trace, TraceModel, expected_shape, parse_info
from crossval.traces.write import TraceWriter

Read = TypeVar("Read")
MODEL = TraceModel("0" * 64, 2, 2, 1, 2, 4, 6, 9)
TEXT = st.text(max_size=20).filter(lambda text: not any(0xD800 <= ord(char) < 0xE000 for char in text))


def tap_array(name: str, plan: PassPlan, rows: tuple[int, ...] | None, seed: int) -> TapArray:
    bits = np.random.default_rng(seed).integers(
        0, 1 << 32, expected_shape(name, MODEL, plan, rows), dtype=np.uint32
    )
    return TapArray(bits.view(np.float32), rows)


@st.composite
def records(draw: st.DrawFn) -> list[PassRecord]:
    start, found = 0, []
    for _ in range(draw(st.integers(1, 3))):
        ids = tuple(draw(st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=4)))
        plan = PassPlan(pass_kind(len(ids), start), ids, start)
        names = draw(st.lists(st.sampled_from(taps.of_model(2)), min_size=1, max_size=5, unique=True))
        rows = st.none() | st.sets(st.integers(0, len(ids) - 1), min_size=1).map(lambda s: tuple(sorted(s)))
        arrays = {name: tap_array(name, plan, draw(rows), draw(st.integers(0, 99))) for name in names}
        found.append(PassRecord(plan, arrays, draw(st.none() | st.floats(0, 1e6))))
        start += len(ids)
    return found


@st.composite
def identities(draw: st.DrawFn) -> EngineIdentity:
    scalar = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e100, 1e100)
    return EngineIdentity(
        name=draw(TEXT.filter(bool)),
        version=draw(st.none() | TEXT),
        compiler=draw(st.none() | TEXT),
        numerics=Numerics(draw(st.none() | st.integers(1, 16)), draw(st.none() | st.booleans())),
        settings=draw(st.dictionaries(TEXT, scalar | TEXT, max_size=3)),
    )


@given(records(), identities(), st.none() | TEXT)
@settings(max_examples=30, deadline=None)
def test_round_trip(given_records: list[PassRecord], engine: EngineIdentity, text: str | None) -> None:
    fed = [token for record in given_records for token in record.plan.token_ids]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "t"
        with TraceWriter(out, MODEL) as writer:
            for record in given_records:
                writer.add_pass(record)
            written = writer.finish(engine=engine, prompt_ids=fed[:2], prompt_text=text)
        trace = Trace.open(out)
        trace.verify()
        assert trace.info == written
        assert (trace.info.engine, trace.info.model, trace.info.prompt_text) == (engine, MODEL, text)
        for index, record in enumerate(given_records):
            assert trace.info.passes[index].elapsed_s == record.elapsed_s
            assert trace.info.plan[index] == record.plan
            stored = trace.taps(index)
            assert set(stored) == set(record.taps)
            for name, tap in stored.items():
                assert tap.rows == record.taps[name].rows
                assert tap.array.tobytes() == record.taps[name].array.tobytes()


@pytest.fixture(scope="module")
def sample() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sample"
        plans = [PassPlan("prefill", (1, 2, 3), 0), PassPlan("decode", (4,), 3)]
        with TraceWriter(out, MODEL) as writer:
            for plan in plans:
                names = ["inp_embd", "blk.0.kq", "blk.1.l_out", "result_output"]
                rows = {name: (len(plan.token_ids) - 1,) if name == "result_output" else None for name in names}
                writer.add_pass(PassRecord(plan, {n: tap_array(n, plan, rows[n], 1) for n in names}))
            writer.finish(engine=EngineIdentity("x"), prompt_ids=(1, 2, 3), prompt_text="abc")
        yield out


def attempt(read: Callable[[], Read]) -> tuple[str, Read | None]:
    """Return the reader's message when it rejects the file, otherwise what it reads; anything else is a crash."""
    try:
        return "", read()
    except BadInputError as error:
        return str(error), None


def damage(data: st.DataObject, original: bytes) -> bytes:
    """Overwrite, cut out or insert bytes."""
    at = data.draw(st.integers(0, len(original) - 1))
    cut = data.draw(st.integers(0, 6))
    return original[:at] + data.draw(st.binary(max_size=6)) + original[at + cut :]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_trace_json_is_read_or_refused(sample: Path, data: st.DataObject) -> None:
    refusal, info = attempt(lambda: parse_info(damage(data, (sample / "trace.json").read_bytes()), "trace.json"))
    assert "\n" not in refusal
    for recorded in info.passes if info is not None else ():
        for tap in recorded.taps.values():
            assert all(type(side) is int for side in tap.shape)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_json_digits_and_words_swapped_are_read_or_refused(sample: Path, data: st.DataObject) -> None:
    text = (sample / "trace.json").read_text()
    old = data.draw(
        st.sampled_from(["0", "1", "3", "null", '"F32"', "true", "[", "}", ",", '"rows"', "blk", "decode"])
    )
    new = data.draw(
        st.sampled_from(
            ["-1", "1.0", "1e400", "99999999999999999999", "null", "{}", "[[]]", '"\\ud800"', "true", ""]
        )
    )
    count = data.draw(st.integers(1, 3))
    refusal, _ = attempt(lambda: parse_info(text.replace(old, new, count).encode(), "trace.json"))
    assert "\n" not in refusal


@given(st.data(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_damaged_pass_file_is_refused_or_reads_as_declared(sample: Path, data: st.DataObject, fit: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "t"
        shutil.copytree(sample, out)
        path = out / "pass-0000.safetensors"
        original = path.read_bytes()
        damaged = damage(data, original)
        path.write_bytes(damaged)
        if fit:
            text = (out / "trace.json").read_text()
            before, after = (hashlib.sha256(x).hexdigest() for x in (original, damaged))
            (out / "trace.json").write_text(text.replace(before, after))
        trace = Trace.open(out)
        refusal, stored = attempt(lambda: dict(trace.taps(0)))
        assert "\n" not in refusal
        if stored is None:
            assert damaged != original
        else:
            assert fit or damaged == original
            for name, tap in stored.items():
                assert tap.array.shape == trace.info.passes[0].taps[name].shape
