"""Tap maps: what an engine calls its tensors, and how its arrays become taps (docs/tap-maps.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.errors import BadInputError
from crossval.files import read_limited
from crossval.model import taps
from crossval.schema import parse_json, validate_tap_map

FORMAT = "crossval-tap-map"
FORMAT_VERSION = 1
MAX_MAP_BYTES = 1 << 20
LAYER = "{i}"
"""Stands for the layer's number in a name."""

Array = npt.NDArray[Any]
Sizes = Any
"""What has ``n_heads``, ``n_kv_heads`` and the other axes as attributes: a ``TraceModel`` or a ``SpecConfig``."""


# --- steps ----------------------------------------------------------------------------------------------------


def _split_heads(array: Array, sizes: Sizes) -> Array:
    *rest, width = array.shape
    if width % sizes.head_dim:
        raise ValueError(f"split_heads: {width} values are not a multiple of head_dim {sizes.head_dim}")
    return array.reshape(*rest, width // sizes.head_dim, sizes.head_dim)


def _merge_heads(array: Array, sizes: Sizes) -> Array:
    if array.ndim < 2:
        raise ValueError("merge_heads needs two axes")
    *rest, n_heads, width = array.shape
    return array.reshape(*rest, n_heads * width)


def _halves_to_adjacent(array: Array, sizes: Sizes) -> Array:
    _check_head(array, sizes, "rope_halves_to_adjacent")
    found: Array = array.reshape(*array.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(array.shape)
    return found


def _adjacent_to_halves(array: Array, sizes: Sizes) -> Array:
    _check_head(array, sizes, "rope_adjacent_to_halves")
    found: Array = array.reshape(*array.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(array.shape)
    return found


def _check_head(array: Array, sizes: Sizes, name: str) -> None:
    if array.shape[-1] != sizes.head_dim or array.shape[-1] % 2:
        raise ValueError(f"{name}: the last axis holds {array.shape[-1]} values, not one head of {sizes.head_dim}")


WORDS: Mapping[str, Callable[[Array, Sizes], Array]] = {
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "rope_halves_to_adjacent": _halves_to_adjacent,
    "rope_adjacent_to_halves": _adjacent_to_halves,
}
"""Steps without an argument. The order of a head's values decides which of them RoPE rotates together."""


def _size(sizes: Sizes, name: str) -> int:
    """Return the values of a part by its name: of one token, all heads together."""
    heads = {"q_dim": "n_heads", "kv_dim": "n_kv_heads"}
    return int(getattr(sizes, heads[name]) * sizes.head_dim if name in heads else getattr(sizes, name))


@dataclass(frozen=True)
class Transpose:
    """The axes in another order."""

    axes: tuple[int, ...]

    def __call__(self, array: Array, sizes: Sizes) -> Array:
        """Return the array with its axes in that order."""
        if sorted(self.axes) != list(range(array.ndim)):
            raise ValueError(f"transpose: {list(self.axes)} does not list the {array.ndim} axes once each")
        found: Array = array.transpose(self.axes)
        return found


@dataclass(frozen=True)
class Take:
    """One of several parts that stand side by side in the last axis: of ``gate_up``, of ``qkv``."""

    part: int
    of: tuple[str, ...]

    def __call__(self, array: Array, sizes: Sizes) -> Array:
        """Return the part."""
        widths = [_size(sizes, name) for name in self.of]
        if array.shape[-1] != sum(widths):
            raise ValueError(f"take: the last axis holds {array.shape[-1]} values, its parts {sum(widths)}")
        start = sum(widths[: self.part])
        found: Array = array[..., start : start + widths[self.part]]
        return found


Step = Callable[[Array, Sizes], Array]


def _step(value: Any) -> Step:
    if isinstance(value, str):
        return WORDS[value]
    if "transpose" in value:
        return Transpose(tuple(map(int, value["transpose"])))
    part, of = int(value["take"]["part"]), tuple(value["take"]["of"])
    if part >= len(of):
        raise ValueError(f"take: there is no part {part} of {len(of)}")
    return Take(part, of)


def is_tap(name: str) -> bool:
    """Return whether a name is in the vocabulary."""
    try:
        taps.parse(name)
    except ValueError:
        return False
    return True


# --- entries --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tap: what the engine calls it, and the steps that lead from the engine's array to the tap's."""

    tap: str
    """``blk.{i}.q``, ``result_norm``."""
    sources: tuple[str, ...]
    """Patterns; of several that are there, the last one is taken: the one computed last."""
    steps: tuple[Step, ...] = ()
    architectures: frozenset[str] | None = None
    """Model files for which it holds; None: all."""

    def apply(self, array: Array, shape: Sequence[int], sizes: Sizes) -> Array:
        """Return the tap of an engine's array: leading axes of 1 removed as far as that is needed, then the steps.

        ``shape``: of the tap.

        Raises:
            WrongShape: the steps lead to another shape.
            ValueError: a step does not fit the array.
        """
        error: ValueError | None = None
        while True:
            try:
                made = array
                for step in self.steps:
                    made = step(made, sizes)
                if made.shape == tuple(shape):
                    return made
                error = WrongShape(made.shape) if error is None or made.ndim >= len(shape) else error
            except ValueError as one:
                error = error or one
            if array.ndim <= 1 or array.shape[0] != 1:
                raise error
            array = array[0]

    def check(self, stored: Sequence[int], shape: Sequence[int], sizes: Sizes) -> None:
        """Check that an array of the shape ``stored`` gives a tap of ``shape``; errors as of ``apply``."""
        self.apply(np.broadcast_to(np.float32(0), tuple(stored)), shape, sizes)  # takes no memory


class WrongShape(ValueError):
    """The steps lead to another shape than the tap's."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """``shape``: what they lead to."""
        super().__init__(f"shape {list(shape)}")
        self.shape = shape


PLAIN = Entry("", ())
"""An array under the tap's own name."""


def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"(\{i\}|\*)", text)
    seen = False
    made = ""
    for part in parts:
        if part == LAYER:
            made += "(?P=i)" if seen else "(?P<i>0|[1-9][0-9]{0,5})"
            seen = True
        else:
            made += ".*" if part == "*" else re.escape(part)
    return re.compile(made + r"\Z", re.DOTALL)


@dataclass(frozen=True)
class Resolved:
    """The names that an engine used, as far as they mean something."""

    found: Mapping[str, tuple[str, Entry]]
    """Full tap name -> the engine's name, and how its array is to be read."""
    ignored: tuple[str, ...]
    """Names that the map ignores, or that another name of the same tap replaces."""
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class TapMap:
    """What one engine calls its tensors."""

    name: str
    """Of the shipped map, or of the file."""
    entries: tuple[Entry, ...]
    ignore: tuple[str, ...] = ()
    digest: str | None = None
    """sha256 of the file; None: a shipped map."""

    @cached_property
    def _compiled(self) -> tuple[list[tuple[re.Pattern[str], int, Entry]], list[re.Pattern[str]]]:
        entries = [
            (_pattern(text), rank, entry) for entry in self.entries for rank, text in enumerate(entry.sources)
        ]
        return entries, [_pattern(text) for text in self.ignore]

    def targets(self, name: str, architecture: str | None) -> list[tuple[str, int, Entry]]:
        """Return the taps that an engine's tensor gives: full name, rank among the tap's sources, entry.

        ``architecture``: of the model file; None: not known, so that entries for some architectures do not hold.
        """
        found = []
        for pattern, rank, entry in self._compiled[0]:
            match = pattern.match(name)
            if match is not None and (entry.architectures is None or architecture in entry.architectures):
                number = match.groupdict().get("i")
                found.append((entry.tap if number is None else entry.tap.replace(LAYER, number), rank, entry))
        return found

    def ignores(self, name: str) -> bool:
        """Return whether the map says that a name is to be ignored."""
        return any(pattern.match(name) for pattern in self._compiled[1])


def resolve(names: Collection[str], tap_map: TapMap | None, architecture: str | None) -> Resolved:
    """Return which of an engine's names are taps: by the map first, else under the taps' own names.

    Raises:
        ValueError: two names give one tap, and the map does not say which of them is meant.
    """
    found: dict[str, tuple[int, str, Entry]] = {}
    ignored: list[str] = []
    unknown: list[str] = []
    for name in names:
        given = [] if tap_map is None else tap_map.targets(name, architecture)
        if not given and is_tap(name):
            given = [(name, 0, PLAIN)]
        if not given:
            (ignored if tap_map is not None and tap_map.ignores(name) else unknown).append(name)
        for tap, rank, entry in given:
            before = found.get(tap)
            if before is not None and before[0] == rank:
                raise ValueError(f"{before[1]} and {name} both give {tap}")
            if before is not None:
                ignored.append(name if rank < before[0] else before[1])
            if before is None or rank > before[0]:
                found[tap] = (rank, name, entry)
    return Resolved(
        {tap: (name, entry) for tap, (_, name, entry) in found.items()}, tuple(ignored), tuple(unknown)
    )


def counted(names: Iterable[str]) -> list[str]:
    """Return names for a message, those that differ in numbers only as one: ``model.layers.{i}.mlp (30)``."""
    counts: dict[str, int] = {}
    for name in names:
        general = re.sub(r"(?<![A-Za-z0-9_])[0-9]+(?![A-Za-z0-9_])", LAYER, name)
        counts[general] = counts.get(general, 0) + 1
    return [f"{name} ({n})" for name, n in counts.items()]


# --- files ----------------------------------------------------------------------------------------------------


def read(path: str | Path, name: str | None = None, digest: str | None = None) -> TapMap:
    """Read and check a tap map; ``name``: what it is called, else the file's name.

    Raises:
        BadInputError: it cannot be read, is not a tap map, or names a tap that does not exist.
    """
    path = Path(path)
    return parse(read_limited(path, "tap map", MAX_MAP_BYTES), str(path), name or path.name, digest)


def parse(data: bytes, where: str, name: str, digest: str | None = None) -> TapMap:
    """Parse and check the bytes of a tap map; ``where``: for messages.

    Raises:
        BadInputError: not strict JSON, against the schema, or contradicting itself.
    """
    value = parse_json(data, where)
    validate_tap_map(value, where)
    try:
        entries = tuple(_entry(item) for item in value["taps"])
        for text in value.get("ignore", ()):
            _pattern(text)
    except ValueError as error:
        raise BadInputError(f"{where}: {error}") from error
    return TapMap(name, entries, tuple(value.get("ignore", ())), digest)


def _entry(item: Mapping[str, Any]) -> Entry:
    tap, given = item["tap"], item["from"]
    sources = (given,) if isinstance(given, str) else tuple(given)
    if not is_tap(tap.replace(LAYER, "0")) or (LAYER not in tap and tap.startswith("blk.")):
        raise ValueError(f"there is no tap {tap!r}; blk.{{i}}.l_out is an example of one")
    for source in sources:
        if (LAYER in tap) != (LAYER in source):
            raise ValueError(f"{tap} from {source}: {LAYER} stands in one of them only")
    architectures = item.get("architectures")
    return Entry(
        tap,
        sources,
        tuple(map(_step, item.get("do", ()))),
        None if architectures is None else frozenset(architectures),
    )
