"""A benchmark as a receipt's JSON and back, and that receipt held against itself.

The checks return complaints, empty when all is well, as in ``crossval.receipts.consistency``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from crossval.terms import Side

SIDES: tuple[Side, ...] = ("candidate", "reference")


def criterion(findings: BenchFindings) -> dict[str, Any]:
    """Return the smallest ratios asked for, as the receipt's ``thresholds``."""
    return {"min_ratios": dict(findings.min_ratios)}


def to_json(findings: BenchFindings) -> dict[str, Any]:
    """Return the receipt's ``results``: what was taken, and everything that follows from it."""
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
    """Return what the candidate read, beside what the machine reads; a share per round."""
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


def summarize(findings: BenchFindings) -> dict[str, Any]:
    """Return the receipt's summary fields; ``exact_match_rate`` is the share of passes with equal logits."""
    verdict = decide(findings)
    compared = sum(taken.n_compared for taken in findings.taken.values())
    equal = sum(taken.n_equal for taken in findings.taken.values())
    return {
        "first_divergence": None,
        "first_inexact": None,
        "coverage": {"required": n_required(findings), "compared": compared, "skipped": []},
        "parity": {
            "cosine_similarity": None,
            "exact_match_rate": equal / compared if compared else None,
            "logits_exact_match_rate": None,
            "cpp_available": False,
            "status": verdict,
        },
        "verdict": verdict,
    }


# --- a receipt against itself ---------------------------------------------------------------------------------


def from_json(receipt: Receipt) -> BenchFindings:
    """Return the findings of a valid ``bench`` receipt: what was taken is read, all else is computed."""
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


def recompute(receipt: Receipt) -> dict[str, Any]:
    """Return summary fields, figures and ratios as the receipt's own measurements give them."""
    findings = from_json(receipt)
    return {**summarize(findings), "results": to_json(findings)}


def workload(receipt: Receipt) -> list[str]:
    """Check that both engines ran live, on the tokens, threads and kernel that the receipt states."""
    findings = from_json(receipt)
    work, settings, ids = findings.work, receipt["settings"], receipt["prompt"]["token_ids"]
    vocab_size = receipt["tokenizer"]["vocab_size"]
    complaints = [
        f"the {side} is {receipt[side]['status']}; only a live engine can be measured"
        for side in SIDES
        if receipt[side]["status"] != "live"
    ]
    if vocab_size != work.vocab_size:
        complaints.append(f"tokenizer.vocab_size is {vocab_size}, the model's is {work.vocab_size}")
    if (work.n_first, work.n_processes) != (N_FIRST, N_PROCESSES):
        complaints.append(
            f"{work.n_processes} fresh processes on {work.n_first} tokens, "
            f"this version takes {N_PROCESSES} on {N_FIRST}"
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
        complaints.append(f"kernel {findings.kernel} was asked for, {ran} ran")
    return complaints


def measurements(receipt: Receipt) -> list[str]:
    """Check that every measure has as many values and compared passes as the work gives."""
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
    ternary = [name for name in taken.reads if name.startswith("i2s_")]
    if [name.rpartition("_")[2] for name in ternary] != [ran]:
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


CHECKS: Mapping[str, Callable[[Receipt], list[str]]] = {
    "workload": workload,
    "measurements": measurements,
    "reads": reads,
}
"""Name of a check -> function; the summary is checked with every other kind's."""
