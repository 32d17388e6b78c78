"""The two sides of a comparison, and what computed the candidate's numbers, as a receipt states them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crossval.formats import Dtype
from crossval.passes import EngineIdentity, Numerics, tokenizer_rules
from crossval.terms import SIDES, Side

Status = Literal["live", "recorded", "unavailable", "unused"]
"""``unused``: `smoke` or `metamorphic` did not ask for this engine; `selftest` needs no reference."""
ComputePath = Literal["real", "library", "recorded", "specification", "none"]

REFERENCE_NAME = "bitnet.cpp"
SPECIFICATION = "specification"
PATH_OF_NAME: dict[str, ComputePath] = {
    "bitnet_py": "real",
    REFERENCE_NAME: "library",
    "llama.cpp": "library",
    "transformers": "library",
    SPECIFICATION: "specification",
}
"""Name of a live engine -> what computes its numbers: ``real`` counts its kernels, a ``library`` does not."""
WITHOUT_RULES = ("bitnet_py", SPECIFICATION)
"""Engines that read text by the rules of another: a generation that they state is followed, or the default."""
SAME_IF_EQUAL = ("library_digest", "trace_digest")
OTHER_IF_DIFFERENT = ("library_digest", "source_digest", "source_commit", "version")
"""Fields by which two parties of one name are known to be one build, or two."""


def joint_digest(trace_digests: Sequence[str]) -> str:
    """Return the digest of what a party answered from: of its trace, or of its traces, one for each prompt."""
    return (
        trace_digests[0]
        if len(trace_digests) == 1
        else hashlib.sha256("".join(trace_digests).encode()).hexdigest()
    )


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
        identity = EngineIdentity(**facts, numerics=Numerics.from_json(data["numerics"]))
        return cls(data["status"], identity, data["trace_digest"], data["note"])


def rules_between(parties: Mapping[Side, Party]) -> str:
    """Return the generation by whose rules text is read (``passes.tokenizer_rules``)."""
    return tokenizer_rules({side: party.identity.numerics for side, party in parties.items()})


@dataclass(frozen=True)
class Compute:
    """What computed the candidate's numbers; ``kernels`` are ``{name, calls, bytes}`` read from the C library."""

    path: ComputePath
    fallback: bool = False
    kernels: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as the receipt's ``compute``."""
        return {"path": self.path, "fallback": self.fallback, "kernels": [dict(k) for k in self.kernels]}


def names_of(receipt: Mapping[str, Any]) -> dict[Side, str]:
    """Return what to call the two engines of a receipt: their names, or how they differ where these are equal."""
    names: dict[Side, str] = {side: receipt[side]["name"] for side in SIDES}
    if len(set(names.values())) == len(names):
        return names
    asked = {side: receipt["settings"][side] for side in SIDES}
    words = {side: names[side] if word in (None, "auto") else word for side, word in asked.items()}
    if len(set(words.values())) == len(words):
        return words
    return {side: f"the {side}'s {names[side]}" for side in SIDES}


def same_engine(candidate: Mapping[str, Any], reference: Mapping[str, Any]) -> str | None:
    """Return why two parties of a receipt are not two engines (or two builds of one), or None when they are."""

    def known(fields: Sequence[str]) -> list[str]:
        return [one for one in fields if candidate[one] is not None and reference[one] is not None]

    for one in known(SAME_IF_EQUAL):
        if candidate[one] == reference[one]:
            return f"the same {one}"
    if candidate["name"] != reference["name"]:
        return None
    if any(candidate[one] != reference[one] for one in known(OTHER_IF_DIFFERENT)):
        return None
    return "the same name, and nothing that tells two builds apart"


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
        if found is None or found["scope"] in ("some", "mixed"):
            used |= Numerics.from_json(receipt[side]["numerics"]).formats
        else:
            used.add(found["dtype"])
    return used
