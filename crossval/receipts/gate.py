"""What CI checks of a receipt: that it is consistent (recomputed from its own rows) and good enough (the policy).

No status string is trusted. docs/receipts.md states what a digest stored in the receipt itself cannot prove.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from crossval.receipts.file import Receipt, digest
from crossval.receipts.kind import Kind, recompute, summary_conflicts
from crossval.receipts.party import (
    PATH_OF_NAME,
    Compute,
    is_quantized,
    names_of,
    same_engine,
)
from crossval.receipts.policy import GateCheck, Policy, at_least, not_meant
from crossval.terms import OUTPUT_IGNORED, SEPARATE_OUTPUT_NOTE, SIDES

CLOCK_SKEW = datetime.timedelta(minutes=5)
_MAX_COMPLAINTS = 5


def judge(
    kind: Kind[Any], receipt: Receipt, policy: Policy | None = None, now: datetime.datetime | None = None
) -> list[GateCheck]:
    """Return every check of a receipt of this kind, valid by the schema; it passes when all of them do.

    Raises:
        BadInputError: a pattern among the expected answers is unusable or takes too long.
    """
    policy = policy or Policy()
    now = now or datetime.datetime.now(datetime.timezone.utc)
    checks = [_digest(receipt), _age(receipt, policy, now)]
    if receipt["reference"]["status"] == "unavailable" or receipt["thresholds"] is None:
        return [*checks, GateCheck("reference", False, "an engine was unavailable: nothing was compared")]
    checks += [_recomputed(name, found) for name, found in complaints(kind, receipt).items()]
    return [*checks, *_policy_checks(kind, receipt, policy)]


def complaints(kind: Kind[Any], receipt: Receipt) -> dict[str, list[str]]:
    """Return, by check, where a receipt contradicts what follows from its own rows, model and token ids.

    Raises:
        BadInputError: a pattern among the expected answers is unusable or takes too long.
    """
    found = {name: check(receipt) for name, check in kind.checks.items()}
    found["summary"] = summary_conflicts(kind, receipt)
    return {**found, **{name: check(receipt) for name, check in kind.further_checks(receipt).items()}}


def passed(checks: Sequence[GateCheck]) -> bool:
    """Return whether a receipt passes: at least one check, and none failed."""
    return bool(checks) and all(check.passed for check in checks)


def together(judged: Sequence[Sequence[GateCheck]]) -> list[list[GateCheck]]:
    """Return the checks of several receipts that one policy is for.

    A demand holds receipts of the kinds that it means; of the others nothing is demanded, as long as it holds one.
    """
    held = {check.name for checks in judged for check in checks if check.applies}
    return [
        [replace(one, passed=True) if not one.applies and one.name in held else one for one in checks]
        for checks in judged
    ]


def _recomputed(name: str, found: Sequence[str]) -> GateCheck:
    more = len(found) - _MAX_COMPLAINTS
    detail = "; ".join(found[:_MAX_COMPLAINTS]) + (f"; and {more} more" if more > 0 else "")
    return GateCheck(name, not found, detail or "recomputed, as stated")


def _digest(receipt: Receipt) -> GateCheck:
    computed = digest(receipt)
    same = computed == receipt["digest"]
    detail = computed[:16] if same else f"states {receipt['digest'][:16]}…, contents give {computed[:16]}…: edited"
    return GateCheck("digest", same, detail)


def _age(receipt: Receipt, policy: Policy, now: datetime.datetime) -> GateCheck:
    text = receipt["created_at"]
    try:
        created = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        return GateCheck("age", False, f"created_at {text} is not a date")
    if created > now + CLOCK_SKEW:
        return GateCheck("age", False, f"created_at {text} lies in the future")
    days = (now - created) / datetime.timedelta(days=1)
    allowed = policy.max_age_days
    detail = f"{max(days, 0.0):.1f} days" + ("" if allowed is None else f", {allowed:g} allowed")
    return GateCheck("age", allowed is None or days <= allowed, detail)


def _policy_checks(kind: Kind[Any], receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    yield _verdict(kind, receipt, policy)
    amount = kind.amount(receipt)
    n_tokens = Policy.min_tokens if amount.n_tokens is None else amount.n_tokens  # the default asks nothing of it
    enough = amount.n_compared > 0 and n_tokens >= policy.min_tokens
    yield GateCheck("compared", enough, f"{amount.words} ({policy.min_tokens} required)")
    yield from kind.demands(receipt, policy)
    yield from _ratios(kind, receipt, policy)
    yield from _reference(kind, receipt, policy)
    yield _distinct(receipt)
    if kind.computes:
        yield from _compute(receipt, policy)
    elif receipt["compute"] != Compute("none").to_json():
        yield GateCheck("compute path", False, f"a {kind.name} receipt computes nothing, this one names a path")
    yield from _model(receipt, policy)
    yield from _rates(kind, receipt, policy)
    yield from kind.exactness(receipt, policy)


def _verdict(kind: Kind[Any], receipt: Receipt, policy: Policy) -> GateCheck:
    verdict = recompute(kind, receipt)["verdict"]
    good, detail = verdict in (kind.passing, "near_ties"), f"{verdict} (recomputed)"
    if verdict == "agrees_within":
        distance = kind.within(receipt)
        asked = "no distance" if policy.accept_within is None else f"{policy.accept_within:g}"
        good, detail = policy.accepts(distance), f"agrees within {distance:.3g} (recomputed), {asked} accepted"
    if verdict == "deviates":  # which deviations are accepted is a check of its own
        good = bool(policy.allow_deviation)
    return GateCheck("verdict", good and verdict == receipt["verdict"], detail)


def _ratios(kind: Kind[Any], receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check the speed ratios against the policy's minimum, whatever the command itself required."""
    measured = kind.ratios(receipt) if policy.min_ratios else {}
    for name, least in policy.min_ratios.items():
        if name not in measured:
            yield not_meant(f"{name} ratio", f"a {kind.name} receipt holds no speeds")
            continue
        yield at_least(f"{name} ratio", measured[name], least)


def _reference(kind: Kind[Any], receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    reference = receipt["reference"]
    name, status = reference["name"], reference["status"]
    if status == "unused":
        if policy.require_live and kind.one_sided:
            yield not_meant("live reference", f"a {kind.name} receipt needs no reference")
        elif policy.require_live:
            yield GateCheck("live reference", False, "the reference did not take part")
        return
    allowed = ", ".join(policy.reference_names)
    yield GateCheck("reference", name in policy.reference_names, f"{name}; accepted: {allowed}")
    if policy.require_live:
        yield GateCheck("live reference", status == "live", f"reference is {status}")
    if status == "recorded" and not reference["trace_digest"]:
        yield GateCheck("recorded reference", False, "no trace_digest: the trace cannot be identified")
    if PATH_OF_NAME.get(name) == "library":
        known = bool(reference["library_digest"])
        yield GateCheck("reference build", known, reference["library_digest"] or "library_digest is not known")


def _distinct(receipt: Receipt) -> GateCheck:
    """Check that two engines were compared, not one with itself."""
    ours, theirs = receipt["candidate"], receipt["reference"]
    unused = [side for side in SIDES if receipt[side]["status"] == "unused"]
    if unused:
        return GateCheck("two parties", True, f"the {unused[0]} did not take part")
    why = same_engine(ours, theirs)
    if why is not None:
        return GateCheck("two parties", False, f"candidate and reference have {why}")
    names = names_of(receipt)
    return GateCheck("two parties", True, f"{names['candidate']} against {names['reference']}")


def _expected_path(candidate: Mapping[str, Any]) -> str:
    if candidate["status"] == "recorded":
        return "recorded"
    if candidate["status"] == "unused":
        return "none"
    return PATH_OF_NAME.get(candidate["name"], "none")


def _compute(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    compute, candidate = receipt["compute"], receipt["candidate"]
    path, kernels = compute["path"], compute["kernels"]
    expected = _expected_path(candidate)
    if path != expected:
        yield GateCheck(
            "compute path", False, f"{path}, but the candidate is {candidate['status']} {candidate['name']}"
        )
    elif path == "real":
        ran = [k for k in kernels if is_quantized(k["name"]) and k["calls"] > 0 and k["bytes"] > 0]
        names = ", ".join(f"{k['name']} x{k['calls']}" for k in ran)
        yield GateCheck("compute path", bool(ran), f"real: {names}" if ran else "no quantised kernel ran")
    elif path == "library":
        digest = candidate["library_digest"]
        yield GateCheck("compute path", bool(digest), f"library: {digest or 'library_digest is not known'}")
    else:
        yield GateCheck("compute path", path in policy.allow_compute_paths, f"{path}: the policy must allow it")
    if path != "real" and kernels:
        yield GateCheck("kernels", False, f"counters of a library, but the compute path is {path}")
    if len({k["name"] for k in kernels}) != len(kernels):
        yield GateCheck("kernels", False, "a kernel is listed twice")
    fallback = compute["fallback"]
    detail = "a slower kernel than the CPU offers ran without being requested" if fallback else "none"
    yield GateCheck("fallback", not fallback or policy.allow_fallback, detail)


def _model(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    model = receipt["model"]
    if policy.model_sha256 is not None:
        yield GateCheck("model", model["sha256"] in policy.model_sha256, model["sha256"])
    ignored = model["separate_output"] and model["architecture"] in OUTPUT_IGNORED
    if ignored != (SEPARATE_OUTPUT_NOTE in receipt["notes"]):
        state = "has an output.weight that bitnet.cpp ignores" if ignored else "has none that bitnet.cpp ignores"
        yield GateCheck("notes", False, f"the model {state}, the notes say otherwise")
    if not policy.allow_dirty:
        dirty = receipt["tool"]["dirty"]
        yield GateCheck("clean tool", dirty is False, f"tool.dirty is {dirty}")


def _rates(kind: Kind[Any], receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check the fractions of equal results; engines checked independently have none unless it is demanded."""
    parity = receipt["parity"]
    rate = parity["exact_match_rate"]
    one_sided = kind.one_sided or "unused" in [receipt[side]["status"] for side in SIDES]
    if kind.counted is None:
        if policy.min_exact_match > 0:
            yield not_meant("exact match", f"a {kind.name} receipt counts no equal results")
    elif policy.min_exact_match > 0 or not one_sided:
        yield at_least("exact match", rate, policy.min_exact_match, f" of the {kind.counted}")
    asked = (
        ("token match", "tokens", policy.min_token_match, rate),
        ("logit match", "logits", policy.min_logit_match, parity["logits_exact_match_rate"]),
    )
    for name, unit, least, found in asked:
        if least is None:
            continue
        if unit in kind.rates:
            yield at_least(name, found, least, f" of the {unit}")
        else:
            yield not_meant(name, f"a {kind.name} receipt counts no {unit}")
