"""The available engines, one row each, and how a word opens one as candidate or reference.

Runners are returned unentered. No engine is ever silently replaced by another: a live reference
that fails to load is an error, not a reason to use a golden, and the specification is used only
when asked for by name. To add a live engine: a runner, and a row of ``ENGINES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossval.bitnet_cpp import library
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.goldens import find_golden, goldens_dir, list_goldens
from crossval.engines.recorded import RecordedRunner
from crossval.engines.spec import SpecRunner
from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256
from crossval.passes import Numerics, Runner
from crossval.terms import SIDES, Side

HOW_TO_BUILD = "run `make fetch-cpp` (or set BITNET_CPP_DIR or BITNET_CPP_LIB)"


@dataclass(frozen=True)
class Asked:
    """What an engine is opened for; each engine uses the fields that apply to it.

    ``prompt``: text or token ids. ``numerics``: how the reference states that it rounds.
    """

    word: str
    model_path: Path
    prompt: str | Sequence[int] | None = None
    numerics: Numerics | None = None
    n_threads: int | None = None
    kernel: str | None = None


@dataclass(frozen=True)
class Engine:
    """One engine: the word that selects it, its name in receipts, and how it is opened.

    ``live``: set if the engine is chosen per prompt and may be a recorded one; the word of the engine
    to use instead where any prompt must run. ``one_way``: why it cannot run in another way (in other
    pieces, with other threads).
    """

    word: str
    name: str
    sides: tuple[Side, ...]
    open: Callable[[Asked], Runner]
    live: str | None = None
    one_way: str | None = None


def _bitnet_py(asked: Asked) -> Runner:
    return BitnetPyRunner(
        asked.model_path, n_threads=asked.n_threads, numerics=asked.numerics, kernel=asked.kernel
    )


def _bitnet_cpp(asked: Asked) -> Runner:
    if library.find_library() is None:
        raise UnavailableError(
            f"bitnet.cpp is not built here; {HOW_TO_BUILD}, or use --reference auto for its recorded activations"
        )
    if asked.n_threads is None:
        return BitnetCppRunner(asked.model_path)
    return BitnetCppRunner(asked.model_path, n_threads=asked.n_threads)


def _spec(asked: Asked) -> Runner:
    return SpecRunner(asked.model_path)


def _auto(asked: Asked) -> Runner:
    """Return live bitnet.cpp when its library is there, else a golden of this model file and prompt."""
    if library.find_library() is not None:
        return _bitnet_cpp(asked)
    path, prompt = asked.model_path, asked.prompt
    golden = None if prompt is None else find_golden(path, file_sha256(path), prompt)
    if golden is None:
        raise UnavailableError(_nothing_found(path, prompt))
    return RecordedRunner(golden)


def _trace(asked: Asked) -> Runner:
    path, model_path = Path(asked.word), asked.model_path
    runner = RecordedRunner(path)
    found, recorded = file_sha256(model_path), runner.info.model
    if recorded.sha256 != found:
        raise BadInputError(
            f"{path} was recorded from another model ({recorded.file_name or 'unnamed'}, sha256 "
            f"{recorded.sha256[:12]}…) than {model_path} ({found[:12]}…)"
        )
    return runner


ENGINES = (
    Engine("auto", "bitnet.cpp", ("reference",), _auto, live="bitnet.cpp"),
    Engine("bitnet.cpp", "bitnet.cpp", ("reference",), _bitnet_cpp),
    Engine("bitnet_py", "bitnet_py", ("candidate",), _bitnet_py),
    Engine("spec", "specification", SIDES, _spec, one_way="the specification computes in one way only"),
)
TRACE = Engine("DIR", "trace", SIDES, _trace, one_way="a trace cannot be run again")
"""A directory with a trace, which also acts as an engine; its word is its path."""
_ROWS = {row.word: row for row in ENGINES}


def find_engine(side: Side, word: str) -> Engine:
    """Return the row of a word, or ``TRACE`` for a directory.

    Raises:
        BadInputError: it is neither; the message lists the words.
    """
    row = _ROWS.get(word)
    if row is not None and side in row.sides:
        return row
    if not word or not Path(word).is_dir():
        raise BadInputError(f"{side} {word!r} is neither {', '.join(words(side))} nor a directory with a trace")
    return TRACE


def words(side: Side) -> list[str]:
    """Return the words accepted for a side, besides a trace directory."""
    return [row.word for row in ENGINES if side in row.sides]


def live_words() -> list[str]:
    """Return the words of engines that run any prompt."""
    return [row.word for row in ENGINES if row.live is None]


def live_word(word: str) -> str:
    """Return the word to use where the engine must run live."""
    row = _ROWS.get(word)
    return word if row is None else row.live or word


def engine_name(word: str) -> str:
    """Return what receipts call an engine that has not been opened."""
    return _ROWS[word].name if word in _ROWS else Path(word).name or word


def open_candidate(
    word: str,
    model_path: str | Path,
    *,
    numerics: Numerics | None = None,
    n_threads: int | None = None,
    kernel: str | None = None,
) -> Runner:
    """Return the engine under test: one of ``words("candidate")``, or a trace directory.

    ``numerics``: what the entered reference states about its arithmetic
    (``reference.identity.numerics``); our engine then rounds in the same places.

    Raises:
        BadInputError: the word is none of these, or the trace is malformed or of another model.
    """
    asked = Asked(word, Path(model_path), numerics=numerics, n_threads=n_threads, kernel=kernel)
    return find_engine("candidate", word).open(asked)


def open_reference(
    word: str,
    model_path: str | Path,
    prompt: str | Sequence[int] | None = None,
    *,
    n_threads: int | None = None,
) -> Runner:
    """Return the reference: one of ``words("reference")``, or a trace directory.

    ``auto`` is live bitnet.cpp when its library is there, else a golden of this model file and
    ``prompt`` (text or token ids).

    Raises:
        UnavailableError: bitnet.cpp is not built, or ``auto`` finds neither it nor a golden.
        BadInputError: the word is none of these, or the trace is malformed or of another model.
    """
    asked = Asked(word, Path(model_path), prompt, n_threads=n_threads)
    return find_engine("reference", word).open(asked)


def open_live(word: str, model_path: str | Path, *, n_threads: int | None = None) -> Runner:
    """Return an engine that runs any prompt: one of ``live_words()``.

    Raises:
        UnavailableError: bitnet.cpp is not built.
        BadInputError: the word is none of these.
    """
    if word not in live_words():
        raise BadInputError(f"engine {word!r}: expected {', '.join(live_words())}")
    return _ROWS[word].open(Asked(word, Path(model_path), n_threads=n_threads))


def require_bitnet_cpp(recorded: str, otherwise: str = "") -> None:
    """Check that live bitnet.cpp is there; ``recorded``: what a recorded one lacks, for the message.

    Raises:
        UnavailableError: it is not built.
    """
    if library.find_library() is None:
        raise UnavailableError(
            f"bitnet.cpp is not built here, and what is recorded of it {recorded}; {HOW_TO_BUILD}{otherwise}"
        )


def _nothing_found(model_path: Path, prompt: str | Sequence[int] | None) -> str:
    """Explain which references exist, and what to do."""
    remedy = "run `make fetch-cpp` to build bitnet.cpp, or --reference spec to compare with the specification"
    goldens = list_goldens(model_path)
    if not goldens:
        return f"bitnet.cpp is not built here and {goldens_dir(model_path)} holds no recorded reference; {remedy}"
    sha256 = file_sha256(model_path)
    usable = [golden for golden in goldens if golden.info.model.sha256 == sha256]
    if not usable:
        return (
            f"bitnet.cpp is not built here and the {len(goldens)} goldens in {goldens_dir(model_path)} were "
            f"recorded from another version of {model_path.name}; {remedy}, or record them again"
        )
    prompts = ", ".join(repr(golden.info.prompt_text) for golden in usable[:12] if golden.info.prompt_text)
    asked = "no prompt was given" if prompt is None else "none of them is for this prompt"
    return f"bitnet.cpp is not built here; goldens exist for: {prompts}; {asked}; {remedy}"
