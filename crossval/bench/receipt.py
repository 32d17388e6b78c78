"""Receipts of kind ``bench``: measurements as JSON and back, and what must follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from bitnet_py.bench import READ_BUFFER_BYTES, READ_PASSES, spread
from crossval.bench.figures import (
    BenchFindings,
    Taken,
    bytes_per_token,
    complete,
    decide,
    figures,
    machine_rates,
    missed,
    n_required,
    ratios,
    read_rates,
)
from crossval.bench.measures import BOUNDED, MEASURES, N_FIRST, N_PROCESSES, Measure, Work
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.party import family_of, is_quantized
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import vocabulary_conflicts
from crossval.terms import SIDES


def to_json(findings: BenchFindings) -> dict[str, Any]:
    """Return the fields of the receipt that hold a benchmark."""
    return {"thresholds": {"min_ratios": dict(findings.min_ratios)}, "results": results_to_json(findings)}


def results_to_json(findings: BenchFindings) -> dict[str, Any]:
    """Return the receipt's ``results``: what was measured, and everything that follows from it."""
    work = {name: value for name, value in asdict(findings.work).items() if name != "vocab_size"}
    return {
        "work": {**work, "kernel": findings.kernel},
        "measures": {measure.name: _measure(measure, findings) for measure in MEASURES},
        "machine": {
            "read_bytes": findings.read_bytes,
            "read_s": list(findings.read_s),
            "bytes_per_s": _spread(machine_rates(findings)),
        },
        "missed": missed(findings),
    }


def _measure(measure: Measure, findings: BenchFindings) -> dict[str, Any]:
    taken, work = findings.taken[measure.name], findings.work
    found = ratios(taken)
    sides: dict[str, Any] = {
        side: {"raw": list(raw), "figure": _spread(figures(measure, work, raw))} for side, raw in taken.raw.items()
    }
    return {
        "unit": measure.unit,
        "n_tokens": measure.n_tokens(work),
        **sides,
        "ratios": found,
        "ratio": _spread(found),
        "passes": {"compared": taken.n_compared, "equal": taken.n_equal},
        "reads": _reads(measure, findings) if measure.reads else None,
    }


def _reads(measure: Measure, findings: BenchFindings) -> dict[str, Any]:
    """Return how fast the candidate read, and which fraction of the machine's bandwidth that is, per round."""
    taken, work = findings.taken[measure.name], findings.work
    rates = read_rates(measure, work, taken)
    shares = [rate / machine for rate, machine in zip(rates, machine_rates(findings), strict=False)]
    return {
        "weights": [{"name": name, "bytes": n} for name, n in taken.reads.items()],
        "bytes_per_token": bytes_per_token(measure, work, taken),
        "bytes_per_s": _spread(rates),
        "shares": shares,
        "share": _spread(shares),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    found = spread(values)
    return None if found is None else asdict(found)


def summarize(findings: BenchFindings) -> Summary:
    """Return verdict and coverage; ``exact_match_rate`` is the fraction of passes with bit-identical logits."""
    compared = sum(taken.n_compared for taken in findings.taken.values())
    equal = sum(taken.n_equal for taken in findings.taken.values())
    return Summary(
        status=decide(findings),
        required=n_required(findings),
        compared=compared,
        exact_match_rate=equal / compared if compared else None,
    )


# --- checks ---------------------------------------------------------------------------------------------------


def from_json(receipt: Receipt) -> BenchFindings:
    """Return the findings of a valid ``bench`` receipt: raw values are read, everything else is recomputed."""
    results = receipt["results"]
    given = dict(results["work"])
    kernel = given.pop("kernel")
    return BenchFindings(
        work=Work(**given, vocab_size=receipt["model"]["shape"]["vocab_size"]),
        kernel=kernel,
        taken={measure.name: _taken(results["measures"][measure.name]) for measure in MEASURES},
        read_bytes=results["machine"]["read_bytes"],
        read_s=tuple(results["machine"]["read_s"]),
        min_ratios=receipt["thresholds"]["min_ratios"],
    )


def _taken(data: Mapping[str, Any]) -> Taken:
    weights = [] if data["reads"] is None else data["reads"]["weights"]
    raw = {side: tuple(data[side]["raw"]) for side in SIDES}
    reads = {one["name"]: one["bytes"] for one in weights}
    return Taken(raw, data["passes"]["compared"], data["passes"]["equal"], reads)


def workload(receipt: Receipt) -> list[str]:
    """Check that both engines ran live, on the tokens, threads and kernel that the receipt states."""
    findings = from_json(receipt)
    work, settings, ids = findings.work, receipt["settings"], receipt["prompt"]["token_ids"]
    complaints = [
        f"the {side} is {receipt[side]['status']}; only a live engine can be measured"
        for side in SIDES
        if receipt[side]["status"] != "live"
    ]
    complaints += vocabulary_conflicts(receipt)
    if (work.n_first, work.n_processes) != (N_FIRST, N_PROCESSES):
        complaints.append(
            f"{work.n_processes} fresh processes on {work.n_first} tokens, "
            f"this version runs {N_PROCESSES} on {N_FIRST}"
        )
    if findings.read_bytes != READ_BUFFER_BYTES * READ_PASSES:
        complaints.append(
            f"{findings.read_bytes} bytes read, this version reads {READ_BUFFER_BYTES * READ_PASSES}"
        )
    if ids != work.prompt_ids:
        complaints.append("prompt.token_ids are not those that seed, length and vocabulary give")
    if work.n_context > receipt["model"]["shape"]["context_length"]:
        complaints.append(f"{work.n_context} tokens do not fit the model's context")
    counts = {"n_threads": work.n_threads, "n_decode": work.n_decode}
    complaints += [
        f"settings.{name} is {settings[name]}, results.work says {value}"
        for name, value in counts.items()
        if settings[name] != value
    ]
    threads = {side: receipt[side]["settings"].get("n_threads") for side in SIDES}
    complaints += [
        f"the {side} ran with {n_threads} threads, results.work says {work.n_threads}"
        for side, n_threads in threads.items()
        if n_threads != work.n_threads
    ]
    ran = receipt["candidate"]["settings"].get("kernel")
    if findings.kernel not in (None, ran):
        complaints.append(f"kernel {findings.kernel} was requested, {ran} ran")
    return complaints


def measurements(receipt: Receipt) -> list[str]:
    """Check that every measure has as many values and compared passes as the work requires."""
    findings = from_json(receipt)
    complaints = [] if complete(findings) else ["values are missing, or passes were not compared"]
    if set(findings.min_ratios) != set(BOUNDED):
        complaints.append(f"thresholds.min_ratios is not of {', '.join(BOUNDED)}")
    for name, taken in findings.taken.items():
        if taken.n_equal > taken.n_compared:
            complaints.append(f"{name}: {taken.n_equal} of {taken.n_compared} passes are equal")
    return complaints


def reads(receipt: Receipt) -> list[str]:
    """Check that the bytes read follow from the model's shape and are part of the library's counters."""
    findings = from_json(receipt)
    return [
        f"{measure.name}: {what}"
        for measure in MEASURES
        if measure.reads
        for what in _read_conflicts(measure, findings.taken[measure.name], findings.work, receipt)
    ]


def _read_conflicts(measure: Measure, taken: Taken, work: Work, receipt: Receipt) -> Iterator[str]:
    stated = receipt["results"]["measures"][measure.name]["reads"]
    if stated is not None and len(stated["weights"]) != len(taken.reads):
        yield "an operation is listed twice"
    totals = {kernel["name"]: kernel["bytes"] for kernel in receipt["compute"]["kernels"]}
    for name, n in taken.reads.items():
        if n > totals.get(name, 0):
            yield f"{name} read {n} bytes of weights, {totals.get(name, 0)} by the counters of the whole run"
    ran = receipt["candidate"]["settings"].get("kernel")
    ternary = [name for name in taken.reads if is_quantized(name)]
    if [family_of(name) for name in ternary] != [ran]:
        yield f"ternary weights were read by {', '.join(ternary) or 'nothing'}, the kernel is {ran}"
    n_tokens = measure.n_tokens(work) * len(taken.raw["candidate"])
    expected = n_tokens * ternary_bytes(receipt["model"]["shape"])
    found = sum(taken.reads[name] for name in ternary)
    if found != expected:
        yield f"{found} bytes of ternary weights for {n_tokens} tokens, the model's shape gives {expected}"


def ternary_bytes(shape: Mapping[str, int]) -> int:
    """Return the bytes of all ternary matrices of a model, four weights in a byte; one token reads each once."""
    dim, kv_dim, hidden = shape["dim"], shape["n_kv_heads"] * shape["head_dim"], shape["hidden_dim"]
    return shape["n_layers"] * (2 * dim * dim + 2 * dim * kv_dim + 3 * dim * hidden) // 4


def amount(receipt: Receipt) -> Amount:
    """Return how many passes were compared; tokens of prompt and decoding."""
    work, n_passes = from_json(receipt).work, receipt["coverage"]["compared"]
    n_tokens = work.n_prompt + work.n_decode
    return Amount(n_passes, n_tokens, f"{n_passes} passes, {n_tokens} tokens")


def median_ratios(receipt: Receipt) -> dict[str, float | None]:
    """Return the median ratio of every measure, recomputed."""
    found = {name: spread(ratios(taken)) for name, taken in from_json(receipt).taken.items()}
    return {name: None if one is None else one.median for name, one in found.items()}


def exactness(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check that the logits of every pass are bit-identical."""
    if policy.require_bitwise:
        rate = receipt["parity"]["exact_match_rate"]
        shown = "null" if rate is None else f"{rate:.6g}"
        yield GateCheck("bitwise", rate == 1.0, f"{shown} of the passes have equal logits")


BENCH = Kind[BenchFindings](
    name="bench",
    counted="passes",
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    derived=results_to_json,
    checks={"workload": workload, "measurements": measurements, "reads": reads},
    amount=amount,
    exactness=exactness,
    ratios=median_ratios,
)
