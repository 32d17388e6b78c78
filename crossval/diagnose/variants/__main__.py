"""Write ``docs/variants.md`` (``python -m crossval.diagnose.variants > docs/variants.md``)."""

from __future__ import annotations

import re
import sys

from crossval.diagnose.variants import EVERY_OP, FAMILIES, FITTED, VARIANTS, Variant
from crossval.model import taps

HEADER = """# Known mistakes

Generated from `crossval/diagnose/variants`; do not edit. Regenerate with
`python -m crossval.diagnose.variants > docs/variants.md`.

A wrong operation is computed again with each known mistake that applies to it. One is named only when its output
is as close to the recorded one as float32 arithmetic allows and every other is at least ten times farther;
mistakes that give the same output on the input at hand are reported together, and anything else is `undetermined`.

`{}` stands for a value that is tried or fitted: a tensor, a position, a constant. Family 14 (wrong tokens or
template) cannot be seen in one operation; compare the token ids.
"""


def variants_markdown() -> str:
    """Return the page: one table for each family."""
    sections = [HEADER]
    for family, title in FAMILIES.items():
        rows = dict.fromkeys(_row(variant) for variant in (*VARIANTS, *FITTED) if variant.family == family)
        if rows:
            sections.append(f"## {family}. {title}\n\n| name | operations | what the engine does |\n|---|---|---|")
            sections[-1] += "".join(f"\n{row}" for row in rows) + "\n"
    return "\n".join(sections)


def _row(variant: Variant) -> str:
    order = [*taps.INPUT_TAPS, *taps.LAYER_TAPS, *taps.HEAD_TAPS]
    names = ", ".join(f"`{name}`" for name in order if name in variant.ops)
    if variant.ops == EVERY_OP:
        names = "all"
    elif len(EVERY_OP - variant.ops) < len(variant.ops):
        names = "all but " + ", ".join(f"`{name}`" for name in order if name not in variant.ops)
    said = variant.shown_sentence or variant.explanation
    return f"| {_cell(variant.shown or variant.name)} | {names} | {_cell(said)} |"


def _cell(text: str) -> str:
    return re.sub(r"{[^}]*}", "{}", text).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(variants_markdown())
