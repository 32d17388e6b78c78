"""Recording: what is selected is there, decoded greedily, or there is no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crossval.engines.record import record_trace, trace_model
from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256
from crossval.model import taps
from crossval.traces.read import Trace
from tests.support.numpy_engine import MODEL, NumpyRunner, fault

PROMPT = (3, 14, 15)


def test_defaults_are_every_tap_of_the_prompt_and_the_outline_after(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    info = record_trace(
        NumpyRunner(),
        MODEL,
        tmp_path / "t",
        prompt_ids=PROMPT,
        n_decode=3,
        n_decode_full=1,
        progress=lambda *step: seen.append(step),
    )
    coarse = taps.of_model(3, outline=True)
    assert [list(recorded.taps) for recorded in info.passes] == [taps.of_model(3)] * 2 + [coarse] * 2
    assert seen[-1] == ("recording", 4, 4)
    trace = Trace.open(tmp_path / "t")
    trace.verify()
    for index in range(3):
        logits = trace.taps(index)["result_output"].array[-1]
        assert info.plan[index + 1].token_ids == (int(np.argmax(logits)),)


def test_logits_are_always_recorded(tmp_path: Path) -> None:
    info = record_trace(NumpyRunner(), MODEL, tmp_path / "t", prompt_ids=PROMPT, select_prefill=["blk.0.q"])
    assert set(info.passes[0].taps) == {"blk.0.q", "result_output"}


def test_a_tap_the_engine_lacks_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"1 of \d+ selected taps.*blk.1.kq"):
        record_trace(NumpyRunner(lacks=["blk.1.kq"]), MODEL, tmp_path / "t", prompt_ids=PROMPT)
    assert list((tmp_path / "t").iterdir()) == []
    info = record_trace(NumpyRunner(sub_norms=False), MODEL, tmp_path / "u", prompt_ids=PROMPT)
    assert len(info.passes[0].taps) == len(taps.of_model(3)) - 6


def test_unusable_logits_leave_no_trace(tmp_path: Path) -> None:
    broken = NumpyRunner(fault("result_output", lambda x: np.full_like(x, np.nan)))
    with pytest.raises(BadInputError, match="logits are not usable"):
        record_trace(broken, MODEL, tmp_path / "t", prompt_ids=PROMPT, n_decode=1)
    assert list((tmp_path / "t").iterdir()) == []


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no tokens"):
        record_trace(NumpyRunner(), MODEL, tmp_path / "t", prompt_ids=())
    with pytest.raises(BadInputError, match="negative"):
        record_trace(NumpyRunner(), MODEL, tmp_path / "t", prompt_ids=PROMPT, n_decode=-1)
    with pytest.raises(BadInputError, match=r"no tap 'blk\.3\.q'"):
        record_trace(NumpyRunner(), MODEL, tmp_path / "t", prompt_ids=PROMPT, select_prefill=["blk.3.q"])
    assert not (tmp_path / "t").exists()


def test_trace_model_describes_the_file(shipped_model: Path, tmp_path: Path) -> None:
    model = trace_model(shipped_model)
    assert model.sha256 == file_sha256(shipped_model)
    assert model.file_name == shipped_model.name
    assert model.n_heads * model.head_dim == model.dim
    for bad in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(BadInputError):
            trace_model(bad)
