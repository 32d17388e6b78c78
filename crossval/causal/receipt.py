"""The causal view in a receipt: as JSON, and checked against itself and the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from crossval.causal import view as causal
from crossval.causal.view import CausalView, LayerEffect
from crossval.compare import rows as compare
from crossval.compare.rows import TapRow
from crossval.model import taps
from crossval.receipts.file import Receipt
from crossval.terms import LOGITS

_SLACK = 1e-6
"""Room for rounding in what bounds a KL divergence."""

Section = Mapping[str, Any]
"""The receipt's ``causal``."""


def to_json(view: CausalView) -> dict[str, Any]:
    """Return the view as the receipt's ``causal``."""
    return {
        **asdict(view),
        "effects": [asdict(one) for one in view.effects],
        "not_patched": list(view.not_patched),
    }


def effects_of(section: Section) -> tuple[LayerEffect, ...]:
    """Return the effects of a section that is valid by the schema."""
    return tuple(LayerEffect(**one) for one in section["effects"])


# --- checks ---------------------------------------------------------------------------------------------------


def complaints(receipt: Receipt, rows: Sequence[TapRow]) -> list[str]:
    """Check that everything in ``causal`` follows from its KL divergences, and that these fit the rows."""
    section, n_layers = receipt["causal"], receipt["model"]["shape"]["n_layers"]
    n_tokens = [len(one["token_ids"]) for one in receipt["results"]["passes"]]
    return [
        *_places(section, n_layers),
        *_given(section, rows, n_tokens, n_layers),
        *_derived(section),
        *_against_rows(section, rows, n_layers),
    ]


def _places(section: Section, n_layers: int) -> Iterator[str]:
    """Check that every state was patched or is listed as not patched, in order; the embedding is optional."""
    wanted = ["inp_embd", *(f"blk.{i}.l_out" for i in range(n_layers))]
    patched, left = [one["tap"] for one in section["effects"]], section["not_patched"]
    for name, found in (("effects", patched), ("not_patched", left)):
        if found != [tap for tap in wanted if tap in found]:
            yield f"{name}: not states after layers of this model, each once and in order"
    missing = [tap for tap in wanted[1:] if (tap in patched) == (tap in left)]
    if missing:
        yield f"{missing[0]} has to be either patched or not"
    if "inp_embd" in left:
        yield "the embedding need not be patched, so it is not missing"
    if not patched:
        yield "nothing was patched"
    for one in section["effects"]:
        if one["layer"] != taps.parse(one["tap"]).layer:
            yield f"{one['tap']}: its layer is {one['layer']}"


def _given(section: Section, rows: Sequence[TapRow], n_tokens: Sequence[int], n_layers: int) -> Iterator[str]:
    """Check that exactly those states were patched that both engines gave for all tokens.

    After the last layer only the last token counts, and rows do not say which tokens they hold unless all.
    """
    lengths = dict(enumerate(n_tokens))
    whole = {(row.pass_index, row.tap) for row in rows if row.rows_compared == lengths.get(row.pass_index)}
    patched = {one["tap"] for one in section["effects"]}
    for tap in ("inp_embd", *(f"blk.{i}.l_out" for i in range(n_layers))):
        last = tap == f"blk.{n_layers - 1}.l_out"
        given = all((i, tap) in whole for i in range(len(n_tokens) - 1 if last else 0, len(n_tokens)))
        if given and tap not in patched:
            yield f"{tap}: both engines gave it, but it was not patched"
        if not given and tap in patched and not last:
            yield f"{tap}: it was patched, but the rows do not hold all its tokens"


def _derived(section: Section) -> Iterator[str]:
    """Recompute what follows from the divergences alone."""
    effects, baseline = effects_of(section), section["baseline_kl"]
    for one, (recovered, introduced) in zip(
        effects, causal.shares(baseline, [e.kl for e in effects]), strict=True
    ):
        if (one.recovered, one.introduced) != (recovered, introduced):
            yield f"{one.tap}: recovered and introduced are not what its KL and the baseline give"
        if one.equal_states and one.kl != 0.0:
            yield f"{one.tap}: equal states, but the KL after patching is {one.kl:.6g}"
    derived = {
        "nothing_recovered_from": causal.nothing_recovered_from(effects),
        "largest": causal.largest(effects),
        "reliable": causal.is_reliable(baseline, section["noise_kl"], effects),
    }
    yield from (
        f"{name} is {section[name]}, the effects say {value}"
        for name, value in derived.items()
        if section[name] != value
    )


def _against_rows(section: Section, rows: Sequence[TapRow], n_layers: int) -> Iterator[str]:
    """Check the view against the direct comparison of the same passes."""
    logits = last_row(rows, LOGITS)
    if logits is None or logits.max_abs is None:
        yield "the comparison has no logits of the last pass"
        return
    if compare.row_status(logits) == "equal" and section["baseline_kl"] != 0.0:
        yield f"the logits are bit-identical, the baseline is {section['baseline_kl']:.6g}"
    # Logits that are at most d apart give log-probabilities at most 2 d apart.
    if section["baseline_kl"] > 2.0 * logits.max_abs * (1.0 + _SLACK) + _SLACK:
        yield f"the baseline {section['baseline_kl']:.6g} is more than logits {logits.max_abs:.6g} apart can give"
    for one in section["effects"]:
        equal = _equal_states(rows, one["tap"], last=one["layer"] == n_layers - 1)
        if equal is not None and one["equal_states"] != equal:
            yield f"{one['tap']}: equal_states is {one['equal_states']}, the rows say {equal}"
        own = one["candidate_own_kl"], one["reference_own_kl"]
        if one["equal_states"] and compare.row_status(logits) == "equal" and own[0] != own[1]:
            yield f"{one['tap']}: equal states and equal logits, but own KLs {own[0]:.6g} and {own[1]:.6g}"


def _equal_states(rows: Sequence[TapRow], tap: str, *, last: bool) -> bool | None:
    """Return whether both engines gave the same state; None where the rows do not tell.

    After the last layer only the last token counts.
    """
    if not last:
        found = [compare.row_status(row) == "equal" for row in rows if row.tap == tap]
        return all(found) if found else None
    row = last_row(rows, tap)
    if row is None:
        return None
    equal = compare.row_status(row) == "equal"
    return equal if equal or row.rows_compared == 1 else None


def last_row(rows: Sequence[TapRow], tap: str) -> TapRow | None:
    """Return the row of a tap in the last pass, None when it has none."""
    n_passes = max((row.pass_index for row in rows), default=0)
    return next((row for row in rows if row.tap == tap and row.pass_index == n_passes), None)
