"""What a session of two engines reports about the kernels that ran."""

from __future__ import annotations

import pytest

from bitnet_py import _native
from crossval.engines import session


@pytest.mark.parametrize(
    ("used", "asked", "fallback"),
    [("fast", "", False), ("slow", "", True), ("slow", "slow", False), (None, "", True)],
)
def test_fallback_is_a_slower_kernel_unasked(used, asked, fallback, monkeypatch):
    families = [_native.KernelFamily(*family) for family in (
        ("fastest", "", False), ("fast", "", True), ("slow", "", True),
    )]  # fmt: skip
    monkeypatch.setattr(_native, "kernel_families", lambda: families)
    monkeypatch.setenv("BITNET_KERNEL", asked)
    assert session.is_fallback(used) is fallback
