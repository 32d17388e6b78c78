"""Break the engine everywhere at once: the text turns to nonsense and `crossval smoke` fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_py.gguf import GGUFFile
from crossval.smoke.suite import load_suite
from tests.support.broken_engine import ROOT, TEXT_MISTAKES, TextMistake, build, run
from tests.support.families import each_family
from tests.support.fault_table import ask
from tests.support.native_build import LIBRARY


@pytest.fixture(params=TEXT_MISTAKES, ids=lambda mistake: mistake.name, scope="module")
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextMistake, Path]:
    mistake: TextMistake = request.param
    return mistake, build([mistake], tmp_path_factory.mktemp("broken") / LIBRARY)


TAPS_SCRIPT = """
import sys
import numpy as np
from bitnet_py.model import Model
with Model.from_gguf(sys.argv[1], n_threads=1) as model:
    names = ["inp_embd", "blk.0.attn_norm", "blk.0.q", "blk.0.l_out", "result_output"]
    taps = model.forward([5, 9, 17, 3], model.new_cache(), taps=names).taps
np.savez(sys.argv[2], **taps)
"""


def taps_of(
    model: Path, out: Path, library: Path | None = None, kernel: str | None = None
) -> dict[str, np.ndarray]:
    command = [sys.executable, "-c", TAPS_SCRIPT, model, out]
    if library is None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    else:
        done = run(command, library, kernel=kernel)
    assert done.returncode == 0, done.stderr
    with np.load(out) as found:
        return dict(found)


@each_family
def test_a_mistake_changes_the_logits_and_nothing_before_it(
    broken, kernel: str, shipped_model: Path, tmp_path: Path
) -> None:
    mistake, library = broken
    right = taps_of(shipped_model, tmp_path / "right.npz")
    wrong = taps_of(shipped_model, tmp_path / "wrong.npz", library, kernel)
    assert np.array_equal(right["inp_embd"], wrong["inp_embd"])
    assert np.array_equal(right["blk.0.attn_norm"], wrong["blk.0.attn_norm"])
    if mistake.name == "sequential I2_S decode":
        assert_decoded_in_sequence(shipped_model, wrong)
    else:
        assert np.array_equal(right["blk.0.q"], wrong["blk.0.q"])
    assert np.isfinite(wrong["result_output"]).all()
    cosine = np.corrcoef(right["result_output"].ravel(), wrong["result_output"].ravel())[0, 1]
    assert cosine < 0.999


def assert_decoded_in_sequence(model: Path, taps: dict[str, np.ndarray]) -> None:
    """The mistake exchanges activations; it must be what a reader of the codes in sequence would compute."""
    with GGUFFile.open(model) as gguf:
        info = gguf.tensors["blk.0.attn_q.weight"]
        data = np.asarray(gguf.data(info.name))
    rows, cols = info.shape
    packed = data[: rows * cols // 4]
    scale = float(data[rows * cols // 4 :][:4].copy().view("<f4")[0])
    codes = packed[:, None] >> np.array([6, 4, 2, 0], np.uint8) & 3  # four neighbours, high bits first
    weights = (codes.reshape(rows, cols).astype(np.float64) - 1) * scale
    x = taps["blk.0.attn_norm"].astype(np.float64)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    expected = np.rint(x / step) * step @ weights.T
    found = taps["blk.0.q"].reshape(expected.shape)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_the_model_answers() -> None:
    found = ask(None)
    assert found.exit_code == 0
    assert found.n_prompts == len(load_suite("long").prompts)
    card = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"^\| all \|.*\| (\d+)/(\d+) \([\d.]+%\) \|$", card, re.M)
    assert stated is not None
    assert (found.correct, found.n_prompts) == tuple(map(int, stated.groups()))


def test_a_broken_engine_answers_less_than_half(broken) -> None:
    mistake, library = broken
    found = ask(library)
    assert found.exit_code == 1, f"{mistake.name}: {found}"
    assert found.accuracy < 0.5, f"{mistake.name}: {found}"
