"""Nodes of bitnet.cpp's graph become taps of the defined shape, whatever their strides."""

from __future__ import annotations

import ctypes
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossval.bitnet_cpp import main, march
from crossval.bitnet_cpp.abi import TABLES
from crossval.bitnet_cpp.capture import Capture, PassShape, node_index, read_tensor, tap_array
from crossval.bitnet_cpp.table import TYPE_F16, TYPE_F32, Table
from crossval.model import taps
from crossval.model.config import MAY_HAVE
from crossval.passes import Numerics

OPS = {1: b"MUL_MAT", 2: b"ROPE", 3: b"SQR", 4: b"ADD", 5: b"RESHAPE", 6: b"GLU", 7: b"GET_ROWS"}


def library(host: bool = True, table: Table = march.TABLE) -> SimpleNamespace:
    return SimpleNamespace(
        table=table,
        tensor=table.tensor.struct.from_address,
        ggml_backend_buffer_is_host=lambda _: host,
        ggml_op_name=lambda op: OPS[op],
    )


def capture_of(table: Table = march.TABLE, flash_attention: bool = False) -> Capture:
    return Capture(library(table=table), table.nodes("bitnet-b1.58", flash_attention))


def tensor(array: np.ndarray, name: str = "node", op: int = 1, table: Table = march.TABLE) -> Any:
    """Return a ggml tensor over an array ``(ne3, ne2, ne1, ne0)``; the array must stay alive."""
    result = table.tensor.struct(type=TYPE_F32, op=op, name=name.encode(), data=array.ctypes.data, buffer=1)
    result.ne[:] = array.shape[::-1]
    result.nb[:] = array.strides[::-1]
    return result


def test_the_index_holds_exactly_what_is_selected():
    known = march.TABLE.nodes("bitnet-b1.58", False)
    index = node_index(known, ["blk.3.q", "blk.3.q_rope", "result_norm"])
    assert set(index) == {b"Qcur-3", b"result_norm"}
    assert [name for name, _, _ in index[b"Qcur-3"]] == ["blk.3.q", "blk.3.q_rope"]
    assert node_index(known, []) == {}
    with pytest.raises(ValueError, match="unknown tap"):
        node_index(known, ["blk.0.nonsense"])


def test_taps_that_a_graph_does_not_have_are_waited_for_nowhere():
    known = main.TABLE.nodes("bitnet-b1.58", True)
    assert node_index(known, ["blk.0.ffn_act", "blk.0.kq", "blk.0.kq_soft_max"]) == {}


@pytest.mark.parametrize(
    ("table", "flash_attention"),
    [(table, on) for table in TABLES for on in (False, *([True] if table.flash_attention else []))],
    ids=lambda one: getattr(one, "generation", None),
)
def test_numerics_state_what_the_table_has_no_tensor_for(table, flash_attention):
    stated = Numerics(8, False, generation=table.generation, flash_attention=flash_attention)
    forms = (False,) if table.generation == "mainline" else (False, True)  # norms of inputs: it refuses them
    for arch, normed in itertools.product(table.graphs, forms):
        nodes = table.nodes(arch, flash_attention, normed)
        unnamed = {tap for tap, found in nodes.items() if not found}
        assert unnamed == stated.inside_others(arch, normed), (arch, normed)
        normed = normed and "input_norms" in MAY_HAVE.get(arch, ())
        of_library = {"result_output"}  # not from a node
        lacking = taps.SUB_NORMS if arch in ("bitnet", "bitnet-b1.58", "bitnet-25") else set()
        assert set(nodes) | of_library | lacking == set(taps.of_graph(arch, normed)), (arch, normed)


@given(
    shape=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    axes=st.permutations(range(4)),
    table=st.sampled_from([march.TABLE, main.TABLE]),
)
def test_a_tensor_of_any_strides_is_copied_as_numpy_sees_it(shape, axes, table):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).transpose(axes)
    copy = read_tensor(library(table=table), tensor(array, table=table))
    np.testing.assert_array_equal(copy, array)
    assert copy.flags.c_contiguous
    assert not np.shares_memory(copy, array)


def test_a_tensor_of_another_type_or_in_device_memory_is_refused():
    array = np.zeros((1, 1, 2, 2), np.float32)
    half = tensor(array)
    half.type = TYPE_F16
    with pytest.raises(ValueError, match="ggml type 1, expected float32"):
        read_tensor(library(), half)
    with pytest.raises(ValueError, match="not in host memory"):
        read_tensor(library(host=False), tensor(array))


def test_padding_of_the_cache_is_stripped_from_attention():
    scores = np.arange(2 * 3 * 32, dtype=np.float32).reshape(1, 2, 3, 32)
    taken = tap_array("kq", scores, PassShape(n_tokens=3, n_kv=7, head_dim=4))
    assert taken.array.shape == (2, 3, 7)
    assert taken.array.flags.c_contiguous
    assert taken.rows is None
    np.testing.assert_array_equal(taken.array, scores[0, :, :, :7])


def test_projections_and_rotated_heads_have_the_same_shape():
    shape = PassShape(n_tokens=3, n_kv=3, head_dim=4)
    flat = np.arange(3 * 8, dtype=np.float32)
    projected = tap_array("q", flat.reshape(1, 1, 3, 8), shape)
    rotated = tap_array("q_rope", flat.reshape(1, 3, 2, 4), shape)
    np.testing.assert_array_equal(projected.array, rotated.array)
    assert projected.array.shape == (3, 2, 4)


def test_the_last_layers_single_row_is_the_last_token():
    shape = PassShape(n_tokens=5, n_kv=5, head_dim=4)
    assert tap_array("l_out", np.zeros((1, 1, 1, 8), np.float32), shape).rows == (4,)
    assert tap_array("l_out", np.zeros((1, 1, 5, 8), np.float32), shape).rows is None


@pytest.mark.parametrize(
    ("tap", "shape"),
    [
        ("l_out", (2, 1, 5, 8)),
        ("l_out", (1, 2, 5, 8)),
        ("l_out", (1, 1, 3, 8)),
        ("kq", (1, 2, 4, 32)),
        ("kq", (1, 2, 5, 4)),
        ("q", (1, 1, 5, 6)),
        ("q_rope", (1, 4, 2, 4)),
    ],
)
def test_a_shape_the_graph_cannot_have_is_refused(tap, shape):
    with pytest.raises(ValueError, match=tap):
        tap_array(tap, np.zeros(shape, np.float32), PassShape(n_tokens=5, n_kv=5, head_dim=4))


def drive(capture: Capture, nodes: list[tuple[Any, np.ndarray]]) -> list[str]:
    """Call the callback as the scheduler does; return the names of the nodes it wanted."""
    callback, wanted = capture.callback(), []
    for node, _ in nodes:
        if callback(ctypes.addressof(node), True, None):
            wanted.append(node.name.decode())
            callback(ctypes.addressof(node), False, None)
    return wanted


def nodes(*specs: tuple[str, int, tuple[int, ...]], table: Table = march.TABLE) -> list[tuple[Any, np.ndarray]]:
    made = []
    for i, (name, op, shape) in enumerate(specs):
        array = np.full(shape, i, np.float32)
        made.append((tensor(array, name, op, table), array))
    return made


def test_only_wanted_nodes_are_stopped_at_and_the_operation_decides():
    capture = capture_of()
    capture.arm(["blk.0.q_rope", "blk.0.ffn_act"], PassShape(2, 2, 4))
    graph = nodes(
        ("Qcur-0", 1, (1, 1, 2, 8)),
        ("Qcur-0", 2, (1, 2, 2, 4)),
        ("ffn_relu-0", 3, (1, 1, 2, 16)),
        ("ffn_sqr(relu)-0", 3, (1, 1, 2, 16)),
        ("Qcur-1", 2, (1, 2, 2, 4)),
    )
    assert drive(capture, graph) == ["Qcur-0", "ffn_relu-0", "ffn_sqr(relu)-0"]
    assert {name: float(tap.array.flat[0]) for name, tap in capture.taken.items()} == {
        "blk.0.q_rope": 1.0,
        "blk.0.ffn_act": 3.0,
    }


def test_a_build_with_silu_gives_its_activation_as_the_same_tap():
    capture = capture_of()
    capture.arm(["blk.0.ffn_act"], PassShape(2, 2, 4))
    drive(capture, nodes(("ffn_silu-0", 3, (1, 1, 2, 16))))
    assert set(capture.taken) == {"blk.0.ffn_act"}


def test_the_newer_graph_has_other_names_and_a_view_of_the_same_name_is_not_the_projection():
    capture = capture_of(main.TABLE, flash_attention=True)
    taps = ["inp_embd", "blk.0.q", "blk.0.kqv_out", "blk.0.attn_o_out", "blk.0.ffn_act", "blk.0.ffn_out"]
    capture.arm(taps, PassShape(2, 2, 4))
    graph = nodes(
        ("inp_embd", 1, (1, 1, 2, 8)),
        ("embd", 7, (1, 1, 2, 8)),
        ("Qcur-0", 1, (1, 1, 2, 8)),
        ("Qcur-0", 5, (1, 2, 2, 4)),
        ("kqv_out-0", 5, (1, 1, 2, 8)),
        ("attn_out-0", 1, (1, 1, 2, 8)),
        ("ffn_sub_out-0", 6, (1, 1, 2, 16)),
        table=main.TABLE,
    )
    drive(capture, graph)
    found = {name: float(tap.array.flat[0]) for name, tap in capture.taken.items()}
    assert found == {
        "inp_embd": 1.0,
        "blk.0.q": 2.0,
        "blk.0.kqv_out": 4.0,
        "blk.0.attn_o_out": 5.0,
        "blk.0.ffn_out": 6.0,
    }


def test_a_bias_makes_the_biased_projection_the_tap():
    capture = capture_of()
    capture.arm(["blk.0.v"], PassShape(2, 2, 4))
    drive(capture, nodes(("Vcur-0", 1, (1, 1, 2, 8)), ("Vcur-0", 4, (1, 1, 2, 8))))
    assert capture.taken["blk.0.v"].array.flat[0] == 1.0


def test_an_error_in_the_callback_is_kept_and_stops_the_graph():
    capture = capture_of()
    capture.arm(["blk.0.l_out"], PassShape(5, 5, 4))
    ((node, _array),) = nodes(("l_out-0", 4, (1, 1, 3, 8)))
    callback = capture.callback()
    assert callback(ctypes.addressof(node), True, None)
    assert not callback(ctypes.addressof(node), False, None)
    assert "3 rows for 5 tokens" in str(capture.error)
    assert capture.taken == {}
