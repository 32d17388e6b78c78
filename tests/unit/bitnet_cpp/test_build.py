"""Adapting and building bitnet.cpp, on a small stand-in."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from crossval.bitnet_cpp import build as build_cpp
from crossval.bitnet_cpp import builder
from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp import manifest as cpp_manifest
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp import toolchain as cpp_toolchain
from crossval.bitnet_cpp.builder import Options
from crossval.bitnet_cpp.remedies import GENERATION_VARIABLE, LIBRARY_VARIABLE, SOURCE_VARIABLE
from crossval.errors import UnavailableError
from tests.support.bitnet_cpp_tree import MAIN, write_tree


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
    library = builder.build(cpp_source.describe(source, "directory"), options)
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
    assert cpp_manifest.manifest_for(files) == manifest

    capsys.readouterr()
    again = builder.build(cpp_source.describe(source, "directory"), options)
    assert again == library
    assert "already built" in capsys.readouterr().err

    # A failed build is reported with the end of its log and leaves the last good library alone.
    (source / "3rdparty/llama.cpp/src/llama.cpp").write_text("this is no C++\n")
    with pytest.raises(UnavailableError, match=r"(?s)compiling.*failed.*what works without it.*no C\+\+"):
        builder.build(cpp_source.describe(source, "directory"), options)
    assert library.path.is_file()
    assert (
        builder.up_to_date(cpp_source.describe(source, "directory"), cpp_toolchain.find_toolchain(), options)
        is None
    )


@pytest.mark.usefixtures("needs_compiler")
def test_of_main_only_the_libraries_are_built_wherever_it_puts_them(tmp_path):
    source = write_tree(tmp_path / "checkout", files=MAIN)
    before = listing(source)
    options = Options(tmp_path / "build")
    found = builder.build(cpp_source.describe(source, "directory"), options)
    assert listing(source) == before
    assert found.path == tmp_path / "build/lib/libllama.so"
    assert found.manifest is not None
    assert set(found.manifest.libraries) == {
        "libggml-base.so.0.1.2", "libggml-cpu.so.0.1.2", "libggml.so.0.1.2", "libllama.so.0.0.1",
    }  # fmt: skip
    assert found.manifest.data["source"]["generation"] == "main"
    files = {str(found.path.parent / name): digest for name, digest in found.manifest.libraries.items()}
    assert cpp_manifest.manifest_for(files) == found.manifest
    assert builder.build(cpp_source.describe(source, "directory"), options) == found


@pytest.mark.usefixtures("needs_compiler")
def test_several_processes_build_one_directory_once(tmp_path):
    source = write_tree(tmp_path / "checkout", files=MAIN)
    code = (
        "import sys; from pathlib import Path; from crossval.bitnet_cpp import builder, source\n"
        "described = source.describe(Path(sys.argv[1]), 'directory')\n"
        "print(builder.build(described, builder.Options(Path(sys.argv[2]))).path)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "build")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    done = [process.communicate(timeout=300) for process in running]
    assert [out.strip() for out, _ in done] == [str(tmp_path / "build/lib/libllama.so")] * 3, done
    assert sum("already built" in err for _, err in done) == 2


def test_an_interrupted_build_leaves_no_compiler_running(tmp_path, monkeypatch):
    """The compilers are children of the program that is run, and end with it."""
    pid_file, child_running = tmp_path / "pid", ["sh", "-c", f"sleep 300 & echo $! > {tmp_path}/pid; wait"]
    real_wait = subprocess.Popen.wait

    def interrupted(process, timeout=None):
        if timeout is None:
            return real_wait(process)
        while not (pid_file.is_file() and pid_file.read_text().endswith("\n")):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builder._run(child_running, tmp_path / "log", "compiling")
    compiler, deadline = int(pid_file.read_text()), time.monotonic() + 10
    while _is_running(compiler):
        assert time.monotonic() < deadline, "the compiler is still running"
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.usefixtures("needs_compiler")
def test_generations_are_built_side_by_side_and_a_wrong_one_is_refused(source, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path / "build")
    monkeypatch.setattr(build_cpp, "default_build_dir", lambda: tmp_path / "build")
    main = write_tree(tmp_path / "main", files=MAIN)
    for checkout in (main, source):
        monkeypatch.setenv(SOURCE_VARIABLE, str(checkout))
        assert build_cpp.main(["--cmake-arg=-DGGML_TEST_OPTIONS=-DX=1"]) == 3  # built, but no libllama
    assert {path.relative_to(tmp_path) for path in tmp_path.glob("build/**/libllama.so")} == {
        Path("build/lib/libllama.so"),
        Path("build/main/lib/libllama.so"),
    }
    capsys.readouterr()
    monkeypatch.setenv(GENERATION_VARIABLE, "main")
    assert build_cpp.main([]) == 4
    assert "is a checkout of the generation march, not main" in capsys.readouterr().err


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
    (lib / cpp_manifest.MANIFEST_NAME).write_text(json.dumps(manifest))
    assert builder.up_to_date(described, tools, options) is not None
    assert builder.up_to_date(replace(described, digest="other"), tools, options) is None
    assert builder.up_to_date(replace(described, commit="a" * 40), tools, options) is None
    assert builder.up_to_date(described, replace(tools, version="cc 2"), options) is None
    assert builder.up_to_date(described, tools, replace(options, isa="avx2")) is None
    assert builder.up_to_date(described, tools, replace(options, cflags="-O1")) is None
    assert builder.up_to_date(described, tools, replace(options, force=True)) is None
    (lib / "libllama.so").write_bytes(b"changed")
    assert builder.up_to_date(described, tools, options) is None


def test_tl_kernels_without_their_header_are_refused_before_building(source, tmp_path):
    options = Options(tmp_path / "build", cmake_args=("-DBITNET_X86_TL2=ON",))
    with pytest.raises(UnavailableError, match=r"lacks include/bitnet-lut-kernels\.h"):
        builder._prepare(options.build_dir, cpp_source.describe(source, "directory"), options)


def test_isa_options_decide_about_native_and_avx512():
    tools = cpp_toolchain.Toolchain("cc", "c++", "", "cmake", "", "Ninja")
    options = Options(Path("b"), isa="avx2", cflags="-mno-fma", cmake_args=("-DGGML_OPENMP=OFF",))
    command = builder._configure_command(tools, Path("s"), Path("b"), options)
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", "-DGGML_AVX2=ON", "-DCMAKE_C_FLAGS=-mno-fma"} <= set(command)
    assert command[-1] == "-DGGML_OPENMP=OFF"
