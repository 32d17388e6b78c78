"""Tap maps: names of an engine become taps, arrays of an engine their values, and a map that is wrong says so."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.errors import BadInputError
from crossval.traces import tap_map
from crossval.traces.tap_map import PLAIN, Entry, TapMap, WrongShape, counted, parse, resolve
from tests.support.numpy_engine import MODEL

HEADS, WIDTH, DIM = MODEL.n_heads, MODEL.head_dim, MODEL.dim


def made(*entries: Any, **more: Any) -> TapMap:
    value = {"format": "crossval-tap-map", "format_version": 1, "taps": list(entries), **more}
    return parse(json.dumps(value).encode(), "a map", "mine")


def entry(**item: Any) -> Entry:
    return made({"tap": "blk.{i}.q", "from": "x.{i}", **item}).entries[0]


def refused(match: str, *entries: Any, **more: Any) -> None:
    with pytest.raises(BadInputError, match=match) as caught:
        made(*entries, **more)
    assert str(caught.value).startswith("a map: ")


def test_a_layers_number_is_carried_from_the_engines_name_to_the_taps() -> None:
    found = resolve(["model.7.norm", "model.12.norm", "head"], made(
        {"tap": "blk.{i}.attn_norm", "from": "model.{i}.norm"}, {"tap": "result_output", "from": "head"}
    ), None)  # fmt: skip
    assert {tap: name for tap, (name, _) in found.found.items()} == {
        "blk.7.attn_norm": "model.7.norm", "blk.12.attn_norm": "model.12.norm", "result_output": "head",
    }  # fmt: skip
    assert (found.ignored, found.unknown) == ((), ())


@pytest.mark.parametrize(
    "name", ["model.07.norm", "model.x.norm", "model.7.norms", "a.model.7.norm", "model.7.norm\n"]
)
def test_a_name_matches_as_a_whole_or_not_at_all(name: str) -> None:
    one = made({"tap": "blk.{i}.attn_norm", "from": "model.{i}.norm"})
    assert resolve([name], one, None).unknown == (name,)


def test_a_dot_in_a_pattern_is_a_dot_and_a_star_any_text() -> None:
    one = made({"tap": "blk.{i}.q", "from": "*layers.{i}.q"})
    assert set(resolve(["base.layers.3.q", "layers.4.q", "layersX5.q"], one, None).found) == {"blk.3.q", "blk.4.q"}


def test_a_number_that_stands_twice_is_the_same_number() -> None:
    one = made({"tap": "blk.{i}.q", "from": "l{i}.q{i}"})
    assert resolve(["l1.q1", "l1.q2"], one, None).unknown == ("l1.q2",)


@pytest.mark.parametrize("names", [("gate-0", "gate_b-0"), ("gate_b-0", "gate-0")])
def test_of_several_names_of_one_tap_the_last_listed_is_taken(names: tuple[str, str]) -> None:
    one = made({"tap": "blk.{i}.ffn_gate", "from": ["gate-{i}", "gate_b-{i}"]})
    found = resolve(names, one, None)
    assert found.found["blk.0.ffn_gate"][0] == "gate_b-0"
    assert found.ignored == ("gate-0",)
    assert resolve(["gate-0"], one, None).found["blk.0.ffn_gate"][0] == "gate-0"


def test_two_names_of_one_rank_for_one_tap_are_refused() -> None:
    one = made({"tap": "blk.{i}.q", "from": "*.{i}.q"})
    with pytest.raises(ValueError, match=r"a\.0\.q and b\.0\.q both give blk\.0\.q"):
        resolve(["a.0.q", "b.0.q"], one, None)
    with pytest.raises(ValueError, match="both give"):
        resolve(["a.0.q", "blk.0.q"], one, None)


def test_one_tensor_may_hold_several_taps() -> None:
    parts = {"of": ["hidden_dim", "hidden_dim"]}
    one = made(
        {"tap": "blk.{i}.ffn_gate", "from": "gate_up.{i}", "do": [{"take": {"part": 0, **parts}}]},
        {"tap": "blk.{i}.ffn_up", "from": "gate_up.{i}", "do": [{"take": {"part": 1, **parts}}]},
    )
    found = resolve(["gate_up.1"], one, None).found
    array = np.arange(3 * 2 * MODEL.hidden_dim, dtype=np.float32).reshape(3, -1)
    shape = (3, MODEL.hidden_dim)
    gate, up = (found[f"blk.1.{tap}"][1].apply(array, shape, MODEL) for tap in ("ffn_gate", "ffn_up"))
    np.testing.assert_array_equal(np.concatenate([gate, up], axis=1), array)


def test_parts_of_different_widths_are_cut_at_their_places() -> None:
    of = ["q_dim", "kv_dim", "kv_dim"]
    n_kv = MODEL.n_kv_heads * WIDTH
    array = np.arange(2 * (HEADS * WIDTH + 2 * n_kv), dtype=np.float32).reshape(2, -1)
    one = entry(do=[{"take": {"part": 1, "of": of}}, "split_heads"])
    found = one.apply(array, (2, MODEL.n_kv_heads, WIDTH), MODEL)
    start = HEADS * WIDTH
    np.testing.assert_array_equal(found.reshape(2, -1), array[:, start : start + n_kv])
    with pytest.raises(ValueError, match=f"holds {start} values, its parts {start + 2 * n_kv}"):
        one.apply(array[:, :start], (2, MODEL.n_kv_heads, WIDTH), MODEL)


def test_entries_for_an_architecture_hold_for_it_only() -> None:
    one = made(
        {"tap": "blk.{i}.q", "from": "q.{i}", "do": ["split_heads"], "architectures": ["bitnet"]},
        {"tap": "blk.{i}.q", "from": "q.{i}", "do": ["split_heads", "rope_halves_to_adjacent"],
         "architectures": ["llama"]},
    )  # fmt: skip
    steps = {name: len(resolve(["q.0"], one, name).found["blk.0.q"][1].steps) for name in ("bitnet", "llama")}
    assert steps == {"bitnet": 1, "llama": 2}
    assert resolve(["q.0"], one, None).unknown == ("q.0",)


def test_taps_under_their_own_names_need_no_entry() -> None:
    one = made({"tap": "result_output", "from": "head"}, ignore=["debug.*"])
    found = resolve(["blk.0.q", "head", "debug.x", "other"], one, None)
    assert found.found["blk.0.q"] == ("blk.0.q", PLAIN)
    assert (found.ignored, found.unknown) == (("debug.x",), ("other",))


def test_a_map_goes_before_a_taps_own_name() -> None:
    """Llama in llama.cpp calls the down projection ``ffn_out``."""
    one = made({"tap": "blk.{i}.ffn_down", "from": "blk.{i}.ffn_out"})
    assert set(resolve(["blk.0.ffn_out"], one, None).found) == {"blk.0.ffn_down"}


# --- arrays ---------------------------------------------------------------------------------------------------


def test_leading_axes_of_one_are_removed() -> None:
    array = np.arange(4 * DIM, dtype=np.float32).reshape(4, DIM)
    for stored in (array, array[None], array[None, None]):
        np.testing.assert_array_equal(PLAIN.apply(stored, (4, DIM), MODEL), array)
    np.testing.assert_array_equal(
        entry(do=["split_heads"]).apply(array[None, :, : HEADS * WIDTH], (4, HEADS, WIDTH), MODEL).reshape(4, -1),
        array[:, : HEADS * WIDTH],
    )


def test_an_axis_of_one_that_belongs_to_the_tap_stays() -> None:
    one = np.ones((1, DIM), np.float32)
    assert PLAIN.apply(one, (1, DIM), MODEL).shape == (1, DIM)
    assert PLAIN.apply(one[None], (1, DIM), MODEL).shape == (1, DIM)


def test_a_batch_of_two_is_not_removed() -> None:
    with pytest.raises(WrongShape):
        PLAIN.apply(np.ones((2, 4, DIM), np.float32), (4, DIM), MODEL)


def test_heads_first_becomes_tokens_first() -> None:
    array = np.arange(HEADS * 3 * WIDTH, dtype=np.float32).reshape(1, HEADS, 3, WIDTH)
    found = entry(do=[{"transpose": [1, 0, 2]}]).apply(array, (3, HEADS, WIDTH), MODEL)
    np.testing.assert_array_equal(found, array[0].swapaxes(0, 1))


def test_merging_heads_undoes_splitting_them() -> None:
    array = np.arange(3 * HEADS * WIDTH, dtype=np.float32).reshape(3, HEADS, WIDTH)
    found = entry(do=["merge_heads"]).apply(array, (3, HEADS * WIDTH), MODEL)
    np.testing.assert_array_equal(found, array.reshape(3, -1))
    np.testing.assert_array_equal(entry(do=["split_heads"]).apply(found, array.shape, MODEL), array)


def test_rope_orders_are_each_others_inverse_and_pair_the_right_values() -> None:
    sizes, half = replace(MODEL, head_dim=6), 3  # two halves of three are no three pairs
    head = np.arange(6, dtype=np.float32).reshape(1, 1, 6)
    adjacent = entry(do=["rope_halves_to_adjacent"]).apply(head, (1, 1, 6), sizes)
    np.testing.assert_array_equal(adjacent[0, 0, ::2], head[0, 0, :half])  # the pair (j, j + half) becomes
    np.testing.assert_array_equal(adjacent[0, 0, 1::2], head[0, 0, half:])  # (2j, 2j + 1)
    back = entry(do=["rope_adjacent_to_halves"]).apply(adjacent, (1, 1, 6), sizes)
    np.testing.assert_array_equal(back, head)


def test_checking_a_shape_takes_no_memory() -> None:
    with pytest.raises(WrongShape):
        entry(do=["merge_heads", "split_heads"]).check((1 << 20, 1 << 20, 1 << 10), (3, HEADS, WIDTH), MODEL)
    with pytest.raises(ValueError, match=r"large|size"):
        PLAIN.check((1 << 24,) * 6, (3, DIM), MODEL)


@pytest.mark.parametrize(
    ("steps", "stored", "match"),
    [
        (["split_heads"], (3, WIDTH + 1), "not a multiple of head_dim"),
        (["rope_halves_to_adjacent"], (3, HEADS, WIDTH + 2), "not one head"),
        ([{"transpose": [0, 1]}], (3, HEADS, WIDTH), "does not list the 3 axes"),
        (["merge_heads"], (WIDTH,), "needs two axes"),
    ],
)
def test_a_step_that_does_not_fit_says_why(steps: list[Any], stored: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        entry(do=steps).check(stored, (3, HEADS, WIDTH), MODEL)


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "match"),
    [
        ({"tap": "blk.{i}.nonsense", "from": "x.{i}"}, "there is no tap"),
        ({"tap": "blk.0.q", "from": "x"}, "there is no tap"),
        ({"tap": "blk.{i}.q", "from": "x"}, "stands in one of them only"),
        ({"tap": "result_norm", "from": "x.{i}"}, "stands in one of them only"),
        ({"tap": "blk.{i}.q", "from": "x.{i}", "do": ["flatten"]}, "violates tap-map"),
        ({"tap": "blk.{i}.q", "from": "*a*b*{i}"}, "violates tap-map"),
        ({"tap": "blk.{i}.q", "from": "x.{i}", "do": [{"take": {"part": 2, "of": ["dim", "dim"]}}]}, "no part 2"),
        ({"tap": "blk.{i}.q"}, "violates tap-map"),
    ],
)
def test_a_wrong_entry_is_refused(item: Any, match: str) -> None:
    refused(match, item)


def test_what_is_no_map_is_refused(tmp_path: Path) -> None:
    refused("violates", {"tap": "blk.{i}.q", "from": "x.{i}"}, format_version=2)
    refused("violates", {"tap": "blk.{i}.q", "from": "x.{i}"}, extra=1)
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(BadInputError, match="not valid JSON"):
        tap_map.read(tmp_path / "m.json")
    with pytest.raises(BadInputError, match="cannot read tap map"):
        tap_map.read(tmp_path / "none.json")


def test_names_are_counted_by_layer() -> None:
    assert counted(["m.0.x", "m.1.x", "y", "q8_0", "Qcur-0"]) == [
        "m.{i}.x (2)",
        "y (1)",
        "q8_0 (1)",
        "Qcur-{i} (1)",
    ]


def test_the_map_of_the_documentation_is_one_and_its_steps_are_all_there_are() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tap-maps.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- tap map -->\n```json\n(.*?)```", page, re.DOTALL)
    assert found is not None
    assert len(parse(found[1].encode(), "docs", "docs").entries) == 7
    assert all(f"`{word}`" in page for word in tap_map.WORDS)
