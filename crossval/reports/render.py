"""Tables and lines for people, made from receipts. Without a terminal: plain text, fixed width, no colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossval.audit import precision
from crossval.audit import show as render_audit
from crossval.bench import show as render_bench
from crossval.causal import show as render_causal
from crossval.compare import rows as compare
from crossval.compare.rows import LayersResult, TapRow
from crossval.examine import greedy_show as render_greedy
from crossval.model import taps
from crossval.receipts import evidence
from crossval.receipts.file import Receipt
from crossval.repeat import floors_show as render_floors
from crossval.repeat.cells import STYLE, cell, number, times_floor
from crossval.repeat.floors import FloorTable
from crossval.repeat.floors_receipt import table_of
from crossval.repeat.metamorphic import show as render_metamorphic
from crossval.reports import triage
from crossval.reports.console import VERDICT_STYLE, clip, new_table, percent
from crossval.reports.console import console as console
from crossval.reports.console import plain as plain
from crossval.reports.console import show_line as show_line
from crossval.selftest import show as render_selftest
from crossval.smoke import show as render_smoke

if TYPE_CHECKING:
    from crossval.engines.doctor import Check as Finding
    from crossval.receipts.gate import Check

MAX_PASS_COLUMNS = 6


def show_receipt(out: Console, receipt: Receipt) -> None:
    """Print the tables, the verdict, what is first seen where, and the notes of a receipt."""
    _headline(out, receipt)
    if receipt["reference"]["status"] == "unavailable":
        show_line(out, f"reference unavailable: {receipt['reference']['note']}")
    elif receipt["kind"] == "smoke":
        render_smoke.show_answers(out, receipt)
        return
    elif receipt["kind"] == "selftest":
        render_selftest.show_selftest(out, receipt)
        return
    elif receipt["kind"] == "metamorphic":
        render_metamorphic.show_metamorphic(out, receipt)
        return
    elif receipt["kind"] == "bench":
        render_bench.show_bench(out, receipt)
        return
    elif receipt["kind"] == "greedy":
        render_greedy.show_greedy(out, receipt)
    else:
        layers, floors = evidence.layers_from_json(receipt), table_of(receipt)
        which = "floor" if floors is None else "measured floor"
        legend = f"'=': all bits are equal, else the distance in ulp, or NMSE (relative error over its {which})"
        show_line(out, f"\nTap by tap; {legend}.")
        out.print(layers_table(layers, floors))
        for index, layer in _detailed(layers):
            rows = [row for row in layers.rows if row.pass_index == index and taps.parse(row.tap).layer == layer]
            if len(rows) > 1:
                show_line(out, f"\nOperations of layer {layer} in pass {index} ({rows[0].pass_kind}).")
                out.print(ops_table(rows, floors))
        render_audit.show_audits(out, receipt)
        render_floors.show_floors(out, receipt)
        render_causal.show_causal(out, receipt)
    show_verdict(out, receipt)


def show_triage(out: Console, receipt: Receipt) -> None:
    """Print whose fault it is, how that is known, and what to do next."""
    _headline(out, receipt)
    show_line(out, "")
    for label, text in triage.explain(receipt):
        show_line(out, f"{label:11}  {text}")
    if "causal" in receipt:
        out.print(render_causal.effects_table(receipt["causal"]))
    for note in receipt["notes"]:
        show_line(out, f"note: {note}")


def _headline(out: Console, receipt: Receipt) -> None:
    model = receipt["model"]
    show_line(out, f"model      {model['file_name']}  sha256 {model['sha256'][:12]}  {_shape(model['shape'])}")
    for side in ("candidate", "reference"):
        if receipt[side]["status"] != "unused":
            show_line(out, f"{side:10} {_engine(receipt[side])}")
    prompt = receipt["prompt"]
    if prompt["text"] is not None and receipt["kind"] not in ("smoke", "selftest"):
        show_line(out, f"prompt     {clip(prompt['text'], 60)!r}  {len(prompt['token_ids'])} tokens")


def _shape(shape: Mapping[str, Any]) -> str:
    return (
        f"{shape['n_layers']} layers, dim {shape['dim']}, {shape['n_heads']}/{shape['n_kv_heads']} heads, "
        f"hidden {shape['hidden_dim']}, vocabulary {shape['vocab_size']}"
    )


def _engine(party: Mapping[str, Any]) -> str:
    facts = [f"{party['name']}", party["status"]]
    if party["version"]:
        facts.append(f"version {party['version']}")
    if party["source_commit"]:
        facts.append(f"commit {party['source_commit'][:12]}")
    if party["compiler"]:
        facts.append(party["compiler"])
    if party["settings"].get("kernel"):
        facts.append(f"kernel {party['settings']['kernel']}")
    if party["numerics"]["simd_width"]:
        facts.append(f"{party['numerics']['simd_width']} lanes")
    return ", ".join(facts)


def layers_table(result: LayersResult, floors: FloorTable | None = None) -> Table:
    """Return one line per embedding, layer and head tap, one column per pass; many decoded tokens share one.

    ``floors``: measured ones, to use in the place of the tolerance table's.
    """
    found = {(row.pass_index, row.tap): row for row in result.rows}
    skipped = {(skip.pass_index, skip.tap) for skip in result.coverage.skipped}
    n_passes = max([len(result.plan), *(key[0] + 1 for key in skipped)], default=0)
    groups = _columns(result, n_passes)
    table = new_table()
    table.add_column("tap", no_wrap=True)
    for title, _ in groups:
        table.add_column(title, no_wrap=True)
    for tap in taps.outline_taps(result.n_layers):
        cells = [cell([(index, tap) for index in indexes], found, skipped, floors) for _, indexes in groups]
        table.add_row(_tap_label(tap), *cells)
    return table


def _columns(result: LayersResult, n_passes: int) -> list[tuple[str, list[int]]]:
    titles = {}
    for index, plan in enumerate(result.plan):
        titles[index] = f"{plan.kind} {len(plan.token_ids)}" if plan.kind == "prefill" else f"decode @{plan.start}"
    if n_passes <= MAX_PASS_COLUMNS:
        return [(titles.get(index, f"pass {index}"), [index]) for index in range(n_passes)]
    single = [index for index, plan in enumerate(result.plan) if plan.kind == "prefill"][:MAX_PASS_COLUMNS]
    rest = [index for index in range(n_passes) if index not in single]
    return [(titles[index], [index]) for index in single] + [(f"{len(rest)} more, worst", rest)]


def _tap_label(tap: str) -> str:
    parsed = taps.parse(tap)
    return parsed.tap if parsed.layer is None else f"layer {parsed.layer}"


def _detailed(result: LayersResult) -> list[tuple[int, int]]:
    """Return (pass, layer) of the tables to show: where it first diverges, else where bits first differ."""
    place = compare.first_divergence(result.rows) or compare.first_inexact(result.rows)
    return [(place.pass_index, place.layer)] if place is not None and place.layer is not None else []


def ops_table(rows: Sequence[TapRow], floors: FloorTable | None = None) -> Table:
    """Return every metric of the operations of one layer, in execution order."""
    table = new_table()
    names = ("op", "state", "bits equal", "max ulp", "cosine", "NMSE", "floors", "worst token", "max abs", "norm")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        status = compare.row_status(row)
        state = "=" if status == "equal" else status
        table.add_row(
            taps.parse(row.tap).tap,
            Text(state, STYLE[status]),
            percent(row.exact_match_rate),
            _count(row.max_ulp),
            number(row.cosine, ".9f"),
            number(row.nmse, ".2e"),
            times_floor(row, floors).strip("()") or "-",
            number(row.worst_token_nmse, ".1e") + ("" if row.worst_token is None else f" @{row.worst_token}"),
            number(row.max_abs, ".2e"),
            number(row.norm_ratio, ".6f"),
        )
    return table


def show_verdict(out: Console, receipt: Receipt) -> None:
    """Print the verdict line, what follows from it, the first divergence and the notes."""
    verdict, parity, coverage = receipt["verdict"], receipt["parity"], receipt["coverage"]
    who = (
        f"{receipt['candidate']['name']} against {receipt['reference']['name']} ({receipt['reference']['status']})"
    )
    counts = f"{coverage['compared']} of {coverage['required']} comparisons"
    line = Text.assemble((verdict.upper(), VERDICT_STYLE.get(verdict, "bold red")), f"  {plain(who)}: {counts}")
    within = precision.within(receipt) if verdict == "parity" else None
    if within is not None:
        line.append(f", within {within}")
    rate = parity["exact_match_rate"]
    if rate is not None and receipt["kind"] == "greedy":
        line.append(f", {percent(rate)} of the tokens equal, ")
        line.append(f"{percent(parity['logits_exact_match_rate'])} of the logits bit-equal")
    elif rate is not None:
        line.append(", all bits equal" if rate == 1.0 else f", {percent(rate)} of the values bit-equal")
    out.print(line, soft_wrap=True)
    if receipt["kind"] in evidence.AUDITED:
        render_audit.show_advice(out, render_audit.advice_of(receipt))
    if receipt["kind"] == "greedy":
        render_audit.show_advice(out, render_greedy.conclude(receipt))
    _show_place(out, receipt, "first_divergence")
    if receipt["first_inexact"] != receipt["first_divergence"]:
        _show_place(out, receipt, "first_inexact")
    for skip in coverage["skipped"][:5]:
        where = f"pass {skip['pass_index']} {skip['tap']}" if "tap" in skip else f"prompt {skip['prompt_index']}"
        show_line(out, f"not compared: {where}: {skip['why']}")
    if len(coverage["skipped"]) > 5:
        show_line(out, f"not compared: {len(coverage['skipped']) - 5} more")
    for note in receipt["notes"]:
        show_line(out, f"note: {note}")


def _show_place(out: Console, receipt: Receipt, name: str) -> None:
    place, what = (
        receipt[name],
        {"first_divergence": "first divergence", "first_inexact": "first inexact bits"}[name],
    )
    if place is None:
        return
    if "tap" in place:
        row = "" if place["row"] is None else f", worst at position {place['row']}"
        at = render_audit.seen_at(receipt, place)
        text = f"{at} (pass {place['pass_index']}, {place['pass_kind']}{row})"
        more = place["note"]
    else:
        ours, theirs = place["candidate_token"], place["reference_token"]
        text = f"prompt {place['prompt_index']}, step {place['step']}: "
        text += f"logits, both choose {ours}" if ours == theirs else f"candidate {ours}, reference {theirs}"
        more = place["explanation"]
    show_line(out, f"{what}: {text}" + (f": {more}" if more else ""))


def show_checks(out: Console, name: str, checks: Sequence[Check], passed: bool) -> None:
    """Print one receipt's gate checks and whether it passes."""
    table = new_table()
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in checks:
        state = Text("pass", "green") if check.passed else Text("FAIL", "bold red")
        table.add_row(check.name, state, plain(check.detail))
    out.print(table)
    style = "bold green" if passed else "bold red"
    out.print(Text.assemble(("PASS" if passed else "FAIL", style), f"  {plain(name)}"), soft_wrap=True)


def show_findings(out: Console, checks: Sequence[Finding]) -> None:
    """Print what the doctor found, and what to do about everything that is missing."""
    table = new_table()
    for name in ("part", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in checks:
        state = Text("ok", "green") if check.ok else Text("MISSING" if check.required else "missing", "bold red")
        table.add_row(plain(check.name), state, plain(check.detail))
    out.print(table)
    for check in checks:
        if not check.ok and check.remedy:
            show_line(out, f"{check.name}: {check.remedy}")


def show_path(out: Console, what: str, path: Path) -> None:
    """Print where something was written."""
    show_line(out, f"{what}: {path}")


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    return str(value) if value < 1_000_000 else f"{value:.1e}"
