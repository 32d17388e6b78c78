"""The texts of broken engines as evidence, counted by signature: the product's data, and tables for the page."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bitnet_py import Model
from bitnet_py.resources import default_model_path
from crossval.texts import evidence
from crossval.texts.evidence import FIRST, Evidence, Fault, Signature, to_json
from crossval.texts.signature import Departure, Right, departure_of, form_of
from tests.support.native_build import ROOT
from tests.zoo.texts import HELD_OUT, PROMPTS, Broken, Text, broken, texts

PAGE = ROOT / "docs" / "triage.md"
MARKS = ("<!-- texts -->\n", "<!-- /texts -->\n")


def rights() -> dict[str, Right]:
    """Return the right text of every prompt."""
    return {prompt: whole_text(prompt) for prompt in (*PROMPTS, *HELD_OUT)}


def whole_text(prompt: str) -> Right:
    """Return the right text to its end."""
    with Model.from_gguf(default_model_path()) as model:
        tokenizer = model.tokenizer
        made: list[int] = []
        ids = tokenizer.encode(prompt)
        cache = model.new_cache()
        pending = ids
        while not made or made[-1] not in tokenizer.eos_ids:
            made.append(int(model.forward(pending, cache).logits[-1].argmax()))
            pending = made[-1:]
        return Right(tuple(tokenizer.token_bytes(token) for token in made[:-1]), ended=True)


def signature_of(text: Text, right: Right) -> Signature:
    """Return what a text looks like, and where it leaves the right one."""
    return Signature(form_of(text.text), departure_of(text.text, right)[0])


def measured(given: Iterable[Text], right: Mapping[str, Right]) -> Evidence:
    """Count texts by fault and signature."""
    engines: set[Broken] = set()
    seen: dict[str, Counter[Signature]] = defaultdict(Counter)
    held_out: dict[str, Counter[Signature]] = defaultdict(Counter)
    passes: dict[Departure, Counter[str]] = defaultdict(Counter)
    facts = {}
    for text in given:
        engine, signature = text.engine, signature_of(text, right[text.prompt])
        engines.add(engine)
        facts[engine.fault] = (engine.family, engine.what)
        where = seen if text.prompt in PROMPTS else held_out
        where[engine.fault][signature] += 1
        if where is seen and signature.departure is not None:
            passes[signature.departure][engine.place if engine.place.endswith(" only") else "both"] += 1
    faults = tuple(Fault(name, *facts[name], seen[name], held_out[name]) for name in facts)
    return Evidence(faults, len(engines), {name: dict(sorted(passes[name].items())) for name in sorted(passes)})


def write(found: Evidence, progress: Callable[[str], None] = print) -> None:
    """Write the product's data and the tables of the page."""
    data = to_json(found.faults, found.n_engines, found.passes)
    rows = ",\n".join(json.dumps(row) for row in data.pop("faults"))
    text = json.dumps(data)[:-1] + f', "faults": [\n{rows}\n]}}\n'
    evidence.FILE.parent.mkdir(exist_ok=True)
    evidence.FILE.write_text(text, encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    begin, end = map(re.escape, MARKS)
    changed, n_places = re.subn(f"{begin}.*{end}", lambda _: MARKS[0] + tables(found) + MARKS[1], page, flags=re.S)
    assert n_places == 1, f"{PAGE} lacks the marks {MARKS}"
    PAGE.write_text(changed, encoding="utf-8")
    progress(f"{len(found.faults)} faults, {found.n_engines} engines")


def tables(found: Evidence) -> str:
    """Return the tables in Markdown."""
    silent = sum(fault.silent for fault in found.faults)
    n_texts = sum(sum(fault.seen.values()) for fault in found.faults)
    right = sum(count for fault in found.faults for one, count in fault.seen.items() if one.departure == "none")
    lines = [
        f"{len(found.faults)} faults, {found.n_engines} engines, {n_texts} texts. {right} of the texts are right,",
        f"and {silent} faults show in none of them: a right text proves no engine right.",
        "",
        "| the text looks like | faults | suspects: faults of the class that do, of all |",
        "|---|---:|---|",
    ]
    looks = {Signature(one.form) for fault in found.faults for one in fault.seen if one.departure != "none"}
    for one in sorted(looks, key=lambda one: (-n_faults(found, one), str(one))):
        lines.append(f"| {one} | {n_faults(found, one)} | {_first(found, one)} |")
    lines += [
        "",
        "| the text looks like, and departs | faults | suspects |",
        "|---|---:|---|",
    ]
    pairs = {one for fault in found.faults for one in fault.seen if one.departure != "none"}
    for one in sorted(pairs, key=lambda one: (-n_faults(found, one), str(one))):
        if n_faults(found, one) > FIRST:
            lines.append(f"| {one.form}, {one.departure} | {n_faults(found, one)} | {_first(found, one)} |")
    lines += ["", "| the text departs | engines wrong in every pass | the prompt's only | decoded tokens only |"]
    lines += ["|---|---:|---:|---:|"]
    for departure, kinds in found.passes.items():
        numbers = [str(kinds.get(kind, 0)) for kind in ("both", "prefill only", "decode only")]
        lines.append(f"| {' | '.join([departure, *numbers])} |")
    lines += [
        "",
        f"| the true class is among the first {FIRST} | other prompts | other prompts, the fault unseen |",
        "|---|---:|---:|",
        *(f"| {what} | {found.share(**k)} | {_unseen(found, k)} |" for what, k in SHARES.items()),
    ]
    return "\n".join(lines) + "\n"


SHARES: dict[str, dict[str, bool]] = {
    "the text alone": {"right_known": False},
    "the text and the right one": {"right_known": True},
    f"without looking at it: the {FIRST} classes with most faults": {"right_known": False, "blind": True},
}


def _unseen(found: Evidence, which: Mapping[str, bool]) -> str:
    """Return the share with the fault unseen, on which a ranking that looks at no text does not depend."""
    return str(found.share(**which, unseen_faults=not which.get("blind", False)))


def n_faults(found: Evidence, signature: Signature) -> int:
    """Return how many faults made an engine print such a text."""
    return sum(len(one.faults) for one in found.suspects(signature))


def _first(found: Evidence, signature: Signature) -> str:
    first = found.suspects(signature)[:FIRST]
    return ", ".join(f"{one.family} ({len(one.faults)} of {one.of})" for one in first)


def main() -> None:
    """Run every engine, and write."""
    engines = list(broken())
    with tempfile.TemporaryDirectory() as folder:
        found = measured(texts(engines, (*PROMPTS, *HELD_OUT), Path(folder)), rights())
    write(found)
