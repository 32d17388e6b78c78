"""Where main's arithmetic changes its form: just before and just after; and what is not finite.

Each test went red for a change of one line of the engine that the passes of ``test_arithmetic`` do not see.
"""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitnet_py import Arithmetic, Model
from bitnet_py.gguf import GGUFFile
from tests.support.numpy_bitnet.model import Model as NumpyModel
from tests.support.numpy_main.engine import NumpyMain
from tests.unit.bitnet_py.test_arithmetic import AVX2, assert_equal, compare, each_arithmetic, taps_of, tokens

FLASH = replace(AVX2, flash_attention=True)
DIM = 128


@pytest.mark.parametrize(
    "n",
    [
        63,  # the longest pass that goes cell by cell
        130,  # three tiles: what the second one adds to a sum is a sum of several groups
    ],
)
def test_flash_attention_of_a_prompt(make_model, n):
    compare(make_model(n_layers=1), FLASH, [tokens(n)])


def test_only_a_single_token_divides_its_cells(make_model):
    """A prompt behind 512 cells does not, whatever its length."""
    found = []
    for parts in (1, 3):
        arithmetic = replace(FLASH, attention_threads=parts)
        with Model.from_gguf(make_model(n_layers=1), arithmetic=arithmetic, n_threads=1) as model:
            cache = model.new_cache()
            model.forward(tokens(510), cache)
            several = [model.forward(tokens(n), cache, logits="all").logits.tobytes() for n in (2, 5)]
            found.append((several, model.forward([7], cache).logits.tobytes()))
    (one, one_single), (three, three_single) = found
    assert one == three
    assert one_single != three_single


def changed(path: Path, folder: Path, tensor: str, at: int, value: float) -> Path:
    """Return a copy of a model with four bytes of a tensor, from ``at`` on, set to a float32."""
    copy = Path(shutil.copy(path, folder / "changed.gguf"))
    with GGUFFile.open(path) as gguf:
        offset = gguf.tensors[tensor].offset + at
    data = bytearray(copy.read_bytes())
    data[offset : offset + 4] = struct.pack("<f", value)
    copy.write_bytes(data)
    return copy


def beyond_binary16(model: Path, folder: Path, name: str, ids: list[int]) -> Path:
    """Return a copy of a model whose keys or values overflow in the cache, those of the last token only."""
    tap = {"k": "blk.0.k_rope", "v": "blk.0.v"}[name]
    found = np.abs(NumpyMain(NumpyModel(model), AVX2).forward(ids)[tap]).reshape(len(ids), -1)
    rest, last = found[:-1].max(), found[-1].max()
    assert rest < last, "choose tokens of which the last has the largest value"
    scale = NumpyModel(model).matrix(f"blk.0.attn_{name}").scale * 65520 / np.sqrt(rest * last)
    return changed(model, folder, f"blk.0.attn_{name}.weight", DIM * 64 // 4, float(scale))


@each_arithmetic
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "n"), [("v", 36), ("k", 3)])
def test_an_infinite_cell_reaches_the_tokens_before_it(make_model, tmp_path, arithmetic, name, n):
    """A masked cell has the score -inf and the weight 0: with infinity NaN, in the reference and where it is
    followed. Whether taps are recorded changes nothing."""
    ids = tokens(n)
    path = beyond_binary16(make_model(n_layers=1), tmp_path, name, ids)
    compare(path, arithmetic, [ids], logits="all")
    found = []
    for taps in ((), taps_of(path)):
        with Model.from_gguf(path, arithmetic=arithmetic, n_threads=1) as model:
            found.append(model.forward(ids, model.new_cache(), taps=taps, logits="all").logits)
    assert_equal({"logits": found[0]}, {"logits": found[1]})


@pytest.fixture
def overflowing(make_model, tmp_path) -> Path:
    """A model whose first norm is infinite where an activation is not small."""
    return changed(make_model(n_layers=1), tmp_path, "blk.0.attn_norm.weight", 4 * 5, 3e38)


@each_arithmetic
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_the_references(overflowing, arithmetic):
    compare(overflowing, arithmetic, [tokens(5), [7]])


@each_arithmetic
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_that_are_not_finite_are_no_rows_of_zeros(overflowing, arithmetic):
    """An infinite activation has the scale 0, too, and a row of NaN no largest magnitude: neither becomes 0."""
    ids, arithmetic = tokens(5), replace(arithmetic, follow_reference=False)
    expected = NumpyMain(NumpyModel(overflowing), arithmetic).forward(ids)
    with Model.from_gguf(overflowing, arithmetic=arithmetic, n_threads=1) as model:
        found = model.forward(ids, model.new_cache(), taps=taps_of(overflowing))
    names = [f"blk.0.{name}" for name in ("attn_norm", "q", "k", "v")]
    assert_equal({name: found.taps[name] for name in names}, {name: expected[name] for name in names})
    assert np.isinf(found.taps["blk.0.q"]).any()
    assert not np.isfinite(found.taps["blk.0.attn_o_out"][-1]).any()
    assert not np.isfinite(found.logits).any()


@pytest.mark.parametrize("arithmetic", [Arithmetic(), Arithmetic("main")], ids=["march", "main"])
def test_activation_is_the_models_unless_the_reference_is_followed(make_model, arithmetic):
    with Model.from_gguf(make_model(n_layers=1), arithmetic=arithmetic, n_threads=1) as model:
        taps = model.forward(tokens(3), model.new_cache(), taps=taps_of(make_model(n_layers=1))).taps
    relu = np.maximum(taps["blk.0.ffn_gate"], np.float32(0))
    assert taps["blk.0.ffn_act"].tobytes() == (relu * relu).tobytes()
