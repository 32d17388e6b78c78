"""Choose candidate and reference from the words of the command line.

Runners are returned unentered. Nothing is ever replaced by something else in silence: a live reference that fails
to load is an error, not a reason to use a golden, and the specification is used only when asked for by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossval.bitnet_cpp import library
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.recorded import RecordedRunner, find_golden, goldens_dir, list_goldens
from crossval.engines.spec import SpecRunner
from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256
from crossval.passes import Numerics, Runner

CANDIDATE_WORDS = ("bitnet_py", "spec")
REFERENCE_WORDS = ("auto", "bitnet.cpp", "spec")
DEFAULT_SIMD_WIDTH = 8


def open_candidate(
    word: str,
    model_path: str | Path,
    *,
    numerics: Numerics | None = None,
    n_threads: int | None = None,
    kernel: str | None = None,
) -> Runner:
    """Return the engine under test: ``bitnet_py``, ``spec`` or a trace directory.

    ``numerics``: what the entered reference says about its arithmetic (``reference.identity.numerics``); our
    engine then rounds in the same places.

    Raises:
        BadInputError: the word is none of these, or the trace is malformed or of another model.
    """
    if word == "bitnet_py":
        numerics = numerics or Numerics()
        return BitnetPyRunner(
            model_path,
            n_threads=n_threads,
            simd_width=numerics.simd_width or DEFAULT_SIMD_WIDTH,
            fused_quantizer=bool(numerics.fused_quantizer),
            kernel=kernel,
        )
    if word == "spec":
        return _spec(model_path)
    return _trace("candidate", word, CANDIDATE_WORDS, model_path)


def open_reference(
    word: str,
    model_path: str | Path,
    prompt: str | Sequence[int] | None = None,
    *,
    n_threads: int | None = None,
) -> Runner:
    """Return the reference: ``auto``, ``bitnet.cpp``, ``spec`` or a trace directory.

    ``auto`` is live bitnet.cpp when its library is there, else a golden of this model file and ``prompt`` (text or
    token ids).

    Raises:
        UnavailableError: bitnet.cpp is not built, or ``auto`` finds neither it nor a golden.
        BadInputError: the word is none of these, or the trace is malformed or of another model.
    """
    if word == "spec":
        return _spec(model_path)
    if word not in ("auto", "bitnet.cpp"):
        return _trace("reference", word, REFERENCE_WORDS, model_path)
    if library.find_library() is not None:
        return _live(model_path, n_threads)
    if word == "bitnet.cpp":
        raise UnavailableError(
            "bitnet.cpp is not built here; run `make fetch-cpp` (or set BITNET_CPP_DIR or BITNET_CPP_LIB), "
            "or use --reference auto for its recorded activations"
        )
    golden = None if prompt is None else find_golden(model_path, file_sha256(model_path), prompt)
    if golden is None:
        raise UnavailableError(_nothing_found(model_path, prompt))
    return RecordedRunner(golden)


def _live(model_path: str | Path, n_threads: int | None) -> Runner:
    if n_threads is None:
        return BitnetCppRunner(model_path)
    return BitnetCppRunner(model_path, n_threads=n_threads)


def _spec(model_path: str | Path) -> Runner:
    return SpecRunner(model_path)


def _trace(role: str, word: str, words: Sequence[str], model_path: str | Path) -> Runner:
    path = Path(word)
    if not word or not path.is_dir():
        raise BadInputError(f"{role} {word!r} is neither {', '.join(words)} nor a directory with a trace")
    runner = RecordedRunner(path)
    found, recorded = file_sha256(model_path), runner.info.model
    if recorded.sha256 != found:
        raise BadInputError(
            f"{path} was recorded from another model ({recorded.file_name or 'unnamed'}, sha256 "
            f"{recorded.sha256[:12]}…) than {model_path} ({found[:12]}…)"
        )
    return runner


def _nothing_found(model_path: str | Path, prompt: str | Sequence[int] | None) -> str:
    """Say what there is, and what to do."""
    remedy = "run `make fetch-cpp` to build bitnet.cpp, or --reference spec to compare with the specification"
    goldens = list_goldens(model_path)
    if not goldens:
        return f"bitnet.cpp is not built here and {goldens_dir(model_path)} holds no recorded reference; {remedy}"
    sha256 = file_sha256(model_path)
    usable = [golden for golden in goldens if golden.info.model.sha256 == sha256]
    if not usable:
        return (
            f"bitnet.cpp is not built here and the {len(goldens)} goldens in {goldens_dir(model_path)} were "
            f"recorded from another version of {Path(model_path).name}; {remedy}, or record them again"
        )
    prompts = ", ".join(repr(golden.info.prompt_text) for golden in usable[:12] if golden.info.prompt_text)
    asked = "no prompt was given" if prompt is None else "none of them is of this prompt"
    return f"bitnet.cpp is not built here; goldens exist for: {prompts}; {asked}; {remedy}"
