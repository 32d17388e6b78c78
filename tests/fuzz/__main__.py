"""Search all targets or one: ``python -m tests.fuzz [--seconds 60] [--target NAME]`` (`make fuzz`).

The seconds are shared by the targets. What a search finds worth keeping stays in ``build/fuzz/NAME/corpus``, and
the next one goes on from there; a crash is written to ``build/fuzz/NAME``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitnet_py._native import LIBRARY_VARIABLE, library_path
from tests.fuzz.crashers import CRASHERS
from tests.fuzz.native import NATIVE, build_native
from tests.fuzz.native import seeds as native_seeds
from tests.fuzz.run_one import MAX_BYTES
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS

FOLDER = Path(__file__).parents[2] / "build" / "fuzz"
TIMEOUT_S = 60
"""For one input, wall time."""
MEMORY_MB = 3072
SEARCH = (sys.executable, "-m", "tests.fuzz.search")


@dataclass(frozen=True)
class Searched:
    """One search."""

    target: str
    n_executions: int
    n_covered: int
    """Edges of the code, as libFuzzer counts them."""
    n_new: int
    """Inputs that the search kept."""
    crash: Path | None


def search(target: str, seconds: int, folder: Path) -> Searched:
    """Run one search; what it prints goes to ``log.txt`` in the target's folder."""
    place = folder / target
    corpus = place / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = place / "seeds"
    seeds.mkdir(exist_ok=True)
    first = native_seeds() if target == NATIVE else SEEDS[target]()
    for index, data in enumerate([*first, *CRASHERS.get(target, {}).values()]):
        (seeds / f"{index:03}").write_bytes(data)
    before = set(place.glob("*-*"))
    options = [
        *(
            f"-max_total_time={seconds}",
            f"-timeout={TIMEOUT_S}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-max_len={MAX_BYTES}",
        ),
        *(f"-artifact_prefix={place}/", "-print_final_stats=1", "-verbosity=1", str(corpus), str(seeds)),
    ]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        program = (
            [str(build_native(folder / "library"))]
            if target == NATIVE
            else [*SEARCH, target, scratch, ",".join(TARGETS[target].covers)]
        )
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", LIBRARY_VARIABLE: str(library_path())}
        with (place / "log.txt").open("wb") as log:
            done = subprocess.run([*program, *options], stdout=log, stderr=log, check=False, env=environment)
        found = sorted(set(place.glob("*-*")) - before)
        crashes = [one for one in found if not (one.name.startswith("oom-") and runs_alone([*program, str(one)]))]
    text = (place / "log.txt").read_text("utf-8", "replace")
    numbers = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", text)}
    if "number_of_executed_units" not in numbers or (done.returncode != 0 and not found):
        print(text[-4000:], file=sys.stderr)
        raise SystemExit(f"{target}: the search itself failed, see {place / 'log.txt'}")
    covered = re.findall(r"cov: (\d+)", text)
    return Searched(
        target,
        numbers["number_of_executed_units"],
        int(covered[-1]) if covered else 0,
        numbers["new_units_added"],
        crashes[0] if crashes else None,
    )


def runs_alone(command: list[str]) -> bool:
    """Return whether an input at which a search ran out of memory is answered in a new process: instrumented code
    leaks, and what one input needs is limited by ``run_one``."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Search, print a line per target; returns the exit code: 1 with a crash."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together; at least one each")
    parser.add_argument("--target", choices=[*SEEDS, NATIVE, "all"], default="all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    asked = parser.parse_args()
    names = list(SEEDS) if asked.target == "all" else [asked.target]
    print(f"{datetime.date.today()}, {asked.seconds} s for {len(names)} targets", flush=True)
    found = []
    for name in names:
        one = search(name, max(1, asked.seconds // len(names)), asked.folder)
        found.append(one)
        end = "" if one.crash is None else f"  CRASH {one.crash}"
        print(
            f"{name:<16} {one.n_executions:>9} executions  {one.n_covered:>6} edges  {one.n_new:>5} kept{end}",
            flush=True,
        )
    print(f"{sum(one.n_executions for one in found)} executions")
    return int(any(one.crash is not None for one in found))


if __name__ == "__main__":
    sys.exit(main())
