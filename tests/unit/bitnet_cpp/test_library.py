"""Which library is used, and which one a path leads to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp import toolchain as cpp_toolchain
from crossval.bitnet_cpp.remedies import BUILD_DIR_VARIABLE, GENERATION_VARIABLE, LIBRARY_VARIABLE
from crossval.bitnet_cpp.runner import open_library
from crossval.errors import BadInputError, CrossvalError, UnavailableError
from tests.support.bitnet_cpp_tree import MAIN, write_tree
from tests.support.c_compiler import compile_library, needs_compiler

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00"
"""Start of a 64-bit shared library for x86-64."""


def test_the_configured_library_comes_first_and_must_exist(tmp_path, monkeypatch):
    built = tmp_path / "build/lib/libllama.so"
    built.parent.mkdir(parents=True)
    built.touch()
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path / "build")
    found = cpp_library.find_library()
    assert found is not None
    assert (found.path, found.origin, found.manifest) == (built, "build", None)

    ready = tmp_path / "ready.so"
    monkeypatch.setenv(LIBRARY_VARIABLE, str(ready))
    assert cpp_library.variables_in_use() == (LIBRARY_VARIABLE,)
    with pytest.raises(UnavailableError, match=r"BITNET_CPP_LIB=.*no such file"):
        cpp_library.find_library()
    ready.touch()
    found = cpp_library.find_library()
    assert found is not None
    assert (found.path, found.origin) == (ready, LIBRARY_VARIABLE)


def test_no_library_says_how_to_get_one_and_what_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path)
    assert cpp_library.find_library() is None
    with pytest.raises(
        UnavailableError, match=r"make fetch-cpp.*BITNET_CPP_DIR.*BITNET_CPP_LIB.*--reference spec"
    ):
        cpp_library.require_library()


def test_another_folder_may_hold_the_builds(tmp_path, monkeypatch):
    library = tmp_path / "main/lib/libllama.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert cpp_library.find_library() is None
    assert cpp_library.variables_in_use() == ()
    monkeypatch.setenv(BUILD_DIR_VARIABLE, str(tmp_path))
    assert cpp_library.variables_in_use() == (BUILD_DIR_VARIABLE, GENERATION_VARIABLE)
    found = cpp_library.find_library()
    assert found is not None
    assert found.path == library
    assert cpp_library.build_dir_of("march") == tmp_path


def test_of_several_built_libraries_the_first_generation_is_used_or_the_one_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path)
    paths = {"march": tmp_path / "lib/libllama.so", "main": tmp_path / "main/lib/libllama.so"}

    def found() -> Path | None:
        library = cpp_library.find_library()
        return library.path if library else None

    for generation in ("main", "march"):
        paths[generation].parent.mkdir(parents=True)
        paths[generation].touch()
        assert found() == paths[generation]
    monkeypatch.setenv(GENERATION_VARIABLE, "main")
    assert found() == paths["main"]
    monkeypatch.setenv(GENERATION_VARIABLE, "mainline")
    assert found() is None
    monkeypatch.setenv(GENERATION_VARIABLE, "april")
    with pytest.raises(BadInputError, match="BITNET_CPP_GENERATION=april: expected march or main"):
        cpp_library.find_library()


# Paths


@pytest.fixture
def x86(monkeypatch):
    monkeypatch.setattr(cpp_library.platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("folder", cpp_library.IN_BUILD_DIRECTORY)
def test_a_library_is_found_by_its_path_and_in_a_build_directory(tmp_path, folder):
    path = tmp_path / folder / "libllama.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ELF)
    for given in (path, tmp_path):
        found = cpp_library.resolve(str(given))
        assert (found.path.resolve(), found.origin, found.manifest) == (path.resolve(), "path", None)


@pytest.mark.usefixtures("x86")
def test_a_build_directory_may_hold_a_versioned_name_only(tmp_path):
    (tmp_path / "libllama.so.0").write_bytes(ELF)
    assert cpp_library.resolve(str(tmp_path)).path == tmp_path / "libllama.so.0"


def test_no_path_means_the_library_built_here(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path)
    with pytest.raises(UnavailableError, match="make fetch-cpp"):
        cpp_library.resolve(None)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libllama.so").touch()
    assert cpp_library.resolve(None).path == tmp_path / "lib/libllama.so"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"hello\n", "is not a shared library: it starts with b'hello"),
        (b"", "is not a shared library: it starts with b''"),
        (ELF[:10], "is not a shared library"),
        (ELF[:4] + b"\x01" + ELF[5:], "is a 32-bit library"),
        (ELF[:18] + b"\xb7\x00", "is a library for aarch64; this machine is x86_64"),
        (ELF[:18] + b"\xff\x00", "is a library for ELF machine 255"),
        (ELF[:16] + b"\x02" + ELF[17:], "another kind of ELF file"),
    ],
)
@pytest.mark.usefixtures("x86")
def test_a_file_that_is_no_library_here_is_bad_input_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "libllama.so"
    path.write_bytes(content)
    for use in (lambda: cpp_library.resolve(str(path)), lambda: open_library(path)):
        with pytest.raises(BadInputError, match=complaint) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_path_to_nothing_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="no such file or directory"):
        cpp_library.resolve(str(tmp_path / "missing"))
    with pytest.raises(BadInputError, match=r"holds neither a libllama.so \(looked in lib, bin, .*nor a source"):
        cpp_library.resolve(str(tmp_path))


def test_a_checkout_is_built_once_per_state_of_its_sources(tmp_path, monkeypatch):
    try:
        cpp_toolchain.find_toolchain()
    except UnavailableError as error:
        pytest.skip(f"{error}")
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path / "build")
    checkout = write_tree(tmp_path / "fork", files=MAIN)
    first = cpp_library.resolve(str(checkout))
    assert first.path.is_file()
    assert first.origin == "source"
    built = first.path.stat().st_mtime_ns
    assert cpp_library.resolve(str(checkout)) == first
    assert first.path.stat().st_mtime_ns == built
    (checkout / "3rdparty/llama.cpp/src/llama.cpp").write_text('extern "C" int llama(void) { return 8; }\n')
    second = cpp_library.resolve(str(checkout))
    assert second.path != first.path
    assert first.path.is_file()  # both stay: one may be the candidate, the other the reference


def test_an_incomplete_checkout_says_what_it_lacks(tmp_path):
    checkout = write_tree(tmp_path, files=MAIN)
    shutil.rmtree(checkout / "3rdparty/llama.cpp")
    with pytest.raises(UnavailableError, match=r"lacks 3rdparty/llama.cpp/src/llama.cpp.*git submodule update"):
        cpp_library.resolve(str(checkout))


# Libraries that load, or do not, but are none of llama.cpp


@needs_compiler
def test_a_library_whose_dependency_is_missing_names_it(tmp_path):
    part = compile_library(tmp_path / "libpart.so", "int part(void) { return 1; }\n")
    code = "int part(void); int llama_decode(void) { return part(); }\n"
    whole = compile_library(tmp_path / "libllama.so", code, f"-L{tmp_path}", "-lpart")
    part.unlink()
    with pytest.raises(UnavailableError, match=r"it needs libpart\.so, which is neither beside it nor") as caught:
        open_library(whole)
    assert "\n" not in str(caught.value)


@needs_compiler
def test_dependencies_beside_the_library_are_used_without_a_run_path(tmp_path):
    """As for a build that was copied elsewhere."""
    base = compile_library(
        tmp_path / "libggml-base.so.0", "int base(void) { return 1; }\n", "-Wl,-soname,libggml-base.so.0"
    )
    code = "int base(void); int llama_decode(void) { return base(); }\n"
    whole = compile_library(tmp_path / "libllama.so", code, str(base))
    with pytest.raises(UnavailableError, match="no known generation"):  # it was loaded, then looked at
        open_library(whole)


@needs_compiler
@pytest.mark.parametrize("options", [(), ("-fvisibility=hidden",), ("-Wl,--strip-all",)])
def test_no_symbols_of_llama_cpp_or_hidden_ones_are_one_clear_line(tmp_path, options):
    name = "other" if not options or "strip" in options[0] else "llama_decode"
    path = compile_library(tmp_path / "libllama.so", f"int {name}(void) {{ return 1; }}\n", *options)
    with pytest.raises(CrossvalError, match="not a libllama: it exports none") as caught:
        open_library(path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
