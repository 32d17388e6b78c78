"""What CI holds a receipt to: it must be true (recomputed from its own rows) and good enough (the policy).

No status string is believed. What a digest that the receipt carries itself cannot prove is in docs/receipts.md.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_py.bench import spread
from crossval.audit.summary import audit_verdict, within_of
from crossval.bench import figures
from crossval.bench import receipt as bench_results
from crossval.compare import rows as compare
from crossval.engines.party import REFERENCE_NAME
from crossval.errors import BadInputError
from crossval.examine import greedy_verdict
from crossval.receipts import consistency, evidence
from crossval.receipts.file import Receipt, digest
from crossval.repeat.metamorphic import receipt as metamorphic_results
from crossval.schema import parse_json, validate_policy
from crossval.terms import SIDES

MAX_POLICY_BYTES = 1 << 20
CLOCK_SKEW = datetime.timedelta(minutes=5)
_MAX_COMPLAINTS = 5
COUNTED: dict[str, str] = {
    "greedy": "tokens",
    "layers": "values",
    "diff": "values",
    "smoke": "texts",
    "bench": "passes",
    "metamorphic": "checks",
    "selftest": "comparisons",
}
"""What ``parity.exact_match_rate`` is a share of, by kind of receipt."""


@dataclass(frozen=True)
class Policy:
    """What the gate demands beyond the receipt being true; fields as in ``schemas/policy.v1.schema.json``."""

    min_exact_match: float = 0.0
    """Least ``parity.exact_match_rate``, whatever a receipt of its kind counts (``COUNTED``)."""
    min_token_match: float | None = None
    """Least share of equal tokens (``greedy``)."""
    min_logit_match: float | None = None
    """Least share of bit-equal logits (``greedy``, ``layers``, ``diff``)."""
    min_cosine: float | None = None
    require_bitwise: bool = False
    require_live: bool = False
    max_age_days: float | None = None
    allow_fallback: bool = False
    allow_dirty: bool = True
    allow_compute_paths: tuple[str, ...] = ()
    reference_names: tuple[str, ...] = (REFERENCE_NAME,)
    model_sha256: tuple[str, ...] | None = None
    min_tokens: int = 1
    tolerance: str = "independent"
    allow_precision: tuple[str, ...] = ()
    """16-bit formats accepted of engines that do not state them (``layers``, ``diff``)."""
    min_correct: float = 0.7
    """Least share of correct answers of every engine (``smoke``), whatever the command itself was asked for."""
    min_prefill_ratio: float | None = None
    """Least median ratio of the candidate's prompt speed to the reference's (``bench``)."""
    min_decode_ratio: float | None = None
    """The same of decoding."""
    min_greedy_ratio: float | None = None
    """The same of greedy decoding."""
    accept_within: float | None = None
    """Relative L2 distance up to which agreement counts where too little was recorded to show more."""

    @property
    def min_ratios(self) -> dict[str, float]:
        """The ratios asked for, by name of the measure."""
        asked = {
            "prefill": self.min_prefill_ratio,
            "decode": self.min_decode_ratio,
            "greedy": self.min_greedy_ratio,
        }
        return {name: least for name, least in asked.items() if least is not None}


def read_policy(path: str | Path) -> Policy:
    """Return the policy in a JSON file; what it leaves out keeps its default.

    Raises:
        BadInputError: unreadable, not strict JSON, or against the schema.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise BadInputError(f"cannot read policy {file}: {error.strerror or error}") from error
    if len(data) > MAX_POLICY_BYTES:
        raise BadInputError(f"{file}: larger than {MAX_POLICY_BYTES} bytes")
    value = parse_json(data, str(file))
    validate_policy(value, str(file))
    given: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    given.pop("schema_version")
    return Policy(**given)


@dataclass(frozen=True)
class Check:
    """One thing the gate looked at."""

    name: str
    passed: bool
    detail: str


def judge(receipt: Receipt, policy: Policy | None = None, now: datetime.datetime | None = None) -> list[Check]:
    """Return every check of a receipt that is valid by the schema; it passes when all of them do.

    Raises:
        BadInputError: a pattern among the expected answers is unusable or takes too long.
    """
    policy = policy or Policy()
    now = now or datetime.datetime.now(datetime.timezone.utc)
    checks = [_digest(receipt), _age(receipt, policy, now)]
    if receipt["reference"]["status"] == "unavailable" or receipt["thresholds"] is None:
        return [*checks, Check("reference", False, "an engine was unavailable: nothing was compared")]
    for name, function in consistency.checks_of(receipt).items():
        complaints = function(receipt)
        checks.append(Check(name, not complaints, _join(complaints) or "recomputed, as stated"))
    return [*checks, *_policy_checks(receipt, policy)]


def passed(checks: Sequence[Check]) -> bool:
    """Return whether a receipt passes: at least one check, and none failed."""
    return bool(checks) and all(check.passed for check in checks)


def _join(complaints: Sequence[str]) -> str:
    shown = "; ".join(complaints[:_MAX_COMPLAINTS])
    more = len(complaints) - _MAX_COMPLAINTS
    return f"{shown}; and {more} more" if more > 0 else shown


def _digest(receipt: Receipt) -> Check:
    computed = digest(receipt)
    same = computed == receipt["digest"]
    detail = computed[:16] if same else f"says {receipt['digest'][:16]}…, contents give {computed[:16]}…: edited"
    return Check("digest", same, detail)


def _age(receipt: Receipt, policy: Policy, now: datetime.datetime) -> Check:
    text = receipt["created_at"]
    try:
        created = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        return Check("age", False, f"created_at {text} is no date")
    if created > now + CLOCK_SKEW:
        return Check("age", False, f"created_at {text} lies in the future")
    days = (now - created) / datetime.timedelta(days=1)
    allowed = policy.max_age_days
    detail = f"{max(days, 0.0):.1f} days" + ("" if allowed is None else f", {allowed:g} allowed")
    return Check("age", allowed is None or days <= allowed, detail)


def _policy_checks(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    yield _verdict(receipt, policy)
    yield _compared(receipt, policy)
    if receipt["kind"] == "smoke":
        yield from _answers(receipt, policy)
    if receipt["kind"] == "metamorphic":
        yield from _relations(receipt)
    yield from _ratios(receipt, policy)
    if receipt["kind"] in (*evidence.AUDITED, "greedy"):
        yield from _audits(receipt, policy)
    yield from _reference(receipt, policy)
    yield _distinct(receipt)
    yield from _compute(receipt, policy)
    yield from _model(receipt, policy)
    yield from _exactness(receipt, policy)


def _verdict(receipt: Receipt, policy: Policy) -> Check:
    verdict = consistency.recompute(receipt)["verdict"]
    good = ["pass"] if receipt["kind"] in evidence.NO_NUMBERS else ["parity"]
    detail = f"{verdict} (recomputed)"
    if verdict == "agrees_within":
        found = max(within_of((receipt["audit"] or {}).get(side)) for side in SIDES)
        asked = "no distance" if policy.accept_within is None else f"{policy.accept_within:g}"
        detail = f"agrees within {found:.3g} (recomputed), {asked} accepted"
        if policy.accept_within is not None and found <= policy.accept_within:
            good.append(verdict)
    return Check("verdict", verdict in good and verdict == receipt["verdict"], detail)


def _compared(receipt: Receipt, policy: Policy) -> Check:
    """Check that enough was compared: rows with elements, or answers, over enough tokens or steps."""
    if receipt["kind"] == "smoke":
        answers = receipt["results"]["rows"]
        n_tokens = sum(len(row["token_ids"]) for row in answers)
        detail = f"{len(answers)} answers, {n_tokens} tokens generated ({policy.min_tokens} required)"
        return Check("compared", bool(answers) and n_tokens >= policy.min_tokens, detail)
    if receipt["kind"] == "selftest":
        found = receipt["results"]["rows"]
        n_tokens = sum(row["n_prompt"] + row["n_decode"] for row in found)
        detail = f"{len(found)} comparisons, {n_tokens} tokens ({policy.min_tokens} required)"
        return Check("compared", bool(found) and n_tokens >= policy.min_tokens, detail)
    if receipt["kind"] == "metamorphic":
        checks, n_tokens = receipt["results"]["rows"], len(receipt["prompt"]["token_ids"])
        n_elements = sum(check["n_compared"] for check in checks)
        detail = f"{len(checks)} checks, {n_elements} elements, {n_tokens} tokens ({policy.min_tokens} required)"
        return Check("compared", n_elements > 0 and n_tokens >= policy.min_tokens, detail)
    if receipt["kind"] == "bench":
        work = bench_results.from_json(receipt).work
        n_tokens, n_passes = work.n_prompt + work.n_decode, receipt["coverage"]["compared"]
        detail = f"{n_passes} passes, {n_tokens} tokens ({policy.min_tokens} required)"
        return Check("compared", n_passes > 0 and n_tokens >= policy.min_tokens, detail)
    rows = [row for _, row in consistency.rows_of(receipt)]
    results = receipt["results"]
    if receipt["kind"] == "greedy":
        n_tokens, unit = sum(len(prompt["steps"]) for prompt in results["prompts"]), "steps"
    else:
        n_tokens, unit = sum(len(one["token_ids"]) for one in results["passes"]), "tokens"
    n_elements = sum(row.n_elements for row in rows)
    detail = f"{len(rows)} rows, {n_elements} elements, {n_tokens} {unit} ({policy.min_tokens} required)"
    return Check("compared", bool(rows) and n_elements > 0 and n_tokens >= policy.min_tokens, detail)


def _answers(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    """Check the share of correct answers of each engine against the policy's, not the command's."""
    for engine in consistency.recompute(receipt)["results"]["summary"]["engines"]:
        correct, n_prompts = engine["all"]["correct"], engine["all"]["n_prompts"]
        met = n_prompts > 0 and correct / n_prompts >= policy.min_correct
        detail = f"{correct} of {n_prompts} correct, {policy.min_correct:g} required"
        yield Check(f"answers of the {engine['engine']}", met, detail)


def _relations(receipt: Receipt) -> Iterator[Check]:
    """Check that every relation of each engine is shown, whatever the command itself was asked for."""
    for side in SIDES:
        if receipt[side]["status"] != "unused":
            missing = metamorphic_results.unproved(receipt, side)
            detail = f"not shown: {', '.join(missing)}" if missing else "all of them"
            yield Check(f"relations of the {side}", not missing, detail)


def _ratios(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    """Check the speed ratios against the policy's, whatever the command itself was asked for."""
    for name, least in policy.min_ratios.items():
        if receipt["kind"] != "bench":
            yield Check(f"{name} ratio", False, f"a {receipt['kind']} receipt holds no speeds")
            continue
        ratio = spread(figures.ratios(bench_results.from_json(receipt).taken[name]))
        met = ratio is not None and ratio.median >= least
        yield Check(
            f"{name} ratio", met, f"{_number(None if ratio is None else ratio.median)}, {least:g} required"
        )


def _audits(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    """Check that every operation of both engines was judged and is within its bound.

    In ``greedy``, bit-equal logits make one engine's clean audit enough for both, and a receipt from before it
    audited shows equal bits or nothing.
    """
    audits = receipt["audit"]
    exact = receipt["kind"] == "greedy" and greedy_verdict.is_exact(receipt["parity"])
    if audits is None:
        shown = "all logits are bit-equal" if exact else "the arithmetic was not checked"
        yield Check("arithmetic", exact, f"none, made before greedy comparisons were audited; {shown}")
        return
    for side in SIDES:
        audit, verdict = audits[side], audit_verdict(audits[side])
        detail = f"{verdict}: there is none"
        if audit is not None:
            detail = f"{verdict}, {audit['n_covered']} of {audit['n_ops']} operations judged"
        accepted = policy.accept_within is not None and within_of(audit) <= policy.accept_within
        vouched = verdict != "clean" and greedy_verdict.vouched(side, audits, exact)
        detail += "; its logits are bit-equal to those of the other engine, which is right" if vouched else ""
        fine = verdict == "clean" or vouched or (verdict == "within" and accepted)
        yield Check(f"audit of the {side}", fine, detail)
        yield from _precision(side, (audit or {}).get("precision"), policy)


def _precision(side: str, found: dict[str, Any] | None, policy: Policy) -> Iterator[Check]:
    """Check that a 16-bit format is stated by the engine or allowed: parity within it is less than parity."""
    if found is None or found["scope"] == "some":
        return
    dtype, declared = found["dtype"], found["declared"]
    detail = f"{dtype}, {'as the engine states' if declared else 'which the engine does not state'}"
    if not declared:
        detail += f"; accepted: {', '.join(policy.allow_precision) or 'none'}"
    yield Check(f"precision of the {side}", declared or dtype in policy.allow_precision, detail)


def _reference(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    reference = receipt["reference"]
    name, status = reference["name"], reference["status"]
    if status == "unused":
        if policy.require_live:
            yield Check("live reference", False, "the reference did not take part")
        return
    allowed = ", ".join(policy.reference_names)
    yield Check("reference", name in policy.reference_names, f"{name}; accepted: {allowed}")
    if policy.require_live:
        yield Check("live reference", status == "live", f"reference is {status}")
    if status == "recorded" and not reference["trace_digest"]:
        yield Check("recorded reference", False, "no trace_digest: which trace it was cannot be told")
    if name == REFERENCE_NAME:
        known = bool(reference["library_digest"])
        yield Check("reference build", known, reference["library_digest"] or "library_digest is not known")


def _distinct(receipt: Receipt) -> Check:
    """Check that two engines were compared, not one with itself."""
    ours, theirs = receipt["candidate"], receipt["reference"]
    unused = [side for side in ("candidate", "reference") if receipt[side]["status"] == "unused"]
    if unused:
        return Check("two parties", True, f"the {unused[0]} did not take part")
    for field_name in ("name", "library_digest", "trace_digest"):
        if ours[field_name] is not None and ours[field_name] == theirs[field_name]:
            return Check("two parties", False, f"candidate and reference have the same {field_name}")
    return Check("two parties", True, f"{ours['name']} against {theirs['name']}")


_PATH_OF_NAME = {"bitnet_py": "real", "specification": "specification"}


def _expected_path(candidate: dict[str, Any]) -> str:
    if candidate["status"] == "recorded":
        return "recorded"
    if candidate["status"] == "unused":
        return "none"
    return _PATH_OF_NAME.get(candidate["name"], "none")


def _compute(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    compute, candidate = receipt["compute"], receipt["candidate"]
    path, kernels = compute["path"], compute["kernels"]
    expected = _expected_path(candidate)
    if path != expected:
        yield Check(
            "compute path", False, f"{path}, but the candidate is {candidate['status']} {candidate['name']}"
        )
    elif path == "real":
        ran = [k for k in kernels if is_quantized(k["name"]) and k["calls"] > 0 and k["bytes"] > 0]
        names = ", ".join(f"{k['name']} x{k['calls']}" for k in ran)
        yield Check("compute path", bool(ran), f"real: {names}" if ran else "no quantised kernel ran")
    else:
        yield Check("compute path", path in policy.allow_compute_paths, f"{path}: the policy must allow it")
    if path != "real" and kernels:
        yield Check("kernels", False, f"counters of a library, but the compute path is {path}")
    if len({k["name"] for k in kernels}) != len(kernels):
        yield Check("kernels", False, "a kernel is listed twice")
    fallback = compute["fallback"]
    detail = "a slower kernel than the CPU offers ran unasked" if fallback else "none"
    yield Check("fallback", not fallback or policy.allow_fallback, detail)


def is_quantized(kernel: str) -> bool:
    """Return whether a counter belongs to a kernel that multiplies packed ternary weights."""
    return "i2s" in kernel.lower().replace("_", "")


def _model(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    model = receipt["model"]
    if policy.model_sha256 is not None:
        yield Check("model", model["sha256"] in policy.model_sha256, model["sha256"])
    noted = any("output.weight" in note for note in receipt["notes"])
    if model["separate_output"] != noted:
        state = "has its own output.weight" if model["separate_output"] else "ties its head to the embedding"
        yield Check("notes", False, f"the model {state}, the notes say otherwise")
    if not policy.allow_dirty:
        yield Check("clean tool", receipt["tool"]["dirty"] is False, f"tool.dirty is {receipt['tool']['dirty']}")


def _exactness(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    rate, cosine = receipt["parity"]["exact_match_rate"], receipt["parity"]["cosine_similarity"]
    parties = (receipt["candidate"]["status"], receipt["reference"]["status"])
    single = "unused" in parties or receipt["kind"] == "metamorphic"
    if policy.min_exact_match > 0 or not single:
        met = rate is not None and rate >= policy.min_exact_match
        detail = f"{_number(rate)} of the {COUNTED[receipt['kind']]}, {policy.min_exact_match:g} required"
        yield Check("exact match", met, detail)
    yield from _matches(receipt, policy)
    if policy.min_cosine is not None:
        met = cosine is not None and cosine >= policy.min_cosine
        yield Check("cosine", met, f"{_number(cosine)}, {policy.min_cosine:g} required")
    if receipt["kind"] == "bench":  # its passes are equal in every bit or do not count
        if policy.require_bitwise:
            yield Check("bitwise", rate == 1.0, f"{_number(rate)} of the passes have equal logits")
        return
    if receipt["kind"] in evidence.NO_NUMBERS:
        asked = {"bitwise": policy.require_bitwise, "tolerance": policy.tolerance == "same"}
        detail = f"a {receipt['kind']} receipt holds no numbers"
        yield from (Check(name, False, detail) for name in asked if asked[name])
        return
    if policy.require_bitwise:
        inexact = [where for where, row in consistency.rows_of(receipt) if compare.row_status(row) != "equal"]
        yield Check("bitwise", not inexact, f"first inexact: {inexact[0]}" if inexact else "all bits equal")
    if policy.tolerance == "same":
        used = consistency.expected_thresholds(receipt)["policy"]
        yield Check("tolerance", used == "same", f"these engines are held to the {used!r} table")


def _matches(receipt: Receipt, policy: Policy) -> Iterator[Check]:
    """Check the shares of equal tokens and of bit-equal logits, of receipts that count them."""
    kind, parity = receipt["kind"], receipt["parity"]
    asked = (
        ("token match", "tokens", policy.min_token_match, "exact_match_rate", ("greedy",)),
        (
            "logit match",
            "logits",
            policy.min_logit_match,
            "logits_exact_match_rate",
            ("greedy", *evidence.AUDITED),
        ),
    )
    for name, unit, least, rate_name, kinds in asked:
        if least is None:
            continue
        if kind not in kinds:
            yield Check(name, False, f"a {kind} receipt counts no {unit}")
            continue
        rate = parity[rate_name]
        yield Check(name, rate is not None and rate >= least, f"{_number(rate)} of the {unit}, {least:g} required")


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.6g}"
