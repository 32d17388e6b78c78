"""Adapting and building bitnet.cpp, on a small stand-in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from crossval.bitnet_cpp import build as build_cpp
from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp import toolchain as cpp_toolchain
from crossval.bitnet_cpp.build import Options
from crossval.bitnet_cpp.library import SOURCE_VARIABLE
from crossval.errors import UnavailableError


def listing(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def needs_compiler() -> None:
    try:
        cpp_toolchain.find_toolchain()
    except UnavailableError as error:
        pytest.skip(f"{error}")


@pytest.mark.usefixtures("needs_compiler")
def test_a_checkout_is_built_out_of_tree_once_and_described(source, tmp_path, capsys):
    before = listing(source)
    options = Options(tmp_path / "build", cmake_args=("-DGGML_TEST_OPTIONS=-DX=1",))
    library = build_cpp.build(cpp_source.describe(source, "directory"), options)
    assert library.path == tmp_path / "build/lib/libllama.so"
    assert listing(source) == before

    manifest = library.manifest
    assert manifest is not None
    assert set(manifest.libraries) == {"libggml.so", "libllama.so"}
    assert manifest.source_commit is None
    assert manifest.source_digest == cpp_source.source_digest(source)
    assert [note.split(":")[0] for note in manifest.data["source"]["adaptations"]] == [
        cpp_source.LUT_HEADER,
        cpp_source.MAD_SOURCE,
    ]
    assert manifest.data["cmake"]["cache"]["CMAKE_BUILD_TYPE"] == "Release"
    assert "isa=native" in manifest.flags
    assert manifest.data["host"]["cpu_model"]
    files = {str(library.path.parent / name): digest for name, digest in manifest.libraries.items()}
    assert cpp_library.manifest_for(files) == manifest

    capsys.readouterr()
    again = build_cpp.build(cpp_source.describe(source, "directory"), options)
    assert again == library
    assert "already built" in capsys.readouterr().err

    # A failed build is reported with the end of its log and leaves the last good library alone.
    (source / "3rdparty/llama.cpp/src/llama.cpp").write_text("this is no C++\n")
    with pytest.raises(UnavailableError, match=r"(?s)compiling.*failed.*what works without it.*no C\+\+"):
        build_cpp.build(cpp_source.describe(source, "directory"), options)
    assert library.path.is_file()
    assert (
        build_cpp.up_to_date(cpp_source.describe(source, "directory"), cpp_toolchain.find_toolchain(), options)
        is None
    )


@pytest.mark.usefixtures("needs_compiler")
def test_main_explains_a_library_that_is_none_with_exit_code_3(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(SOURCE_VARIABLE, str(source))
    assert build_cpp.main(["--build-dir", str(tmp_path / "build")]) == 3
    assert "is not a libllama" in capsys.readouterr().err


def test_a_rebuild_is_due_when_anything_that_matters_changed(source, tmp_path):
    described = cpp_source.describe(source, "directory")
    tools = cpp_toolchain.Toolchain("cc", "c++", "cc 1", "cmake", "cmake 3", "Ninja")
    options = Options(tmp_path / "build")
    lib = options.build_dir / "lib"
    lib.mkdir(parents=True)
    (lib / "libllama.so").write_bytes(b"library")
    manifest = {
        "version": 1,
        "source": {"commit": None, "digest": described.digest},
        "compiler": {"version": tools.version},
        "cmake": {"flags": ""},
        "options": {"isa": "native", "cflags": "", "cmake_args": []},
        "libraries": {"libllama.so": hashlib.sha256(b"library").hexdigest()},
    }
    (lib / cpp_library.MANIFEST_NAME).write_text(json.dumps(manifest))
    assert build_cpp.up_to_date(described, tools, options) is not None
    assert build_cpp.up_to_date(replace(described, digest="other"), tools, options) is None
    assert build_cpp.up_to_date(replace(described, commit="a" * 40), tools, options) is None
    assert build_cpp.up_to_date(described, replace(tools, version="cc 2"), options) is None
    assert build_cpp.up_to_date(described, tools, replace(options, isa="avx2")) is None
    assert build_cpp.up_to_date(described, tools, replace(options, cflags="-O1")) is None
    assert build_cpp.up_to_date(described, tools, replace(options, force=True)) is None
    (lib / "libllama.so").write_bytes(b"changed")
    assert build_cpp.up_to_date(described, tools, options) is None


def test_tl_kernels_without_their_header_are_refused_before_building(source, tmp_path):
    options = Options(tmp_path / "build", cmake_args=("-DBITNET_X86_TL2=ON",))
    with pytest.raises(UnavailableError, match=r"lacks include/bitnet-lut-kernels\.h"):
        build_cpp._prepare(options.build_dir, cpp_source.describe(source, "directory"), options)


def test_isa_options_decide_about_native_and_avx512():
    tools = cpp_toolchain.Toolchain("cc", "c++", "", "cmake", "", "Ninja")
    options = Options(Path("b"), isa="avx2", cflags="-mno-fma", cmake_args=("-DGGML_OPENMP=OFF",))
    command = build_cpp._configure_command(tools, Path("s"), Path("b"), options)
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", "-DGGML_AVX2=ON", "-DCMAKE_C_FLAGS=-mno-fma"} <= set(command)
    assert command[-1] == "-DGGML_OPENMP=OFF"
