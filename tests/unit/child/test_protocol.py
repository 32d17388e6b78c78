"""Frames survive any content and any garbage."""

from __future__ import annotations

import json
import os
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crossval.child import protocol as cpp_protocol
from crossval.child.protocol import DeadlineError, Frame, PeerClosedError, ProtocolError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(st.text().filter(lambda key: key != "arrays"), JSON, max_size=4)
ARRAYS = st.dictionaries(
    st.text(max_size=12),
    st.sampled_from(cpp_protocol.DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    max_size=3,
)


def transfer(data: bytes) -> Frame:
    """Read a frame from bytes that arrive through a pipe."""
    read_fd, write_fd = os.pipe()

    def send() -> None:
        try:
            os.write(write_fd, data)
        finally:
            os.close(write_fd)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return cpp_protocol.read_frame(read_fd, deadline=time.monotonic() + 10)
    finally:
        os.close(read_fd)
        sender.join()


def frame_bytes(header: object, payload: bytes, *, magic: bytes = cpp_protocol.MAGIC) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<4sIQ", magic, len(text), len(payload)) + text + payload


@settings(deadline=None, max_examples=60)
@given(header=HEADERS, arrays=ARRAYS)
def test_a_frame_comes_back_as_it_was(header, arrays):
    payload = b"".join(array.tobytes() for array in arrays.values())
    frame = transfer(cpp_protocol.encode_prefix(header, arrays) + payload)
    assert frame.header == header
    assert list(frame.arrays) == list(arrays)
    for name, array in arrays.items():
        assert frame.arrays[name].dtype == array.dtype
        assert frame.arrays[name].shape == array.shape
        assert frame.arrays[name].tobytes() == array.tobytes()


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200) | st.binary(max_size=100).map(lambda b: cpp_protocol.MAGIC + b))
def test_garbage_is_a_protocol_error_or_an_early_end(data):
    with pytest.raises((ProtocolError, PeerClosedError)):
        transfer(data)


@settings(deadline=None, max_examples=60)
@given(header=HEADERS, arrays=ARRAYS, data=st.data())
def test_a_frame_cut_anywhere_is_an_early_end(header, arrays, data):
    whole = cpp_protocol.encode_prefix(header, arrays) + b"".join(a.tobytes() for a in arrays.values())
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(PeerClosedError):
        transfer(whole[:cut])


def test_an_array_larger_than_a_pipe_goes_through():
    array = np.arange(300_000, dtype=np.float32).reshape(3, 100_000)
    read_fd, write_fd = os.pipe()
    sender = threading.Thread(target=cpp_protocol.write_frame, args=(write_fd, {"x": 1}, {"a": array[:, ::-1]}))
    sender.start()
    try:
        frame = cpp_protocol.read_frame(read_fd, deadline=time.monotonic() + 10)
    finally:
        sender.join()
        os.close(read_fd)
        os.close(write_fd)
    np.testing.assert_array_equal(frame.arrays["a"], array[:, ::-1])


@pytest.mark.parametrize(
    ("header", "payload", "complaint"),
    [
        ([], b"", "not a JSON object"),
        ({}, b"", "list of arrays"),
        ({"arrays": [{"name": "a"}]}, b"", "malformed array"),
        ({"arrays": [{"name": "a", "dtype": "float64", "shape": [1]}]}, b"x" * 8, "malformed array"),
        ({"arrays": [{"name": "a", "dtype": "object", "shape": [1]}]}, b"x" * 8, "malformed array"),
        ({"arrays": [{"name": "a", "dtype": "uint8", "shape": [-1]}]}, b"", "malformed array shape"),
        ({"arrays": [{"name": "a", "dtype": "uint8", "shape": [True]}]}, b"x", "malformed array shape"),
        ({"arrays": [{"name": "a", "dtype": "uint8", "shape": [2]}]}, b"x", "need 2 bytes, the payload has 1"),
        ({"arrays": [{"name": "a", "dtype": "uint8", "shape": [0]}] * 2}, b"", "malformed array"),
        ({"arrays": [{"name": "a", "dtype": "uint8", "shape": [2**36, 2**36, 0]}]}, b"", "no memory"),
    ],
)
def test_a_malformed_description_is_named(header, payload, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        transfer(frame_bytes(header, payload))


@pytest.mark.parametrize(("header_bytes", "payload_bytes"), [(2**32 - 1, 0), (10, 2**64 - 1)])
def test_absurd_lengths_are_refused_before_anything_is_read(header_bytes, payload_bytes):
    with pytest.raises(ProtocolError, match="absurd"):
        transfer(struct.pack("<4sIQ", cpp_protocol.MAGIC, header_bytes, payload_bytes))


def test_deeply_nested_json_is_refused():
    text = b"[" * 100_000
    with pytest.raises(ProtocolError, match="not JSON"):
        transfer(struct.pack("<4sIQ", cpp_protocol.MAGIC, len(text), 0) + text)


def test_another_magic_is_refused():
    with pytest.raises(ProtocolError, match="starting with"):
        transfer(frame_bytes({"arrays": []}, b"", magic=b"HTTP"))


def test_silence_ends_at_the_deadline():
    read_fd, write_fd = os.pipe()
    started = time.monotonic()
    try:
        with pytest.raises(DeadlineError):
            cpp_protocol.read_frame(read_fd, deadline=started + 0.1)
    finally:
        os.close(read_fd)
        os.close(write_fd)
    assert time.monotonic() - started < 5


def test_a_reader_that_does_not_read_ends_at_the_deadline():
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    try:
        big = {"a": np.zeros(1 << 20, np.uint8)}
        with pytest.raises(DeadlineError):
            cpp_protocol.write_frame(write_fd, {}, big, deadline=time.monotonic() + 0.1)
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_an_array_of_another_type_is_not_sent():
    with pytest.raises(ValueError, match="float64"):
        cpp_protocol.encode_prefix({}, {"a": np.zeros(1)})
