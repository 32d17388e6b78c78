"""The engine's arithmetic of main against its NumPy statement, bit for bit, and what each option means."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bitnet_py import Arithmetic, Model, _native
from bitnet_py.errors import InputError, NativeError
from bitnet_py.gguf import GGUFFile
from bitnet_py.taps import LAYER_TAPS, MODEL_TAPS
from tests.support.extra import sampled
from tests.support.families import FAMILIES
from tests.support.numpy_bitnet.model import Model as NumpyModel
from tests.support.numpy_main.engine import NumpyMain

AVX2 = Arithmetic("main", follow_reference=True)
AVX512 = replace(AVX2, simd_width=16)
FP16 = replace(AVX512, half_sums=True)
BUILDS = {"avx2": AVX2, "avx512": AVX512, "fp16": FP16}
ALL = {
    f"{name}{' flash' if flash else ''}": replace(build, flash_attention=flash)
    for name, build in BUILDS.items()
    for flash in (False, True)
}
each_arithmetic = pytest.mark.parametrize("arithmetic", ALL.values(), ids=ALL)
SHAPES = {
    "heads of 64": {},
    "heads of 128, three share keys": {"dim": 384, "n_heads": 3, "n_layers": 1},
    "heads of 256": {"dim": 512, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1},
    "heads of 20": {"dim": 640, "n_heads": 32, "n_kv_heads": 8, "n_layers": 1},
    "heads of 10, vocabulary of 301": {
        "dim": 640,
        "n_heads": 64,
        "n_kv_heads": 64,
        "vocab_size": 301,
        "n_layers": 1,
    },
}


def tokens(n: int) -> list[int]:
    return [(37 * i * i + 11 * i + 5) % 300 for i in range(n)]


def taps_of(path: Path) -> list[str]:
    n_layers = NumpyModel(path).n_layers
    return [*(f"blk.{i}.{tap}" for i in range(n_layers) for tap in LAYER_TAPS), *MODEL_TAPS]


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal in every bit, NaN equal to NaN."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        same = (array.view(np.uint32) == found[name].view(np.uint32)) | (np.isnan(array) & np.isnan(found[name]))
        assert array.shape == found[name].shape, name
        assert same.all(), f"{name}: {int((~same).sum())} of {same.size} values differ"


def compare(path: Path, arithmetic: Arithmetic, passes: list[list[int]], *, logits="last", **options) -> None:
    """Run passes with every tap in the engine and in NumPy."""
    stated, names = NumpyMain(NumpyModel(path), arithmetic), taps_of(path)
    with Model.from_gguf(
        path, arithmetic=arithmetic, **{"n_threads": 2, "bytes_per_thread": 1, **options}
    ) as model:
        cache = model.new_cache()
        for ids in passes:
            expected = stated.forward(ids, all_logits=logits == "all")
            result = model.forward(ids, cache, taps=names, logits=logits)
            assert result.logits.tobytes() == result.taps["result_output"].tobytes()
            assert_equal(result.taps, expected)


class TestWholePasses:
    @pytest.mark.parametrize(("n", "arithmetic"), sampled(product((1, 2, 5, 13, 45), ALL.values()), 3, tuple))
    def test_a_prompt_and_two_tokens(self, make_model, arithmetic, n):
        compare(make_model(), arithmetic, [tokens(n), [7], [8]])

    @each_arithmetic
    def test_prompts_from_64_tokens_on(self, make_model, arithmetic):
        compare(make_model(n_layers=1), arithmetic, [tokens(64), [7]])
        compare(make_model(n_layers=1), arithmetic, [tokens(70), tokens(3)])

    @each_arithmetic
    @pytest.mark.parametrize("shape", [*SHAPES][1:])
    def test_shapes_of_heads(self, make_model, arithmetic, shape):
        compare(make_model(**SHAPES[shape]), arithmetic, [tokens(5), [7]])

    @pytest.mark.parametrize("arithmetic", [ALL["avx2 flash"], ALL["fp16 flash"]], ids=["avx2", "fp16"])
    @pytest.mark.parametrize("shape", [*SHAPES][1:4])
    def test_shapes_of_heads_in_tiles(self, make_model, arithmetic, shape):
        compare(make_model(**SHAPES[shape]), arithmetic, [tokens(66)])

    @pytest.mark.parametrize("arithmetic", BUILDS.values(), ids=BUILDS)
    @pytest.mark.parametrize("vocab_size", [300, 301])
    def test_logits_of_all_tokens(self, make_model, arithmetic, vocab_size):
        compare(make_model(vocab_size=vocab_size), arithmetic, [tokens(5), tokens(2), [3]], logits="all")

    @each_arithmetic
    def test_the_model_itself_where_it_is_not_to_follow_the_reference(self, make_model, arithmetic):
        compare(make_model(), replace(arithmetic, follow_reference=False), [tokens(5), [7]])

    @pytest.mark.parametrize("kernel", FAMILIES)
    @each_arithmetic
    def test_every_family(self, make_model, arithmetic, kernel):
        compare(make_model(n_layers=1), arithmetic, [tokens(6), [7], tokens(64)], kernel=kernel)


class TestManyCells:
    @pytest.mark.parametrize(("parts", "build"), sampled(product((1, 2, 3, 600), BUILDS.values()), 4, tuple))
    def test_a_single_token_divides_its_cells_from_257_tokens_on(self, make_model, build, parts):
        path, arithmetic = make_model(), replace(build, flash_attention=True, attention_threads=parts)
        stated = NumpyMain(NumpyModel(path), arithmetic)
        with Model.from_gguf(path, arithmetic=arithmetic, n_threads=2, bytes_per_thread=1) as model:
            cache = model.new_cache()
            model.forward(tokens(255), cache)
            for token in (7, 8, 9):  # the second is the 257th
                cells = (len(cache.keys), cache.capacity, 1, 64)
                stated.keys, stated.values = (
                    held.view(np.float16).reshape(cells)[:, : 256 if token < 9 else 512]
                    for held in (cache.keys.copy(), cache.values.copy())
                )
                stated.n_tokens = cache.n_tokens
                expected = stated.forward([token])
                assert_equal(model.forward([token], cache, taps=taps_of(path)).taps, expected)

    def test_only_then_do_parts_change_bits(self, make_model):
        logits = []
        for parts in (1, 2):
            arithmetic = replace(AVX2, flash_attention=True, attention_threads=parts)
            with Model.from_gguf(make_model(), arithmetic=arithmetic, n_threads=1) as model:
                cache = model.new_cache()
                logits.append([model.forward(ids, cache).logits for ids in (tokens(255), [7], [8])])
        assert [a.tobytes() == b.tobytes() for a, b in zip(*logits, strict=True)] == [True, True, False]

    @each_arithmetic
    def test_threads_change_nothing(self, make_model, arithmetic):
        arithmetic, passes = (
            replace(arithmetic, attention_threads=3),
            (tokens(70), [7], tokens(200), [8], tokens(5)),
        )
        found = []
        for n_threads in (1, 2, 3, 5):
            with Model.from_gguf(
                make_model(), arithmetic=arithmetic, n_threads=n_threads, bytes_per_thread=1
            ) as model:
                cache = model.new_cache()
                found.append(b"".join(model.forward(ids, cache).logits.tobytes() for ids in passes))
        assert found[1:] == found[:1] * 3

    @each_arithmetic
    def test_a_long_prompt_is_taken_in_pieces(self, make_model, arithmetic):
        ids = tokens(130)
        with Model.from_gguf(make_model(), arithmetic=arithmetic, n_threads=1, n_ubatch=64) as model:
            together = model.forward(ids, model.new_cache()).logits
            cache = model.new_cache()
            for first in range(0, 130, 64):
                pieces = model.forward(ids[first : first + 64], cache).logits
        assert together.tobytes() == pieces.tobytes()

    @each_arithmetic
    def test_a_cache_that_grew_and_one_used_before_give_the_same(self, make_model, arithmetic):
        ids = tokens(300)
        with Model.from_gguf(make_model(), arithmetic=arithmetic, n_threads=1) as model:
            once, growing = model.new_cache(), model.new_cache()
            once.reserve(302)
            for cache in (once, growing):
                model.forward(ids[:5], cache)
                model.forward(ids[5:], cache)
            expected = [model.forward([token], once).logits.tobytes() for token in (7, 8)]
            assert [model.forward([token], growing).logits.tobytes() for token in (7, 8)] == expected
            growing.reset()
            assert not growing.keys.any()
            assert not growing.values.any()
            assert growing.capacity % 256 == 0


def without(path: Path, folder: Path, tensor: str, at: int, size: int) -> Path:
    """Return a copy of a model with some bytes of a tensor set to zero."""
    copy = Path(shutil.copy(path, folder / "zeros.gguf"))
    with GGUFFile.open(path) as gguf:
        offset = gguf.tensors[tensor].offset + at
    data = bytearray(copy.read_bytes())
    data[offset : offset + size] = bytes(size)
    copy.write_bytes(data)
    return copy


@each_arithmetic
@pytest.mark.parametrize("n", [5, 64])
class TestRowsOfZeros:
    def test_of_one_token(self, make_model, tmp_path, arithmetic, n):
        ids, dim = tokens(n), 128
        path = without(make_model(n_layers=1), tmp_path, "token_embd.weight", 2 * dim * ids[3], 2 * dim)
        compare(path, arithmetic, [ids, [7]])
        assert np.isnan(logits_of(path, arithmetic, ids)).all()
        right = replace(arithmetic, follow_reference=False)
        compare(path, right, [ids, [7]])
        assert np.isfinite(logits_of(path, right, ids)).all()

    def test_of_every_token(self, make_model, tmp_path, arithmetic, n):
        path = without(make_model(n_layers=1), tmp_path, "blk.0.ffn_norm.weight", 0, 4 * 128)
        compare(path, arithmetic, [tokens(n), [7]])
        compare(path, replace(arithmetic, follow_reference=False), [tokens(n), [7]])


def logits_of(path: Path, arithmetic: Arithmetic, ids: list[int]) -> np.ndarray:
    with Model.from_gguf(path, arithmetic=arithmetic, n_threads=1) as model:
        return model.forward(ids, model.new_cache()).logits


class TestOptions:
    def test_every_arithmetic_is_another(self, make_model):
        every = [*ALL.values(), Arithmetic(), Arithmetic(simd_width=16), Arithmetic("main")]
        found = [logits_of(make_model(dim=256), arithmetic, tokens(20)).tobytes() for arithmetic in every]
        assert len(set(found)) == len(every)

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"generation": "may"}, "march or main, not 'may'"),
            ({"simd_width": 4}, "8 or 16, not 4"),
            ({"generation": "main", "fused_quantizer": True}, "belongs to generation march"),
            (
                {"flash_attention": True, "half_sums": True},
                "half_sums and flash_attention belong to generation main",
            ),
            ({"follow_reference": True}, "follow_reference belong to generation main"),
            ({"generation": "main", "half_sums": True}, "simd_width 16"),
            ({"generation": "main", "attention_threads": 0}, "at least 1, not 0"),
        ],
    )
    def test_what_no_bitnet_cpp_computes_is_refused(self, options, problem):
        with pytest.raises(InputError, match=problem):
            Arithmetic(**options)

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"generation": 2}, "unknown generation"),
            ({"generation": 1, "fused_quantizer": 1}, "fused quantiser"),
            ({"flash_attention": 1}, "are main's"),
            ({"generation": 1, "half_sums": 1}, "16 lanes"),
            ({"attention_threads": 2000}, "attention_threads"),
        ],
    )
    def test_the_library_refuses_it_too(self, make_model, monkeypatch, options, problem):
        monkeypatch.setattr(
            "bitnet_py.model.arithmetic_struct",
            lambda _: _native.ArithmeticStruct(**{"simd_width": 8, "attention_threads": 1, **options}),
        )
        with pytest.raises(NativeError, match=problem):
            Model.from_gguf(make_model(), n_threads=1)

    def test_flash_attention_has_no_scores(self, make_model):
        with Model.from_gguf(make_model(), arithmetic=ALL["avx2 flash"], n_threads=1) as model:
            found = model.forward(tokens(3), model.new_cache(), taps=taps_of(make_model())).taps
        with Model.from_gguf(make_model(), arithmetic=ALL["avx2"], n_threads=1) as model:
            others = model.forward(tokens(3), model.new_cache(), taps=taps_of(make_model())).taps
        assert set(others) - set(found) == {f"blk.{i}.{tap}" for i in range(2) for tap in ("kq", "kq_soft_max")}


class TestLargest:
    @pytest.mark.parametrize("arithmetic", [AVX2, AVX512, ALL["avx2 flash"]], ids=["avx2", "avx512", "flash"])
    def test_the_search_gives_the_bits_of_the_whole_head(self, make_model, arithmetic):
        with Model.from_gguf(make_model(), arithmetic=arithmetic, n_threads=2, screen_from_bytes=0) as model:
            model.screen()
            row = model.forward(tokens(9), model.new_cache()).logits[-1]
            found = model.largest(tokens(9), model.new_cache(), 5)
            assert found.n_rows_read < len(row)
            expected = np.argsort(-row, kind="stable")[:5]
            np.testing.assert_array_equal(found.ids, expected)
            assert found.logits.tobytes() == row[expected].tobytes()
            assert found.all_logits().tobytes() == row.tobytes()

    def test_sums_in_binary16_read_the_whole_head(self, make_model):
        with Model.from_gguf(make_model(), arithmetic=FP16, n_threads=1, screen_from_bytes=0) as model:
            assert not model.searches_head
            row = model.forward(tokens(9), model.new_cache()).logits[-1]
            for _ in range(2):
                found = model.largest(tokens(9), model.new_cache(), 5)
                assert found.n_rows_read == len(row)
                np.testing.assert_array_equal(found.ids, np.argsort(-row, kind="stable")[:5])
            with pytest.raises(NativeError, match="exceed the bounds of the search"):
                model._search(np.array([7], np.int32), model.new_cache(), 5)
