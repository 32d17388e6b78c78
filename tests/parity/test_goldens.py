"""Our engine against recorded bitnet.cpp: bit-identical at every recorded tap, with every kernel of this CPU."""

from __future__ import annotations

import numpy as np
import pytest

import crossval
from bitnet_py.resources import default_model_path
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.goldens import (
    AS_RUN,
    FULL_PROMPTS,
    N_DECODE,
    N_DECODE_MAIN,
    OUTLINE_PROMPTS,
    OUTLINE_PROMPTS_MAIN,
    find_golden,
    goldens_dir,
    list_goldens,
    slug,
)
from crossval.engines.recorded import RecordedRunner
from crossval.files import file_sha256
from crossval.model import taps
from crossval.passes import Numerics
from crossval.traces.read import Trace
from tests.support.families import FAMILIES

PROMPTS = (*FULL_PROMPTS, *OUTLINE_PROMPTS)


def golden_of(prompt: str) -> RecordedRunner:
    path = default_model_path()
    found = find_golden(path, file_sha256(path), prompt)
    assert found is not None, f"no golden of {prompt!r} for this model file"
    return RecordedRunner(found)


def test_there_is_a_golden_for_every_prompt_and_no_other():
    recorded = {golden.info.prompt_text for golden in list_goldens(default_model_path())}
    assert recorded == set(PROMPTS)


def test_goldens_are_whole_and_name_the_build_that_made_them():
    for golden in list_goldens(default_model_path()):
        Trace.open(golden.path).verify()
        engine = golden.info.engine
        assert engine.name == "bitnet.cpp"
        assert engine.source_digest
        assert engine.library_digest
        assert engine.compiler
        assert engine.numerics.simd_width in (8, 16)


def test_goldens_stay_under_ten_megabytes():
    folder = goldens_dir(default_model_path())
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 10_000_000


@pytest.mark.parametrize(
    ("prompt", "kernel"),
    [(p, k) for p in PROMPTS for k in FAMILIES if k == FAMILIES[0] or p in FULL_PROMPTS],
)
def test_engine_equals_bitnet_cpp_bit_for_bit(prompt: str, kernel: str) -> None:
    golden = golden_of(prompt)
    with BitnetPyRunner(
        default_model_path(), n_threads=1, kernel=kernel, numerics=golden.identity.numerics
    ) as engine:
        assert_equal(engine, golden, kernel, N_DECODE)
    if prompt in FULL_PROMPTS:
        model = golden.info.model
        assert set(golden.trace.taps(0)) == set(taps.of_model(model.n_layers, model.architecture))


def assert_equal(engine: BitnetPyRunner, golden: RecordedRunner, kernel: str, n_decode: int) -> None:
    """Every recorded tensor of every pass has the same bits, and so the same tokens follow."""
    prompt, n_compared = golden.info.prompt_text, 0
    assert engine.model.kernel_name == kernel
    assert prompt is not None
    assert engine.tokenize(prompt) == list(golden.info.passes[0].plan.token_ids)
    for index, plan in enumerate(golden.plan):
        recorded = golden.trace.taps(index)
        ours = engine.eval(plan.token_ids, list(recorded)).taps
        for name, tap in recorded.items():
            assert tap.array.shape == ours[name].array.shape, (index, name)
            assert np.array_equal(tap.array.view(np.uint32), ours[name].array.view(np.uint32)), (index, name)
            n_compared += tap.array.size
        if index + 1 < len(golden.plan):
            assert golden.plan[index + 1].token_ids == (int(ours["result_output"].array[-1].argmax()),)
    n_layers = golden.info.model.n_layers
    assert len(golden.plan) == 1 + n_decode
    assert all(
        set(golden.trace.taps(i)) >= set(taps.of_model(n_layers, outline=True)) for i in range(len(golden.plan))
    )
    assert n_compared > (1 + n_decode) * golden.info.model.vocab_size


def test_the_other_simd_width_is_seen_as_different():
    """The comparison has power: with one rounding order changed, bits differ."""
    golden = golden_of(FULL_PROMPTS[0])
    other = 8 if golden.identity.numerics.simd_width == 16 else 16
    with BitnetPyRunner(default_model_path(), numerics=Numerics(simd_width=other)) as engine:
        plan = golden.plan[0]
        ours = engine.eval(plan.token_ids, ["blk.0.attn_norm", "blk.0.kq"]).taps
        recorded = golden.trace.taps(0)
        same = {
            name: np.array_equal(recorded[name].array.view(np.uint32), ours[name].array.view(np.uint32))
            for name in ours
        }
    assert same == {"blk.0.attn_norm": True, "blk.0.kq": False}


# --- bitnet.cpp's main ----------------------------------------------------------------------------------------

MAIN = {golden.path.name: golden for golden in list_goldens(default_model_path(), "main")}


def test_main_was_recorded_without_flash_attention_and_with_it():
    wanted = {slug(prompt) for prompt in FULL_PROMPTS}
    wanted |= {AS_RUN + slug(prompt) for prompt in (*FULL_PROMPTS, *OUTLINE_PROMPTS_MAIN)}
    assert set(MAIN) == wanted
    for name, golden in MAIN.items():
        Trace.open(golden.path).verify()
        engine = golden.info.engine
        assert engine.source_digest
        assert engine.library_digest
        assert engine.compiler
        assert (engine.numerics.generation, engine.numerics.flash_attention) == ("main", name.startswith(AS_RUN))
    folder = goldens_dir(default_model_path(), "main")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 5_000_000


@pytest.mark.parametrize("kernel", FAMILIES)
@pytest.mark.parametrize("name", MAIN)
def test_engine_equals_main_bit_for_bit(name: str, kernel: str) -> None:
    golden = RecordedRunner(MAIN[name].path)
    numerics = golden.identity.numerics
    with BitnetPyRunner(
        default_model_path(), n_threads=1, kernel=kernel, numerics=numerics, follow_reference_graph=True
    ) as engine:
        assert_equal(engine, golden, kernel, N_DECODE_MAIN)
    absent = set(taps.of_graph("bitnet-b1.58"))
    absent -= {taps.parse(tap).tap for tap in golden.trace.taps(0)}
    if golden.info.prompt_text in FULL_PROMPTS:
        assert absent == numerics.inside_others("bitnet-b1.58")


@pytest.mark.parametrize("name", [prefix + slug(FULL_PROMPTS[0]) for prefix in ("", AS_RUN)])
def test_main_is_found_to_compute_another_activation(name: str) -> None:
    receipt = crossval.compare_engines(
        MAIN[name].info.prompt_text or "", reference=str(MAIN[name].path), n_decode=1
    )
    assert receipt["verdict"] == "reference_defect"
    (found,) = receipt["diagnosis"]
    assert (found["party"], found["layer"], found["tap"]) == ("reference", 0, "blk.0.ffn_out")
    assert "SiLU instead of squared ReLU" in found["explanation"]


@pytest.mark.parametrize("name", [prefix + slug(FULL_PROMPTS[0]) for prefix in ("", AS_RUN)])
def test_main_and_our_engine_agree_on_the_graph_that_main_computes(name: str) -> None:
    receipt = crossval.compare_engines(
        MAIN[name].info.prompt_text or "",
        reference=str(MAIN[name].path),
        n_decode=1,
        follow_reference_graph=True,
    )
    assert receipt["verdict"] == "parity"
    assert receipt["parity"]["exact_match_rate"] == 1.0
    assert receipt["settings"]["follow_reference_graph"] is True
