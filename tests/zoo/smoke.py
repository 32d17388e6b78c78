"""Faults that turn the text into nonsense, and what ``crossval smoke`` reports for each.

``python -m tests.zoo.smoke [--write]`` asks the engine the long suite once per fault and prints the table of
docs/smoke.md (``--write``: puts it there).
"""

from __future__ import annotations

import argparse
import json
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests.support.native_build import ROOT
from tests.zoo.engine import run

PAGE = ROOT / "docs" / "smoke.md"
MARKS = ("<!-- faults -->\n", "<!-- /faults -->\n")
CROSSVAL = Path(sysconfig.get_path("scripts")) / "crossval"
FAULTS = {
    "none": ("", ""),
    "interleaved RoPE": (
        "rope-interleaved",
        "pairs (2i, 2i+1) are rotated instead of (i, i + head_dim/2)",
    ),
    "sequential I2_S decode": (
        "codes-sequential-high-first",
        "the four codes of a byte are taken for four neighbours",
    ),
    "skipped attention sub-norm": (
        "sub-norm-skipped:op=attn_sub_norm",
        "attn_sub_norm is left out in every layer",
    ),
    "skipped FFN sub-norm": ("sub-norm-skipped:op=ffn_sub_norm", "ffn_sub_norm is left out in every layer"),
    "SiLU": ("act-silu", "x * sigmoid(x) instead of relu(x)^2"),
}
"""Name -> the fault in the words of ``BN_FAULT``, in every layer, and what is wrong. The text does not show which
of these it is."""


@dataclass(frozen=True)
class Outcome:
    """What ``crossval smoke`` reported for one engine."""

    exit_code: int
    n_prompts: int
    correct: int
    coherent: int
    garbled: int

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return self.correct / self.n_prompts


def ask(fault: str, model: Path | None = None) -> Outcome:
    """Ask a model (the shipped one) the long suite, with this fault in the engine."""
    done = run([CROSSVAL, "smoke", "--suite", "long", "--json", *(("--model", model) if model else ())], fault)
    assert done.returncode in (0, 1), done.stderr
    counts = json.loads(done.stdout)["results"]["summary"]["engines"][0]["all"]
    return Outcome(done.returncode, **counts)


def table(model: Path | None = None) -> str:
    """Return the table in Markdown."""
    lines = ["| fault | what is wrong | correct | coherent | garbled |", "|---|---|---:|---:|---:|"]
    for name, (fault, what) in FAULTS.items():
        found = ask(fault, model)
        share = f"{found.correct} of {found.n_prompts} ({100 * found.accuracy:.1f} %)"
        lines.append(f"| {name} | {what} | {share} | {found.coherent} | {found.garbled} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description="Table of faults and what they do to the text.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/smoke.md")
    parser.add_argument("--model", type=Path, metavar="PATH", help="another model than the shipped one")
    arguments = parser.parse_args()
    made = table(arguments.model)
    if not arguments.write:
        print(made, end="")
        return
    text = PAGE.read_text(encoding="utf-8")
    begin, end = map(re.escape, MARKS)
    changed, n_places = re.subn(f"{begin}.*{end}", lambda _: MARKS[0] + made + MARKS[1], text, flags=re.S)
    assert n_places == 1, f"{PAGE} lacks the marks {MARKS}"
    PAGE.write_text(changed, encoding="utf-8")


if __name__ == "__main__":
    main()
