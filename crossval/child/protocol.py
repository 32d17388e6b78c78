"""Frames between the harness and a child process that runs an engine.

One frame, both directions, little endian::

    offset  bytes
    0       4      magic "BXF1"
    4       4      length of the header, uint32
    8       8      length of the payload, uint64
    16      ...    header: UTF-8 JSON object; "arrays" lists {"name", "dtype", "shape"}
    ...     ...    payload: the arrays one after the other, C order, no padding

Anything else is an error of the peer and raises ``ProtocolError``.
"""

from __future__ import annotations

import json
import math
import os
import select
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"BXF1"
MAX_HEADER_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 64 << 30
DTYPES = ("float32", "int32", "uint8")

_PREFIX = struct.Struct("<4sIQ")
_READ_CHUNK_BYTES = 1 << 20


class ProtocolError(Exception):
    """The peer sent something that is not a frame."""


class PeerClosedError(Exception):
    """The peer closed its end of the pipe."""


class DeadlineError(Exception):
    """The peer did not send or accept a complete frame in time."""


@dataclass(frozen=True)
class Frame:
    """One message: a JSON object and the arrays that came with it."""

    header: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


def joined(texts: Sequence[bytes]) -> dict[str, npt.NDArray[Any]]:
    """Return byte strings as two arrays of a frame: ``text``, all of them joined, and ``n_bytes`` of each."""
    text = np.frombuffer(b"".join(texts), np.uint8)
    return {"text": text, "n_bytes": np.array([len(one) for one in texts], np.int32)}


def split(text: npt.NDArray[Any], n_bytes: npt.NDArray[Any]) -> list[bytes]:
    """Return the byte strings that ``joined`` made into arrays.

    Raises:
        ProtocolError: the lengths are not those of the text.
    """
    ends = np.cumsum(n_bytes, dtype=np.int64).tolist()
    if (n_bytes < 0).any() or (ends[-1] if ends else 0) != text.size:
        raise ProtocolError("the lengths of the texts do not add up")
    data = text.tobytes()
    return [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def encode_prefix(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return the bytes of a frame up to its payload.

    Raises:
        ValueError: an array's dtype is not one of ``DTYPES`` or the header is too long.
    """
    specs = []
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f"array {name!r} has dtype {array.dtype.name}; a frame carries {', '.join(DTYPES)}")
        specs.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape)})
    text = json.dumps({**header, "arrays": specs}, allow_nan=False).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the frame's header has {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return _PREFIX.pack(MAGIC, len(text), sum(array.nbytes for array in arrays.values())) + text


def write_frame(
    fd: int,
    header: Mapping[str, Any],
    arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    *,
    deadline: float | None = None,
) -> None:
    """Write one frame to a pipe; ``deadline`` is a ``time.monotonic`` value, None waits forever.

    Raises:
        PeerClosedError: the peer closed its end.
        DeadlineError: the peer did not accept the frame in time (only for a non-blocking ``fd``).
    """
    arrays = arrays or {}
    _write_all(fd, memoryview(encode_prefix(header, arrays)), deadline)
    for array in arrays.values():
        if array.size:
            _write_all(fd, np.ascontiguousarray(array).data.cast("B"), deadline)


def read_frame(fd: int, *, deadline: float | None = None) -> Frame:
    """Read one frame from a pipe; ``deadline`` is a ``time.monotonic`` value, None waits forever.

    Raises:
        ProtocolError: the bytes received are not a frame.
        PeerClosedError: the peer closed its end.
        DeadlineError: no complete frame in time.
    """
    prefix = bytearray(_PREFIX.size)
    _read_into(fd, memoryview(prefix), deadline)
    magic, header_bytes, payload_bytes = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ProtocolError(f"expected a frame starting with {MAGIC!r}, got {bytes(magic)!r}")
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"absurd frame: header {header_bytes} bytes, payload {payload_bytes} bytes")
    text = _read_bytes(fd, header_bytes, deadline)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ProtocolError("the header is not a JSON object")
    specs = _array_specs(header.pop("arrays", None))
    expected = sum(np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in specs)
    if expected != payload_bytes:
        raise ProtocolError(f"the arrays need {expected} bytes, the payload has {payload_bytes}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, dtype, shape in specs:
        try:
            array = np.empty(shape, dtype=dtype)
        except (MemoryError, ValueError) as error:
            raise ProtocolError(f"no memory for an array of shape {shape}: {error}") from error
        if array.size:
            _read_into(fd, array.data.cast("B"), deadline)
        arrays[name] = array
    return Frame(header, arrays)


def _array_specs(value: object) -> list[tuple[str, str, tuple[int, ...]]]:
    if not isinstance(value, list):
        raise ProtocolError("the header lacks the list of arrays")
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    seen = set()
    for item in value:
        if not isinstance(item, dict) or set(item) != {"name", "dtype", "shape"}:
            raise ProtocolError(f"malformed array description: {item!r:.80}")
        name, dtype, shape = item["name"], item["dtype"], item["shape"]
        if not isinstance(name, str) or name in seen or dtype not in DTYPES or not isinstance(shape, list):
            raise ProtocolError(f"malformed array description: {item!r:.80}")
        if len(shape) > 8 or not all(type(n) is int and 0 <= n <= MAX_PAYLOAD_BYTES for n in shape):
            raise ProtocolError(f"malformed array shape: {shape!r:.80}")
        seen.add(name)
        specs.append((name, dtype, tuple(shape)))
    return specs


def _wait(fd: int, event: int, deadline: float | None) -> None:
    if deadline is None:
        return
    poller = select.poll()
    poller.register(fd, event)
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0 or not poller.poll(math.ceil(remaining_s * 1000)):
        raise DeadlineError


def _read_into(fd: int, view: memoryview, deadline: float | None) -> None:
    done = 0
    while done < len(view):
        _wait(fd, select.POLLIN, deadline)
        try:
            count = os.readv(fd, [view[done : done + _READ_CHUNK_BYTES]])
        except BlockingIOError:
            continue
        if count == 0:
            raise PeerClosedError
        done += count


def _read_bytes(fd: int, size: int, deadline: float | None) -> bytearray:
    """Read ``size`` bytes into a growing buffer, so that a false length cannot allocate memory up front."""
    data = bytearray()
    while len(data) < size:
        part = bytearray(min(size - len(data), _READ_CHUNK_BYTES))
        _read_into(fd, memoryview(part), deadline)
        data += part
    return data


def _write_all(fd: int, view: memoryview, deadline: float | None) -> None:
    done = 0
    while done < len(view):
        _wait(fd, select.POLLOUT, deadline)
        try:
            done += os.write(fd, view[done : done + _READ_CHUNK_BYTES])
        except BlockingIOError:
            continue
        except BrokenPipeError as error:
            raise PeerClosedError from error
