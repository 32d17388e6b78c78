"""Exit codes, the same in table and JSON mode.

====  ==========================================================================================
code  meaning
====  ==========================================================================================
0     parity or pass; an audit that leaves nothing but near ties
1     divergence, deviation from the model's definition, or gate failure
2     usage
3     reference unavailable, coverage incomplete, or agreement shown only within a distance
4     bad input: model, trace, receipt; a file or stdout that cannot be read or written
5     an engine crashed or timed out, or a bug in crossval itself
130   interrupted
141   the reader of the output closed it
143   terminated (SIGTERM), after cleaning up
====  ==========================================================================================

Each class of ``crossval.errors`` defines its own code; those of the verdicts are here.
"""

from __future__ import annotations

from bitnet_py.errors import BitnetError, error_line
from crossval.errors import BadInputError, CrossvalError, EngineCrashError, UnavailableError
from crossval.receipts.file import Receipt
from crossval.receipts.kind import VIEWS

DEBUG_VARIABLE = "CROSSVAL_DEBUG"
"""Environment variable: when it is set, failures print a traceback."""
EXIT_OF_VERDICT = {
    "parity": 0,
    "pass": 0,
    "near_ties": 0,
    "divergence": 1,
    "shared_deviation": 1,
    "reference_defect": 1,
    "candidate_defect": 1,
    "both_differ": 1,
    "deviates": 1,
    "fail": 1,
    "incomplete": 3,
    "agrees_within": 3,
}

EXIT_OF_JUDGEMENT = {"right": 0, "broken": 1, "not compared": 3}
"""Of a text (``crossval.texts``)."""


def exit_code(made: Receipt) -> int:
    """Return the exit code of a receipt's verdict; 3 when the verdict is good but a requested view is missing."""
    missing = [name for name in VIEWS if made["settings"].get(name) and name not in made]
    return EXIT_OF_VERDICT[made["verdict"]] or (UnavailableError.exit_code if missing else 0)


def of_error(error: Exception) -> tuple[str, int]:
    """Return message and exit code of an exception."""
    if isinstance(error, EngineCrashError):
        return str(error).strip(), error.exit_code
    if isinstance(error, CrossvalError):
        return _one_line(error), error.exit_code
    if isinstance(error, BitnetError):
        return _one_line(error), BadInputError.exit_code
    if isinstance(error, OSError):
        where = "cannot write the output" if error.filename is None else str(error.filename)
        return _one_line(f"{where}: {error.strerror or error}"), BadInputError.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; use a shorter prompt or fewer decoded tokens", EngineCrashError.exit_code
    hint = f"this is a bug in crossval; set {DEBUG_VARIABLE}=1 for a traceback and report it"
    return f"{type(error).__name__}: {_one_line(error)} ({hint})", EngineCrashError.exit_code


def _one_line(error: object) -> str:
    return error_line(str(error)) or type(error).__name__
