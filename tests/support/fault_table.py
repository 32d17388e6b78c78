"""Table of faults and what they do to the text: ``python -m tests.support.fault_table [--write]``.

Builds the engine with each mistake of ``broken_engine.TEXT_MISTAKES``, asks it the long suite, and prints
the table of docs/smoke.md (``--write``: puts it there).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.broken_engine import ROOT, TEXT_MISTAKES, TextMistake, build, run
from tests.support.native_build import LIBRARY

PAGE = ROOT / "docs" / "smoke.md"
MARKS = ("<!-- faults -->\n", "<!-- /faults -->\n")
CROSSVAL = Path(sysconfig.get_path("scripts")) / "crossval"


@dataclass(frozen=True)
class Outcome:
    """What ``crossval smoke`` said of one engine."""

    exit_code: int
    n_prompts: int
    correct: int
    coherent: int
    garbled: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n_prompts


def ask(library: Path | None, model: Path | None = None) -> Outcome:
    """Ask a model (the shipped one) the long suite, through another build of the engine if one is given."""
    words = [CROSSVAL, "smoke", "--suite", "long", "--json", *(("--model", model) if model else ())]
    if library is None:
        done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    else:
        done = run(words, library)
    assert done.returncode in (0, 1), done.stderr
    counts = json.loads(done.stdout)["results"]["summary"]["engines"][0]["all"]
    return Outcome(done.returncode, **counts)


def outcomes(model: Path | None) -> Iterator[tuple[TextMistake | None, Outcome]]:
    """Yield the engine as it is, then with each mistake."""
    yield None, ask(None, model)
    for mistake in TEXT_MISTAKES:
        with tempfile.TemporaryDirectory() as folder:
            yield mistake, ask(build([mistake], Path(folder) / LIBRARY), model)


def table(model: Path | None = None) -> str:
    """Return the table in Markdown."""
    lines = ["| fault | what is wrong | correct | coherent | garbled |", "|---|---|---:|---:|---:|"]
    for mistake, found in outcomes(model):
        name, what = ("none", "") if mistake is None else (mistake.name, mistake.what)
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
