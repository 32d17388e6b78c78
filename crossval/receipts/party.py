"""The two sides of a comparison, and what computed the candidate's numbers, as a receipt states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crossval.formats import Dtype
from crossval.passes import EngineIdentity, Numerics
from crossval.terms import SIDES

Status = Literal["live", "recorded", "unavailable", "unused"]
"""``unused``: `smoke` or `metamorphic` did not ask for this engine; `selftest` needs no reference."""
ComputePath = Literal["real", "recorded", "specification", "none"]

REFERENCE_NAME = "bitnet.cpp"


@dataclass(frozen=True)
class Party:
    """One of the two engines of a comparison."""

    status: Status
    identity: EngineIdentity
    trace_digest: str | None = None
    note: str | None = None

    @property
    def is_bitnet_cpp(self) -> bool:
        """Whether this is real bitnet.cpp, live or recorded."""
        return self.status in ("live", "recorded") and self.identity.name == REFERENCE_NAME

    def to_json(self) -> dict[str, Any]:
        """Return the party as the receipt's ``candidate`` or ``reference``."""
        return {
            "status": self.status,
            **self.identity.to_json(),
            "trace_digest": self.trace_digest,
            "note": self.note,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Party:
        """Return the party of a receipt that is valid by the schema."""
        facts = {k: v for k, v in data.items() if k not in ("status", "trace_digest", "note", "numerics")}
        identity = EngineIdentity(**facts, numerics=Numerics(**data["numerics"]))
        return cls(data["status"], identity, data["trace_digest"], data["note"])


@dataclass(frozen=True)
class Compute:
    """What computed the candidate's numbers; ``kernels`` are ``{name, calls, bytes}`` read from the C library."""

    path: ComputePath
    fallback: bool = False
    kernels: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as the receipt's ``compute``."""
        return {"path": self.path, "fallback": self.fallback, "kernels": [dict(k) for k in self.kernels]}


def is_quantized(kernel: str) -> bool:
    """Return whether a counter of the C library belongs to a kernel that multiplies packed ternary weights."""
    return "i2s" in kernel.lower().replace("_", "")


def family_of(kernel: str) -> str:
    """Return the family of a counter's kernel: ``avx2`` of ``i2s_gemv_avx2``."""
    return kernel.rpartition("_")[2]


def compute_dtypes(receipt: Mapping[str, Any]) -> set[Dtype]:
    """Return the formats that the engines in a receipt compute in: found by their audits, or stated."""
    used: set[Dtype] = set()
    for side in SIDES:
        audit = (receipt.get("audit") or {}).get(side)
        found = None if audit is None else audit.get("precision")
        if found is None or found["scope"] == "some":
            used.add(receipt[side]["numerics"].get("compute_dtype") or "f32")
        else:
            used.add(found["dtype"])
    return used
