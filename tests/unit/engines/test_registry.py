"""Choosing candidate and reference: no engine is silently replaced by another."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitnet_py import _native
from crossval.engines import registry
from crossval.engines.goldens import goldens_dir
from crossval.engines.record import record_trace
from crossval.engines.recorded import RecordedRunner
from crossval.engines.registry import (
    engine_name,
    find_word,
    live_word,
    live_words,
    open_candidate,
    open_live,
    open_reference,
    row_of,
    words,
)
from crossval.engines.words import EngineWord
from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256
from crossval.passes import Numerics, Runner
from crossval.terms import SIDES, Side
from tests.support.numpy_engine import MODEL, NumpyRunner

SHARED_OBJECT = Path(_native.library_path()).read_bytes()[:64]
"""What a library for this machine starts with."""


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
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that holds no model; what reads it is told the shape of the engine that is recorded here."""
    monkeypatch.setattr(registry, "trace_model", lambda path: replace(MODEL, sha256=file_sha256(path)))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    return path


def library(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    def find_library() -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("crossval.bitnet_cpp.library.find_library", find_library)


def named(side: Side, text: str) -> EngineWord:
    return find_word(side, text)


def golden(model: Path, name: str = "hello", sha256: str | None = None) -> Path:
    out = goldens_dir(model) / name
    info = replace(MODEL, sha256=sha256 or file_sha256(model))
    record_trace(NumpyRunner(), info, out, prompt_ids=(1, 2), prompt_text=name)
    return out


@pytest.mark.parametrize("side", SIDES)
def test_our_engine_takes_the_numerics_of_the_other(side: Side, runners: dict[str, type], model: Path) -> None:
    def opened(**asked: Any) -> Runner:
        choose = open_candidate if side == "candidate" else open_reference
        return choose(named(side, "bitnet_py"), model, **asked)

    numerics = Numerics(16, True)
    made = opened(numerics=numerics, n_threads=3, kernel="scalar", n_ubatch=700, follow_reference_graph=True)
    assert isinstance(made, runners["BitnetPyRunner"])
    given = {"n_threads": 3, "numerics": numerics, "kernel": "scalar", "n_ubatch": 700}
    assert made.options == {**given, "follow_reference_graph": True}
    made = opened()
    assert isinstance(made, runners["BitnetPyRunner"])
    assert made.options == {"n_threads": None, "numerics": None, "kernel": None, "follow_reference_graph": False}


def test_spec_is_spec_on_both_sides(runners: dict[str, type], model: Path) -> None:
    assert isinstance(open_candidate(named("candidate", "spec"), model), runners["SpecRunner"])
    assert isinstance(open_reference(named("reference", "spec"), model), runners["SpecRunner"])


@pytest.mark.parametrize("word", ["auto", "bitnet.cpp"])
def test_a_built_library_is_used_live_even_beside_a_golden(
    word: str, runners: dict[str, type], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, object())
    golden(model)
    made = open_reference(named("reference", word), model, "hello", n_threads=2)
    assert isinstance(made, runners["BitnetCppRunner"])
    assert made.options == {"library": None, "n_threads": 2}  # type: ignore[attr-defined]


def test_auto_falls_to_the_golden_of_this_model_and_prompt(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, None)
    path = golden(model)
    for prompt in ("hello", (1, 2)):
        made = open_reference(named("reference", "auto"), model, prompt)
        assert isinstance(made, RecordedRunner)
        assert made.trace.directory == path


def test_bitnet_cpp_by_name_never_becomes_a_golden(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, None)
    golden(model)
    with pytest.raises(UnavailableError, match="make fetch-cpp"):
        open_reference(named("reference", "bitnet.cpp"), model, "hello")


def test_a_broken_library_setting_never_becomes_a_golden(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, UnavailableError("BITNET_CPP_LIB points at nothing"))
    golden(model)
    with pytest.raises(UnavailableError, match="points at nothing"):
        open_reference(named("reference", "auto"), model, "hello")


def test_auto_without_anything_says_what_there_is(
    runners: dict[str, type], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, None)
    with pytest.raises(UnavailableError, match=r"no recorded reference.*make fetch-cpp.*--reference spec"):
        open_reference(named("reference", "auto"), model, "hello")
    golden(model, "old", sha256="cd" * 32)
    with pytest.raises(UnavailableError, match=r"another version of m\.gguf"):
        open_reference(named("reference", "auto"), model, "old")
    golden(model, "new")
    with pytest.raises(UnavailableError, match="goldens exist for: 'new'; none of them is for this prompt"):
        open_reference(named("reference", "auto"), model, "hello")
    with pytest.raises(UnavailableError, match="no prompt was given"):
        open_reference(named("reference", "auto"), model)


def test_trace_directories_must_belong_to_the_model(model: Path, tmp_path: Path) -> None:
    path = golden(model)
    for opened in (
        open_candidate(named("candidate", str(path)), model),
        open_reference(named("reference", str(path)), model),
    ):
        assert isinstance(opened, RecordedRunner)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other weights")
    with pytest.raises(BadInputError, match="recorded from another model"):
        open_candidate(named("candidate", str(path)), other)
    with pytest.raises(BadInputError, match="recorded from another model"):
        open_reference(named("reference", str(path)), other)


@pytest.mark.parametrize("word", ["auto", "DIR"])
def test_traces_must_have_the_shape_of_the_model(word: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, None)
    path = golden(model)
    monkeypatch.setattr(
        registry, "trace_model", lambda path: replace(MODEL, sha256=file_sha256(path), n_layers=MODEL.n_layers + 1)
    )
    with pytest.raises(BadInputError, match=r"model\.n_layers is 3, numpy\.gguf has 4"):
        open_reference(named("reference", word.replace("DIR", str(path))), model, "hello")


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
    assert list(rows) == ["auto", "bitnet_py", "bitnet.cpp", "llama.cpp", "transformers", "spec"]
    live = ["bitnet_py", "bitnet.cpp[:PATH]", "llama.cpp[:PATH]", "transformers[:DTYPE]", "spec"]
    assert words("candidate") == [*live, "DIR"]
    assert words("reference") == ["auto", *words("candidate")]
    for side in SIDES:
        for row in rows.values():
            if side in row.sides:
                assert row_of(find_word(side, row.word)) is row
    assert live_words() == live
    assert [live_word(word) for word in ("auto", "spec", "traces/x")] == ["bitnet.cpp", "spec", "traces/x"]


def test_unopened_engines_have_the_name_that_receipts_give_them(tmp_path: Path) -> None:
    named_in_receipts = {"auto": "bitnet.cpp", "spec": "specification", "llama.cpp:a/b.so": "llama.cpp"}
    for text, name in named_in_receipts.items():
        assert engine_name(find_word("reference", text)) == name
    assert engine_name(find_word("reference", str(tmp_path))) == tmp_path.name


def test_only_engines_that_run_any_prompt_are_opened_live(runners: dict[str, type], tmp_path: Path) -> None:
    assert isinstance(open_live("spec", "m.gguf"), runners["SpecRunner"])
    listed = r"neither bitnet_py, bitnet\.cpp\[:PATH\], llama\.cpp\[:PATH\], transformers\[:DTYPE\] nor spec"
    for text in ("auto", str(tmp_path)):
        with pytest.raises(BadInputError, match=listed):
            open_live(text, "m.gguf")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("word", ["bitnet.cpp", "llama.cpp"])
def test_a_path_says_which_build(side: Side, word: str, runners: dict[str, type], model: Path) -> None:
    build = model.with_name("libllama.so")
    choose = open_candidate if side == "candidate" else open_reference
    with pytest.raises(BadInputError, match="no such file"):
        choose(named(side, f"{word}:{build}"), model)
    build.write_bytes(SHARED_OBJECT)
    made = choose(named(side, f"{word}:{build}"), model, n_threads=1)
    assert isinstance(made, runners["BitnetCppRunner"])
    assert made.options == {"library": build, "n_threads": 1}
    made = choose(named(side, f"{word}:{build}"), model, as_run=True)
    assert made.options == {"library": build, "flash_attention": None}  # as its generation has it


def test_llama_cpp_is_the_library_of_the_installed_package(
    runners: dict[str, type], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossval.engines.llama_package.find_library", lambda: None)
    with pytest.raises(
        UnavailableError, match=r"no llama\.cpp is installed here; run `pip install 'bitnet-parity\[llama\]'`"
    ):
        open_candidate(named("candidate", "llama.cpp"), model)
    build = model.with_name("libllama.so")
    build.write_bytes(SHARED_OBJECT)
    monkeypatch.setattr("crossval.engines.llama_package.find_library", lambda: build)
    made = open_candidate(named("candidate", "llama.cpp"), model)
    assert isinstance(made, runners["BitnetCppRunner"])
    assert made.options == {"library": build}
    other = model.with_name("libother.so")
    other.write_bytes(SHARED_OBJECT)
    made = open_candidate(named("candidate", f"llama.cpp:{other}"), model)
    assert made.options == {"library": other}  # type: ignore[attr-defined]
