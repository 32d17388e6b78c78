"""Tap maps by name: those that ship with ``crossval``, and files.

The maps of the llama.cpp family are made of the tables that live libraries are captured by
(``crossval.bitnet_cpp``): nodes that two taps share are told apart by their operation, ``Qcur-0:ROPE``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from crossval.bitnet_cpp import abi
from crossval.bitnet_cpp.table import Node, Nodes, Table
from crossval.errors import BadInputError
from crossval.files import file_sha256
from crossval.model import taps
from crossval.terms import LOGITS
from crossval.traces.tap_map import LAYER, Entry, TapMap, read

MAPS = Path(__file__).parent / "maps"
OPERATION = ":"
"""Between a node's name and its operation."""
FAMILY: Mapping[str, Table] = {
    f"{table.engine}-{table.generation}" if table.engine == "bitnet.cpp" else table.engine: table
    for table in abi.TABLES
}


def shipped() -> list[str]:
    """Return the names of the maps that ship with ``crossval``."""
    return sorted([*FAMILY, *(path.stem for path in MAPS.glob("*.json"))])


def load(word: str | Path) -> TapMap:
    """Return a shipped map by its name, or read one from a file.

    Raises:
        BadInputError: it is neither, or the file is not a tap map.
    """
    name = str(word)
    if name in FAMILY:
        return of_table(name, FAMILY[name])
    if name in shipped():
        return read(MAPS / f"{name}.json", name)
    if not Path(word).is_file():
        raise BadInputError(f"tap map {name!r} is neither a file nor one of {', '.join(shipped())}")
    return read(word, digest=file_sha256(Path(word)))


def of_table(name: str, table: Table) -> TapMap:
    """Return what a generation of llama.cpp calls the taps, for every architecture whose graph is known."""
    by_nodes: dict[int, list[str]] = {}
    for architecture, nodes in table.graphs.items():
        by_nodes.setdefault(id(nodes), []).append(architecture)
    entries: list[Entry] = []
    for architectures in by_nodes.values():
        entries += _entries(table.graphs[architectures[0]], frozenset(architectures))
    return TapMap(name, tuple(entries))


def _entries(nodes: Nodes, architectures: frozenset[str]) -> Iterable[Entry]:
    """Yield an entry for each tap that has a node; the logits, which no table lists, have one, too."""
    every = {**nodes, LOGITS: ((LOGITS, None),)}
    shared = [name for found in every.values() for name in {name for name, _ in found}]
    for tap, found in every.items():
        in_layer = taps.OPS[tap].layer is not None
        sources = [name for node in found for name in _names(node, shared.count(node[0]) == 1, in_layer)]
        if sources:
            yield Entry(f"blk.{LAYER}.{tap}" if in_layer else tap, tuple(sources), (), architectures)


def _names(node: Node, alone: bool, in_layer: bool) -> list[str]:
    """Return what a node may be called: with its operation where that identifies it, and alone where it does."""
    name, operations = node
    whole = f"{name}-{LAYER}" if in_layer else name
    return [whole] * alone + [f"{whole}{OPERATION}{operation}" for operation in sorted(operations or ())]
