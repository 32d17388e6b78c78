"""The vocabulary of taps follows from the graphs, and the format of receipts has no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from crossval.model import taps

SCHEMA = Path(__file__).resolve().parents[3] / "schemas" / "receipt.v1.schema.json"


def test_bitnets_taps_in_execution_order():
    assert " ".join(taps.of_graph("bitnet-b1.58")) == (
        "inp_embd attn_norm q k v q_rope k_rope kq kq_soft_max kqv_out attn_sub_norm attn_o_out ffn_inp ffn_norm "
        "ffn_gate ffn_up ffn_act ffn_out ffn_sub_norm ffn_down l_out result_norm result_output"
    )
    assert taps.of_graph(None) == taps.of_graph("mamba") == taps.of_graph("bitnet-b1.58")


def test_all_taps_in_execution_order():
    assert taps.INPUT_TAPS == ("inp_embd", "inp_scaled")
    assert " ".join(taps.LAYER_TAPS) == (
        "attn_norm attn_q_norm_in attn_k_norm_in attn_v_norm_in q k v q_norm k_norm q_rope k_rope q_scaled kq "
        "kq_soft_max kqv_out attn_sub_norm attn_o_out attn_post_norm ffn_inp ffn_norm ffn_gate_norm_in "
        "ffn_up_norm_in ffn_gate ffn_up ffn_act ffn_out ffn_sub_norm ffn_down ffn_post_norm l_out"
    )
    assert taps.HEAD_TAPS == ("result_norm", "result_output", "pooled", "embedding")
    assert taps.STATES == {"k_cache": "k_rope", "v_cache": "v", "final_states": "result_norm"}
    assert taps.state_source("final_states") == "result_norm"
    assert taps.state_source("blk.3.k_cache") == "blk.3.k_rope"
    every = {*taps.INPUT_TAPS, *taps.LAYER_TAPS, *taps.HEAD_TAPS}
    assert every - taps.OPTIONAL_TAPS == set(taps.of_graph("llama"))
    order = [taps.execution_index(name, 2) for name in taps.all_taps(2)]
    assert order == list(range(len(order)))


def test_what_a_model_of_an_architecture_has():
    assert taps.of_graph("llama") == tuple(t for t in taps.of_graph("bitnet") if t not in taps.SUB_NORMS)
    plain, normed = taps.of_graph("qwen3"), taps.of_graph("qwen3", True, True)
    assert set(normed) - set(plain) == {
        "attn_q_norm_in", "attn_k_norm_in", "attn_v_norm_in", "attn_sub_norm", "ffn_gate_norm_in",
        "ffn_up_norm_in", "ffn_sub_norm", "pooled", "embedding",
    }  # fmt: skip
    gemma = set(taps.of_graph("gemma3", True, True))
    assert gemma - set(normed) == {"inp_scaled", "q_scaled", "attn_post_norm", "ffn_post_norm"}
    assert gemma == {*taps.INPUT_TAPS, *taps.LAYER_TAPS, *taps.HEAD_TAPS}


def test_the_receipts_schema_accepts_the_taps_of_all_graphs_and_no_others():
    pattern = json.loads(SCHEMA.read_text())["$defs"]["tap"]["pattern"]
    in_layer, outside = re.fullmatch(r"\^\(blk\\\.\(.*?\)\\\.\((.*?)\)\|(.*)\)\$", pattern).groups()
    assert in_layer.split("|") == list(taps.LAYER_TAPS)
    assert outside.split("|") == [*taps.INPUT_TAPS, *taps.HEAD_TAPS]
    assert all(re.match(pattern, name) for name in taps.all_taps(12))


def test_engines_may_give_few_rows_after_the_last_attention_only():
    gathered = [name for name in taps.all_taps(2) if taps.may_be_gathered(name, 2)]
    assert gathered == taps.all_taps(2)[taps.all_taps(2).index("blk.1.attn_post_norm") :]


@pytest.mark.parametrize(
    ("name", "axis", "axes"),
    [
        ("token_ids", 0, None),
        ("blk.3.q_rope", 0, ("token", "head", "feature")),
        ("blk.0.kq", 1, ("head", "token", "key")),
        ("result_output", 0, ("token", "feature")),
    ],
)
def test_axes(name, axis, axes):
    assert taps.token_axis(name) == axis
    assert axes is None or taps.axis_names(name) == axes


def test_only_scores_hold_what_nothing_reads():
    assert taps.visible("blk.0.kq", (2, 2, 3), [1, 2]).tolist() == [[True, True, False], [True, True, True]]
    assert [name for name in taps.all_taps(1) if taps.visible(name, (1, 1, 1), [0]) is not None] == ["blk.0.kq"]


def test_rows_are_taken_along_the_axis_of_tokens():
    scores = np.arange(12).reshape(2, 3, 2)
    assert np.array_equal(taps.take_rows("blk.0.kq", scores, (4, 5, 7), (5, 7)), scores[:, 1:])
    assert taps.take_rows("blk.0.kq", scores, (4, 5, 7), (4, 5, 7)) is scores
    with pytest.raises(KeyError):
        taps.take_rows("blk.0.kq", scores, (4, 5, 7), (6,))
