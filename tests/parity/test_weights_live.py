"""Tables that the quantisers of live bitnet.cpp make are the checkpoint's, by the criterion of their type."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from crossval.weights.blocks import CRITERIA, Tally

pytestmark = pytest.mark.live
COLS = 512


def hard_rows() -> npt.NDArray[np.float32]:
    """Return rows that are hard for a search of scales: spikes, few distinct values, ties, tiny and zero ones."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((96, COLS)) * 2.0 ** rng.integers(-12, 3, (96, 1))
    rows[:16, ::16] *= rng.uniform(3, 60, (16, COLS // 16))
    rows[16:32] = rng.choice([-1.0, 0.5, 1.0, 0.25], (16, COLS))
    rows[32:40] *= 2.0 ** -rng.integers(0, 24, (8, COLS))
    rows[40:48] *= 1e-9
    rows[48:56] = np.abs(rows[48:56])
    rows[56:60] = 0
    rows[60:64, 16:] = 0
    rows[64:72] = np.rint(rows[64:72] * 4) / 8
    rows[72:80] = rows[72:80] ** 3
    rows[80:88, 3::16] = 8 * np.abs(rows[80:88]).max(axis=1, keepdims=True)
    return rows.astype(np.float32)


@pytest.mark.parametrize("generation", ["march", "main"])
@pytest.mark.parametrize("kind", CRITERIA)
def test_a_table_of_the_library(generation: str, kind: str, request: pytest.FixtureRequest) -> None:
    library = Path(request.getfixturevalue(f"{generation}_library"))
    name = next(one for one in ("libggml-base.so", "libggml.so") if (library.parent / one).exists())
    ctypes.CDLL(str(library)).llama_backend_init()  # fills the tables that convert float16
    quantise = ctypes.CDLL(str(library.parent / name)).ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    quant = gguf.GGMLQuantizationType[kind]
    values = hard_rows()
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[quant]
    rows = np.zeros((len(values), COLS // n_values * n_bytes), np.uint8)
    assert quantise(int(quant), values.ctypes.data, rows.ctypes.data, 0, *values.shape, None) == rows.nbytes
    tally = Tally(quant)
    tally.add(rows, values)
    criterion, n_different = tally.outcome
    assert n_different == 0
    assert criterion in CRITERIA[kind]
    wrong = Tally(quant)
    wrong.add(rows, np.roll(values, 1, axis=1))
    assert wrong.outcome[1] > values.size // 20
