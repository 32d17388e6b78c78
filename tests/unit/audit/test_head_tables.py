"""Bounds of the LM head for tables of every type: what bitnet.cpp computes is within them, mistakes are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from bitnet_py.ggml_types import GGMLType
from crossval.audit import bounds
from crossval.audit.bounds import Arithmetic, quantised
from crossval.audit.bounds.approx import Approx, exact, round_to
from crossval.model import tables
from crossval.model.kinds import Head
from crossval.model.op import Op
from crossval.passes import Numerics
from tests.support import q8_k
from tests.support import tables as emulated

HEAD = Op("result_output", None, Head(), ("result_norm",), ("token_embd.weight",), ("n_tokens", "vocab_size"))
KINDS = (*emulated.IN_BLOCKS, GGMLType.F32, GGMLType.BF16)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
ROWS, COLS = 64, 768
BUILDS = {
    "march, AVX2": Numerics(8, False),
    "march, AVX-512": Numerics(16, False, bfloat_pairs=True),
    "main, AVX2": Numerics(8, False, generation="main"),
    "main, AVX-512": Numerics(16, False, generation="main", bfloat_pairs=False),
}


def scene(kind: GGMLType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bytes and values of a table, and inputs with a few large features."""
    rows = emulated.random_rows(kind, ROWS, COLS)
    table = rows.view("<f4") if kind is GGMLType.F32 else tables.decode(rows, GGMLQuantizationType(int(kind)))
    x = np.random.default_rng(2).standard_normal((3, COLS)).astype(np.float32)
    x[:, ::97] *= 12
    return rows, table, x


def judged(x: np.ndarray, table: np.ndarray, recorded: np.ndarray, arithmetic: Arithmetic) -> float:
    """Return the largest distance in multiples of its bound, by the reading that fits best."""
    found = []
    for reading in bounds.readings(HEAD, arithmetic, len(x), len(x)):
        wide = reading.apply(0, x)
        expected = HEAD.function(wide, table)
        allowed = bounds.bound(HEAD, [wide], expected, [table], arithmetic.reading(reading))
        found.append(float((np.abs(recorded - expected) / allowed).max()))
    return min(found)


@each_kind
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("tiled", [False, True])
def test_what_bitnet_cpp_computes_is_within(kind, build, tiled):
    rows, table, x = scene(kind)
    numerics = BUILDS[build]
    recorded = emulated.multiply(
        rows, kind, x, main=numerics.generation == "main", width=numerics.simd_width,
        pairs=bool(numerics.bfloat_pairs), tiled=tiled,
    )  # fmt: skip
    known = Arithmetic(numerics, 4, head_table=kind.name)
    assert judged(x, table, recorded, known) < 0.5
    assert judged(x, table, recorded, Arithmetic(Numerics(), 4, head_table=kind.name)) < 0.5
    assert judged(x, table, recorded * np.float32(1 + 2**-12), known) > 1


@each_kind
def test_an_input_that_is_rounded_otherwise_is_seen(kind):
    """Of a build that is known to quantise its input: it did not, or as for another type."""
    _, table, x = scene(kind)
    known = Arithmetic(BUILDS["march, AVX2"], 4, head_table=kind.name)
    plain = (x.astype(np.float64) @ np.asarray(table, np.float64).T).astype(np.float32)
    in_half = (x.astype(np.float16).astype(np.float64) @ np.asarray(table, np.float64).T).astype(np.float32)
    assert (judged(x, table, plain, known) > 1) is (kind is not GGMLType.F32)
    assert judged(x, table, in_half, known) > 1
    unknown = Arithmetic(Numerics(), 4, head_table=kind.name)
    assert judged(x, table, plain, unknown) < 1  # an engine that multiplies with decoded values


def test_quantised_inputs_are_codes_times_steps():
    x = np.random.default_rng(4).standard_normal((2, 512)).astype(np.float32)
    x[0, :256] = 0
    codes, steps = emulated.quantize_q8_0(x)
    np.testing.assert_array_equal(quantised.q8_0(x), (codes * steps[..., None].astype(np.float64)).reshape(2, -1))
    for fused, quantise in ((False, quantised.q8_k), (True, quantised.q8_k_fused)):
        expected = []
        for row in x:
            codes, steps = q8_k.quantize(row, fused=fused)
            expected.append(np.concatenate([c * np.float64(s) for c, s in zip(codes, steps, strict=True)]))
        np.testing.assert_array_equal(quantise(x), expected)


@pytest.mark.parametrize("name", quantised.QUANTISERS)
def test_quantised_values_move_no_further_than_said(name):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((4, 512))
    approx = replace(exact(x), noise=np.abs(x) * 1e-4 + 1e-5)
    found = round_to(name, approx)
    np.testing.assert_array_equal(found.value, quantised.QUANTISERS[name](x))
    for _ in range(20):
        other = x + rng.uniform(-1, 1, x.shape) * approx.noise
        assert (np.abs(quantised.QUANTISERS[name](other) - found.value) <= found.total + 1e-12).all()
    step = np.abs(x).reshape(4, -1, quantised.BLOCK_OF[name]).max(axis=-1) / 127
    typical = found.total.reshape(4, -1, quantised.BLOCK_OF[name]) / step[..., None]
    assert np.median(typical) < 0.5  # most codes are known
    assert not round_to(name, exact(x)).total.any()


@each_kind
def test_a_segment_that_ends_in_the_head(kind):
    """Inputs with an error: the result is within what is carried."""
    rows, table, x = scene(kind)
    known = Arithmetic(BUILDS["march, AVX2"], 4, head_table=kind.name)
    (reading,) = bounds.readings(HEAD, known, 3, 3)
    off = (x * (1 + np.random.default_rng(8).uniform(-1, 1, x.shape) * 2e-7)).astype(np.float32)
    approx = Approx(x.astype(np.float64), np.abs(x) * 2.5e-7, np.zeros(x.shape), np.zeros(3))
    found = bounds.propagate(HEAD, [round_to(reading.rounded[0], approx)], [table], known.reading(reading))
    recorded = emulated.multiply(rows, kind, off, main=False, width=8, pairs=False, tiled=False)
    assert (np.abs(recorded - found.value) <= found.total).all()
