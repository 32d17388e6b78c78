"""One search by atheris: ``python -m tests.fuzz.search TARGET SCRATCH COVERS OPTION...``, in its own process."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

# An editable installation imports its modules by a finder of its own, and so they would not be instrumented.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
with atheris.instrument_imports(include=sys.argv[3].split(",")):
    from tests.fuzz.mutate import mutated
    from tests.fuzz.run_one import run_one
    from tests.fuzz.targets import TARGETS


def main(name: str, scratch: str, options: list[str]) -> None:
    """Search until a limit among the options, or the first crash, which libFuzzer writes to a file."""
    target = TARGETS[name]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        choices = random.Random(seed)
        made = mutated(data, max_size, choices) if choices.random() < 0.8 else None
        return atheris.Mutate(data, max_size) if made is None else made

    more = {"custom_mutator": mutate} if target.json else {}
    atheris.Setup([sys.argv[0], *options], lambda data: run_one(target, data, Path(scratch)), **more)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[4:])
