"""A policy made of a receipt that one trusts: ``crossval gate --init``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from crossval.receipts.file import Receipt
from crossval.receipts.policy import Policy, demands

HEAD = (
    "# Made by `crossval gate --init` of a receipt of kind {kind} (digest {digest}).\n"
    "# Fields: docs/policy.md. Remove what a later receipt may change; what is commented out was seen, too.\n"
)
COMMENTED = {
    "candidate_library_digest": "the library under test changes with every build of it",
    "max_age_days": "an example: a receipt does not say how old it may become",
}


def policy_text(receipt: Receipt) -> str:
    """Return a policy in YAML that accepts a receipt, and others as good of the same model, engines, version."""
    lines = [HEAD.format(kind=receipt["kind"], digest=receipt["digest"]), "schema_version: 1\n"]
    for name, value in _seen(receipt):
        comment = COMMENTED.get(name)
        text = f"{name}: {json.dumps(value, ensure_ascii=False)}"
        lines.append(f"# {text} # {comment}\n" if comment else f"{text}\n")
    return "".join(lines)


def _seen(receipt: Receipt) -> Iterator[tuple[str, Any]]:
    """Yield the fields that mean this kind, with what the receipt states; nothing of what it does not state."""
    kind, reference, candidate = receipt["kind"], receipt["reference"], receipt["candidate"]
    parity, compute, coverage = receipt["parity"], receipt["compute"], receipt["coverage"]
    live, recorded = reference["status"] == "live", reference["status"] == "recorded"
    deviations = {one for side in (receipt["audit"] or {}).values() for one in _deviations(side)}
    path, on_cpu = compute["path"], candidate["status"] == "live"
    # fmt: off
    seen: dict[str, Any] = {
        "kinds": [kind],
        "require_live": live or None,
        "min_exact_match": parity["exact_match_rate"],
        "min_logit_match": parity["logits_exact_match_rate"],
        "min_coverage": coverage["compared"] / coverage["required"] if coverage["required"] else None,
        "max_age_days": 30,
        "allow_precision": sorted({one for side in (receipt["audit"] or {}).values() for one in _precision(side)}),
        "allow_deviation": sorted(deviations),
        "allow_reference_graph": receipt["settings"].get("follow_reference_graph"),
        "allow_fallback": compute["fallback"] or None,
        "allow_compute_paths": [path] if path in ("recorded", "specification", "none") else None,
        "allow_dirty": False if receipt["tool"]["dirty"] is False else None,
        "tool_version": _listed(receipt["tool"]["version"]),
        "model_sha256": _listed(receipt["model"]["sha256"]),
        "candidate_library_digest": _listed(candidate["library_digest"]) if on_cpu else None,
        "reference_names": _listed(reference["name"]) if live or recorded else None,
        "reference_generation": _listed(reference["numerics"].get("generation")) if live or recorded else None,
        "reference_library_digest": _listed(reference["library_digest"]) if live else None,
        "reference_source_digest": _listed(reference["source_digest"]) if live else None,
        "reference_trace_digest": _listed(reference["trace_digest"]) if recorded else None,
        "allow_unknown_provenance": False if live or recorded else None,
    }
    # fmt: on
    default = Policy()
    for name, demand in demands().items():
        if seen.get(name) not in (None, [], getattr(default, name)) and kind in demand.kinds:
            yield name, seen[name]


def _listed(value: Any) -> list[Any] | None:
    return None if value is None else [value]


def _deviations(audit: dict[str, Any] | None) -> list[str]:
    found = (audit or {}).get("products") or {}
    return [one for named in (found.get("deviations", []), *found.get("alternatives", [])) for one in named]


def _precision(audit: dict[str, Any] | None) -> list[str]:
    found = (audit or {}).get("precision")
    return [found["dtype"]] if found and found["scope"] != "some" and not found["declared"] else []
