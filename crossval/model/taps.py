"""Taps: the shared vocabulary of intermediate tensors, in execution order.

It follows from the graphs (``crossval.model.graphs``): a tap is the output of an operation. Names are
bitnet.cpp's graph callback names, made unique (``Qcur-0`` appears there twice: ``q`` before RoPE, ``q_rope``
after it). A full name is ``blk.{layer}.{tap}`` for layer taps and the bare tap name for the model-wide ones.
All arrays are float32, C-contiguous, shaped as ``Op.axes`` says; scores have no padding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.model.config import SpecConfig
from crossval.model.graphs import GRAPHS
from crossval.model.kinds import BitLinear, IntArray, Kind, Pooling, RmsNorm, visible_keys
from crossval.model.op import Op


def _lacks_nothing(architecture: str) -> SpecConfig:
    """Return a model of one layer that lacks no optional operation."""
    config = SpecConfig(1, 1, 1, 2, 2, 2, 1, 1, rope_base=1.0, rms_eps=1.0, architecture=architecture)
    pooling: Pooling | None = "mean" if config.may_have("pooling") else None
    return replace(config, input_norms=config.may_have("input_norms"), pooling=pooling)


def vocabulary() -> dict[str, Op]:
    """Return the operations of all architectures by name, in execution order.

    Raises:
        ValueError: two architectures use one name for outputs of different shapes, or in a different order.
    """
    found: dict[str, Op] = {}
    graphs = {name: operations(_lacks_nothing(name)) for name, operations in GRAPHS.items()}
    for architecture, ops in graphs.items():
        before: str | None = None
        for op in ops:
            known = found.setdefault(op.name, op)
            states = {known.appends_to, op.appends_to} - {None}
            if (known.axes, known.layer) != (op.axes, op.layer) or len(states) > 1:
                raise ValueError(f"{architecture}: {op.name} is also the name of another tensor")
            if known.appends_to != op.appends_to:
                found[op.name] = replace(known, appends_to=states.pop())
            if known is op:  # a new one comes after the one that it follows in its own graph
                names = [name for name in found if name != op.name]
                names.insert(names.index(before) + 1 if before is not None else 0, op.name)
                found = {name: found[name] for name in names}
            before = op.name
    shared = set.intersection(*({op.name for op in ops} for ops in graphs.values()))
    return {name: replace(op, optional=op.optional or name not in shared) for name, op in found.items()}


OPS: dict[str, Op] = vocabulary()
"""Tap without its layer -> its operation in a model that lacks none; its sizes mean nothing."""
_IN_LAYERS = [name for name, op in OPS.items() if op.layer is not None]
_OUTSIDE = [name for name in OPS if name not in _IN_LAYERS]

LAYER_TAPS: tuple[str, ...] = tuple(_IN_LAYERS)
"""Taps of one layer in execution order (the specification's order; engines may interleave q, k and v)."""
_FIRST = list(OPS).index(LAYER_TAPS[0])
INPUT_TAPS: tuple[str, ...] = tuple(name for name in _OUTSIDE if list(OPS).index(name) < _FIRST)
HEAD_TAPS: tuple[str, ...] = tuple(name for name in _OUTSIDE if name not in INPUT_TAPS)
OPTIONAL_TAPS = frozenset(name for name, op in OPS.items() if op.optional)
"""Taps a model may lack; when neither engine has one, nothing is missing."""
SUB_NORMS = frozenset({"attn_sub_norm", "ffn_sub_norm"})
"""Taps that models of one architecture have or lack."""


@lru_cache(maxsize=64)
def of_graph(architecture: str | None, input_norms: bool = False, pooled: bool = False) -> tuple[str, ...]:
    """Return the taps, without their layer, that a model has at most, in execution order.

    ``input_norms``, ``pooled``: it has norms before its matrices, and one vector of a text as its result. Of an
    architecture that has no graph here: those of BitNet.
    """
    known = architecture if architecture in GRAPHS else next(iter(GRAPHS))
    config = _lacks_nothing(known)
    asked = replace(config, input_norms=input_norms, pooling=config.pooling if pooled else None)
    return tuple(op.name for op in GRAPHS[known](asked))


def of_model(n_layers: int, architecture: str | None = None, *, outline: bool = False, **form: bool) -> list[str]:
    """Return the full names of the taps that a model has at most, or of its outline; ``form``: of ``of_graph``."""
    known = of_graph(architecture, **form)
    names = outline_taps(n_layers) if outline else all_taps(n_layers)
    return [name for name in names if parse(name).tap in known]


STATES: dict[str, str] = {op.appends_to.rpartition(".")[2]: name for name, op in OPS.items() if op.appends_to}
"""KV state, without the layer -> the tap whose rows make it up."""
CONTEXT_INPUTS = ("token_ids", "positions")
"""Inputs of operations that belong to the pass and are not tensors."""


def of_kind(*kinds: type[Kind]) -> frozenset[str]:
    """Return the taps, without their layer, that operations of the given kinds compute."""
    return frozenset(name for name, op in OPS.items() if isinstance(op.kind, kinds))


BITLINEARS = of_kind(BitLinear)
NORMS = of_kind(RmsNorm)
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\Z")


@dataclass(frozen=True, order=True)
class TapName:
    """A parsed full tap name; ``layer`` is None for model-wide taps."""

    layer: int | None
    tap: str

    def __str__(self) -> str:
        return self.tap if self.layer is None else f"blk.{self.layer}.{self.tap}"


@lru_cache(maxsize=4096)
def parse(name: str) -> TapName:
    """Parse a full tap name.

    Raises:
        ValueError: the name is not in the vocabulary.
    """
    if name in INPUT_TAPS or name in HEAD_TAPS:
        return TapName(None, name)
    match = _LAYER_NAME.match(name)
    if match is None or match.group(2) not in LAYER_TAPS:
        raise ValueError(f"unknown tap name {name!r}")
    return TapName(int(match.group(1)), match.group(2))


def layer_taps(layer: int) -> list[str]:
    """Return the full names of every tap of one layer, in execution order."""
    return [f"blk.{layer}.{tap}" for tap in LAYER_TAPS]


def all_taps(n_layers: int) -> list[str]:
    """Return the full names of every tap of a model, in execution order."""
    names = list(INPUT_TAPS)
    for layer in range(n_layers):
        names += layer_taps(layer)
    return names + list(HEAD_TAPS)


def outline_taps(n_layers: int) -> list[str]:
    """Return the coarse selection: embedding, every layer's output, final norm and logits."""
    return [*INPUT_TAPS, *(f"blk.{layer}.{LAYER_TAPS[-1]}" for layer in range(n_layers)), *HEAD_TAPS]


def in_outline(name: str) -> bool:
    """Return whether a tap belongs to the coarse selection."""
    return parse(name).tap in (*INPUT_TAPS, LAYER_TAPS[-1], *HEAD_TAPS)


def execution_index(name: str, n_layers: int = 1 << 20) -> int:
    """Return the position of a tap in execution order, for sorting and for finding the first divergence.

    ``n_layers``: larger than any layer's index will do for sorting.
    """
    tap = parse(name)
    n_inputs = len(INPUT_TAPS)
    if tap.tap in INPUT_TAPS:
        return INPUT_TAPS.index(tap.tap)
    if tap.layer is None:
        return n_inputs + n_layers * len(LAYER_TAPS) + HEAD_TAPS.index(tap.tap)
    return n_inputs + tap.layer * len(LAYER_TAPS) + LAYER_TAPS.index(tap.tap)


def check_op_names(names: Iterable[str]) -> None:
    """Check that every name is one of an operation or of a kind of operation.

    Raises:
        ValueError: one is not.
    """
    known = [*dict.fromkeys(op.kind_name for op in OPS.values()), *OPS]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no operation {name!r}; known: {', '.join(known)}")


def op_of(name: str) -> Op:
    """Return the operation that computes a tap: only its kind and axes mean something, not its hyper-parameters.

    Raises:
        ValueError: the name is not in the vocabulary.
    """
    return OPS[parse(name).tap]


def is_optional(name: str) -> bool:
    """Return whether a model may lack a tap."""
    return op_of(name).optional


def may_be_gathered(name: str, n_layers: int) -> bool:
    """Return whether engines may give a tap only for the tokens of a pass whose logits are wanted."""
    tap = parse(name)
    return OPS[tap.tap].output_rows and tap.layer in (None, n_layers - 1)


def is_state(name: str) -> bool:
    """Return whether an input is KV state, whose rows are cache cells, not tokens of the pass."""
    return name.rpartition(".")[2] in STATES


def state_source(name: str) -> str:
    """Return the tap whose rows of all passes so far make up a KV state."""
    layer, dot, state = name.rpartition(".")
    return f"{layer}{dot}{STATES[state]}"


# --- axes -----------------------------------------------------------------------------------------------------


def token_axis(name: str) -> int:
    """Return the axis that counts tokens, of a tap or of ``token_ids`` and ``positions``."""
    return 0 if name in CONTEXT_INPUTS else op_of(name).token_axis


def has_keys(name: str) -> bool:
    """Return whether a tap has an axis of keys: its width depends on the tokens so far."""
    return "n_kv" in op_of(name).axes


def take_rows(name: str, array: npt.NDArray[Any], given: Sequence[int], wanted: Sequence[int]) -> npt.NDArray[Any]:
    """Return some tokens of an array that holds the tokens ``given``.

    Raises:
        KeyError: it lacks one of them.
    """
    if tuple(wanted) == tuple(given):
        return array
    where = {row: i for i, row in enumerate(given)}
    taken: npt.NDArray[Any] = np.take(array, [where[row] for row in wanted], axis=token_axis(name))
    return taken


def visible(name: str, shape: Sequence[int], positions: Iterable[int] | IntArray) -> npt.NDArray[np.bool_] | None:
    """Return a mask, to be broadcast, of the elements that count; None: all do.

    Scores of later keys are causally masked afterwards, so an engine may leave anything there. ``positions``:
    those of the tokens that the array holds.
    """
    if not op_of(name).kind.unmasked:
        return None
    return visible_keys(shape[-1], np.asarray(positions))


def axis_names(name: str) -> tuple[str, ...]:
    """Return what the axes of a tap are called in messages."""
    axes = op_of(name).axes
    return tuple(_AXIS_NAMES.get(axis, "head" if "heads" in axis else "feature") for axis in axes)


_AXIS_NAMES = {"n_tokens": "token", "n_kv": "key"}


def shape_hint(
    name: str, shape: Sequence[int], expected: Sequence[int], keys_of: Mapping[int, int] | None = None
) -> str:
    """Return what to do about a tap's shape; empty if the cause cannot be told.

    ``keys_of``: how many keys the other passes see, by their index.
    """
    if len(shape) == len(expected) and has_keys(name) and shape[:-1] == expected[:-1]:
        return _keys_hint(shape[2], expected[2], keys_of or {})
    if sorted(shape) == sorted(expected):
        return f"the axes are in another order: write ({', '.join(axis_names(name))}), the last running fastest"
    if math.prod(shape) == math.prod(expected):
        return f"the number of values is correct: reshape it to [{', '.join(map(str, expected))}]"
    return ""


def _keys_hint(found: int, expected: int, keys_of: Mapping[int, int]) -> str:
    """Explain attention scores over another number of keys than the tokens so far."""
    alike = [index for index, n_keys in keys_of.items() if n_keys == found]
    other = f"; pass {alike[0]} sees {found} keys: are the passes in another order?" if alike else ""
    if found < expected:
        return f"it has {found} keys, the tokens so far are {expected}: cells of the KV cache are missing{other}"
    cells = "one cell" if found == expected + 1 else f"{found - expected} cells"
    return (
        f"it has {found} keys, the tokens so far are {expected}: the KV cache is padded or holds {cells} more; "
        f"cut the last axis to the cells of positions 0 to {expected - 1} (array[:, :, :{expected}]){other}"
    )
