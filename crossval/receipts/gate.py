"""What CI checks of a receipt: that it is consistent (recomputed from its own rows) and good enough (the policy).

No status string is trusted. docs/receipts.md states what a digest stored in the receipt itself cannot prove.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bitnet_py.errors import listed
from crossval.receipts import allowed
from crossval.receipts.file import Receipt, digest
from crossval.receipts.kind import Kind, recompute, summary_conflicts
from crossval.receipts.once import judgement
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
METRICS = {"min_cosine": "cosine", "max_nmse": "nmse", "max_abs": "max_abs", "min_exact_match": "exact_match_rate"}
"""Limit of a policy's ``taps`` -> the field of a row that it holds."""
_MAX_COMPLAINTS = 5


def judge(
    kind: Kind[Any], receipt: Receipt, policy: Policy | None = None, now: datetime.datetime | None = None
) -> list[GateCheck]:
    """Return every check of a receipt of this kind, valid by the schema; it passes when all of them do.

    Raises:
        BadInputError: a pattern among the expected answers is unusable or takes too long.
    """
    policy, others = (policy or Policy()).meant_for(kind.name)
    now = now or datetime.datetime.now(datetime.timezone.utc)
    checks = [_digest(receipt), _age(receipt, policy, now)]
    if receipt["reference"]["status"] == "unavailable" or receipt["thresholds"] is None:
        return [*checks, GateCheck("reference", False, "an engine was unavailable: nothing was compared")]
    with judgement():
        checks += [_recomputed(name, found) for name, found in complaints(kind, receipt).items()]
        return [*checks, *_policy_checks(kind, receipt, policy), *others]


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
    held = tuple({check.name for checks in judged for check in checks if check.applies})
    return [
        [
            replace(one, passed=True) if not one.applies and any(n.startswith(one.name) for n in held) else one
            for one in checks
        ]
        for checks in judged
    ]


def _recomputed(name: str, found: Sequence[str]) -> GateCheck:
    return GateCheck(name, not found, listed(found, _MAX_COMPLAINTS, "; ") or "recomputed, as stated")


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
    most = policy.max_age_days
    detail = f"{max(days, 0.0):.1f} days" + ("" if most is None else f", {most:g} allowed")
    return GateCheck("age", most is None or days <= most, detail)


def _policy_checks(kind: Kind[Any], receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    yield _verdict(kind, receipt, policy)
    amount = kind.amount(receipt)
    yield GateCheck("compared", amount.n_compared > 0, amount.words)
    if policy.min_tokens > Policy.min_tokens:
        yield at_least("tokens", amount.n_tokens, policy.min_tokens)
    yield from _coverage(receipt, policy)
    yield from kind.demands(receipt, policy)
    yield from _ratios(kind, receipt, policy)
    yield from _reference(kind, receipt, policy)
    yield from allowed.checks(receipt, policy)
    yield _distinct(receipt)
    if kind.computes:
        yield from _compute(receipt, policy)
    elif receipt["compute"] != Compute("none").to_json():
        yield GateCheck("compute path", False, f"a {kind.name} receipt computes nothing, this one names a path")
    yield from _notes(receipt)
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
        yield at_least(f"{name} ratio", measured[name], least)


def _reference(kind: Kind[Any], receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    reference = receipt["reference"]
    name, status = reference["name"], reference["status"]
    if status == "unused":
        if policy.require_live and kind.one_sided:
            yield not_meant("live reference", f"not applicable: this {kind.name} receipt needs no reference")
        elif policy.require_live:
            yield GateCheck("live reference", False, "the reference did not take part")
        if policy.reference_names != Policy.reference_names:
            yield not_meant("reference", "not applicable: the reference did not take part")
        return
    accepted = ", ".join(policy.reference_names)
    yield GateCheck("reference", name in policy.reference_names, f"{name}; accepted: {accepted}")
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


def _notes(receipt: Receipt) -> Iterator[GateCheck]:
    model = receipt["model"]
    ignored = model["separate_output"] and model["architecture"] in OUTPUT_IGNORED
    if ignored != (SEPARATE_OUTPUT_NOTE in receipt["notes"]):
        state = "has an output.weight that bitnet.cpp ignores" if ignored else "has none that bitnet.cpp ignores"
        yield GateCheck("notes", False, f"the model {state}, the notes say otherwise")


def _rates(kind: Kind[Any], receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check the fractions of equal results; engines checked independently have none unless it is demanded."""
    parity = receipt["parity"]
    rate = parity["exact_match_rate"]
    one_sided = kind.one_sided or "unused" in [receipt[side]["status"] for side in SIDES]
    if kind.counted is not None and (policy.min_exact_match > 0 or not one_sided):
        yield at_least("exact match", rate, policy.min_exact_match, f" of the {kind.counted}")
    for unit, least, found in (
        ("token", policy.min_token_match, rate),
        ("logit", policy.min_logit_match, parity["logits_exact_match_rate"]),
    ):
        if least is not None:
            yield at_least(f"{unit} match", found, least, f" of the {unit}s")


def _coverage(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check how much of what was required was compared, and the taps that a policy names, row by row."""
    if policy.min_coverage is not None:
        counts = receipt["coverage"]
        share = counts["compared"] / counts["required"] if counts["required"] else None
        yield at_least("coverage", share, policy.min_coverage)
    for tap, limits in policy.taps.items():
        rows = [one for one in receipt["results"]["rows"] if tap in (one["tap"], one["tap"].rpartition(".")[2])]
        wrong = [
            f"{one['tap']}, pass {one['pass_index']}: {one[METRICS[name]]}, {name} {limit:g}"
            for one in rows
            for name, limit in limits.items()
            if not _within(one[METRICS[name]], name, limit)
        ]
        detail = f"{len(rows)} rows" if rows else "no row of this tap was compared"
        yield GateCheck(f"taps: {tap}", bool(rows) and not wrong, wrong[0] if wrong else detail)


def _within(value: float | None, name: str, limit: float) -> bool:
    if value is None:
        return False
    return value >= limit if name.startswith("min") else value <= limit
