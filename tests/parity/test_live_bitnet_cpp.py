"""The runner against real bitnet.cpp, both generations of it: every tap, no observer effect, limits, crashes that
stay in the child."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from crossval.bitnet_cpp import limits as cpp_limits
from crossval.bitnet_cpp import manifest as cpp_manifest
from crossval.bitnet_cpp.runner import OUTPUT_WEIGHT_NOTE, BitnetCppRunner, open_library
from crossval.child.command import child_command
from crossval.child.process import ChildProcess
from crossval.engines.record import trace_model
from crossval.errors import BadInputError, EngineCrashError, UnavailableError
from crossval.model import taps
from crossval.traces.read import expected_shape

pytestmark = pytest.mark.live

ODD = {"n_layers": 3, "dim": 640, "n_heads": 5, "n_kv_heads": 1, "hidden_dim": 896, "vocab_size": 300}
LOGITS = ["result_output"]


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


def logits(runner: BitnetCppRunner, token_ids: list[int], select=LOGITS) -> np.ndarray:
    return runner.eval(token_ids, select).taps["result_output"].array


@pytest.fixture(scope="module")
def odd_model(make_model) -> Path:
    return make_model(**ODD)


@pytest.fixture(scope="module", params=["march", "main"])
def library(request) -> Path:
    """A libllama of each generation."""
    path: Path = request.getfixturevalue(f"{request.param}_library")
    return path


@pytest.fixture(scope="module")
def shared(odd_model, library) -> Iterator[BitnetCppRunner]:
    with BitnetCppRunner(odd_model, library=library) as runner:
        yield runner


@pytest.fixture(scope="module")
def flash(odd_model, main_library) -> Iterator[BitnetCppRunner]:
    """Main as it runs by itself: with flash attention."""
    with BitnetCppRunner(odd_model, library=main_library, flash_attention=True) as runner:
        yield runner


@pytest.fixture
def runner(shared: BitnetCppRunner) -> BitnetCppRunner:
    shared.reset()
    return shared


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 33])
def test_every_tap_comes_with_its_shape_in_prefill_and_decode(runner, odd_model, n_tokens):
    model = trace_model(odd_model)
    names = taps.of_model(ODD["n_layers"], model.architecture)
    for start, step in ((0, n_tokens), (n_tokens, 1)):
        record = runner.eval(ids(step, start), names)
        assert list(record.plan.positions) == list(range(start, start + step))
        assert record.plan.kind == ("decode" if start else "prefill")
        absent = runner.identity.numerics.inside_others(model.architecture)
        assert set(record.taps) == {name for name in names if taps.parse(name).tap not in absent}
        for name, tap in record.taps.items():
            at_the_end = names.index(name) >= names.index("blk.2.ffn_inp")
            only_the_last_row = name == "result_output" or (at_the_end and step > 1)
            assert tap.rows == ((step - 1,) if only_the_last_row else None), name
            assert tap.array.shape == expected_shape(name, model, record.plan, tap.rows), name
            assert tap.array.dtype == np.float32
            assert tap.array.flags.c_contiguous
            assert np.isfinite(tap.array).all(), name


@pytest.mark.parametrize("n_tokens", [1, 5, 45])
def test_capture_does_not_change_the_logits(runner, n_tokens):
    prompt = ids(n_tokens)
    plain = [logits(runner, prompt), logits(runner, [7]), logits(runner, [8])]
    runner.reset()
    everything = taps.of_model(3)
    traced = [logits(runner, step, everything) for step in (prompt, [7], [8])]
    for a, b in zip(plain, traced, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sequence_may_change_between_plain_and_traced_passes(runner):
    steps = [ids(6), [1], [2], ids(3, 1), [4]]
    plain = [logits(runner, step) for step in steps]
    runner.reset()
    mixed = [logits(runner, step, LOGITS if i % 2 else ["blk.0.q", *LOGITS]) for i, step in enumerate(steps)]
    for a, b in zip(plain, mixed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_pass_gives_exactly_what_was_selected_and_its_time(runner):
    record = runner.eval(ids(4), ["blk.2.kq", "inp_embd"])
    assert set(record.taps) == {"blk.2.kq", "inp_embd"}
    assert record.elapsed_s is not None
    assert 0 < record.elapsed_s < 60
    assert runner.eval([1], []).taps == {}


def test_reset_starts_over(runner):
    first = logits(runner, ids(5))
    runner.eval([1], [])
    runner.reset()
    np.testing.assert_array_equal(logits(runner, ids(5)), first)


def test_decoding_in_one_request_gives_what_single_passes_give(five_layers, library):
    prompt, following = list(range(40, 60)), [7, 8, 9]
    with BitnetCppRunner(five_layers, library=library, n_ctx=64) as runner:
        assert runner.pid > 0
        runner.eval(prompt, LOGITS)
        single = [runner.eval([token], LOGITS) for token in following]
        runner.reset()
        runner.eval(prompt, LOGITS)
        together = runner.eval_each(following)
        assert [record.plan for record in together] == [record.plan for record in single]
        for one, other in zip(single, together, strict=True):
            assert one.taps["result_output"].array.tobytes() == other.taps["result_output"].array.tobytes()
            assert other.elapsed_s > 0
        with pytest.raises(BadInputError, match="do not fit"):
            runner.eval_each([1] * runner.model.n_ctx)
        with pytest.raises(BadInputError, match="outside the vocabulary"):
            runner.eval_each([1, 10**6])
        assert runner.eval([1], LOGITS).plan.start == 23  # nothing of these was run


def test_tokens_come_from_llama_tokenize(runner):
    bare = runner.tokenize("hello there", add_bos=False)
    assert len(bare) > 1
    assert runner.tokenize("hello there") == [runner.tokenize("")[0], *bare]
    assert len(runner.tokenize("x" * 5000, add_bos=False)) > 10
    assert runner.tokenize("", add_bos=False) == []
    with pytest.raises(BadInputError, match="not valid Unicode"):
        runner.tokenize("\ud800")


@pytest.mark.parametrize(
    ("tokens", "select", "complaint"),
    [
        ([], LOGITS, "at least one token"),
        ([300], LOGITS, "token id 300 is outside the vocabulary of 300"),
        ([-1], LOGITS, "token id -1"),
        ([1] * 513, LOGITS, "longer than bitnet.cpp's ubatch of 512.*raise n_ubatch"),
        ([1], ["blk.3.q"], "the model has 3 layers"),
        ([1], ["nonsense"], "unknown tap"),
    ],
)
def test_bad_input_is_refused_before_it_reaches_the_engine(runner, tokens, select, complaint):
    with pytest.raises(BadInputError, match=complaint):
        runner.eval(tokens, select)
    assert logits(runner, [1]).shape == (1, 300)


def test_a_sequence_longer_than_the_context_is_refused(odd_model, library):
    with BitnetCppRunner(odd_model, library=library, n_ctx=64) as runner:
        n_ctx = runner.model.n_ctx  # main rounds it up
        assert n_ctx in (64, 256)
        for chunk in [64] * (n_ctx // 64 - 1) + [60]:
            runner.eval(ids(chunk), [])
        with pytest.raises(BadInputError, match=rf"{n_ctx - 4} \+ 5 tokens do not fit.*context of {n_ctx}"):
            runner.eval(ids(5), [])
        runner.eval(ids(4), [])
    with (
        pytest.raises(BadInputError, match="longer than the model's context"),
        BitnetCppRunner(odd_model, library=library, n_ctx=1 << 20),
    ):
        pass


def test_identity_names_the_files_really_loaded(runner, library):
    identity = runner.identity
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert identity.settings[f"sha256 {library.resolve().name}"] == digest
    assert identity.name == "bitnet.cpp"
    assert identity.numerics.simd_width in (8, 16)
    # No build of March 2026 sums in binary16, so it states nothing about it.
    assert (identity.numerics.binary16_sums is None) == (identity.numerics.generation == "march")
    assert identity.numerics.fused_quantizer in (True, False)
    manifest = cpp_manifest.read_manifest(library.resolve().parent)
    if manifest is not None:
        assert identity.source_digest == manifest.source_digest
        assert identity.compiler == manifest.compiler
    assert all(
        value is None or isinstance(value, str | int | float | bool) for value in identity.settings.values()
    )


def test_a_separate_head_that_march_ignores_is_noted(odd_model, make_model, march_library):
    with BitnetCppRunner(odd_model, library=march_library) as tied:
        assert "output.weight" not in tied.identity.settings
    with BitnetCppRunner(make_model(untied_head=True), library=march_library) as untied:
        assert untied.identity.settings["output.weight"] == OUTPUT_WEIGHT_NOTE


# Generations


def test_each_generation_states_whose_arithmetic_it_is(odd_model, march_library, main_library):
    stated = {}
    for path in (march_library, main_library):
        with BitnetCppRunner(odd_model, library=path) as runner:
            stated[runner.identity.numerics.generation] = runner.identity
            assert runner.identity.numerics.fused_quantizer in (True, False)
    assert stated["march"].numerics.flash_attention is None
    assert stated["main"].numerics.flash_attention is False
    assert stated["main"].numerics.fused_quantizer is False
    assert "ubatch_limit" in stated["march"].settings
    assert "ubatch_limit" not in stated["main"].settings


@pytest.mark.parametrize("n_tokens", [1, 5, 70])
def test_with_flash_attention_scores_are_no_tensors_and_capture_changes_nothing(flash, n_tokens):
    """Three ways to compute: a single token, a few, and 64 or more."""
    steps, names = (ids(n_tokens), [7], [8]), taps.of_model(3)
    flash.reset()
    plain = [logits(flash, step) for step in steps]
    flash.reset()
    absent = {f"blk.{layer}.{tap}" for layer in range(3) for tap in ("kq", "kq_soft_max", "ffn_act")}
    for step, expected in zip(steps, plain, strict=True):
        record = flash.eval(step, names)
        assert set(names) - set(record.taps) == absent
        assert record.taps["blk.0.kqv_out"].array.shape == (len(step), 640)
        np.testing.assert_array_equal(record.taps["result_output"].array, expected)


def test_flash_attention_is_another_arithmetic_and_stated(shared, flash, main_library):
    numerics = flash.identity.numerics
    assert (numerics.generation, numerics.flash_attention, numerics.attention_threads) == ("main", True, 2)
    with BitnetCppRunner(flash._model_path, library=main_library) as without:
        assert without.identity.numerics.attention_threads is None
        flash.reset()
        assert not np.array_equal(logits(flash, ids(13)), logits(without, ids(13)))


def test_flash_attention_of_march_is_refused(odd_model, march_library):
    with (
        pytest.raises(UnavailableError, match=r"flash attention of bitnet.* is not supported"),
        BitnetCppRunner(odd_model, library=march_library, flash_attention=True),
    ):
        pass


def test_a_copy_of_a_split_build_uses_the_libraries_beside_it(odd_model, main_library, tmp_path):
    for path in main_library.resolve().parent.glob("lib*.so*"):
        if not path.is_symlink():
            # Under the names that it is linked against.
            shutil.copy(path, tmp_path / re.sub(r"(\.so\.\d+)\..*", r"\1", path.name))
    facts = open_library(tmp_path / "libllama.so.0")
    assert {Path(path).parent for path in facts["files"]} == {tmp_path}
    assert len(facts["files"]) == 4


def test_what_main_cannot_load_is_said_by_main_itself_or_known_before(make_model, main_library):
    for shape, error, complaint in (
        ({"untied_head": True}, EngineCrashError, r"(?s)could not load.*wrong number of tensors"),
        ({"arch": "bitnet-25"}, BadInputError, "architecture 'bitnet-25'; of bitnet.cpp main .* the graphs of"),
    ):
        with (
            pytest.raises(error, match=complaint),
            BitnetCppRunner(make_model(**shape), library=main_library),
        ):
            pass


# Crashes


def with_norm_of_type(path: Path, target: Path, ggml_type: int) -> Path:
    """Copy a model, changing the type of one norm in the tensor table: bitnet.cpp loads it and aborts."""
    data = bytearray(path.read_bytes())
    name = b"blk.1.ffn_norm.weight"
    at = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    assert int.from_bytes(data[at : at + 4], "little") == 1
    data[at + 12 : at + 16] = ggml_type.to_bytes(4, "little")
    target.write_bytes(data)
    return target


def test_an_abort_is_reported_with_its_log_and_the_harness_lives_on(odd_model, tmp_path, march_library):
    corrupt = with_norm_of_type(odd_model, tmp_path / "corrupt.gguf", 1)
    with BitnetCppRunner(corrupt, library=march_library) as runner:
        with pytest.raises(
            EngineCrashError, match=r"(?s)SIGABRT \(signal 6\) during a pass of 3 tokens.*GGML_ASSERT"
        ):
            runner.eval([1, 2, 3], LOGITS)
        with pytest.raises(EngineCrashError, match=r"not running.*SIGABRT"):
            runner.eval([1], LOGITS)
    with BitnetCppRunner(odd_model, library=march_library) as runner:
        assert logits(runner, [1, 2, 3]).shape == (1, 300)


def test_a_truncated_model_is_refused_with_the_engines_own_words(odd_model, tmp_path, library):
    short = tmp_path / "short.gguf"
    shutil.copy(odd_model, short)
    os.truncate(short, short.stat().st_size - 5000)
    with (
        pytest.raises(EngineCrashError, match=r"(?s)could not load.*not within the file bounds"),
        BitnetCppRunner(short, library=library),
    ):
        pass


def test_a_killed_engine_is_reported(odd_model, library):
    with BitnetCppRunner(odd_model, library=library) as runner:
        runner.eval([1], [])
        assert runner._child is not None
        os.kill(runner._child.pid, signal.SIGKILL)
        with pytest.raises(EngineCrashError, match="SIGKILL"):
            runner.eval([1], [])


WIDE = {"n_layers": 2, "dim": 128, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 4608, "vocab_size": 300}
"""512 rows of 4608 results are 9 MiB on the stack of one thread (in the first layer: the last has one row)."""


def start_with_small_stack(claimed_bytes: int | None = None) -> ChildProcess:
    """Start the child with 8 MiB; ``claimed_bytes``: the stack that it believes it has, None: it looks."""
    script = f'ulimit -s 8192; exec "$@" {claimed_bytes or ""}'
    module = "crossval.bitnet_cpp.limits" if claimed_bytes is None else "crossval.bitnet_cpp.serve"
    return ChildProcess("bitnet.cpp", ["/bin/sh", "-c", script, "sh", *child_command(module)])


def load(child: ChildProcess, library: Path, model: Path) -> dict[str, object]:
    child.request("open", {"library": str(library)}, what="opening", timeout_s=60)
    params = {
        "model": str(model), "overrides": {}, "n_ctx": None, "n_ubatch": 512, "n_threads": 1,
        "flash_attention": False, "input_norms": False,
    }  # fmt: skip
    return child.request("load", params, what="loading", timeout_s=60).header


def decode_512(child: ChildProcess) -> None:
    tokens = {"token_ids": np.ones(512, np.int32)}
    child.request("eval", {"select": []}, tokens, what="512 tokens", timeout_s=120)


def test_a_long_batch_of_wide_rows_fits_our_stack(make_model, march_library):
    with BitnetCppRunner(make_model(**WIDE), library=march_library, n_threads=1) as runner:
        assert runner.model.n_ubatch == 512
        assert logits(runner, [1] * 512).shape == (1, 300)


def test_the_same_batch_overflows_the_usual_stack(make_model, march_library):
    """Why there are limits: a child that believes it has a large stack, but has 8 MiB."""
    with start_with_small_stack(cpp_limits.STACK_BYTES) as child:
        assert load(child, march_library, make_model(**WIDE))["n_ubatch"] == 512
        with pytest.raises(EngineCrashError, match="SIGSEGV"):
            decode_512(child)


def test_where_the_stack_cannot_grow_the_batch_is_limited_instead(make_model, march_library):
    with start_with_small_stack() as child:
        limit = load(child, march_library, make_model(**WIDE))["n_ubatch"]
    assert limit == cpp_limits.max_ubatch(8 << 20, [4608], 1) < 512


def test_a_damaged_library_is_unavailable(odd_model, library, tmp_path):
    broken = tmp_path / "libllama.so"
    broken.write_bytes(library.read_bytes()[:4096])
    with pytest.raises(UnavailableError, match="libllama"), BitnetCppRunner(odd_model, library=broken):
        pass
