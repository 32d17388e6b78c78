"""A greedy comparison that is stopped and resumed: what its journal keeps, and what is checked in it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossval import schema
from crossval.api import generation as command
from crossval.compare.greedy import compare_greedy
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.errors import BadInputError
from crossval.examine.greedy_receipt import GREEDY, structure
from crossval.passes import PassRecord
from crossval.receipts import file as receipt
from crossval.receipts import gate, provenance
from crossval.receipts.journal import Journal
from tests.support.strangers import run

TEXTS = ("One prompt", "Another", "A third of them", "The last")
STEPS = 3
HEADER = {"format": "test", "settings": {"n_steps": 3}}
ENTRIES = [{"index": 0, "x": 0.1}, {"index": 1, "text": "ä\u2028\n"}, {"index": 2, "none": None}]


# The file


def write(path: Path, entries: list[dict[str, Any]], header: dict[str, Any] | None = None) -> bytes:
    with Journal(path, header or HEADER) as journal:
        assert list(journal.entries()) == []
        for entry in entries:
            journal.append(entry)
    return path.read_bytes()


def contents(path: Path) -> list[dict[str, Any]]:
    with Journal(path, HEADER) as journal:
        return [entry for _, entry in journal.entries()]


def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / "j", ENTRIES)


WHOLE = whole()


def test_entries_come_back_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "j"
    assert write(path, ENTRIES) == WHOLE
    assert WHOLE.count(b"\n") == 4
    with Journal(path, HEADER) as journal:
        assert list(journal.entries()) == [(f"{path}:{i + 2}", entry) for i, entry in enumerate(ENTRIES)]
    assert path.read_bytes() == WHOLE


@given(st.integers(0, len(WHOLE)))
def test_cut_anywhere_it_resumes_to_the_same_file(length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        path.write_bytes(WHOLE[:length])
        with Journal(path, HEADER) as journal:
            kept = [entry for _, entry in journal.entries()]
            assert kept == ENTRIES[: max(0, WHOLE[:length].count(b"\n") - 1)]
            for entry in ENTRIES[len(kept) :]:
                journal.append(entry)
        assert path.read_bytes() == WHOLE


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"\xff\n",
        b'{"entry":{},"entry":{}}\n',
        b"NaN\n",
        b'{"entry": {}}\n',
        b'{"entry":{},"more":1}\n',
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(WHOLE + line)
    with pytest.raises(BadInputError, match="j:5: "):
        contents(path)


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for data in (b"my notes", b"my notes\n", b"{}\n", WHOLE[10:]):
        path.write_bytes(data)
        with pytest.raises(BadInputError, match="j:1: "):
            Journal(path, HEADER)
        assert path.read_bytes() == data


def test_another_runs_journal_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, ENTRIES)
    with pytest.raises(BadInputError, match=r"another run: settings.n_steps is 3 there, 4 here"):
        Journal(path, {**HEADER, "settings": {"n_steps": 4}})
    with pytest.raises(BadInputError, match="more is null there, 1 here"):
        Journal(path, {**HEADER, "more": 1})
    with pytest.raises(BadInputError, match="format is test there, null here"):
        Journal(path, {"settings": {"n_steps": 3}})
    assert path.read_bytes() == WHOLE


def test_two_runs_cannot_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, HEADER), pytest.raises(BadInputError, match="another process"):
        Journal(path, HEADER)
    Journal(path, HEADER).close()


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "j", Path(os.devnull)):
        with pytest.raises(BadInputError, match="cannot write journal"):
            Journal(path, HEADER)
    write(tmp_path / "j", ENTRIES)
    with Journal(tmp_path / "j", HEADER) as journal, pytest.raises(ValueError, match="read all"):
        journal.append({})


# The command


@pytest.fixture(autouse=True)
def same_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests independent of commits made while they run."""
    facts = provenance.tool_facts()
    monkeypatch.setattr(provenance, "tool_facts", lambda: dict(facts))


class Bench:
    """The command over a few prompts, counted and interruptible."""

    whole: ClassVar[bytes] = b""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.model = folder, model
        self.journal, self.prompts = folder / "j.jsonl", folder / "p.txt"
        self.stop_at: int | None = None
        self.n_run = 0
        self.prompts.write_text("\n".join(TEXTS))
        monkeypatch.setattr(command, "compare_greedy", self._compare)

    def _compare(self, *args: Any, **more: Any) -> Any:
        if self.n_run == self.stop_at:
            raise KeyboardInterrupt
        self.n_run += 1
        return compare_greedy(*args, **more)

    def __call__(self, *args: str | Path, code: int = 0, journal: bool = True) -> Any:
        """Run; return the receipt, or the line on stderr when it fails."""
        self.n_run = 0
        out = self.folder / "r.json"
        options = ("--reference", "spec", "--model", self.model, "--steps", str(STEPS), "--receipt", out, "--json")
        more = ("--journal", self.journal) if journal else ()
        result = run("greedy", "--prompts", self.prompts, *options, *more, *args)
        assert result.exit_code == code, result.output
        if code > 1:
            return result.stderr
        made = receipt.read(out)
        assert not any(gate.complaints(GREEDY, made).values())
        return made

    def finished(self) -> None:
        """Have the journal of a whole run, made once."""
        if not Bench.whole:
            self()
            Bench.whole = self.journal.read_bytes()
        self.journal.write_bytes(Bench.whole)

    def interrupted(self, n_done: int) -> str:
        self.stop_at = n_done
        message = self(code=130)
        self.stop_at = None
        return str(message)

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line)["entry"] for line in self.journal.read_text(encoding="utf-8").split("\n")[1:-1]]

    def forge(self, entries: list[dict[str, Any]]) -> None:
        """Write a journal of this run with these entries and correct digests."""
        header = json.loads(self.journal.read_text(encoding="utf-8").split("\n")[0])["run"]
        self.journal.unlink()
        write(self.journal, entries, header)


@pytest.fixture
def bench(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, model_path, monkeypatch)


def lasting(made: receipt.Receipt) -> dict[str, Any]:
    """Return the receipt without its time, and without what the journal adds to it."""
    kept = {name: value for name, value in copy.deepcopy(made).items() if name not in ("created_at", "digest")}
    kept["results"].pop("from_journal", None)
    return kept


@pytest.mark.parametrize("n_done", range(len(TEXTS) + 1))
def test_a_resumed_run_gives_the_receipt_of_an_uninterrupted_one(bench: Bench, n_done: int) -> None:
    at_once = bench(journal=False)
    assert "from_journal" not in at_once["results"]
    if n_done < len(TEXTS):
        message = bench.interrupted(n_done)
        assert f"{n_done} of {len(TEXTS)} prompts are in {bench.journal}" in message
    else:
        assert bench()["results"]["from_journal"] == 0
    resumed = bench()
    assert bench.n_run == len(TEXTS) - n_done
    assert resumed["results"]["from_journal"] == n_done
    assert lasting(resumed) == lasting(at_once)
    assert resumed["compute"]["kernels"]


def test_a_run_killed_in_the_middle_of_a_line_loses_that_prompt_only(bench: Bench) -> None:
    at_once = bench()
    data = bench.journal.read_bytes()
    bench.journal.write_bytes(data[:-7])
    again = bench()
    assert (bench.n_run, again["results"]["from_journal"]) == (1, len(TEXTS) - 1)
    assert lasting(again) == lasting(at_once)
    assert bench.journal.read_bytes() == data


def test_more_prompts_can_be_added_and_others_are_refused(bench: Bench) -> None:
    bench()
    bench.prompts.write_text("\n".join((*TEXTS, "One more")))
    assert bench()["results"]["from_journal"] == len(TEXTS)
    bench.prompts.write_text("\n".join(TEXTS))
    assert "holds more than the 4 prompts" in bench(code=4)
    bench.prompts.write_text("\n".join((TEXTS[0], "Something else")))
    assert "j.jsonl:3: prompt 1 was another one" in bench(code=4)


def test_a_single_prompt_has_a_journal_too(bench: Bench, model_path: Path) -> None:
    args = ("greedy", "--prompt", "x", "--steps", "2", "--reference", "spec", "--model", model_path)
    assert run(*args, "--journal", bench.journal).exit_code == 0
    assert run(*args, "--journal", bench.journal).exit_code == 0
    assert bench.n_run == 1


def test_the_journal_of_another_run_is_refused(
    bench: Bench, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    bench()
    before = bench.journal.read_bytes()
    for changed, what in (
        (("--steps", "4"), "settings.n_steps is 3 there, 4 here"),
        (("--threads", "1"), "settings.n_threads is null there, 1 here"),
        (("--candidate", "spec"), "candidate."),
        (("--model", make_model(seed=7)), "model.sha256"),
    ):
        message = bench(*changed, code=4)
        assert message.startswith(f"error: journal {bench.journal} belongs to another run: {what}"), message
        assert message.count("\n") == 1
    assert bench.journal.read_bytes() == before


def test_another_tool_is_another_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench()
    facts = {**provenance.tool_facts(), "commit": "0" * 40}
    monkeypatch.setattr(provenance, "tool_facts", lambda: facts)
    assert "tool.commit" in bench(code=4)


def test_a_file_that_is_no_journal_is_left_alone(bench: Bench) -> None:
    bench.journal.write_text("my notes")
    assert "j.jsonl:1: not the journal of a run" in bench(code=4)
    assert bench.journal.read_text() == "my notes"


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(entry: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        target: Any = entry
        for name in outer:
            target = target[int(name) if name.isdigit() else name]
        target[int(last) if last.isdigit() else last] = value(target[last]) if callable(value) else value

    return apply


@pytest.mark.parametrize(
    ("forgery", "what"),
    [
        (change("index", 2), "prompt 1 is expected here"),
        (change("index", True), "prompt 1 is expected here"),
        (change("more", 1), "other fields"),
        (change("prompt.text", "Else"), "prompt 1 was another one"),
        (change("prompt.prompt_ids", lambda ids: [*ids, 5]), "token ids are not those of the prompt"),
        (change("prompt.more", 1), "violates receipt.v1"),
        (change("prompt.steps", 7), "violates receipt.v1"),
        (change("prompt.candidate_tokens", lambda ids: [10**6, *ids[1:]]), "outside the vocabulary"),
        (change("prompt.candidate_tokens", lambda ids: [ids[0] ^ 1, *ids[1:]]), "not what the steps chose"),
        (change("prompt.steps", lambda steps: steps[1:]), "steps are missing"),
        (change("prompt.steps_required", STEPS + 1), "steps_required"),
        (change("prompt.free_running_matches", 1), "free_running_matches"),
        (change("prompt.teacher_forced_agreement", 0.5), "teacher_forced_agreement"),
        (change("prompt.steps.1.logits.bitwise_equal", True), ""),
        (change("prompt.steps.1.logits.bound.nmse", 1.0), "bounds are not those"),
        (change("prompt.steps.1.logits.status", "diverged"), "status is diverged"),
        (change("prompt.steps.1.logits.nmse", 1e-9), "NMSE"),
        (change("prompt.steps.1.logits.n_elements", 7), ""),
        (change("traces.reference", "0" * 64), "another recorded trace"),
        (change("kernels", []), "not those of the candidate"),
        (change("kernels", 3), "not a list"),
        (change("kernels", lambda all_: [{**one, "calls": -1} for one in all_]), "not a list"),
        (change("kernels", lambda all_: [{**one, "calls": 0} for one in all_]), "no kernel ran"),
        (change("kernels", lambda all_: [*all_, all_[0]]), "not those of the candidate"),
    ],
)
def test_an_entry_is_believed_no_more_than_a_receipt(
    bench: Bench, forgery: Callable[[dict[str, Any]], None], what: str
) -> None:
    bench.finished()
    entries = bench.entries()
    forgery(entries[1])
    bench.forge(entries)
    message = bench(code=4)
    assert f"{bench.journal}:3: " in message
    assert what in message
    assert message.count("\n") == 1
    assert bench.n_run == 0


@pytest.mark.usefixtures("no_bitnet_cpp")
def test_recorded_references_are_told_apart(
    bench: Bench, model_path: Path, record: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "m.gguf"
    shutil.copy(model_path, model)
    for index, text in enumerate(TEXTS):
        shutil.copytree(record(prompt=text), tmp_path / "m.goldens" / f"g{index}")
    auto = ("--model", model, "--reference", "auto")
    at_once = bench(*auto, journal=False)
    bench(*auto)
    resumed = bench(*auto)
    assert (bench.n_run, resumed["results"]["from_journal"]) == (0, len(TEXTS))
    assert lasting(resumed) == lasting(at_once)
    shutil.rmtree(tmp_path / "m.goldens" / "g1")
    shutil.copytree(record(prompt=TEXTS[1], n_decode=3), tmp_path / "m.goldens" / "g1")
    assert "j.jsonl:3: made with another recorded trace" in bench(*auto, code=4)


def test_diverged_and_unusable_steps_survive_the_journal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BitnetPyRunner.eval
    for wrong in (np.nan, 50.0):

        def spoiled(self: Any, *args: Any, wrong: float = wrong) -> PassRecord:
            made = right(self, *args)
            if made.plan.kind == "decode" and "result_output" in made.taps:
                made.taps["result_output"].array[0, 1] = wrong
            return made

        monkeypatch.setattr(BitnetPyRunner, "eval", spoiled)
        bench.journal.unlink(missing_ok=True)
        first, again = bench(code=1), bench(code=1)
        assert (bench.n_run, again["results"]["from_journal"]) == (0, len(TEXTS))
        assert lasting(first) == lasting(again)
        steps = first["results"]["prompts"][0]["steps"]
        assert steps[1]["logits"]["status"] == ("invalid" if wrong is np.nan else "diverged")


def test_the_share_from_the_journal_cannot_exceed_the_prompts(bench: Bench) -> None:
    made = bench()
    made["results"]["from_journal"] = len(TEXTS) + 1
    assert any("from_journal" in what for what in structure(made))
    made["results"]["from_journal"] = -1
    with pytest.raises(BadInputError, match="from_journal"):
        schema.validate(made)


def test_a_receipt_too_large_to_read_is_refused_before_the_run(bench: Bench) -> None:
    assert "at most 50000 steps" in bench("--steps", "20000", code=4)
    assert bench.n_run == 0


def test_progress_counts_prompts() -> None:
    said: list[tuple[str, int, int]] = []
    report = command.of_prompt(lambda *what: said.append(what), 2, 7)
    report("tokens", 5, 32)
    assert said == [("prompt 3 of 7, tokens 5/32", 2, 7)]
    command.of_prompt(lambda *what: said.append(what), 0, 1)("tokens", 5, 32)
    assert said[1:] == [("tokens", 5, 32)]
