"""Arrays of strings in a GGUF file: located when the file is opened, decoded on access.

Layout: ``count`` strings one after the other, unaligned; ``string = u64 size_bytes | UTF-8 bytes``,
little-endian. Example: ``["a", "", "é"]`` is ``01 00*7 61 | 00*8 | 02 00*7 C3 A9``: the strings
begin at 0, 9 and 17, the last ends at 27.

A vocabulary is 10^5 strings of a few bytes, and callers that already have token ids never need
their text. Their offsets are always needed, because the next value of the file begins where the
last string ends.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import DAMAGED, clip, model_error

MAX_STRING_BYTES = 64 << 20
_LENGTH = struct.Struct("<Q")
_BLOCK_BYTES = 1 << 16  # temporaries from 128 KiB on are new pages of the system each time: half as fast
_N_WALKED = 16
_N_SHOWN = 4


class StringArray(Sequence[str]):
    """The strings of one array in a mapped GGUF file: immutable, each decoded on access.

    Iteration decodes all strings together, which is faster than one at a time. Equal to a list, a
    tuple or another array of the same strings. Keeps the mapping alive. Everything but ``len`` and
    ``repr`` raises ``ModelError`` for a string that is not UTF-8.
    """

    __slots__ = ("_data", "_offsets", "_path", "_what")

    def __init__(
        self, buffer: bytes | mmap.mmap, offsets: npt.NDArray[np.int64], path: str | Path, what: str
    ) -> None:
        """Wrap a buffer with the offsets that ``find_strings`` found; ``path`` and ``what`` are for errors."""
        self._data = np.frombuffer(buffer, np.uint8)
        self._offsets = offsets
        self._path = path
        self._what = what

    def __len__(self) -> int:
        return self._offsets.size - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = range(len(self))[index]
        return self._decode(found) if isinstance(found, int) else [self._decode(i) for i in found]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (StringArray, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and self.tolist() == list(other)

    def __repr__(self) -> str:
        shown = [clip(self._bytes(i).decode(errors="replace")) for i in range(min(len(self), _N_SHOWN))]
        return f"<{len(self)} strings: {', '.join(shown)}{', ...' if len(self) > _N_SHOWN else ''}>"

    def tolist(self) -> list[str]:
        """Return all strings. Raises ``ModelError`` when one is not UTF-8."""
        # All are decoded as one text and cut at their lengths: eight zero bytes each, which occur
        # nowhere else.
        raw = self._data[self._offsets[0] : self._offsets[-1]].copy()
        begins = self._offsets[:-1] - self._offsets[0]
        long = begins[np.diff(self._offsets) >= _LENGTH.size + 256]
        raw[begins] = 0
        raw[long[:, None] + np.arange(1, _LENGTH.size)] = 0
        if raw.size - np.count_nonzero(raw) == len(self) * _LENGTH.size:
            try:
                text: str = raw.tobytes().decode()
                return text.split("\0" * _LENGTH.size)[1:]
            except UnicodeDecodeError:
                pass  # _decode names the string
        return [self._decode(i) for i in range(len(self))]

    def _bytes(self, index: int) -> bytes:
        return self._data[self._offsets[index] + _LENGTH.size : self._offsets[index + 1]].tobytes()

    def _decode(self, index: int) -> str:
        try:
            return self._bytes(index).decode()
        except UnicodeDecodeError as error:
            position = int(self._offsets[index]) + _LENGTH.size
            raise model_error(
                self._path,
                f"{self._what}, string {index} (byte {position})",
                expected="UTF-8",
                found=f"{error.reason} at its byte {error.start}",
                remedy=DAMAGED,
            ) from None


def find_strings(buffer: bytes | mmap.mmap, start: int, count: int) -> npt.NDArray[np.int64]:
    """Return what ``walk_strings`` returns, in milliseconds for 10^5 strings.

    The length of a string shorter than 256 bytes ends in seven zero bytes, which texts hardly ever
    contain. Every place followed by seven zero bytes may be the beginning of such a string; if that
    string would end at the next such place, the two are linked. From a true beginning, links lead
    only to beginnings, whatever bytes they cross. Where they end (an empty or a long string, zero
    bytes in a text), some strings are walked one at a time.
    """
    data = np.frombuffer(buffer, np.uint8)
    offsets = np.empty(count + 1, np.int64)
    offsets[0] = start
    n_found = block_end = 0
    places = ends = np.empty(0, np.int64)
    while n_found < count:
        n_walked = min(count - n_found, _N_WALKED)
        walked = walk_strings(buffer, start, n_walked)
        offsets[n_found : n_found + len(walked)] = walked
        n_found += len(walked) - 1
        if len(walked) <= n_walked or n_found == count:
            return offsets[: n_found + 1]
        start = walked[-1]
        if start >= block_end:
            block = data[start : start + _BLOCK_BYTES]
            places = start + _before_seven_zeros(block)
            ends = np.flatnonzero(places[:-1] + _LENGTH.size + data[places[:-1]] != places[1:])
            block_end = start + block.size
        first = int(places.searchsorted(start))
        if first < places.size and places[first] == start:
            end = int(ends.searchsorted(first))
            last = int(ends[end]) if end < ends.size else places.size - 1
            n_linked = min(last - first, count - n_found)
            offsets[n_found : n_found + n_linked + 1] = places[first : first + n_linked + 1]
            n_found += n_linked
            start = int(offsets[n_found])
    return offsets


def walk_strings(buffer: bytes | mmap.mmap, start: int, count: int, limit: int = MAX_STRING_BYTES) -> list[int]:
    """Return where each of ``count`` strings begins, and where the last one ends.

    The list is shorter when a string is longer than ``limit`` or than the rest of the buffer, or
    its length is cut off: then its last item is where that string begins. Nothing past the end of
    the buffer is read.
    """
    end = len(buffer)
    offsets = [start]
    for _ in range(count):
        rest = end - start - _LENGTH.size
        if rest < 0:
            break
        (length,) = _LENGTH.unpack_from(buffer, start)
        if length > min(limit, rest):
            break
        start += _LENGTH.size + length
        offsets.append(start)
    return offsets


def _before_seven_zeros(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return every ``i`` for which ``block[i + 1 : i + 8]`` is seven bytes, all zero."""
    zero = block == 0
    two = zero[1:-1] & zero[2:]
    four = two[:-2] & two[2:]
    return np.flatnonzero(four[:-3] & four[3:])
