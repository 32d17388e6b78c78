"""Recorded traces of engines that are correct, or wrong in chosen places, each made once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from crossval.engines.record import record_trace, trace_model
from tests.support.strangers import PROMPT, Fault, Stranger

Record = Callable[..., Path]


@pytest.fixture(scope="session")
def model_path(make_model: Callable[..., Path]) -> Path:
    return make_model()


@pytest.fixture(scope="session")
def record(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Return ``record(name=..., fault=Fault(...), ...) -> trace directory``; ``taps``: only these are recorded."""
    folder = tmp_path_factory.mktemp("traces")
    made: dict[Any, Path] = {}

    def make(
        name: str = "bitnet.cpp",
        fault: Fault | None = None,
        prompt: str = PROMPT,
        n_decode: int = 2,
        taps: Collection[str] | None = None,
        anonymous: bool = False,
        model: Path = model_path,
    ) -> Path:
        key = (name, fault, prompt, n_decode, None if taps is None else tuple(taps), anonymous, model)
        if key in made:
            return made[key]
        made[key] = folder / f"trace-{len(made)}"
        runner = Stranger(model, n_threads=1)
        runner.name, runner.fault, runner.anonymous = name, fault or Fault(), anonymous
        with runner:
            record_trace(
                runner,
                trace_model(model),
                made[key],
                prompt_ids=runner.tokenize(prompt),
                prompt_text=prompt,
                n_decode=n_decode,
                select_prefill=taps,
                select_decode=taps,
                n_decode_full=n_decode,
            )
        return made[key]

    return make


@pytest.fixture
def golden(record: Record) -> Path:
    return record()


@pytest.fixture
def no_bitnet_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossval.bitnet_cpp.library.find_library", lambda: None)
