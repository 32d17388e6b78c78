"""The specification as a runner: taps, rows, passes, cache, rejected input."""

import json
from dataclasses import replace

import numpy as np
import pytest

from crossval.engines.registry import find_word, open_candidate
from crossval.engines.spec import SpecRunner
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.passes import Numerics, PassPlan
from tests.support import vocabularies
from tests.support.tiny_gguf import F16, tiny_model, write_gguf

N_LAYERS = 2
EVERYTHING = taps.all_taps(N_LAYERS)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    metadata, tensors, _ = tiny_model(n_layers=N_LAYERS)
    return write_gguf(tmp_path_factory.mktemp("spec") / "m.gguf", metadata, tensors)


@pytest.fixture
def runner(model_path):
    with SpecRunner(model_path) as runner:
        yield runner


def test_every_tap_has_the_shape_and_dtype_of_the_vocabulary(runner):
    runner.eval([1, 2, 3], [])
    record = runner.eval([4, 5], EVERYTHING)
    n, n_kv, dim = 2, 5, 128
    expected = {"q": (n, 2, 64), "q_rope": (n, 2, 64), "kq": (2, n, n_kv), "kq_soft_max": (2, n, n_kv)}
    expected |= dict.fromkeys(("k", "k_rope", "v"), (n, 1, 64))
    expected |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_act", "ffn_out", "ffn_sub_norm"), (n, 256))
    expected |= {"result_norm": (1, dim), "result_output": (1, 40)}
    assert list(record.taps) == EVERYTHING
    for name, tap in record.taps.items():
        assert tap.array.shape == expected.get(taps.parse(name).tap, (n, dim)), name
        assert tap.array.dtype == np.float32
        assert tap.array.flags.c_contiguous
        assert tap.rows == ((1,) if name in taps.HEAD_TAPS else None)


def test_only_what_is_selected_is_returned(runner):
    record = runner.eval([1, 2], {"blk.1.l_out", "result_output", "blk.7.l_out"})
    assert set(record.taps) == {"blk.1.l_out", "result_output"}
    assert record.elapsed_s > 0


def test_plans_say_prefill_or_decode(runner):
    assert runner.eval([1], []).plan == PassPlan("prefill", (1,), 0)
    assert runner.eval([2], []).plan == PassPlan("decode", (2,), 1)
    assert runner.eval([3, 4], []).plan == PassPlan("prefill", (3, 4), 2)
    runner.reset()
    assert runner.eval(np.array([5, 6]), []).plan == PassPlan("prefill", (5, 6), 0)


def test_one_by_one_equals_the_batch(runner):
    tokens = [7, 3, 3, 39, 0]
    batch = runner.eval(tokens, EVERYTHING).taps
    runner.reset()
    steps = [runner.eval([token], EVERYTHING).taps for token in tokens]
    for name in EVERYTHING:
        if name in taps.HEAD_TAPS:
            joined = steps[-1][name].array
        elif taps.parse(name).tap in ("kq", "kq_soft_max"):
            joined, batch_rows = steps[-1][name].array, batch[name].array[:, -1:]
            np.testing.assert_allclose(joined, batch_rows, rtol=1e-6, atol=1e-6)
            continue
        else:
            joined = np.concatenate([step[name].array for step in steps])
        np.testing.assert_allclose(joined, batch[name].array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_reset_forgets(runner):
    first = runner.eval([1, 2, 3], ["result_output"]).taps["result_output"].array
    runner.eval([4], [])
    runner.reset()
    again = runner.eval([1, 2, 3], ["result_output"]).taps["result_output"].array
    assert np.array_equal(first, again)


def test_models_without_sub_norms_lack_those_taps(tmp_path):
    metadata, tensors, _ = tiny_model(n_layers=1, sub_norms=False)
    with SpecRunner(write_gguf(tmp_path / "m.gguf", metadata, tensors)) as runner:
        record = runner.eval([1], taps.all_taps(1))
        assert set(taps.all_taps(1)) - set(record.taps) == {"blk.0.attn_sub_norm", "blk.0.ffn_sub_norm"}


def test_a_separate_head_is_used(tmp_path):
    metadata, tensors, _ = tiny_model(n_layers=1, tied=False)
    with SpecRunner(write_gguf(tmp_path / "m.gguf", metadata, tensors)) as runner:
        record = runner.eval([1, 2], taps.HEAD_TAPS)
    kind, shape, data = tensors["output.weight"]
    assert kind == F16
    head = np.frombuffer(data, "<f2").reshape(shape).astype(np.float64)
    expected = record.taps["result_norm"].array @ head.T
    np.testing.assert_allclose(record.taps["result_output"].array, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([], "at least one token"),
        ([1, 40], "from 0 to 39, found 40"),
        ([-1], "found -1"),
        ([0] * 33, "at most 32"),
    ],
)
def test_unusable_tokens_are_refused_and_change_nothing(runner, tokens, match):
    runner.eval([1], [])
    with pytest.raises(BadInputError, match=match):
        runner.eval(tokens, [])
    assert runner.eval([2], []).plan.start == 1


def test_the_context_is_counted_over_passes(runner):
    runner.eval([0] * 31, [])
    runner.eval([0], [])
    with pytest.raises(BadInputError, match="found 33"):
        runner.eval([0], [])


def test_nan_in_the_embedding_is_refused_by_name(tmp_path):
    metadata, tensors, _ = tiny_model(n_layers=1)
    kind, shape, data = tensors["token_embd.weight"]
    table = np.frombuffer(data, "<f2").reshape(shape).copy()
    table[3, 5] = np.nan
    tensors["token_embd.weight"] = kind, shape, table.tobytes()
    with SpecRunner(write_gguf(tmp_path / "m.gguf", metadata, tensors)) as runner:
        with pytest.raises(BadInputError, match=r"inp_embd: .*token_embd\.weight"):
            runner.eval([1, 3], [])
        with pytest.raises(BadInputError, match=r"result_output: .*token_embd\.weight"):
            runner.eval([1], [])  # token 3 is not used, but its logit is


def test_identity_says_who_this_is(runner):
    identity = runner.identity
    assert identity.name == "specification"
    assert len(identity.source_digest) == 64
    assert "bitnet_py" in identity.settings["tokenizer"]
    assert replace(identity, settings={}).to_json()["numerics"] == {"simd_width": None, "fused_quantizer": None}
    json.dumps(identity.to_json())
    assert runner.status == "live"
    assert runner.plan is None


def test_tokenize_uses_the_models_own_vocabulary(runner):
    ids = runner.tokenize('"#A', add_bos=False)
    assert ids == [1, 2, 32]
    assert runner.tokenize('"#A') == [0, *ids]


def test_unusable_files_and_use_outside_the_context_are_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    for path in (tmp_path / "bad.gguf", tmp_path / "none.gguf"):
        with pytest.raises(BadInputError, match=path.name), SpecRunner(path):
            pass
        with pytest.raises(BadInputError, match=path.name):
            SpecRunner(path).tokenize("x")
    with pytest.raises(RuntimeError, match="context manager"):
        SpecRunner(tmp_path / "none.gguf").eval([1], [])


@pytest.mark.parametrize(
    ("stated", "rules"),
    [(None, "march"), ("march", "march"), ("main", "main"), ("mainline", "main")],
)
def test_text_is_read_by_the_rules_of_the_other_engine(tmp_path, stated, rules):
    path = vocabularies.write(tmp_path / "v.gguf", "falcon3")
    numerics = None if stated is None else Numerics(generation=stated)
    runner = open_candidate(find_word("candidate", "spec"), path, numerics=numerics)
    expected = {one: vocabularies.tokenizer_of("falcon3", one).encode("It's 1234") for one in ("march", "main")}
    assert expected["march"] != expected["main"]
    assert runner.tokenize("It's 1234") == expected[rules]
    assert runner.identity.settings["tokenizer_rules"] == rules
