"""Soak: commands run thousands of times, a third of them killed at a random moment; nothing may stay behind.

``python -m tests.soak --runs 2000 --jobs 4`` (docs/reliability.md). With a live bitnet.cpp (``BITNET_CPP_LIB``)
half of the comparisons use it. Every run has a folder and temporary folder of its own, and an environment variable
by which every process that it started is found, whoever its parent is now.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossval import registry
from crossval.bitnet_cpp.remedies import BUILD_DIR_VARIABLE, LIBRARY_VARIABLE
from crossval.errors import BadInputError
from crossval.receipts import file as receipt
from crossval.receipts.gate import passed
from crossval.traces.read import Trace

MARK = "CROSSVAL_SOAK_RUN"
GRACE_S = 30.0
"""Within which everything that a run started has to be gone once its command is."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLED_SHARE = 1 / 3
BEFORE_THE_PROGRAM = ("Fatal Python error: init_", "Could not import runpy module")
"""How Python reports Ctrl-C in its own first 20 ms, with exit code 1, before it runs a line of any program."""
RECEIPT, JOURNAL, TRACE = "r.json", "j.jsonl", "trace"
PROMPTS = "What is 2+2?\nWhat is the capital of France?\nName a colour.\n"


@dataclass(frozen=True)
class Case:
    """A command, and what it may leave in its folder."""

    name: str
    words: tuple[str, ...]
    share: int
    """Of all runs, relative to the others'."""
    live: bool = False
    files: frozenset[str] = frozenset({RECEIPT})
    program: tuple[str, ...] = (sys.executable, "-m", "crossval")


def cases(live: bool) -> list[Case]:
    """Return the commands; those with a live engine where there is one."""
    layers = ("layers", "--prompt", "What is 2+2?", "--receipt", RECEIPT)
    greedy = ("greedy", "--prompts", "prompts.txt", "--steps", "4", "--journal", JOURNAL, "--receipt", RECEIPT)
    record = ("record", "--engine", "bitnet_py", "--prompt", "Hi", "--out", TRACE, "--overwrite")
    both = [
        Case("layers, goldens", layers, 10),
        Case("record over a trace", record, 1, files=frozenset({TRACE})),
    ]
    if not live:
        return both
    files = frozenset({"prompts.txt", JOURNAL, RECEIPT})
    return [*both, Case("layers, live", layers, 10, live=True), Case("greedy, live", greedy, 3, True, files)]


@dataclass
class Outcome:
    """What became of one run."""

    case: str
    kill: str
    """Signal and whom it hit; empty: none."""
    exit_code: int
    problems: list[str] = field(default_factory=list)
    n_left: int = 0
    """Temporary files and folders that a killed command left, and the next one removed."""


def processes(mark: str) -> list[int]:
    """Return the processes whose environment has the mark."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


class Run:
    """One run of a command in a folder of its own."""

    def __init__(self, case: Case, number: int, folder: Path, seed: int) -> None:
        self.case = case
        self.mark = f"{os.getpid()}-{number}"
        self.folder = folder / str(number)
        self.choices = random.Random(f"{seed} {number}")
        self.temporary = self.folder / "tmp"
        self.work = self.folder / "work"
        self.temporary.mkdir(parents=True)
        self.work.mkdir()
        if "prompts.txt" in case.files:
            (self.work / "prompts.txt").write_text(PROMPTS)
        self.environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            MARK: self.mark,
            "OPENBLAS_NUM_THREADS": "1",
        }
        if not case.live:
            self.environment |= {BUILD_DIR_VARIABLE: str(self.folder / "none")}
            self.environment.pop(LIBRARY_VARIABLE, None)

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log.txt").open("wb") as log:
            return subprocess.Popen(
                [*self.case.program, *self.case.words],
                cwd=self.work, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def again(self, outcome: Outcome) -> None:
        """Run to the end without a kill, and check what is there."""
        code = self.start().wait()
        self.check_gone(outcome)
        if code != 0:
            outcome.problems.append(f"exit {code} without a kill: {self.said()}")
        self.check_files(outcome, whole=True)
        if left := self.left():
            outcome.problems.append(f"left behind: {left}")

    def killed(self, expected_s: float) -> Outcome:
        """Kill the command or one of its children at a random moment; then run it again, to its end."""
        if TRACE in self.case.files:
            self.start().wait()  # the trace that a killed command must not damage
        number = self.choices.choice(SIGNALS)
        process = self.start()
        self.wait(self.choices.uniform(0, 1.1 * expected_s))
        children = [pid for pid in processes(self.mark) if pid != process.pid]
        at_child = bool(children) and self.choices.random() < 0.5
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.choices.choice(children) if at_child else process.pid, number)
        code = process.wait()
        outcome = Outcome(self.case.name, f"{number.name} {'child' if at_child else 'parent'}", code)
        self.check_gone(outcome)
        # before the command has taken over its signals, Python and the kernel end it
        # a library whose child dies while it is checked is no usable one: exit 3, and a receipt that says so
        allowed = {0, 3, 5} if at_child else {0, -number, *({130} if number is signal.SIGINT else {143})}
        if number is signal.SIGINT and not at_child and self.log().startswith(BEFORE_THE_PROGRAM):
            allowed = {1}
        if code not in allowed or "bug in crossval" in self.said():
            outcome.problems.append(f"exit {code} after {outcome.kill}: {self.said()}")
        self.check_files(outcome, whole=code == 0, verdict="incomplete" if code == 3 else "parity")
        left = self.left()
        if left and not (number is signal.SIGKILL and not at_child):
            outcome.problems.append(f"left behind after {outcome.kill}: {left}")
        outcome.n_left = len(left)
        n_done = self.n_journaled()
        self.again(outcome)
        if n_done is not None and receipt.read(self.work / RECEIPT)["results"]["from_journal"] != n_done:
            outcome.problems.append(f"{n_done} prompts of the journal were not taken from it")
        return outcome

    def n_journaled(self) -> int | None:
        """Return how many prompts the journal holds; None: there is none."""
        path = self.work / JOURNAL
        return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else None

    def wait(self, seconds: float) -> None:
        """Let the command work before it is killed."""
        time.sleep(seconds)

    def check_gone(self, outcome: Outcome) -> None:
        """Wait until no process of this run is left; those that stay are a problem, and are ended."""
        deadline = time.monotonic() + GRACE_S
        while (left := processes(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:80]
            outcome.problems.append(f"orphan after {outcome.kill}: {command!r}")
            os.kill(pid, signal.SIGKILL)

    def check_files(self, outcome: Outcome, *, whole: bool, verdict: str = "parity") -> None:
        """Check that what is there is whole; ``whole``: and that there is something."""
        try:
            if TRACE in self.case.files and (whole or (self.work / TRACE / "trace.json").exists()):
                Trace.open(self.work / TRACE).verify()
            path = self.work / RECEIPT
            if RECEIPT in self.case.files and (whole or path.exists()):
                made = receipt.read(path)
                passes = passed(registry.judge(made))
                if made.verdict != verdict or passes != (verdict == "parity"):
                    outcome.problems.append(f"a receipt says {made.verdict}, and the gate passes it: {passes}")
        except BadInputError as error:
            outcome.problems.append(f"half written after {outcome.kill or 'no kill'}: {error}")

    def left(self) -> list[str]:
        """Return what should not be in the folders."""
        work = [path.name for path in self.work.iterdir() if path.name not in self.case.files]
        trace = self.work / TRACE
        inside = [path.name for path in trace.iterdir() if path.suffix == ".part"] if trace.is_dir() else []
        return sorted([*work, *inside, *(path.name for path in self.temporary.iterdir())])

    def log(self) -> str:
        """Return what the command printed."""
        return (self.folder / "log.txt").read_text("utf-8", "replace")

    def said(self) -> str:
        """Return the last line that the command printed."""
        lines = self.log().strip().splitlines()
        return lines[-1][:300] if lines else "nothing"


def timed(case: Case, number: int, folder: Path) -> float:
    """Return how long one run of a case takes in seconds; its problems end the soak."""
    start = time.monotonic()
    run, outcome = Run(case, number, folder, seed=0), Outcome(case.name, "", 0)
    run.again(outcome)
    if outcome.problems:
        raise SystemExit(f"{case.name}: {outcome.problems[0]}")
    return time.monotonic() - start


def soak(numbers: range, n_jobs: int, seed: int, most_s: float, folder: Path) -> list[Outcome]:
    """Run those numbers that begin within ``most_s`` seconds; the folder of a run without a problem is removed."""
    # a shell starts what runs in the background with SIGINT ignored, and a command would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    every = cases(LIBRARY_VARIABLE in os.environ)
    end = time.monotonic() + most_s
    with ThreadPoolExecutor(n_jobs) as pool:
        spent_s = pool.map(lambda at: timed(every[at], -1 - at, folder), range(len(every)))
        expected_s = {case.name: spent for case, spent in zip(every, spent_s, strict=True)}
        print("at first:", ", ".join(f"{name} {spent:.1f} s" for name, spent in expected_s.items()), flush=True)

        def one(number: int) -> Outcome | None:
            if time.monotonic() > end:
                return None
            choices = random.Random(f"{seed} {number} drawn")
            (case,) = choices.choices(every, [case.share for case in every])
            run = Run(case, number, folder, seed)
            if choices.random() < KILLED_SHARE:
                outcome = run.killed(expected_s[case.name])
            else:
                outcome = Outcome(case.name, "", 0)
                run.again(outcome)
            if not outcome.problems:
                shutil.rmtree(run.folder)
            for problem in outcome.problems:
                print(f"run {number}, {case.name}: {problem}", flush=True)
            return outcome

        return [outcome for outcome in pool.map(one, numbers) if outcome is not None]


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the counts of a soak, as lines."""
    killed = [one for one in outcomes if one.kill]
    counts: dict[str, Counter[Any]] = {
        "runs": Counter(one.case for one in outcomes),
        "killed": Counter(one.kill for one in killed),
        "exit codes after a kill": Counter(one.exit_code for one in killed),
    }
    lines = [
        f"{title}: {', '.join(f'{key} {n}' for key, n in sorted(found.items()))}"
        for title, found in counts.items()
    ]
    n_left, n_problems = sum(one.n_left for one in outcomes), sum(bool(one.problems) for one in outcomes)
    return "\n".join(
        [
            f"{len(outcomes)} runs, {len(killed)} killed, {len(killed)} repeated after that",
            *lines,
            f"left by a killed command and removed by the next: {n_left}",
            f"runs with a problem: {n_problems}",
        ]
    )


def main() -> int:
    """Soak and print the counts; 1 where anything stayed behind."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first run: 20 go on after 0 to 19")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="within which a run has to begin")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        numbers = range(asked.first, asked.first + asked.runs)
        outcomes = soak(numbers, asked.jobs, asked.seed, asked.seconds, Path(folder))
    print(f"{datetime.date.today()}, seed {asked.seed}, from run {asked.first}\n{summary(outcomes)}")
    return int(any(one.problems for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
