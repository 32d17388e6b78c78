"""An engine to audit and its weights; a changed recording compared with a good one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model.weights import SpecWeights
from crossval.receipts import file as receipt
from tests.support.rewritten import Change, rewritten
from tests.support.strangers import Fault, run

Record = Callable[..., Path]


@pytest.fixture
def engine(make_model: Callable[..., Path]) -> Iterator[BitnetPyRunner]:
    with BitnetPyRunner(make_model(), n_threads=1) as runner:
        yield runner


@pytest.fixture
def weights(make_model: Callable[..., Path]) -> SpecWeights:
    return SpecWeights(make_model())


Judged = Callable[..., tuple[int, receipt.Receipt, str]]


@pytest.fixture
def judged(model_path: Path, record: Record, tmp_path: Path) -> Judged:
    """What ``diff`` says of a changed recording beside a good one."""

    def judge(
        change: Change, *, fault: Fault | None = None, model: Path = model_path, names: list[str] | None = None
    ) -> tuple[int, receipt.Receipt, str]:
        source = record("other", fault, model=model, taps=names)
        trace, out = rewritten(source, tmp_path / "t", change), tmp_path / "r.json"
        result = run("diff", trace, record(model=model), "--model", model, "--receipt", out)
        assert "Traceback" not in result.output
        return result.exit_code, receipt.read(out), result.stdout

    return judge
