"""Map nodes of the library's compute graph to taps, and copy them out.

``llama.cpp`` names its nodes ``name-layer``. Some names occur twice (``Qcur`` before and after RoPE), so the
operation decides as well; ``crossval.bitnet_cpp.table`` says which node holds which tap.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.bitnet_cpp import abi
from crossval.bitnet_cpp.abi import Library
from crossval.bitnet_cpp.table import TYPE_F32, Nodes
from crossval.model import taps


@dataclass(frozen=True)
class PassShape:
    """What the shape of a captured tensor is checked against. ``n_kv`` counts cells in use, without padding."""

    n_tokens: int
    n_kv: int
    head_dim: int


@dataclass(frozen=True)
class CapturedTap:
    """A tap copied out of the graph; ``rows`` as in ``TapArray``."""

    array: npt.NDArray[np.float32]
    rows: tuple[int, ...] | None


@dataclass
class Capture:
    """The state of one ``cb_eval`` callback: the taps wanted, those copied, and the error, if any."""

    library: Library
    nodes: Nodes
    wanted: dict[bytes, list[tuple[str, str, frozenset[str] | None]]] = field(default_factory=dict)
    shape: PassShape = PassShape(0, 0, 0)
    taken: dict[str, CapturedTap] = field(default_factory=dict)
    error: BaseException | None = None

    def arm(self, select: Collection[str], shape: PassShape) -> None:
        """Select what the next pass copies out."""
        self.wanted = node_index(self.nodes, select)
        self.shape = shape
        self.taken = {}
        self.error = None

    def callback(self) -> Any:
        """Return the C callback; the caller keeps it alive as long as a context uses it."""

        def on_node(address: int, ask: bool, _user_data: int | None) -> bool:
            # An exception cannot pass through C: keep it and stop the graph.
            try:
                return self._on_node(address, ask)
            except BaseException as error:
                self.error = self.error or error
                return False

        return abi.EVAL_CALLBACK(on_node)

    def _on_node(self, address: int, ask: bool) -> bool:
        tensor = self.library.tensor(address)
        candidates = self.wanted.get(tensor.name)
        if candidates is None:
            return False
        op = self.library.ggml_op_name(tensor.op).decode("ascii", "replace")
        for full_name, tap, ops in candidates:
            if ops is None or op in ops:
                if not ask:
                    self.taken[full_name] = tap_array(tap, read_tensor(self.library, tensor), self.shape)
                return True
        return False


def node_index(nodes: Nodes, select: Collection[str]) -> dict[bytes, list[tuple[str, str, frozenset[str] | None]]]:
    """Return node name -> [(full tap name, tap, operations)] for the selected taps that have a node.

    Raises:
        ValueError: a name is not in the vocabulary.
    """
    index: dict[bytes, list[tuple[str, str, frozenset[str] | None]]] = {}
    for full_name in select:
        parsed = taps.parse(full_name)
        for node, ops in nodes.get(parsed.tap, ()):
            name = node if parsed.layer is None else f"{node}-{parsed.layer}"
            index.setdefault(name.encode(), []).append((full_name, parsed.tap, ops))
    return index


def read_tensor(library: Library, tensor: Any) -> npt.NDArray[np.float32]:
    """Copy a float32 tensor of any strides into a C-contiguous array, slowest dimension first.

    Raises:
        ValueError: it is not float32, or not in host memory.
    """
    name = tensor.name.decode("utf-8", "replace")
    if tensor.type != TYPE_F32:
        raise ValueError(f"node {name} has ggml type {tensor.type}, expected float32")
    if not tensor.data or (tensor.buffer and not library.ggml_backend_buffer_is_host(tensor.buffer)):
        raise ValueError(f"node {name} is not in host memory")
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    if any(n < 1 for n in shape):
        raise ValueError(f"node {name} has the shape {shape}")
    span = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 4
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(tensor.data))
    view: npt.NDArray[np.float32] = np.ndarray(shape, np.float32, buffer=memory.data, strides=strides)
    copy: npt.NDArray[np.float32] = view.copy()
    return copy


def tap_array(tap: str, array: npt.NDArray[np.float32], shape: PassShape) -> CapturedTap:
    """Reshape a node's array ``(ne3, ne2, ne1, ne0)`` to the shape that ``crossval.model.taps`` defines.

    Raises:
        ValueError: the shape is not one this graph can produce.
    """
    if array.ndim != 4 or array.shape[0] != 1:
        raise ValueError(f"{tap}: unexpected shape {array.shape}")
    if taps.OPS[tap].token_axis:
        n_tokens, n_kv = array.shape[2:]
        if n_tokens != shape.n_tokens or n_kv < shape.n_kv:
            raise ValueError(f"{tap}: shape {array.shape[1:]} for {shape.n_tokens} tokens and {shape.n_kv} cells")
        return CapturedTap(np.ascontiguousarray(array[0, :, :, : shape.n_kv]), None)
    n_tokens, head_dim = shape.n_tokens, shape.head_dim
    if "head_dim" in taps.OPS[tap].axes:
        projected = array.shape[1:3] == (1, n_tokens) and array.shape[3] % head_dim == 0
        rotated = array.shape[1] == n_tokens and array.shape[3] == head_dim
        if not projected and not rotated:
            raise ValueError(f"{tap}: shape {array.shape} for {n_tokens} tokens and head_dim {head_dim}")
        return CapturedTap(array.reshape(n_tokens, -1, head_dim), None)
    if array.shape[1] != 1:
        raise ValueError(f"{tap}: unexpected shape {array.shape}")
    flat = array[0, 0]
    if len(flat) == n_tokens:
        return CapturedTap(flat, None)
    # The last layer keeps only the rows whose logits were asked for: the last token.
    if len(flat) == 1:
        return CapturedTap(flat, (n_tokens - 1,))
    raise ValueError(f"{tap}: {len(flat)} rows for {n_tokens} tokens")
