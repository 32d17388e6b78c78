"""Rates of the kernels after the table of pytest-benchmark: one line per operation, families side by side."""

from __future__ import annotations

import pytest

Rates = dict[str, dict[str, str]]
RATES = pytest.StashKey[Rates]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RATES] = {}


@pytest.fixture
def rates(request: pytest.FixtureRequest) -> Rates:
    """Rate by operation and family, shown at the end."""
    return request.config.stash[RATES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rates = config.stash[RATES]
    if not rates:
        return
    families = list(dict.fromkeys(family for row in rates.values() for family in row))
    terminalreporter.section("rates (median)")
    terminalreporter.line(f"{'':<24}" + "".join(f"{family:>18}" for family in families))
    for operation, row in rates.items():
        terminalreporter.line(f"{operation:<24}" + "".join(f"{row.get(family, '-'):>18}" for family in families))
