"""The available engines, one row each, and how a word opens one as candidate or reference.

Runners are returned unentered. No engine is ever silently replaced by another: a live reference
that fails to load is an error, not a reason to use a golden, and the specification is used only
when asked for by name. To add a live engine: a runner, and a row of ``ENGINES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_py.arithmetic import Generation
from crossval.bitnet_cpp import library
from crossval.bitnet_cpp.remedies import BUILD, HOW_TO_BUILD
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.engines import llama_package
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.goldens import find_golden, goldens_dir, list_goldens
from crossval.engines.record import trace_model
from crossval.engines.recorded import RecordedRunner
from crossval.engines.spec import SpecRunner
from crossval.engines.transformers import CHOICES, NAME, TransformersRunner, parse_choices
from crossval.engines.words import PATH, TRACE, EngineWord, parse, shown
from crossval.errors import UnavailableError
from crossval.files import file_sha256
from crossval.passes import Numerics, Runner, tokenizer_rules
from crossval.terms import SIDES, Side
from crossval.traces.tap_map import TapMap


@dataclass(frozen=True)
class Asked:
    """What an engine is opened for; each engine uses the fields that apply to it.

    ``prompt``: text or token ids. ``numerics``: how the other engine states that it rounds.
    ``follow_reference_graph``: compute what the other engine's generation computes, even where that
    is not the model. ``n_ubatch``: longest pass needed; ``n_ctx``: tokens the cache has to hold; None: the
    engine's own. ``as_run``: flash attention as the engine's generation has it by default, not off. ``tap_map``:
    what the engine of a trace calls its tensors.
    """

    word: EngineWord
    model_path: Path
    prompt: str | Sequence[int] | None = None
    numerics: Numerics | None = None
    follow_reference_graph: bool = False
    n_threads: int | None = None
    kernel: str | None = None
    n_ubatch: int | None = None
    n_ctx: int | None = None
    as_run: bool = False
    tap_map: TapMap | None = None

    def options(self, *names: str) -> dict[str, Any]:
        """Return those of the named options that were given."""
        held = ((name, getattr(self, name)) for name in names)
        return {name: value for name, value in held if value is not None}


@dataclass(frozen=True)
class Engine:
    """One engine: the word that selects it, its name in receipts, and how it is opened.

    ``what``: it, in a few words. ``takes``: what may follow the word after a colon, such as a path that says
    which build is meant. ``follows``: it can compute as the other engine states that it does. ``reads``: it has a
    tokenizer; one that has none reads by the other engine's rules. ``has_kernels``: one of several kernel families
    can be chosen. ``live``: set if the engine is chosen per prompt and may be a recorded one; the word of the
    engine to use instead where any prompt must run. ``one_way``: why it cannot run in another way (in other
    pieces, with other threads).
    """

    word: str
    name: str
    what: str
    open: Callable[[Asked], Runner]
    sides: tuple[Side, ...] = SIDES
    takes: str | None = None
    follows: bool = False
    reads: bool = True
    has_kernels: bool = False
    live: str | None = None
    one_way: str | None = None


def _bitnet_py(asked: Asked) -> Runner:
    return BitnetPyRunner(
        asked.model_path,
        n_threads=asked.n_threads,
        numerics=asked.numerics,
        follow_reference_graph=asked.follow_reference_graph,
        kernel=asked.kernel,
        **asked.options("n_ubatch"),
    )


def _bitnet_cpp(asked: Asked) -> Runner:
    if asked.word.path is None and library.find_library() is None:
        raise UnavailableError(f"bitnet.cpp is not built here; {HOW_TO_BUILD}, or name a build: bitnet.cpp:PATH")
    return _library(asked, asked.word.path)


def _llama_cpp(asked: Asked) -> Runner:
    path = asked.word.path or llama_package.find_library()
    if path is None:
        raise UnavailableError(
            f"no llama.cpp is installed here; {llama_package.HOW_TO_GET}, or name a build: llama.cpp:PATH"
        )
    return _library(asked, path)


def _library(asked: Asked, path: str | Path | None) -> Runner:
    found = None if path is None else library.resolve(str(path)).path
    given = asked.options("n_threads", "n_ubatch", "n_ctx")
    if asked.as_run:
        given["flash_attention"] = None
    return BitnetCppRunner(asked.model_path, library=found, **given)


def _spec(asked: Asked) -> Runner:
    return SpecRunner(asked.model_path, _rules(asked))


def _rules(asked: Asked) -> Generation:
    """Return by whose rules an engine without a tokenizer reads: the other engine's."""
    return tokenizer_rules({} if asked.numerics is None else {"reference": asked.numerics})


def _transformers(asked: Asked) -> Runner:
    dtype, linear_class = parse_choices(asked.word.path)
    given = asked.options("n_threads")
    return TransformersRunner(asked.model_path, _rules(asked), dtype=dtype, linear_class=linear_class, **given)


def _auto(asked: Asked) -> Runner:
    """Return live bitnet.cpp when its library is there, else a golden of this model file and prompt."""
    if library.find_library() is not None:
        return _library(asked, None)
    path, prompt = asked.model_path, asked.prompt
    golden = None if prompt is None else find_golden(path, file_sha256(path), prompt)
    if golden is None:
        raise UnavailableError(_nothing_found(path, prompt))
    return RecordedRunner(golden, model=trace_model(path))


def _trace(asked: Asked) -> Runner:
    return RecordedRunner(Path(asked.word.path or ""), asked.tap_map, trace_model(asked.model_path))


ENGINES = (
    Engine("auto", "bitnet.cpp", "bitnet.cpp, live or recorded", _auto, sides=("reference",), live="bitnet.cpp"),
    Engine("bitnet_py", "bitnet_py", "this project's engine", _bitnet_py, follows=True, has_kernels=True),
    Engine("bitnet.cpp", "bitnet.cpp", "real bitnet.cpp", _bitnet_cpp, takes=PATH),
    Engine("llama.cpp", "llama.cpp", "mainline llama.cpp", _llama_cpp, takes=PATH),
    Engine(
        NAME,
        NAME,
        "Hugging Face's model, built from the file's weights",
        _transformers,
        takes=CHOICES,
        reads=False,
    ),
    Engine(
        "spec",
        "specification",
        "the model's definition",
        _spec,
        reads=False,
        one_way="the specification computes in one way only",
    ),
)
_TRACE = Engine(TRACE, "trace", "a recorded engine", _trace, one_way="a trace cannot be run again")
"""A directory with a trace, which also acts as an engine."""
_ROWS = {row.word: row for row in (*ENGINES, _TRACE)}
_TAKES = {row.word: row.takes for row in ENGINES if row.takes is not None}


def find_word(side: Side, text: str) -> EngineWord:
    """Return the word that names an engine of a side.

    Raises:
        BadInputError: it is neither an engine nor a directory; the message lists the words.
    """
    return parse(text, [row.word for row in ENGINES if side in row.sides], _TAKES, side)


def row_of(word: EngineWord) -> Engine:
    """Return the engine's row."""
    return _ROWS[word.name]


def words(side: Side) -> list[str]:
    """Return what is accepted for a side, as it is listed."""
    return [*(shown(row.word, _TAKES) for row in ENGINES if side in row.sides), TRACE]


def live_words() -> list[str]:
    """Return what names an engine that runs any prompt, as it is listed."""
    return [shown(row.word, _TAKES) for row in ENGINES if row.live is None]


def live_word(text: str) -> str:
    """Return the word to use where the engine must run live."""
    row = _ROWS.get(text)
    return text if row is None else row.live or text


def engine_name(word: EngineWord) -> str:
    """Return what receipts call an engine that has not been opened."""
    return word.plain if word.name == TRACE else row_of(word).name


def open_candidate(word: EngineWord, model_path: str | Path, **asked: Any) -> Runner:
    """Return the engine under test; ``asked``: further fields of ``Asked``.

    Raises:
        UnavailableError: it is not here.
        BadInputError: the trace is malformed or of another model.
    """
    return row_of(word).open(Asked(word, Path(model_path), **asked))


def open_reference(
    word: EngineWord, model_path: str | Path, prompt: str | Sequence[int] | None = None, **asked: Any
) -> Runner:
    """Return the reference; ``asked``: further fields of ``Asked``.

    ``auto`` is live bitnet.cpp when its library is there, else a golden of this model file and
    ``prompt`` (text or token ids).

    Raises:
        UnavailableError: it is not here, or ``auto`` finds neither live bitnet.cpp nor a golden.
        BadInputError: the trace is malformed or of another model.
    """
    return row_of(word).open(Asked(word, Path(model_path), prompt, **asked))


def open_live(text: str, model_path: str | Path, *, n_threads: int | None = None) -> Runner:
    """Return an engine that runs any prompt: one of ``live_words()``.

    Raises:
        UnavailableError: it is not here.
        BadInputError: the word is none of these.
    """
    word = parse(text, [row.word for row in ENGINES if row.live is None], _TAKES, "engine", traces=False)
    return row_of(word).open(Asked(word, Path(model_path), n_threads=n_threads))


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
    remedy = f"run `{BUILD}` to build bitnet.cpp, or --reference spec to compare with the specification"
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
