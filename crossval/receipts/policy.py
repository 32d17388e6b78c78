"""What CI demands of a receipt beyond consistency."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossval.files import read_limited
from crossval.receipts.party import REFERENCE_NAME
from crossval.schema import parse_json, validate_policy

MAX_POLICY_BYTES = 1 << 20


@dataclass(frozen=True)
class Policy:
    """The demands; fields as in ``schemas/policy.v1.schema.json``."""

    min_exact_match: float = 0.0
    """Minimum ``parity.exact_match_rate``, whatever a receipt of its kind counts (``Kind.counted``)."""
    min_token_match: float | None = None
    """Minimum fraction of equal tokens (``greedy``)."""
    min_logit_match: float | None = None
    """Minimum fraction of bit-identical logits (``greedy``, ``layers``, ``diff``)."""
    min_cosine: float | None = None
    require_bitwise: bool = False
    require_live: bool = False
    max_age_days: float | None = None
    allow_fallback: bool = False
    allow_reference_graph: bool = False
    """Accept engines held to the reference's graph where that is not the model (``layers``, ``greedy``)."""
    allow_dirty: bool = True
    allow_compute_paths: tuple[str, ...] = ()
    reference_names: tuple[str, ...] = (REFERENCE_NAME,)
    model_sha256: tuple[str, ...] | None = None
    min_tokens: int = 1
    tolerance: str = "independent"
    allow_precision: tuple[str, ...] = ()
    """16-bit formats accepted of engines that do not state them (``layers``, ``diff``)."""
    allow_deviation: tuple[str, ...] = ()
    """What engines may do otherwise than the model defines, stated or found (``layers``, ``diff``, ``greedy``)."""
    min_correct: float = 0.7
    """Minimum fraction of correct answers of every engine (``smoke``), whatever the command required."""
    min_prefill_ratio: float | None = None
    """Minimum median ratio of the candidate's prompt speed to the reference's (``bench``)."""
    min_decode_ratio: float | None = None
    """The same of decoding."""
    min_greedy_ratio: float | None = None
    """The same of greedy decoding."""
    accept_within: float | None = None
    """Relative L2 distance within which agreement is accepted where too little was recorded to show more."""

    @property
    def min_ratios(self) -> dict[str, float]:
        """The minimum ratios required, by name of the measure."""
        asked = {
            "prefill": self.min_prefill_ratio,
            "decode": self.min_decode_ratio,
            "greedy": self.min_greedy_ratio,
        }
        return {name: least for name, least in asked.items() if least is not None}

    def accepts(self, distance: float) -> bool:
        """Return whether agreement shown only within this distance is enough."""
        return self.accept_within is not None and distance <= self.accept_within


@dataclass(frozen=True)
class GateCheck:
    """One check of the gate."""

    name: str
    passed: bool
    detail: str
    applies: bool = True
    """False: a demand that means other kinds of receipts; it fails unless one of those is judged with this one."""


def at_least(name: str, value: float | None, least: float, what: str = "") -> GateCheck:
    """Return the check that a number, null where nothing was counted, is at least what is required."""
    shown = "null" if value is None else f"{value:.6g}"
    return GateCheck(name, value is not None and value >= least, f"{shown}{what}, {least:g} required")


def not_meant(name: str, detail: str) -> GateCheck:
    """Return the check of a demand that means other kinds of receipts."""
    return GateCheck(name, False, detail, applies=False)


def read_policy(path: str | Path) -> Policy:
    """Return the policy in a JSON file; what it leaves out keeps its default.

    Raises:
        BadInputError: unreadable, not strict JSON, or against the schema.
    """
    file = Path(path)
    value = parse_json(read_limited(file, "policy", MAX_POLICY_BYTES), str(file))
    validate_policy(value, str(file))
    given: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    given.pop("schema_version")
    return Policy(**given)
