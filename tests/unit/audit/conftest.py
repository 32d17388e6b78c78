"""An engine that audits are done of, and its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model.weights import SpecWeights


@pytest.fixture
def engine(make_model: Callable[..., Path]) -> Iterator[BitnetPyRunner]:
    with BitnetPyRunner(make_model(), n_threads=1) as runner:
        yield runner


@pytest.fixture
def weights(make_model: Callable[..., Path]) -> SpecWeights:
    return SpecWeights(make_model())
