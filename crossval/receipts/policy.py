"""What CI demands of a receipt beyond consistency: the fields of a policy, and which kinds of receipts they mean.

What a field means, and which kinds, is in ``schemas/policy.v1.schema.json``; docs/policy.md is made of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crossval.errors import BadInputError
from crossval.files import read_limited
from crossval.receipts.party import REFERENCE_NAME
from crossval.receipts.yaml_text import parse_yaml
from crossval.schema import load, parse_json, validate_policy

MAX_POLICY_BYTES = 1 << 20
POLICIES = Path(__file__).parent / "policies"
"""The policies that ship with crossval."""
SHIPPED = "shipped"
"""In place of a digest: those of the files that ship with crossval (``shipped.json``)."""
MIN_CORRECT = 0.7
ALLOWANCES = ("allow_", "accept_")
"""How fields begin that accept something: what they mean others for is no loss."""


@dataclass(frozen=True)
class Policy:
    """The demands; fields as in ``schemas/policy.v1.schema.json``. None: anything is accepted."""

    kinds: tuple[str, ...] | None = None
    per_kind: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    require_live: bool = False
    min_exact_match: float = 0.0
    min_token_match: float | None = None
    min_logit_match: float | None = None
    min_cosine: float | None = None
    require_bitwise: bool = False
    tolerance: str = "independent"
    taps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    min_coverage: float | None = None
    min_tokens: int = 1
    min_correct: float | None = None
    """None: ``MIN_CORRECT``, and nothing is asked of kinds without answers."""
    min_prefill_ratio: float | None = None
    min_decode_ratio: float | None = None
    min_greedy_ratio: float | None = None
    max_age_days: float | None = None
    accept_within: float | None = None
    allow_precision: tuple[str, ...] = ()
    allow_deviation: tuple[str, ...] = ()
    allow_reference_graph: bool = False
    allow_fallback: bool = False
    allow_compute_paths: tuple[str, ...] = ()
    allow_dirty: bool = True
    tool_version: tuple[str, ...] | None = None
    model_sha256: tuple[str, ...] | None = None
    candidate_library_digest: tuple[str, ...] | None = None
    reference_names: tuple[str, ...] = (REFERENCE_NAME,)
    reference_generation: tuple[str, ...] | None = None
    reference_library_digest: tuple[str, ...] | None = None
    reference_source_digest: tuple[str, ...] | None = None
    reference_trace_digest: tuple[str, ...] | None = None
    allow_unknown_provenance: bool = True

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

    def meant_for(self, kind: str) -> tuple[Policy, list[GateCheck]]:
        """Return what is asked of receipts of a kind, and a check for each field that means other kinds only."""
        own, default = replace(self, per_kind={}, **dict(self.per_kind.get(kind, {}))), Policy()
        asked = [one for one in demands().values() if getattr(own, one.name) != getattr(default, one.name)]
        others = [one for one in asked if kind not in one.kinds]
        meant = replace(own, **{one.name: getattr(default, one.name) for one in others})
        return meant, [not_meant(one.check, one.why, allows=one.allows) for one in others]


@dataclass(frozen=True)
class Demand:
    """A field of a policy: what it means, and for receipts of which kinds."""

    name: str
    meaning: str
    default: Any
    kinds: tuple[str, ...]
    check: str
    """How the gate's lines about it begin."""
    of_all: bool
    """Whether it means every kind."""

    @property
    def why(self) -> str:
        """Why it is not for a receipt of another kind."""
        return f"not applicable: {self.name} is for {', '.join(self.kinds)}"

    @property
    def allows(self) -> bool:
        """Whether it accepts something instead of demanding it."""
        return self.name.startswith(ALLOWANCES)


@functools.cache
def demands() -> Mapping[str, Demand]:
    """Return the fields of a policy by name, as the schema describes them."""
    schema = load("policy.v1")
    properties = {name: one for name, one in schema["properties"].items() if name != "schema_version"}
    every = properties["kinds"]["items"]["enum"]
    return {
        name: Demand(
            name,
            one["description"],
            one["default"],
            tuple(one.get("x-kinds", every)),
            one.get("x-check", name),
            "x-kinds" not in one,
        )
        for name, one in properties.items()
    }


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


def not_meant(name: str, detail: str, *, allows: bool = False) -> GateCheck:
    """Return the check of a demand that means other kinds of receipts; what only allows something is no demand."""
    return GateCheck(name, allows, detail, applies=False)


def read_policy(path: str | Path) -> Policy:
    """Return the policy in a JSON or YAML file, or one that ships with crossval, by its name.

    What it leaves out keeps its default.

    Raises:
        BadInputError: unreadable, not strict JSON or YAML, against the schema, or a field for a kind that it does
        not mean.
    """
    shipped = POLICIES / f"{path}.yaml"
    file = shipped if Path(path).name == str(path) and shipped.is_file() else Path(path)
    data, where = read_limited(file, "policy", MAX_POLICY_BYTES), str(file)
    parse = parse_json if file.suffix == ".json" or data.lstrip()[:1] == b"{" else parse_yaml
    return policy_of(parse(data, where), where)


def policy_of(value: Any, where: str) -> Policy:
    """Return the policy that a JSON value describes.

    Raises:
        BadInputError: it is against the schema, or holds a field for a kind that it does not mean.
    """
    validate_policy(value, where)
    for kind, own in value.get("per_kind", {}).items():
        inside = f"{where}: per_kind.{kind}"
        validate_policy({"schema_version": 1, **own}, inside)
        for name in own:
            if name in ("schema_version", "kinds", "per_kind") or kind not in demands()[name].kinds:
                raise BadInputError(f"{inside}: {name} is not for receipts of one kind, or not for {kind}")
    given = _plain(value)
    del given["schema_version"]
    return Policy(**{**given, "per_kind": {kind: _plain(own) for kind, own in value.get("per_kind", {}).items()}})


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
