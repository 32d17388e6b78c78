"""``crossval printed`` and ``crossval import-dump``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import crossval
from crossval.api.dumps import PrintedComparison
from crossval.cli import output
from crossval.cli.exits import EXIT_OF_VERDICT
from crossval.cli.options import FOLLOW, MODEL, PATH, PROMPT, THREADS, engine_option, file, plain_command
from crossval.console import new_table, show_line
from crossval.engines.dumps import UNIT, PrintedTap
from crossval.engines.registry import words
from crossval.model.taps import INPUT_TAPS

MAX_ROWS = 12
"""Taps that differ which are listed."""


@plain_command(
    "printed",
    click.argument("dump", type=PATH),
    PROMPT,
    engine_option(
        "engine",
        words("candidate"),
        "bitnet_py",
        "Engine whose values are held beside the printed ones.",
        envvar=None,
    ),
    FOLLOW,
    THREADS,
    MODEL,
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
)
def printed(as_json: bool, **options: Any) -> None:
    """Compare what llama-eval-callback or llama-debug printed with an engine.

    DUMP is the text that either tool printed for the prompt: of each tensor the values at the
    corners, with four decimals. They are compared one by one; nothing is shown about the values in
    between, so the result is never PARITY. Exit 3 when all agree as far as printed, 1 when one
    differs by more than a unit of the last digit. Which side is wrong is not shown: for that,
    record the library itself (`crossval layers --candidate llama.cpp:PATH`).

    \b
    Example:
      llama-eval-callback -m m.gguf -p "What is 2+2?" > dump.txt
      crossval printed dump.txt --prompt "What is 2+2?" --model m.gguf
    """
    with output.progress() as progress:
        found = crossval.compare_printed(progress=progress, **options)
    if as_json:
        click.echo(json.dumps({"verdict": found.verdict, **asdict(found)}))
    else:
        _show(found)
    click.get_current_context().exit(
        EXIT_OF_VERDICT["agrees_within" if found.first_beyond is None else "divergence"]
    )


def _show(found: PrintedComparison) -> None:
    out = output.screen()
    show_line(out, f"dump       {len(found.rows) + len(found.missing)} taps, node names of {found.tap_map}")
    show_line(out, f"engine     {found.engine}  {found.n_tokens} tokens")
    unlike = [row for row in found.rows if row.n_alike < row.n_values]
    if unlike:
        table = new_table()
        for name in ("tap", "printed", "alike", "differ", "largest difference"):
            table.add_column(name, justify="left" if name == "tap" else "right")
        for row in unlike[:MAX_ROWS]:
            table.add_row(row.tap, str(row.n_values), str(row.n_alike), str(row.n_beyond), _size(row))
        out.print(table)
        if len(unlike) > MAX_ROWS:
            show_line(out, f"{len(unlike) - MAX_ROWS} taps more that are not all alike")
    n_values, n_alike = (sum(getattr(row, name) for row in found.rows) for name in ("n_values", "n_alike"))
    counts = f"{n_alike} of {n_values} printed values are alike, in {len(found.rows)} taps"
    first = found.first_beyond
    if first is None:
        others = "" if n_alike == n_values else "; the others are a unit of the last digit away"
        show_line(out, f"AGREES AS FAR AS PRINTED  {counts}{others}")
        show_line(
            out, "meaning    Nothing is shown about the values that were not printed, or below four decimals."
        )
        show_line(
            out, "next step  For a verdict, run the library itself: crossval layers --candidate llama.cpp:PATH."
        )
    else:
        show_line(out, f"DIFFERS  {counts}; first at {first.tap}, by up to {_size(first)}")
        show_line(
            out,
            f"meaning    What was printed before {first.tap} agrees to {UNIT:g}. Which of the two is wrong there "
            "is not shown, and an operation between that was not printed may be the cause.",
        )
        tokens = "Check that the dump is of this prompt. " if first.tap in INPUT_TAPS else ""
        step = f"{tokens}Run the library itself: crossval layers --candidate llama.cpp:PATH audits both."
        show_line(out, f"next step  {step}")
    if found.missing:
        show_line(out, f"not compared: the engine does not have {', '.join(found.missing[:MAX_ROWS])}")


def _size(row: PrintedTap) -> str:
    return "not finite" if row.max_abs is None else f"{row.max_abs:.4g}"


@plain_command(
    "import-dump",
    click.argument("file", type=PATH),
    file("--out", "out_dir", "New trace.", "DIR", required=True),
    click.option("--overwrite", is_flag=True, help="Replace an earlier trace in DIR."),
    MODEL,
)
def import_dump(out_dir: Path, **options: Any) -> None:
    """Make a trace of the logits that llama-debug saved.

    FILE is `llamacpp-NAME.bin`, which `llama-debug --save-logits` writes, with
    `llamacpp-NAME-tokens.bin` beside it. The trace holds the logits of the prompt's last token and
    nothing else. What llama-debug or llama-eval-callback print is no trace: see `crossval printed`.

    \b
    Example:
      llama-debug -m m.gguf -p "What is 2+2?" --save-logits
      crossval import-dump data/llamacpp-m.bin --model m.gguf --out traces/logits
    """
    info = crossval.import_dump(out_dir=out_dir, **options)
    show_line(output.screen(), f"imported the logits after {len(info.prompt_ids)} tokens: {out_dir}")
