"""Whose results a policy accepts: lists of kinds, models, libraries, sources, traces, versions.

Every entry is compared with what the receipt says of itself; docs/trust.md says what that is worth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from crossval.receipts import provenance, shipped
from crossval.receipts.file import Receipt
from crossval.receipts.party import PATH_OF_NAME
from crossval.receipts.policy import SHIPPED, GateCheck, Policy, not_meant

THIS_VERSION = "this"


def checks(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check everything that a policy lists against what a receipt states."""
    if policy.kinds is not None:
        yield _listed("kinds", receipt["kind"], policy.kinds)
    if policy.model_sha256 is not None:
        accepted = _with_shipped(policy.model_sha256, shipped.models())
        yield _listed("model", receipt["model"]["sha256"], accepted)
    if policy.tool_version is not None:
        own = {provenance.version()} if THIS_VERSION in policy.tool_version else set()
        yield _listed("tool version", receipt["tool"]["version"], {*policy.tool_version, *own} - {THIS_VERSION})
    if not policy.allow_dirty:
        dirty = receipt["tool"]["dirty"]
        yield GateCheck("clean tool", dirty is False, f"tool.dirty is {dirty}")
    yield from _candidate(receipt["candidate"], policy)
    yield from _reference(receipt, policy)


def _listed(name: str, value: Any, accepted: Collection[Any]) -> GateCheck:
    """Return the check that a value is one of those accepted; null never is."""
    among = value is not None and value in accepted
    return GateCheck(name, among, str(value) if among else f"{value}: not among the {len(accepted)} accepted")


def _with_shipped(asked: Collection[str], own: Collection[str]) -> set[str]:
    return {*asked, *(own if SHIPPED in asked else ())} - {SHIPPED}


def _candidate(candidate: Mapping[str, Any], policy: Policy) -> Iterator[GateCheck]:
    accepted, status = policy.candidate_library_digest, candidate["status"]
    if accepted is None:
        return
    if status == "unused":
        yield not_meant("candidate library", "not applicable: the candidate did not take part")
    elif status == "live":
        yield _listed("candidate library", candidate["library_digest"], accepted)
    else:
        yield GateCheck("candidate library", False, f"the candidate is {status}: no library is known to have run")


def _reference(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check a reference: a live one by its library and source, a recorded one by its trace alone."""
    reference, status = receipt["reference"], receipt["reference"]["status"]
    of_live = {
        "reference library": ("library_digest", policy.reference_library_digest),
        "reference source": ("source_digest", policy.reference_source_digest),
    }
    lists: dict[str, Collection[str] | None] = {name: accepted for name, (_, accepted) in of_live.items()}
    traces = policy.reference_trace_digest
    lists["reference trace"] = None if traces is None else _with_shipped(traces, shipped.trace_digests(receipt))
    lists["reference generation"] = policy.reference_generation
    asked = [name for name, accepted in lists.items() if accepted is not None]
    if status == "unused":
        yield from (not_meant(name, "not applicable: the reference did not take part") for name in asked)
        return
    if lists["reference generation"] is not None:
        generation = reference["numerics"].get(
            "generation", "march" if reference["name"] == "bitnet.cpp" else None
        )
        yield _listed("reference generation", generation, lists["reference generation"])
        asked.remove("reference generation")
    identified = [name for name in asked if (name == "reference trace") == (status == "recorded")]
    for name in identified:
        stated = of_live[name][0] if name in of_live else "trace_digest"
        accepted = lists[name]
        assert accepted is not None
        yield _listed(name, reference[stated], accepted)
    if asked and not identified:
        what = "a recorded reference" if status == "recorded" else "a live reference"
        yield GateCheck(asked[0], False, f"{what} is identified by none of the policy's lists")
    if not policy.allow_unknown_provenance:
        yield _provenance(reference, lists)


def _provenance(reference: Mapping[str, Any], lists: Mapping[str, Collection[str] | None]) -> GateCheck:
    """Check that something else than a reference's own word says what it is."""
    name = "provenance"
    if reference["status"] == "recorded":
        known = reference["trace_digest"] in (lists["reference trace"] or ())
        why = "the trace is listed" if known else "a trace that is not listed says itself what recorded it"
        return GateCheck(name, known, why)
    if PATH_OF_NAME.get(reference["name"]) != "library":
        return GateCheck(name, True, f"{reference['name']} is part of crossval")
    if reference["library_digest"] in (lists["reference library"] or ()):
        return GateCheck(name, True, "the library is listed")
    known = reference["source_digest"] is not None
    return GateCheck(name, known, "built where it ran" if known else "unknown: no record of how it was built")
