"""Choosing candidate and reference: no engine is silently replaced by another."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crossval.engines import registry
from crossval.engines.goldens import goldens_dir
from crossval.engines.record import record_trace
from crossval.engines.recorded import RecordedRunner
from crossval.engines.registry import (
    engine_name,
    find_engine,
    live_word,
    live_words,
    open_candidate,
    open_live,
    open_reference,
    words,
)
from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256
from crossval.passes import Numerics
from crossval.terms import SIDES
from tests.support.numpy_engine import MODEL, NumpyRunner


class Made:
    """Stands in for a runner class; records its arguments."""

    def __init__(self, *args: object, **options: object) -> None:
        self.args, self.options = args, options


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    made = {name: type(name, (Made,), {}) for name in ("BitnetPyRunner", "BitnetCppRunner", "SpecRunner")}
    for name, stand_in in made.items():
        monkeypatch.setattr(registry, name, stand_in)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    return path


def library(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    def find_library() -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("crossval.bitnet_cpp.library.find_library", find_library)


def golden(model: Path, name: str = "hello", sha256: str | None = None) -> Path:
    out = goldens_dir(model) / name
    info = replace(MODEL, sha256=sha256 or file_sha256(model))
    record_trace(NumpyRunner(), info, out, prompt_ids=(1, 2), prompt_text=name)
    return out


def test_candidate_takes_the_numerics_of_the_reference(runners: dict[str, type], model: Path) -> None:
    made = open_candidate("bitnet_py", model, numerics=Numerics(16, True), n_threads=3, kernel="scalar")
    assert isinstance(made, runners["BitnetPyRunner"])
    assert made.options == {"n_threads": 3, "numerics": Numerics(16, True), "kernel": "scalar"}  # type: ignore[attr-defined]


def test_spec_is_spec_on_both_sides(runners: dict[str, type], model: Path) -> None:
    assert isinstance(open_candidate("spec", model), runners["SpecRunner"])
    assert isinstance(open_reference("spec", model), runners["SpecRunner"])


@pytest.mark.parametrize("word", ["auto", "bitnet.cpp"])
def test_a_built_library_is_used_live_even_beside_a_golden(
    word: str, runners: dict[str, type], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, object())
    golden(model)
    made = open_reference(word, model, "hello", n_threads=2)
    assert isinstance(made, runners["BitnetCppRunner"])
    assert made.options == {"n_threads": 2}  # type: ignore[attr-defined]


def test_auto_falls_to_the_golden_of_this_model_and_prompt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, None)
    path = golden(model)
    for prompt in ("hello", (1, 2)):
        made = open_reference("auto", model, prompt)
        assert isinstance(made, RecordedRunner)
        assert made.trace.directory == path


def test_bitnet_cpp_by_name_never_becomes_a_golden(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, None)
    golden(model)
    with pytest.raises(UnavailableError, match="make fetch-cpp"):
        open_reference("bitnet.cpp", model, "hello")


def test_a_broken_library_setting_never_becomes_a_golden(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, UnavailableError("BITNET_CPP_LIB points at nothing"))
    golden(model)
    with pytest.raises(UnavailableError, match="points at nothing"):
        open_reference("auto", model, "hello")


def test_auto_without_anything_says_what_there_is(
    runners: dict[str, type], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, None)
    with pytest.raises(UnavailableError, match=r"no recorded reference.*make fetch-cpp.*--reference spec"):
        open_reference("auto", model, "hello")
    golden(model, "old", sha256="cd" * 32)
    with pytest.raises(UnavailableError, match=r"another version of m\.gguf"):
        open_reference("auto", model, "old")
    golden(model, "new")
    with pytest.raises(UnavailableError, match="goldens exist for: 'new'; none of them is for this prompt"):
        open_reference("auto", model, "hello")
    with pytest.raises(UnavailableError, match="no prompt was given"):
        open_reference("auto", model)


def test_trace_directories_must_belong_to_the_model(model: Path, tmp_path: Path) -> None:
    path = golden(model)
    for opened in (open_candidate(str(path), model), open_reference(str(path), model)):
        assert isinstance(opened, RecordedRunner)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other weights")
    for choose in (open_candidate, open_reference):
        with pytest.raises(BadInputError, match="recorded from another model"):
            choose(str(path), other)


@pytest.mark.parametrize("word", ["bitnet", "", "BITNET.CPP", "no/such/dir"])
def test_unknown_words_are_refused_with_the_known_ones(word: str, model: Path) -> None:
    with pytest.raises(BadInputError, match="neither bitnet_py, spec nor a directory"):
        open_candidate(word, model)
    with pytest.raises(BadInputError, match=r"neither auto, bitnet\.cpp, spec nor a directory"):
        open_reference(word, model)


@pytest.mark.parametrize("module", ["crossval.engines", "crossval.engines.registry", "crossval.engines.session"])
def test_opening_engines_loads_nothing_that_judges_them(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(name for name in sys.modules if name.startswith('crossval.')))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    above = {
        "audit",
        "bench",
        "causal",
        "cli",
        "compare",
        "diagnose",
        "examine",
        "repeat",
        "reports",
        "selftest",
        "smoke",
    }
    assert not [name for name in loaded if name.split(".")[1] in above]


def test_every_engine_is_one_row_that_says_how_it_can_take_part() -> None:
    rows = {row.word: row for row in registry.ENGINES}
    assert list(rows) == ["auto", "bitnet.cpp", "bitnet_py", "spec"]
    for side in SIDES:
        assert all(find_engine(side, word) is rows[word] for word in words(side))
    assert live_words() == ["bitnet.cpp", "bitnet_py", "spec"]
    assert [live_word(word) for word in ("auto", "spec", "traces/x")] == ["bitnet.cpp", "spec", "traces/x"]
    assert [engine_name(word) for word in ("auto", "spec", "traces/x")] == ["bitnet.cpp", "specification", "x"]
    with pytest.raises(BadInputError, match=r"engine 'auto': expected bitnet\.cpp, bitnet_py, spec"):
        open_live("auto", "m.gguf")
