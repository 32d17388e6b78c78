"""Mainline llama.cpp, live: our engine equal in every bit, the audit clean, and faults found all the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from bitnet_py.ggml_types import BLOCK_LAYOUT
from bitnet_py.gguf import GGUFFile
from crossval.bitnet_cpp.runner import BitnetCppRunner, open_library
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.spec import SpecRunner
from crossval.errors import BadInputError, EngineCrashError
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from tests.support.judged import judge

pytestmark = pytest.mark.live

EMBEDDING = {
    "projections": "tq2_0", "n_layers": 2, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 128,
    "hidden_dim": 512, "sub_norms": False,
}  # fmt: skip
SHAPES = {
    "tq2_0": {"projections": "tq2_0", "n_layers": 3, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 768},
    "tq1_0": {
        "projections": "tq1_0",
        "n_layers": 2,
        "dim": 768,
        "n_heads": 6,
        "n_kv_heads": 3,
        "hidden_dim": 1792,
    },
    "llama": {
        "arch": "llama", "projections": "tq2_0", "n_layers": 2, "dim": 256, "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 128, "hidden_dim": 768, "biases": True, "rope_freqs": True,
    },
    "llama with scales": {
        "arch": "llama", "projections": "tq1_0", "n_layers": 2, "dim": 256, "n_heads": 4, "n_kv_heads": 2,
        "hidden_dim": 512, "scales": True, "rope_scaling": 4.0, "untied_head": True,
    },
    "qwen3": {"arch": "qwen3", **EMBEDDING},
    "gemma3": {"arch": "gemma3", **EMBEDDING},
}  # fmt: skip
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
PROMPT = [3, 14, 15, 92, 65, 35]


@pytest.fixture
def model(make_model: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    return make_model(**SHAPES["tq2_0"], arch="bitnet", vocab_size=300)


def test_its_generation_is_found(llama_cpp: Path) -> None:
    facts = open_library(llama_cpp)
    assert (facts["generation"], facts["engine"]) == ("mainline", "llama.cpp")


@each_shape
@pytest.mark.parametrize("flash_attention", [False, True])
def test_equal_bits(
    llama_cpp: Path, make_model: Callable[..., Path], shape: dict[str, object], flash_attention: bool
) -> None:
    shape = {"arch": "bitnet", **shape}
    model = make_model(**shape, vocab_size=400)
    rng = np.random.default_rng(7)
    with BitnetCppRunner(model, library=llama_cpp, flash_attention=flash_attention) as theirs:
        numerics = theirs.identity.numerics
        if None in (numerics.simd_width, numerics.fused_quantizer, numerics.fused_sums):
            pytest.skip(f"this build rounds in no known way: {numerics}")
        with BitnetPyRunner(model, numerics=numerics, n_threads=2) as ours:
            assert ours.identity.numerics == numerics
            names = [op.output for op in op_table(SpecWeights(model).config)]
            tapped = {taps.parse(name).tap for name in names}
            n_values = 0
            for length in (1, 2, 5, 13, 45):
                theirs.reset()
                ours.reset()
                for ids in (rng.integers(0, 300, length).tolist(), [7], [200]):
                    expected, found = theirs.eval(ids, names).taps, ours.eval(ids, names).taps
                    inside = numerics.inside_others(str(shape["arch"]))
                    assert {taps.parse(name).tap for name in set(names) - set(expected)} == inside & tapped
                    for name, tap in expected.items():
                        assert tap.rows == found[name].rows, name
                        np.testing.assert_array_equal(
                            tap.array.view(np.uint32), found[name].array.view(np.uint32), err_msg=name
                        )
                        n_values += tap.array.size
            assert n_values > 100_000


def test_parity(llama_cpp: Path, model: Path) -> None:
    with BitnetCppRunner(model, library=llama_cpp) as theirs:
        with BitnetPyRunner(model, numerics=theirs.identity.numerics) as ours:
            found = judge(ours, theirs, PROMPT, model, n_decode=2)
            assert (found.verdict, found.guilty, found.reference_guilty) == ("parity", None, None)
        with SpecRunner(model) as spec:
            beside = judge(spec, theirs, PROMPT, model, n_decode=2)
            assert (beside.verdict, beside.found.result.thresholds["policy"]) == ("parity", "blocks")


def damaged(model: Path, path: Path, tensor: str, change: Callable[[np.ndarray], None]) -> Path:
    """Return a copy of a model with the blocks ``(n, 66)``, or the numbers, of one tensor changed."""
    data = bytearray(model.read_bytes())
    with GGUFFile.open(model) as gguf:
        info = gguf.tensors[tensor]
    view = np.frombuffer(data, np.uint8, count=info.size_bytes, offset=info.offset)
    change(view.reshape(-1, BLOCK_LAYOUT[info.type][1]) if info.type.name == "TQ2_0" else view.view("<f4"))
    path.write_bytes(data)
    return path


def scaled(blocks: np.ndarray) -> None:
    scale = np.ascontiguousarray(blocks[:, -2:]).view("<f2") * np.float16(1.01)
    blocks[:, -2:] = scale.view(np.uint8)


def swapped(blocks: np.ndarray) -> None:
    blocks[3, :8] = blocks[3, :8] >> 2 | blocks[3, :8] << 6 & 0xFF


def renormed(norm: np.ndarray) -> None:
    norm[11] *= 1.001


@pytest.mark.parametrize(
    ("tensor", "change", "tap"),
    [
        ("blk.1.attn_q.weight", scaled, "blk.1.q"),
        ("blk.0.ffn_down.weight", swapped, "blk.0.ffn_down"),
        ("blk.2.attn_sub_norm.weight", renormed, "blk.2.attn_sub_norm"),
    ],
)
def test_a_library_that_computes_with_other_weights_is_found(
    llama_cpp: Path, model: Path, tmp_path: Path, tensor: str, change: Callable[[np.ndarray], None], tap: str
) -> None:
    wrong = damaged(model, tmp_path / "wrong.gguf", tensor, change)
    with ExitStack() as stack:
        theirs = stack.enter_context(BitnetCppRunner(wrong, library=llama_cpp))
        ours = stack.enter_context(BitnetPyRunner(model, numerics=theirs.identity.numerics))
        found = judge(ours, theirs, PROMPT, model, n_decode=1)
    assert found.guilty is None
    assert found.reference_guilty is not None
    assert found.reference_guilty.tap == tap
    assert found.verdict == "reference_defect"


def test_a_model_it_cannot_read_is_refused(llama_cpp: Path, make_model: Callable[..., Path]) -> None:
    with pytest.raises(EngineCrashError, match=r"could not load .*") as error:
        BitnetCppRunner(make_model(arch="llama"), library=llama_cpp).__enter__()
    assert "of type 36" in str(error.value)
    with pytest.raises(BadInputError, match=r"architecture 'bitnet-b1\.58'; of mainline llama\.cpp the graphs of"):
        BitnetCppRunner(make_model(), library=llama_cpp).__enter__()


def test_a_model_of_another_graph_is_refused_in_one_line(
    llama_cpp: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_model(**SHAPES["tq2_0"], arch="bitnet").read_bytes().replace(b"bitnet", b"falcon")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises((BadInputError, EngineCrashError)):
        BitnetCppRunner(tmp_path / "m.gguf", library=llama_cpp).__enter__()
