"""Engines with the arithmetic of bitnet.cpp's main: correct ones are inside their bounds, wrong ones outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crossval.audit import bounds
from crossval.audit.audit import audit
from crossval.audit.bounds import Arithmetic, binary16, integers, readings, tables
from crossval.audit.bounds.approx import Approx, exact
from crossval.audit.checks import AuditResult
from crossval.capture import Capture
from crossval.diagnose.findings import find
from crossval.formats import to_f16
from crossval.model.kinds import Head
from crossval.model.taps import OPS
from crossval.model.weights import SpecWeights
from crossval.passes import Numerics, PassPlan
from tests.support.numpy_bitnet.engine import Call, Mistake
from tests.support.numpy_bitnet.main import Build, MainEngine
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.runner import NumpyBitnetRunner

MakeModel = Callable[..., Path]
WIDE_HEADS = {"dim": 256, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 384, "n_layers": 2}
"""128 wide: a block of binary16 lanes."""
BUILDS = {
    "AVX2": Build(8, relu=True),
    "AVX-512": Build(16, relu=True),
    "binary16": Build(16, binary16=True, relu=True),
    "AVX2, flash": Build(8, flash=True, relu=True),
    "AVX-512, flash": Build(16, flash=True, relu=True),
    "binary16, flash": Build(16, binary16=True, flash=True, relu=True),
}
MAIN = Arithmetic(Build().numerics, n_heads=4, head_dim=64)


def plans(*lengths: int) -> tuple[PassPlan, ...]:
    tokens, made, start = np.random.default_rng(7), [], 0
    for n in lengths:
        ids = tuple(map(int, tokens.integers(0, 300, n)))
        made.append(PassPlan("decode" if start and n == 1 else "prefill", ids, start))
        start += n
    return tuple(made)


def audited(
    path: Path, build: Build, lengths: Sequence[int], mistake: Mistake | None = None, **more: Numerics
) -> AuditResult:
    runner = NumpyBitnetRunner(Model(path), mistakes=[] if mistake is None else [mistake], build=build, **more)
    weights = SpecWeights(path)
    return audit([Capture(runner, weights.config, plans(*lengths))], weights)[0]


def first(result: AuditResult) -> str | None:
    return None if result.first_guilty is None else result.first_guilty.tap


@pytest.mark.parametrize("lengths", [(13, 1, 1), (2, 1), (66, 1)])
@pytest.mark.parametrize("name", BUILDS)
def test_every_build_is_inside_its_bounds(make_model: MakeModel, name: str, lengths: tuple[int, ...]):
    result = audited(make_model(**WIDE_HEADS), BUILDS[name], lengths)
    assert result.first_guilty is None
    assert result.n_covered == result.n_ops
    # scores of 128-wide heads in binary16 are known too poorly to know the weighted sum in flash attention
    expected = {"binary16, flash": "within"}.get(name, "clean")
    assert result.verdict == ("clean" if lengths[0] > 64 and name != "binary16, flash" else expected)


def test_flash_attention_over_threads_is_inside_its_bounds(make_model: MakeModel):
    path, build = make_model(n_layers=1), Build(8, flash=True, threads=3, relu=True)
    lengths = (257, 1)
    assert audited(path, build, lengths).verdict == "clean"
    stated_otherwise = replace(build.numerics, attention_threads=1)
    assert first(audited(path, build, lengths, numerics=stated_otherwise)) == "blk.0.kqv_out"


def test_sums_in_binary16_that_are_not_stated_are_named(make_model: MakeModel):
    path, build = make_model(**WIDE_HEADS), BUILDS["binary16"]
    weights = SpecWeights(path)
    source = Capture(NumpyBitnetRunner(Model(path), build=build, numerics=Numerics()), weights.config, plans(5, 1))
    (result,) = audit([source], weights)
    found = find("candidate", source, result, weights)
    assert found is not None
    assert (found.check.tap, found.diagnosis.name) == ("result_output", "sums in binary16")


@pytest.mark.parametrize(
    ("stated", "computed", "where"),
    [
        ({"generation": "march"}, Build(16, binary16=True, relu=True), "blk.0.kqv_out"),
        ({"binary16_sums": False}, Build(16, binary16=True, relu=True), "result_output"),
        ({"generation": "march"}, Build(8, relu=True), "blk.0.kqv_out"),
    ],
)
def test_another_arithmetic_than_stated_is_outside(make_model: MakeModel, stated, computed, where):
    numerics = replace(computed.numerics, **stated)
    assert first(audited(make_model(**WIDE_HEADS), computed, (5, 1), numerics=numerics)) == where


def test_flash_attention_of_an_unknown_engine_is_inside_and_named(make_model: MakeModel):
    result = audited(make_model(**WIDE_HEADS), BUILDS["AVX2, flash"], (13, 1), numerics=Numerics())
    assert result.first_guilty is None
    notes = {check.note for check in result.checks if check.tap == "blk.0.kqv_out"}
    assert all("sums in F16 key by key" in str(note) for note in notes)


def scaled(factor: float) -> Callable[[Call], np.ndarray]:
    return lambda call: (call.right(*call.inputs) * np.float32(factor)).astype(np.float32)


@pytest.mark.parametrize(
    ("op", "build", "factor"),
    [
        ("q", "AVX2", 1 + 1e-5),
        ("kq", "AVX2", 1 + 1e-4),
        ("kqv_out", "AVX2", 1 + 1e-4),
        ("result_output", "AVX2", 1 + 1e-3),
        ("kqv_out", "AVX2, flash", 1.01),  # of one token after 13 others, in binary16
        ("kqv_out", "binary16", 1.1),
        ("result_output", "binary16", 1.5),
    ],
)
def test_a_wrong_operation_is_outside(make_model: MakeModel, op: str, build: str, factor: float):
    wrong = Mistake("scaled", (op,), scaled(factor), kind="decode")
    result = audited(make_model(**WIDE_HEADS), BUILDS[build], (13, 1), wrong)
    assert first(result) == ("result_output" if op == "result_output" else f"blk.0.{op}")


def test_what_binary16_sums_hide_is_wider_than_what_binary32_sums_hide(make_model: MakeModel):
    wrong = Mistake("scaled", ("kqv_out",), scaled(1 + 1e-3), kind="decode")
    seen = {name: first(audited(make_model(**WIDE_HEADS), BUILDS[name], (13, 1), wrong)) for name in BUILDS}
    assert seen["AVX-512"] == "blk.0.kqv_out"
    assert seen["binary16"] is None


# --- the parts ------------------------------------------------------------------------------------------------


def test_the_quantiser_of_main_has_no_least_magnitude_and_rounds_halves_away():
    x = np.zeros((3, 256), np.float32)
    x[0, :4] = 127, 0.5, -2.5, 3.5
    x[1, :3] = 1e-7, 0.6e-7, -1e-7
    codes, scale, _ = integers.quantize(x, MAIN)
    assert codes[0, :4].tolist() == [127, 1, -3, 4]
    assert codes[1, :3].tolist() == [127, 76, -127]
    assert not codes[2].any()
    assert np.isfinite(scale).all()


def test_halves_away_from_zero_are_another_arithmetic_of_an_unknown_engine(make_model: MakeModel):
    weight = SpecWeights(make_model())["blk.0.attn_q.weight"]
    x = np.full((1, weight.signs.shape[1]), 0.5, np.float32)
    x[0, 0], x[0, 1::3] = 127.0, 1.5
    away = (np.trunc(x + np.copysign(np.float32(0.5), x)) @ weight.signs.T * weight.scale).astype(np.float32)
    down = (np.floor(x) @ weight.signs.T * weight.scale).astype(np.float32)
    unknown, march = Arithmetic(Numerics(), 4), Arithmetic(Numerics(8, False), 4)

    def fits(recorded, arithmetic):
        found = bounds.check_bitlinear(x, recorded, [weight], arithmetic)
        return bool((np.abs(recorded - found.expected) <= found.bound).all())

    assert fits(away, unknown)
    assert fits(away, MAIN)
    assert not fits(away, march)
    assert not fits(down, unknown)


@pytest.mark.parametrize("n", [128, 200, 640, 2560])
def test_sums_in_binary16_lanes_stay_within_their_worst_and_likely_error(n):
    rng = np.random.default_rng(n)
    engine = object.__new__(MainEngine)
    engine.build = Build(16, binary16=True)
    x, y = (to_f16(rng.normal(size=(300, n))) for _ in range(2))
    off = np.abs(engine.single(x, y) - np.sum(x * y, axis=-1))
    worst = binary16.worst(n // 128, np.sum(np.abs(x * y), axis=-1))
    likely = binary16.likely(n // 128, np.sqrt(np.sum((x * y) ** 2, axis=-1)))
    assert off.max() > 1e-4
    assert (off <= worst).all()
    assert (off <= likely).all()
    assert (worst <= (n // 128 + 8) * 2**-11 * np.sum(np.abs(x * y), axis=-1) + n * 2**-25).all()


def test_products_below_the_normal_numbers_are_in_the_bound():
    engine = object.__new__(MainEngine)
    engine.build = Build(16, binary16=True)
    x, y = np.full((1, 256), 2.0**-13), np.full((1, 256), 2.0**-13)  # products of 2^-26 are rounded to zero
    off = abs(engine.single(x, y)[0] - 256 * 2.0**-26)
    assert 0 < off <= binary16.worst(2, np.sum(x * y, axis=-1))[0]


@pytest.mark.parametrize(
    ("n_tokens", "head_dim", "lanes", "tiled"),
    [(63, 64, 8, False), (64, 64, 8, True), (64, 20, 8, False), (64, 24, 8, True), (64, 24, 16, False)],
)
def test_flash_attention_works_in_tiles_from_64_tokens_on_where_its_lanes_divide_a_head(
    n_tokens, head_dim, lanes, tiled
):
    assert replace(MAIN, numerics=Build(lanes).numerics, head_dim=head_dim).is_tiled(n_tokens) is tiled


@pytest.mark.parametrize(("n_rows", "sums"), [(1, "binary16 lanes"), (2, "lanes")])
def test_only_a_single_row_of_the_head_is_summed_in_binary16(n_rows, sums):
    (head,) = (op for op in OPS.values() if isinstance(op.kind, Head))
    (reading,) = readings(head, Arithmetic(Build(16, binary16=True).numerics, 4), 5, n_rows)
    assert (reading.rounded, reading.sums) == (("f16",), sums)


@pytest.mark.parametrize(("rows", "wider"), [(300, False), (301, True)])
def test_a_head_of_rows_that_are_no_multiple_of_4_is_summed_row_by_row(rows, wider):
    """Main's product of several rows does not take such a table."""
    x, norms = np.ones((2, 256)), np.ones(rows)
    narrow, plain = (
        tables.head_bound(x, norms, Arithmetic(Build(16, binary16=one).numerics, 4)) for one in (True, False)
    )
    assert bool((narrow > plain).all()) is wider
    assert wider or (narrow == plain).all()


def test_no_block_is_no_sum_in_binary16():
    assert not binary16.worst(0, np.ones(3)).any()
    assert not binary16.likely(0, np.ones(3)).any()


def test_cells_are_known_to_the_last_bit_where_the_weights_are():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(4, 1, 20)) * 3
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    values = to_f16(rng.normal(size=(20, 2, 16)))
    middle, half = binary16.by_cells(exact(weights), exact(values), replace(MAIN, sums="binary16 cells"))
    plain = np.einsum("hnc,chd->nhd", weights, np.repeat(values, 2, axis=1)).reshape(1, -1)
    assert 1e-5 < np.abs(middle - plain).max() < 20 * 2**-11 * np.abs(plain).max()
    assert np.median(half) < 1e-5
    assert (half >= 2 * 2**-24 * np.abs(middle)).all()  # the reciprocal of the sum, and the product with it
    loose = Approx(weights, 0.01 * weights, np.zeros_like(weights), np.zeros(1))
    _, wider = binary16.by_cells(loose, exact(values), replace(MAIN, sums="binary16 cells"))
    assert (wider >= half).all()
    assert np.median(wider) > 1e-3
