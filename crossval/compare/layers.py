"""Find the first layer, then the first operation, at which two engines differ.

First the outline is compared: the embedding, every layer's output, the final norm and the logits. Then the
operations of the layer that was found, or (``full``) those of all layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from crossval.capture import Capture, Place, check_pooled, check_whole, greedy_token, make_feed, model_taps, stages
from crossval.compare.rows import (
    Coverage,
    LayersResult,
    Location,
    Skip,
    TapRow,
    choose_policy,
    compare_tap,
    execution_key,
    first_divergence,
    first_inexact,
    judged,
    row_status,
)
from crossval.errors import BadInputError
from crossval.formats import Dtype
from crossval.model import taps
from crossval.model.tolerance import PolicyName, describe, tolerance_for
from crossval.passes import PassRecord
from crossval.terms import SIDES, Progress, Side

DEFAULT_N_DECODE = 4
UNSTEADY = "a second run gave other numbers: an engine is not deterministic, or capturing changes it"


class Comparison:
    """Two engines and everything compared so far: first the ``outline``, then ``operations`` stage by stage."""

    def __init__(
        self,
        candidate: Capture,
        reference: Capture,
        prompt_ids: Sequence[int],
        *,
        n_decode: int | None = None,
        full: bool = False,
        nan_aside: bool = False,
    ) -> None:
        """A recorded engine fixes the tokens. ``n_decode`` None means 4, or what the trace holds when it is less.
        ``nan_aside``: as in ``compare_tap``.

        Raises:
            BadInputError: empty prompt, no layers, or a trace recorded with other tokens.
        """
        n_layers = candidate.config.n_layers
        if n_layers < 1:
            raise BadInputError(f"the model must have at least one layer, got {n_layers}")
        self._captures = (candidate, reference)
        default = DEFAULT_N_DECODE
        if candidate.config.pooling is not None:
            default = 0
            check_pooled(n_decode)
        self._feed = make_feed(candidate.runner, reference.runner, prompt_ids, n_decode, default)
        if candidate.config.pooling is not None:
            check_whole(self._feed)
        self._n_layers = n_layers
        self._full = full
        self._nan_aside = nan_aside
        self._outline = model_taps(candidate.config, outline=True)
        self._every = model_taps(candidate.config)
        self._policy = self._choose_policy(())
        self._found: dict[Place, TapRow | Skip] = {}
        """Everything that was compared, or had to be and could not."""
        self._places: tuple[Location | None, Location | None] = (None, None)
        """The first divergence and the first difference in bits of the outline."""
        self._wanted: dict[int, list[str]] = {}
        """Pass -> operations to compare."""

    def _choose_policy(self, computed: Collection[Dtype]) -> PolicyName:
        candidate, reference = (capture.runner.identity for capture in self._captures)
        return choose_policy(candidate, reference, computed)

    # --- comparing --------------------------------------------------------------------------------------------

    def outline(self, progress: Progress | None = None) -> None:
        """Run both engines for the first time, fed the tokens that the reference chooses, and compare the outline.

        Raises:
            UnavailableError, EngineCrashError: from a runner.
        """
        feed, token = self._feed, None
        report = progress or (lambda *_: None)
        for capture in self._captures:
            capture.start(feed.expected)
        while (plan := feed.next_plan(token)) is not None:
            index = len(feed.done) - 1
            report("layers", index, feed.n_required)
            ours, theirs = (capture.extend(plan) for capture in self._captures)
            self._compare(index, ours, theirs, self._outline)
            token = greedy_token(theirs)
        report("layers", len(feed.done), feed.n_required)
        self._choose_operations()

    def operations(self, names: Sequence[str]) -> None:
        """Compare those of a stage's taps (``capture.stages``) that have to be compared."""
        wanted: dict[int, list[str]] = {}
        for index, chosen in self._wanted.items():
            for name in names:
                if name in chosen and (index, name) not in self._found:
                    wanted.setdefault(index, []).append(name)
        if wanted:
            ours, theirs = (capture.records(names, ahead=True) for capture in self._captures)
            for index, chosen in wanted.items():
                self._compare(index, ours[index], theirs[index], chosen)

    def _compare(self, index: int, ours: PassRecord, theirs: PassRecord, names: Iterable[str]) -> None:
        for name in names:
            lacking = [
                (side, capture)
                for side, capture, record in zip(SIDES, self._captures, (ours, theirs), strict=True)
                if name not in record.taps
            ]
            if len(lacking) == 2 and taps.is_optional(name):
                continue
            if lacking:
                if not all(_computes_inside(capture, name) for _, capture in lacking):
                    self._found[index, name] = Skip(index, name, "; ".join(_not_given(*one) for one in lacking))
                continue
            tolerance = tolerance_for(name, self._n_layers, self._policy)
            self._found[index, name] = compare_tap(
                name,
                index,
                ours.plan,
                ours.taps[name],
                theirs.taps[name],
                tolerance,
                nan_aside=self._nan_aside,
            )

    def _may_be_absent(self, name: str) -> bool:
        """Return whether the model may lack a tap, or an engine compute it inside another operation."""
        return taps.is_optional(name) or any(_computes_inside(one, name) for one in self._captures)

    def _choose_operations(self) -> None:
        """Choose all, or those of the first layer that diverges and of the first whose bits differ."""
        n_passes = len(self._feed.done)
        if self._full:
            self._wanted = dict.fromkeys(range(n_passes), self._every)
            return
        rows = [row for (_, name), row in self._found.items() if name in self._outline and isinstance(row, TapRow)]
        self._places = (first_divergence(rows), first_inexact(rows))
        self._wanted = {}
        for index, layer in {(place.pass_index, place.layer) for place in self._places if place is not None}:
            if layer is not None:
                in_layer = [name for name in taps.layer_taps(layer) if name in self._every]
                self._wanted.setdefault(index, []).extend(in_layer)

    # --- the result -------------------------------------------------------------------------------------------

    def result(self, computed: Collection[Dtype] = ()) -> LayersResult:
        """Return what was compared, held to the table of the engines' arithmetic.

        ``computed``: the 16-bit formats that their audits found. They may move the first divergence; the
        operations of another layer are then compared, too.
        """
        policy = self._choose_policy(computed)
        if policy != self._policy:
            self._policy = policy
            for place, row in self._found.items():
                if isinstance(row, TapRow):
                    self._found[place] = judged(row, tolerance_for(row.tap, self._n_layers, policy))
            self._choose_operations()
            for names in stages(self._captures[0].config):
                self.operations(names)
        rows, skips = self._rows_and_skips()
        notes = [] if self._full else self._explain(rows, skips)
        ordered = tuple(sorted(rows.values(), key=execution_key))
        skipped = sorted(skips.values(), key=lambda one: (one.pass_index, self._at(one.tap)))
        coverage = Coverage(len({*rows, *skips}), len(rows), tuple(skipped))
        return LayersResult(
            rows=ordered,
            coverage=coverage,
            plan=tuple(self._feed.done),
            thresholds=describe(self._policy),
            n_layers=self._n_layers,
            mode="full" if self._full else "outline",
            notes=tuple(notes),
        )

    def _at(self, name: str) -> int:
        return taps.execution_index(name, self._n_layers)

    def _rows_and_skips(self) -> tuple[dict[Place, TapRow], dict[Place, Skip]]:
        """Return what belongs to the result, by place; a place may have a row and a reason not to trust it."""
        rows: dict[Place, TapRow] = {}
        skips: dict[Place, Skip] = {}
        for place, one in self._found.items():
            index, name = place
            if name not in self._outline and name not in self._wanted.get(index, ()):
                continue
            if isinstance(one, TapRow):
                rows[place] = one
            else:
                skips[place] = one
        for index in range(len(self._feed.done)):
            for name in (*self._outline, *self._wanted.get(index, ())):
                if (index, name) not in self._found and not self._may_be_absent(name):
                    skips[index, name] = Skip(index, name, "it was not compared")
        for index, name in set().union(*(capture.unsteady for capture in self._captures)) & set(rows):
            skips[index, name] = Skip(index, name, UNSTEADY)
        names = self._every if self._full else self._outline
        for index in range(len(self._feed.done), self._feed.n_required):
            for name in names:
                skips[index, name] = Skip(index, name, self._feed.ended or "the pass did not take place")
        return rows, skips

    def _explain(self, rows: dict[Place, TapRow], skips: dict[Place, Skip]) -> list[str]:
        """Say what is known of the layers that were found beyond their rows; return notes."""
        diverged, inexact = self._places
        if diverged is not None and diverged.layer is not None:
            place, text = _why(diverged, diverged.layer, rows, skips)
            if text is not None:
                row = rows[place]
                rows[place] = replace(row, note="; ".join(part for part in (row.note, text) if part))
        if inexact is None or inexact.layer is None or (diverged and diverged.layer == inexact.layer):
            return []
        missing = [
            place
            for place in skips
            if place[1].startswith(f"blk.{inexact.layer}.") and place[1] not in self._outline
        ]
        if not missing:
            return []
        note = (
            f"layer {inexact.layer} is the first whose bits differ (within bounds); {len(missing)} of its "
            f"operations were not compared: {skips[missing[0]].why}"
        )
        for place in missing:  # differences within bounds do not need every operation
            del skips[place]
        return [note]


def _why(
    found: Location, layer: int, rows: Mapping[Place, TapRow], skips: Mapping[Place, Skip]
) -> tuple[Place, str | None]:
    """Return the row to explain, the layer's output or its first wrong operation, and what was not seen."""
    index, output = found.pass_index, f"blk.{layer}.l_out"
    ops = [name for name in taps.layer_taps(layer) if name != output]
    wrong = [
        name for name in ops if (index, name) in rows and row_status(rows[index, name]) in ("diverged", "invalid")
    ]
    unseen = [name for name in ops if (index, name) in skips]
    if wrong:
        unseen = [name for name in unseen if ops.index(name) < ops.index(wrong[0])]
        names = ", ".join(taps.parse(name).tap for name in unseen)
        return (index, wrong[0]), f"not compared before it: {names}" if unseen else None
    if unseen:
        whys = "; ".join(sorted({skips[index, name].why for name in unseen}))
        text = f"ops of layer {layer} not compared ({whys}): the cause lies somewhere in this layer"
    else:
        text = "no operation of this layer exceeds its own bound: the difference builds up to here"
    return (index, output), text


def _computes_inside(capture: Capture, name: str) -> bool:
    """Return whether an engine states that it computes a tap inside another operation."""
    config, numerics = capture.config, capture.runner.identity.numerics
    return taps.parse(name).tap in numerics.inside_others(config.architecture, config.input_norms)


def _not_given(side: Side, capture: Capture) -> str:
    runner = capture.runner
    did = "record" if runner.status == "recorded" else "give"
    return f"the {side} ({runner.identity.name}) did not {did} it"
