"""Draw a run's loss and held-out accuracy as SVG: ``python -m tools.train.plot``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

WIDTH, HEIGHT, MARGIN = 720, 320, 48

Points = Sequence[tuple[float, float]]


def _place(points: Points, last_step: float, top: float) -> str:
    """Return ``points`` (step, value) as SVG coordinates, values from 0 at the bottom to ``top``."""
    wide, high = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    return " ".join(
        f"{MARGIN + wide * step / last_step:.1f},{HEIGHT - MARGIN - high * min(value / top, 1):.1f}"
        for step, value in points
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#444") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def draw(log: Sequence[dict[str, Any]]) -> str:
    """Return the SVG of a training log: loss (left axis), mean accuracy over families (right axis).

    Raises:
        click.UsageError: the log contains no loss.
    """
    loss = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if not loss:
        raise click.UsageError("expected a log with losses, found none; train first")
    scores = [(entry["step"], list(entry["accuracy"].values())) for entry in log if "accuracy" in entry]
    last, top = loss[-1][0], loss[0][1]
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}V{MARGIN}" fill="none" stroke="#999"/>',
    ]
    for part in range(5):
        y = bottom - (HEIGHT - 2 * MARGIN) * part / 4
        parts.append(_text(MARGIN - 6, y + 4, f"{top * part / 4:.2f}", "end", "#1f77b4"))
        parts.append(_text(right + 6, y + 4, f"{25 * part} %", "start", "#2ca02c"))
        x = MARGIN + (WIDTH - 2 * MARGIN) * part / 4
        parts.append(_text(x, bottom + 18, f"{last * part / 4:.0f}"))
    parts.append(_text(WIDTH / 2, HEIGHT - 8, "step"))
    lines: list[tuple[str, str, Points, float]] = [("loss of answers", "#1f77b4", loss, top)]
    for column, (label, colour) in enumerate((("seen questions", "#98df8a"), ("unseen questions", "#2ca02c"))):
        means = [(step, sum(pair[column] for pair in pairs) / len(pairs)) for step, pairs in scores]
        lines.append((label, colour, means, 1.0))
    for row, (label, colour, points, scale) in enumerate(lines):
        parts.append(
            f'<polyline points="{_place(points, last, scale)}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        parts.append(_text(MARGIN + 150 + 150 * row, 24, label, "middle", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


@click.command()
@click.option(
    "--log", "log_path", type=click.Path(path_type=Path, exists=True), default=Path("build/train/log.json")
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("models/bitnet-qa-training.svg"))
def main(log_path: Path, out: Path) -> None:
    """Draw the log.json of a run.

    Example: python -m tools.train.plot --log build/train/log.json
    """
    out.write_text(draw(json.loads(log_path.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
