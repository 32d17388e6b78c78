"""An operation with a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crossval.model.kinds import Kind
from crossval.model.op import Op


@dataclass(frozen=True)
class _Changed(Kind):
    right: Kind
    change: Callable[[np.ndarray], np.ndarray]

    def compute(self, *arrays: Any) -> np.ndarray:
        return self.change(self.right.compute(*arrays))


def changed(op: Op, change: Callable[[np.ndarray], np.ndarray]) -> Op:
    """Return an operation whose output is changed."""
    return replace(op, kind=_Changed(op.kind, change))
