"""Regular expressions from files, matched so that none of them can hang the tool.

Python's ``re`` backtracks: a short pattern can take years on a short text, and both may come from a third-party
receipt or suite. So matching happens in a child process with a limit on its processor time, which a busy machine
does not change, and which ends it even when nobody waits for it any more.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping

from crossval.errors import BadInputError

TIMEOUT_S = 10.0
"""Of processor time."""
_WAIT_FACTOR = 30
"""Times as long is waited: other work on the machine is no defect of a pattern."""
MAX_CHARS = 1000

_CHILD = """
import json, re, signal, sys
signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
for line in sys.stdin:
    pattern, text = json.loads(line)
    print(int(re.search(pattern, text) is not None), flush=True)
"""

Pair = tuple[str, str]
"""A pattern and the text it is searched in."""

_known: dict[Pair, bool] = {}


def defects(patterns: Iterable[str]) -> Mapping[str, str | None]:
    """Return for each pattern what is wrong with it, or None.

    Raises:
        BadInputError: matching takes too long.
    """
    found = {pattern: _syntax_defect(pattern) for pattern in patterns}
    usable = [(pattern, "") for pattern, wrong in found.items() if wrong is None]
    for (pattern, _), matches in search(usable).items():
        if matches:
            found[pattern] = "is found in the empty text, so any answer would be correct"
    return found


def _syntax_defect(pattern: str) -> str | None:
    if len(pattern) > MAX_CHARS:
        return f"{len(pattern)} characters, at most {MAX_CHARS} are allowed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # syntax that a future Python may read differently
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        return f"not a regular expression: {' '.join(str(error).split())[:120]}"
    return None


def search(pairs: Iterable[Pair]) -> Mapping[Pair, bool]:
    """Return for each (pattern, text) whether ``re.search`` finds the pattern; results are cached.

    Raises:
        BadInputError: a pattern is unusable, or matching takes longer than ``TIMEOUT_S``.
    """
    wanted = dict.fromkeys(pairs)
    missing = [pair for pair in wanted if pair not in _known]
    for pattern, _ in missing:
        wrong = _syntax_defect(pattern)
        if wrong is not None:
            raise BadInputError(f"pattern {pattern[:80]!r}: {wrong}")
    if missing:
        _known.update(zip(missing, _ask(missing), strict=True))
    return {pair: _known[pair] for pair in wanted}


def _ask(pairs: list[Pair]) -> list[bool]:
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD, str(TIMEOUT_S)]
    waited_s = _WAIT_FACTOR * TIMEOUT_S
    try:
        done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=waited_s, check=False)
    except subprocess.TimeoutExpired:
        raise BadInputError(
            f"the patterns could not be matched: {waited_s:g} s passed without the {TIMEOUT_S:g} s of processor "
            "time that they may take"
        ) from None
    answers = done.stdout.split()
    if done.returncode == -signal.SIGPROF:
        pattern = pairs[min(len(answers), len(pairs) - 1)][0]
        raise BadInputError(
            f"pattern {pattern[:80]!r}: no answer within {TIMEOUT_S:g} s of processor time; "
            "write it without nested repetition"
        )
    if done.returncode != 0 or len(answers) != len(pairs):
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BadInputError(f"the patterns could not be matched: {tail[0]}")
    return [answer == "1" for answer in answers]
