"""Shipped tap maps: made of the tables that live libraries are captured by, or files of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossval.bitnet_cpp import abi
from crossval.bitnet_cpp.capture import node_index
from crossval.engines import tap_maps
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.graphs import GRAPHS
from crossval.terms import LOGITS
from crossval.traces.tap_map import resolve

TABLES = {"bitnet.cpp-march": "march", "bitnet.cpp-main": "main", "llama.cpp": "mainline"}


def test_every_generation_has_a_map_and_the_package_its_files() -> None:
    assert set(tap_maps.shipped()) == {*TABLES, "bitnet-gpu", "huggingface"}
    assert {table.generation for table in abi.TABLES} == set(TABLES.values())
    for name in tap_maps.shipped():
        assert tap_maps.load(name).name == name


@pytest.mark.parametrize("name", TABLES)
def test_a_map_finds_every_tap_that_capture_finds(name: str) -> None:
    """Names as capture sees them, node and operation, resolve to the taps that capture takes from them."""
    (table,) = (one for one in abi.TABLES if one.generation == TABLES[name])
    made = tap_maps.load(name)
    for architecture, nodes in table.graphs.items():
        every = [*taps.layer_taps(2), "inp_embd", "result_norm"]
        expected: dict[str, set[str]] = {}
        for node, given in node_index(nodes, every).items():
            for full, _, operations in given:
                for operation in sorted(operations or [""]):
                    label = node.decode() + (f":{operation}" if operation else "")
                    expected.setdefault(label, set()).add(full)
        assert expected
        for label, full_names in expected.items():
            assert {tap for tap, _, _ in made.targets(label, architecture)} == full_names, (architecture, label)
        assert {tap for tap, _, _ in made.targets(LOGITS, architecture)} == {LOGITS}


def test_a_name_that_two_taps_share_means_nothing_without_its_operation() -> None:
    made = tap_maps.load("bitnet.cpp-march")
    found = resolve(["Qcur-0", "kqv_out-0"], made, "bitnet-b1.58")
    assert (set(found.found), found.unknown) == ({"blk.0.kqv_out"}, ("Qcur-0",))
    assert set(resolve(["Qcur-0:MUL_MAT", "Qcur-0:ROPE"], made, "bitnet").found) == {"blk.0.q", "blk.0.q_rope"}


def test_the_node_computed_last_is_the_tap() -> None:
    made = tap_maps.load("bitnet.cpp-march")
    found = resolve(["ffn_sqr(relu)-1", "ffn_relu-1"], made, "bitnet-b1.58").found
    assert found["blk.1.ffn_act"][0] == "ffn_sqr(relu)-1"


def test_the_same_name_is_another_tap_in_another_architecture() -> None:
    made = tap_maps.load("bitnet.cpp-march")
    assert set(resolve(["ffn_out-0"], made, "bitnet-b1.58").found) == {"blk.0.ffn_out"}
    assert set(resolve(["ffn_out-0"], made, "llama").found) == {"blk.0.ffn_down"}


@pytest.mark.parametrize("architecture", sorted(GRAPHS))
def test_hugging_face_names_give_each_tap_once(architecture: str) -> None:
    made = tap_maps.load("huggingface")
    names = [
        source.replace("{i}", "1")
        for entry in made.entries
        if entry.architectures is None or architecture in entry.architectures
        for source in entry.sources
    ]
    found = resolve(names, made, architecture)
    assert not found.unknown
    assert {"blk.1.q", "blk.1.kqv_out", "blk.1.l_out", "inp_embd", "result_norm", "result_output"} <= set(
        found.found
    )


def test_a_word_that_is_no_map_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"nor one of bitnet-gpu, bitnet\.cpp-main, .*huggingface"):
        tap_maps.load("nonsense")
    copy = tmp_path / "mine.json"
    copy.write_bytes((tap_maps.MAPS / "huggingface.json").read_bytes())
    made = tap_maps.load(copy)
    assert (made.name, len(made.digest or "")) == ("mine.json", 64)
