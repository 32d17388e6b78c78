"""The kernel families that this CPU runs: tests that depend on a kernel run with each of them, by name."""

from __future__ import annotations

import pytest

from bitnet_py._native import kernel_families

FAMILIES = tuple(family.name for family in kernel_families() if family.available)
"""Best first."""
each_family = pytest.mark.parametrize("kernel", FAMILIES)
