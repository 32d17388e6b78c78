"""Our engine against recorded bitnet.cpp: bit-identical at every recorded tap, with every kernel of this CPU."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_py.resources import default_model_path
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.goldens import (
    FULL_PROMPTS,
    N_DECODE,
    OUTLINE_PROMPTS,
    find_golden,
    goldens_dir,
    list_goldens,
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
def test_engine_equals_bitnet_cpp_bit_for_bit(prompt, kernel):
    golden = golden_of(prompt)
    n_layers = golden.info.model.n_layers
    n_compared = 0
    with BitnetPyRunner(
        default_model_path(),
        n_threads=1,
        kernel=kernel,
        numerics=golden.identity.numerics,
    ) as engine:
        assert engine.model.kernel_name == kernel
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
    assert len(golden.plan) == 1 + N_DECODE
    assert all(set(golden.trace.taps(i)) >= set(taps.outline_taps(n_layers)) for i in range(len(golden.plan)))
    if prompt in FULL_PROMPTS:
        assert set(golden.trace.taps(0)) == set(taps.all_taps(n_layers))
    assert n_compared > (1 + N_DECODE) * golden.info.model.vocab_size


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
