"""Find the first layer, then the first operation, at which two engines differ.

Run 1 (outline) captures the embedding, every layer's output, the final norm and the logits. Run 2 captures the
operations of the one layer that was found (``full``: of all layers, a few layers per run). Arrays of a pass are
dropped once compared, so memory does not depend on the number of layers or decoded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from crossval.compare.rows import (
    Coverage,
    LayersResult,
    Location,
    Skip,
    TapRow,
    compare_tap,
    decide,
    execution_key,
    first_divergence,
    first_inexact,
    row_status,
)
from crossval.compare.tolerance import PolicyName, choose_policy, describe, tolerance_for
from crossval.errors import BadInputError
from crossval.feed import Feed, greedy_token, make_feed
from crossval.formats import Dtype
from crossval.model import taps
from crossval.passes import PassPlan, PassRecord, Runner

DEFAULT_N_DECODE = 4
GROUP_BYTES = 192 << 20
"""In a full comparison, tap arrays of one engine held at a time (two engines: twice that)."""

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, steps done, steps in total)."""


def compare_layers(
    candidate: Runner,
    reference: Runner,
    prompt_ids: Sequence[int],
    *,
    n_layers: int,
    n_decode: int | None = None,
    full: bool = False,
    policy: PolicyName | None = None,
    computed: Collection[Dtype] = (),
    progress: Progress | None = None,
) -> LayersResult:
    """Compare two entered runners over a prompt and ``n_decode`` tokens decoded greedily by the reference.

    A recorded party fixes the tokens. ``n_decode`` None means 4, or what the trace holds when that is less.
    ``policy`` None: chosen from what both engines say about their arithmetic and from ``computed``, the 16-bit
    formats that their audits found.

    Raises:
        BadInputError: empty prompt, no layers, or a trace recorded with other tokens.
        UnavailableError, EngineCrashError: from a runner.
    """
    if n_layers < 1:
        raise BadInputError(f"the model must have at least one layer, got {n_layers}")
    feed = make_feed(candidate, reference, prompt_ids, n_decode, DEFAULT_N_DECODE)
    policy = policy or choose_policy(candidate.identity, reference.identity, computed)
    work = _Work(candidate, reference, n_layers, policy, progress or (lambda *_: None))
    outline = taps.outline_taps(n_layers)
    _run_outline(work, feed, outline)
    if full:
        _run_all_ops(work, feed.done)
    else:
        _run_guilty_ops(work, feed.done)
    for index in range(len(feed.done), feed.n_required):
        for name in taps.all_taps(n_layers) if full else outline:
            work.required.add((index, name))
            work.skips[index, name] = Skip(index, name, feed.ended or "the pass did not take place")
    return _result(work, feed, full)


@dataclass
class _Work:
    """Two engines and everything compared so far."""

    candidate: Runner
    reference: Runner
    n_layers: int
    policy: PolicyName
    progress: Progress
    rows: dict[tuple[int, str], TapRow] = field(default_factory=dict)
    skips: dict[tuple[int, str], Skip] = field(default_factory=dict)
    required: set[tuple[int, str]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    largest_bytes: int = 0
    """Largest size of the arrays one pass of one engine gave."""

    def run(self, plan: PassPlan, select: Collection[str]) -> tuple[PassRecord, PassRecord]:
        return self.candidate.eval(plan.token_ids, select), self.reference.eval(plan.token_ids, select)

    def reset(self) -> None:
        self.candidate.reset()
        self.reference.reset()

    def compare(
        self, index: int, plan: PassPlan, ours: PassRecord, theirs: PassRecord, names: Iterable[str]
    ) -> None:
        """Compare the named taps of one pass; a tap compared before must come out the same."""
        sizes = [0, 0]
        for name in names:
            key = (index, name)
            lacking = self._lacking(name, ours, theirs)
            if len(lacking) == 2 and taps.is_optional(name):
                continue
            self.required.add(key)
            if lacking:
                self.skips.setdefault(key, Skip(index, name, "; ".join(lacking)))
                continue
            c, r = ours.taps[name], theirs.taps[name]
            sizes = [sizes[0] + c.array.nbytes, sizes[1] + r.array.nbytes]
            found = compare_tap(name, index, plan, c, r, tolerance_for(name, self.n_layers, self.policy))
            if isinstance(found, Skip):
                self.skips[key] = found
            elif key not in self.rows:
                self.rows[key] = found
            elif found != self.rows[key]:
                why = "a second run gave other numbers: an engine is not deterministic, or capturing changes it"
                self.skips[key] = Skip(index, name, why)
        self.largest_bytes = max(self.largest_bytes, *sizes)

    def _lacking(self, name: str, ours: PassRecord, theirs: PassRecord) -> list[str]:
        sides = (("candidate", self.candidate, ours), ("reference", self.reference, theirs))
        return [
            f"the {who} ({runner.identity.name}) did not {'record' if runner.status == 'recorded' else 'give'} it"
            for who, runner, record in sides
            if name not in record.taps
        ]


def _run_outline(work: _Work, feed: Feed, outline: Sequence[str]) -> None:
    work.reset()
    token: int | None = None
    while (plan := feed.next_plan(token)) is not None:
        index = len(feed.done) - 1
        work.progress("layers", index, feed.n_required)
        ours, theirs = work.run(plan, outline)
        work.compare(index, plan, ours, theirs, outline)
        token = greedy_token(theirs)
    work.progress("layers", len(feed.done), feed.n_required)


def _run_ops(work: _Work, plans: Sequence[PassPlan], wanted: Mapping[int, Sequence[str]], what: str) -> None:
    """Run again from the start, capturing ``wanted`` (pass -> taps), up to the last pass that is wanted."""
    last = max(wanted)
    work.reset()
    for index, plan in enumerate(plans[: last + 1]):
        work.progress(what, index, last + 1)
        names = wanted.get(index, ())
        ours, theirs = work.run(plan, names)
        work.compare(index, plan, ours, theirs, names)
    work.progress(what, last + 1, last + 1)


def _run_all_ops(work: _Work, plans: Sequence[PassPlan]) -> None:
    first, size = 0, 1
    while first < work.n_layers:
        layers = range(first, min(first + size, work.n_layers))
        names = [name for layer in layers for name in taps.layer_taps(layer)]
        work.largest_bytes = 0
        what = f"operations of layers {layers[0]} to {layers[-1]}"
        _run_ops(work, plans, dict.fromkeys(range(len(plans)), names), what)
        first = layers[-1] + 1
        size = max(1, GROUP_BYTES * len(layers) // max(1, work.largest_bytes))


def _run_guilty_ops(work: _Work, plans: Sequence[PassPlan]) -> None:
    """Descend into the first layer that diverges, and into the first whose bits differ."""
    diverged, inexact = first_divergence(work.rows.values()), first_inexact(work.rows.values())
    wanted: dict[int, list[str]] = {}
    for place in {(p.pass_index, p.layer) for p in (diverged, inexact) if p is not None}:
        if place[1] is not None:
            wanted.setdefault(place[0], []).extend(taps.layer_taps(place[1]))
    if not wanted:
        return
    before = dict(work.skips)
    _run_ops(work, plans, wanted, "operations of the layer found")
    if diverged is not None and diverged.layer is not None:
        _explain(work, diverged)
    optional = None if inexact is None or (diverged and diverged.layer == inexact.layer) else inexact.layer
    if optional is not None:
        _forgive_missing_ops(work, before, optional)


def _explain(work: _Work, place: Location) -> None:
    """Say in the row of the layer's output why no operation is named, or in the operation's what was not seen."""
    index, layer = place.pass_index, place.layer
    assert layer is not None
    key = (index, f"blk.{layer}.l_out")
    ops = [name for name in taps.layer_taps(layer) if name != key[1]]
    guilty = [name for name in ops if _status(work, index, name) in ("diverged", "invalid")]
    unseen = [name for name in ops if (index, name) in work.skips]
    if guilty:
        key = (index, guilty[0])
        unseen = [name for name in unseen if ops.index(name) < ops.index(guilty[0])]
        text = f"not compared before it: {', '.join(taps.parse(name).tap for name in unseen)}" if unseen else None
    elif unseen:
        whys = sorted({work.skips[index, name].why for name in unseen})
        text = f"ops of layer {layer} not compared ({'; '.join(whys)}): the cause lies somewhere in this layer"
    else:
        text = "no operation of this layer exceeds its own bound: the difference builds up to here"
    if text is not None:
        row = work.rows[key]
        work.rows[key] = replace(row, note="; ".join(part for part in (row.note, text) if part))


def _status(work: _Work, index: int, name: str) -> str | None:
    row = work.rows.get((index, name))
    return None if row is None else row_status(row)


def _forgive_missing_ops(work: _Work, before: Mapping[tuple[int, str], Skip], layer: int) -> None:
    """Within-bounds differences need no operation to be complete: say what was missing, do not require it."""
    prefix = f"blk.{layer}."
    missing = [
        key for key in work.skips if key not in before and key[1].startswith(prefix) and key not in work.rows
    ]
    if missing:
        work.notes.append(
            f"layer {layer} is the first whose bits differ (within bounds); {len(missing)} of its operations "
            f"were not compared: {work.skips[missing[0]].why}"
        )
    for key in missing:
        del work.skips[key]
        work.required.discard(key)


def _result(work: _Work, feed: Feed, full: bool) -> LayersResult:
    rows = tuple(sorted(work.rows.values(), key=execution_key))
    skips = sorted(
        work.skips.values(), key=lambda skip: (skip.pass_index, taps.execution_index(skip.tap, work.n_layers))
    )
    coverage = Coverage(len(work.required), len(rows), tuple(skips))
    return LayersResult(
        rows=rows,
        first_divergence=first_divergence(rows),
        first_inexact=first_inexact(rows),
        coverage=coverage,
        verdict=decide(rows, coverage),
        plan=tuple(feed.done),
        token_ids=tuple(token for plan in feed.done for token in plan.token_ids),
        thresholds=describe(work.policy),
        n_layers=work.n_layers,
        mode="full" if full else "outline",
        notes=tuple(work.notes),
    )
