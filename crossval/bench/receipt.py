"""Receipts of kind ``bench``: measurements as JSON and back, and what must follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from bitnet_py.bench import READ_BUFFER_BYTES, READ_PASSES, spread
from crossval.bench.figures import (
    BenchFindings,
    Further,
    Pair,
    Taken,
    all_taken,
    bytes_per_token,
    complete,
    decide,
    figures,
    flags,
    machine_rates,
    median_ratio,
    missed,
    n_required,
    ratios,
    read_rates,
    unshown,
)
from crossval.bench.measures import (
    BOUNDED,
    FIRST_TOKEN,
    MEASURES,
    N_FIRST,
    N_PROCESSES,
    ROUND,
    TRIED,
    Measure,
    Work,
)
from crossval.bench.search import N_TRIALS, Search, Setting, Tried
from crossval.compare.rows import choose_policy
from crossval.model.tolerance import PolicyName
from crossval.passes import Numerics
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.once import once
from crossval.receipts.party import PATH_OF_NAME, Party, family_of, is_quantized, same_engine
from crossval.receipts.policy import GateCheck, Policy
from crossval.receipts.values import vocabulary_conflicts
from crossval.terms import SIDES


def to_json(findings: BenchFindings) -> dict[str, Any]:
    """Return the fields of the receipt that hold a benchmark."""
    return {"thresholds": {"min_ratios": dict(findings.min_ratios)}, "results": results_to_json(findings)}


def results_to_json(findings: BenchFindings) -> dict[str, Any]:
    """Return the receipt's ``results``: what was measured, and everything that follows from it."""
    work = {name: value for name, value in asdict(findings.work).items() if name != "vocab_size"}
    first, *others = (_pair(pair, findings) for pair in findings.pairs)
    return {
        "work": {**work, "kernel": findings.kernel},
        **first,
        **({"references": others} if others else {}),
        "machine": {
            "read_bytes": findings.read_bytes,
            "read_s": list(findings.read_s),
            "bytes_per_s": _spread(machine_rates(findings)),
        },
        "missed": [*missed(findings), *unshown(findings)],
    }


def _pair(pair: Pair, findings: BenchFindings) -> dict[str, Any]:
    written: dict[str, Any] = {}
    if pair.further is not None:
        written = {
            "word": pair.further.word,
            "candidate_numerics": pair.further.candidate.to_json(),
            "reference": pair.further.reference.to_json(),
        }
    if pair.search is not None:
        written["search"] = {side: _search(one, findings) for side, one in pair.search.items()}
    return {**written, "measures": {measure.name: _measure(measure, pair, findings) for measure in MEASURES}}


def _search(search: Search, findings: BenchFindings) -> dict[str, Any]:
    """Return what was tried, and for each measure the setting chosen, by its place in the list."""
    settings = [one.setting for one in search.tried]
    chosen = {measure.name: search.chosen(measure.name) for measure in TRIED}
    return {
        "tried": [
            {
                "n_threads": one.setting.n_threads,
                "cores": list(one.setting.cores),
                "measures": {
                    measure.name: _values(measure, findings.work, one.raw.get(measure.name, ()))
                    for measure in TRIED
                },
            }
            for one in search.tried
        ],
        "chosen": {name: None if one is None else settings.index(one) for name, one in chosen.items()},
        "idle": search.idle,
        "not_pinned": search.not_pinned,
    }


def _values(measure: Measure, work: Work, raw: Sequence[float]) -> dict[str, Any]:
    return {"raw": list(raw), "figure": _spread(figures(measure, work, raw))}


def _measure(measure: Measure, pair: Pair, findings: BenchFindings) -> dict[str, Any]:
    taken, work = pair.taken[measure.name], findings.work
    found = ratios(measure, pair)
    sides: dict[str, Any] = {side: _values(measure, work, raw) for side, raw in taken.raw.items()}
    passes = {"compared": taken.n_compared, "equal": taken.n_equal}
    if pair.search is not None:
        for side in SIDES:
            sides[side]["flags"] = list(flags(measure, pair, side))
    if pair.policy != "same":
        passes["within"] = taken.n_within
    return {
        "unit": measure.unit,
        "n_tokens": measure.n_tokens(work),
        **sides,
        "ratios": found,
        "ratio": _spread(found),
        "passes": passes,
        "reads": _reads(taken, measure, findings) if measure.reads and taken.reads else None,
    }


def _reads(taken: Taken, measure: Measure, findings: BenchFindings) -> dict[str, Any]:
    """Return how fast the candidate read, and which fraction of the machine's bandwidth that is, per round."""
    work = findings.work
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
    return None if found is None else {**vars(found)}


def summarize(findings: BenchFindings) -> Summary:
    """Return verdict and coverage; ``exact_match_rate`` is the fraction of passes with bit-identical logits."""
    compared = sum(taken.n_compared for taken in all_taken(findings))
    equal = sum(taken.n_equal for taken in all_taken(findings))
    return Summary(
        status=decide(findings),
        required=n_required(findings),
        compared=compared,
        exact_match_rate=equal / compared if compared else None,
    )


# --- checks ---------------------------------------------------------------------------------------------------


@once
def from_json(receipt: Receipt) -> BenchFindings:
    """Return the findings of a valid ``bench`` receipt: raw values are read, everything else is recomputed."""
    results = receipt["results"]
    given = dict(results["work"])
    kernel = given.pop("kernel")
    n_threads = receipt["settings"]["n_threads"]
    ours, theirs = (Party.from_json(receipt[side]) for side in SIDES)
    pairs = [_pair_from_json(results, n_threads, choose_policy(ours.identity, theirs.identity))]
    for one in results.get("references", ()):
        further = Further(
            one["word"], Party.from_json(one["reference"]), Numerics.from_json(one["candidate_numerics"])
        )
        ours_there = replace(ours.identity, numerics=further.candidate)
        policy = choose_policy(ours_there, further.reference.identity)
        pairs.append(replace(_pair_from_json(one, n_threads, policy), further=further))
    return BenchFindings(
        work=Work(**given, vocab_size=receipt["model"]["shape"]["vocab_size"]),
        kernel=kernel,
        pairs=tuple(pairs),
        read_bytes=results["machine"]["read_bytes"],
        read_s=tuple(results["machine"]["read_s"]),
        min_ratios=receipt["thresholds"]["min_ratios"],
    )


def _pair_from_json(data: Mapping[str, Any], n_threads: int | None, policy: PolicyName) -> Pair:
    taken = {measure.name: _taken(data["measures"][measure.name]) for measure in MEASURES}
    found = data.get("search")
    search = None if found is None else {side: _search_from_json(found[side], n_threads) for side in SIDES}
    return Pair(taken, policy, search)


def _search_from_json(data: Mapping[str, Any], n_threads: int | None) -> Search:
    tried = tuple(
        Tried(
            Setting(one["n_threads"], tuple(one["cores"])),
            {name: tuple(values["raw"]) for name, values in one["measures"].items()},
        )
        for one in data["tried"]
    )
    return Search(tried, n_threads, data["idle"], data["not_pinned"])


def _taken(data: Mapping[str, Any]) -> Taken:
    weights = [] if data["reads"] is None else data["reads"]["weights"]
    raw = {side: tuple(data[side]["raw"]) for side in SIDES}
    reads = {one["name"]: one["bytes"] for one in weights}
    passes = data["passes"]
    return Taken(raw, passes["compared"], passes["equal"], reads, passes.get("within", 0))


def workload(receipt: Receipt) -> list[str]:
    """Check that all engines ran live, on the tokens, threads and kernel that the receipt states."""
    findings = from_json(receipt)
    work, settings, ids = findings.work, receipt["settings"], receipt["prompt"]["token_ids"]
    further = [pair.further for pair in findings.pairs if pair.further is not None]
    statuses: list[tuple[str, str]] = [(side, receipt[side]["status"]) for side in SIDES]
    statuses += [(one.word, one.reference.status) for one in further]
    complaints = [
        f"the {who} is {status}; only a live engine can be measured"
        for who, status in statuses
        if status != "live"
    ]
    for one in further:
        why = same_engine(receipt["candidate"], one.reference.to_json())
        complaints += [] if why is None else [f"candidate and reference {one.word} have {why}"]
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
    if settings["n_decode"] != work.n_decode:
        complaints.append(f"settings.n_decode is {settings['n_decode']}, results.work says {work.n_decode}")
    ran = receipt["candidate"]["settings"].get("kernel")
    if findings.kernel not in (None, ran):
        complaints.append(f"kernel {findings.kernel} was requested, {ran} ran")
    return complaints


def placement(receipt: Receipt) -> list[str]:
    """Check that every engine ran with threads that it was tried with, or that were asked for."""
    findings = from_json(receipt)
    work, asked = findings.work, receipt["settings"]["n_threads"]
    complaints = [] if asked in (None, work.n_threads) else [f"{asked} threads asked for, {work.n_threads} used"]
    if findings.pairs[0].search is None:
        ran = {side: receipt[side]["settings"].get("n_threads") for side in SIDES}
        return complaints + [
            f"the {side} ran with {n_threads} threads, results.work says {work.n_threads}"
            for side, n_threads in ran.items()
            if n_threads != work.n_threads
        ]
    for pair in findings.pairs:
        theirs = receipt["reference"] if pair.further is None else pair.further.reference.to_json()
        stated = {"candidate": receipt["candidate"]["settings"], "reference": theirs["settings"]}
        for side, search in (pair.search or {}).items():
            complaints += [f"{side}: {what}" for what in _search_conflicts(search, work, stated[side])]
    return complaints


def _search_conflicts(search: Search, work: Work, stated: Mapping[str, Any]) -> Iterator[str]:
    settings = [one.setting for one in search.tried]
    counts = {one.n_threads for one in settings}
    if len(set(settings)) != len(settings):
        yield "a setting was tried twice"
    if any(one.cores and not len(set(one.cores)) == len(one.cores) == one.n_threads for one in settings):
        yield "threads and the cores they were pinned to differ in number"
    if 1 not in counts or max(counts, default=0) != work.n_threads:
        yield f"tried with {sorted(counts)} threads, not with 1 to {work.n_threads}"
    if "n_threads" in stated and counts != {stated["n_threads"]}:
        yield f"settings state {stated['n_threads']} threads, it was tried with {sorted(counts)}"
    for measure in ROUND:
        if search.chosen(measure.name) is None:
            yield f"{measure.name} was not tried"
        if any(len(one.raw[measure.name]) != N_TRIALS for one in search.tried):
            yield f"{measure.name} was not tried {N_TRIALS} times in every setting"
    if any(len(one.raw[FIRST_TOKEN.name]) != (not one.setting.cores) for one in search.tried):
        yield "the first token was not tried once where the system places threads, and only there"


def measurements(receipt: Receipt) -> list[str]:
    """Check that every measure has as many values and compared passes as the work requires."""
    findings = from_json(receipt)
    complaints = [] if complete(findings) else ["values are missing, or passes were not compared"]
    if set(findings.min_ratios) != set(BOUNDED):
        complaints.append(f"thresholds.min_ratios is not of {', '.join(BOUNDED)}")
    for pair in findings.pairs:
        for name, taken in pair.taken.items():
            if taken.n_equal + taken.n_within > taken.n_compared:
                complaints.append(f"{name}: {taken.n_equal} of {taken.n_compared} passes are equal")
            if taken.n_within and pair.policy == "same":
                complaints.append(f"{name}: both engines state the same arithmetic, and bits differ")
    return complaints


def reads(receipt: Receipt) -> list[str]:
    """Check that the bytes read follow from the model's shape and are part of the library's counters."""
    if PATH_OF_NAME.get(receipt["candidate"]["name"]) != "real":
        return []
    findings = from_json(receipt)
    stated = [receipt["results"], *receipt["results"].get("references", ())]
    return [
        f"{measure.name}: {what}"
        for pair, data in zip(findings.pairs, stated, strict=True)
        for measure in MEASURES
        if measure.reads
        for what in _read_conflicts(
            measure, pair.taken[measure.name], findings.work, receipt, data["measures"][measure.name]["reads"]
        )
    ]


def _read_conflicts(
    measure: Measure, taken: Taken, work: Work, receipt: Receipt, stated: Mapping[str, Any] | None
) -> Iterator[str]:
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
    """Return the smallest median ratio of every measure to any reference; None where one makes none."""
    found: dict[str, float | None] = {}
    for measure in MEASURES:
        medians = [median_ratio(measure, pair) for pair in from_json(receipt).pairs]
        known = [one for one in medians if one is not None]
        found[measure.name] = min(known) if len(known) == len(medians) else None
    return found


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
    checks={"workload": workload, "placement": placement, "measurements": measurements, "reads": reads},
    amount=amount,
    exactness=exactness,
    ratios=median_ratios,
)
