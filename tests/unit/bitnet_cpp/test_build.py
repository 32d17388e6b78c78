"""Fetching, adapting and building bitnet.cpp, on small stand-ins taken for real by git, CMake and compiler."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from crossval.bitnet_cpp import build as build_cpp
from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp import toolchain as cpp_toolchain
from crossval.bitnet_cpp.build import Options
from crossval.bitnet_cpp.library import LIBRARY_VARIABLE, SOURCE_VARIABLE
from crossval.errors import UnavailableError

ROOT = Path(__file__).resolve().parents[3]

# The layout of bitnet.cpp in miniature: the paths CMake goes through, the header only upstream's script makes,
# and the lost const that only gcc forgives.
FILES = {
    "CMakeLists.txt": """
        cmake_minimum_required(VERSION 3.14)
        project(standin C CXX)
        add_subdirectory(3rdparty/llama.cpp)
    """,
    "include/ggml-bitnet.h": "#define STANDIN 1\n",
    "src/ggml-bitnet-mad.cpp": """
        #include "ggml-bitnet.h"
        #include "bitnet-lut-kernels.h"
        extern "C" int dot(const void * vy) {
            const signed char * y = (const signed char *) vy;
            typedef signed char int8_t;
            int8_t * y_col = y + STANDIN;
            return y_col[0];
        }
    """,
    "3rdparty/llama.cpp/CMakeLists.txt": "add_subdirectory(ggml)\nadd_subdirectory(src)\n",
    "3rdparty/llama.cpp/ggml/CMakeLists.txt": "add_subdirectory(src)\n",
    "3rdparty/llama.cpp/ggml/src/CMakeLists.txt": """
        add_library(ggml SHARED ../../../../include/bitnet-lut-kernels.h ../../../../src/ggml-bitnet-mad.cpp)
        target_include_directories(ggml PUBLIC ../../../../include)
        target_compile_options(ggml PRIVATE ${GGML_TEST_OPTIONS})
    """,
    "3rdparty/llama.cpp/src/CMakeLists.txt": """
        add_library(llama SHARED llama.cpp)
        target_link_libraries(llama PUBLIC ggml)
    """,
    "3rdparty/llama.cpp/src/llama.cpp": 'extern "C" int llama(void) { return 7; }\n',
}


def write_tree(root: Path, prefix: str = "") -> Path:
    for name, text in FILES.items():
        if name.startswith(prefix):
            path = root / name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def listing(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "checkout")


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.delenv(SOURCE_VARIABLE, raising=False)


# Building


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
    assert "it lacks llama_backend_init" in capsys.readouterr().err


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


# Toolchain


@pytest.mark.parametrize(
    ("cc", "cxx"),
    [
        ("clang", "clang++"),
        ("clang-19", "clang++-19"),
        ("gcc", "g++"),
        ("/opt/gcc-13/bin/gcc-13", "/opt/gcc-13/bin/g++-13"),
        ("cc", "c++"),
        ("x86_64-linux-gnu-gcc-12", "x86_64-linux-gnu-g++-12"),
    ],
)
def test_the_cxx_compiler_belongs_to_the_c_compiler(cc, cxx):
    assert cpp_toolchain.cxx_name(cc) == cxx


def test_a_missing_compiler_says_what_still_works(tmp_path, monkeypatch, capsys):
    cmake = tmp_path / "cmake"
    cmake.write_text("#!/bin/sh\necho cmake version 9\n")
    cmake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"no C and C\+\+ compiler.*--reference spec"):
        cpp_toolchain.find_toolchain()
    monkeypatch.setenv(SOURCE_VARIABLE, str(write_tree(tmp_path / "checkout")))
    assert build_cpp.main(["--build-dir", str(tmp_path / "build")]) == 3
    assert "no C and C++ compiler" in capsys.readouterr().err


def test_clang_is_preferred_to_gcc(tmp_path, monkeypatch):
    for name in ("gcc", "g++", "clang-15", "clang++-15", "clang-18", "cmake"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} version\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    tools = cpp_toolchain.find_toolchain()
    assert (Path(tools.cc).name, Path(tools.cxx).name) == ("clang-15", "clang++-15")
    assert tools.version == "clang-15 version"
    assert Path(cpp_toolchain.find_toolchain("gcc").cxx).name == "g++"
    with pytest.raises(UnavailableError, match=r"looked for clang-18 with clang\+\+-18"):
        cpp_toolchain.find_toolchain("clang-18")


# Finding and believing


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


def test_a_manifest_is_believed_for_the_files_it_lists_only(tmp_path):
    manifest = {
        "version": 1,
        "source": {"commit": "c" * 40, "digest": "d"},
        "compiler": {"version": "clang"},
        "cmake": {"flags": "f"},
        "libraries": {"libggml.so": "1", "libllama.so": "2"},
    }
    path = tmp_path / cpp_library.MANIFEST_NAME
    path.write_text(json.dumps(manifest))
    files = {str(tmp_path / "libggml.so"): "1", str(tmp_path / "libllama.so"): "2"}
    found = cpp_library.manifest_for(files)
    assert found is not None
    assert found.source_commit == "c" * 40
    assert cpp_library.manifest_for({**files, str(tmp_path / "libllama.so"): "3"}) is None
    assert cpp_library.manifest_for({str(tmp_path / "libllama.so"): "2"}) is None
    for broken in (
        "",
        "[]",
        "{}",
        json.dumps({**manifest, "version": 2}),
        json.dumps({**manifest, "libraries": []}),
    ):
        path.write_text(broken)
        assert cpp_library.manifest_for(files) is None


def test_the_combined_digest_depends_on_names_and_contents_not_on_places():
    one = cpp_library.combined_digest({"/a/libllama.so": "1", "/b/libggml.so": "2"})
    assert one == cpp_library.combined_digest({"/c/libggml.so": "2", "/c/libllama.so": "1"})
    assert one != cpp_library.combined_digest({"/a/libllama.so": "2", "/b/libggml.so": "1"})


def test_the_source_digest_sees_content_and_names_only(source, tmp_path):
    digest = cpp_source.source_digest(source)
    copy = shutil.copytree(source, tmp_path / "elsewhere")
    (copy / "README.md").write_text("not compiled")
    (copy / "include/notes.ini").write_text("not compiled")
    assert cpp_source.source_digest(copy) == digest
    (copy / "include/ggml-bitnet.h").write_text("#define STANDIN 2\n")
    assert cpp_source.source_digest(copy) != digest
    (copy / "include/ggml-bitnet.h").write_text(FILES["include/ggml-bitnet.h"])
    (copy / "src/extra.h").write_text("")
    assert cpp_source.source_digest(copy) != digest


def test_a_checkout_that_compiles_as_it_is_is_used_as_it_is(source, tmp_path):
    (source / cpp_source.LUT_HEADER).write_text("")
    mad = source / cpp_source.MAD_SOURCE
    mad.write_text(mad.read_text().replace("int8_t * y_col", "const int8_t * y_col"))
    assert cpp_source.buildable_tree(source, tmp_path / "shadow") == (source, ())


@pytest.mark.parametrize("missing", ["CMakeLists.txt", "3rdparty/llama.cpp/src/llama.cpp"])
def test_an_incomplete_checkout_is_named(source, missing):
    (source / missing).unlink()
    with pytest.raises(UnavailableError, match=f"not a complete checkout.*lacks {missing}"):
        cpp_source.describe(source, "directory")


# Fetching, with a local repository standing in for upstream


def git(directory: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(directory), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def repository(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    git(path, "init", "--quiet")
    return path


def commit(path: Path) -> str:
    git(path, "add", "--all")
    git(path, "commit", "--quiet", "--message", "stand-in")
    return git(path, "rev-parse", "HEAD")


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A stand-in for upstream with its nested submodule, which git is told to use for the real address."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, so fetching cannot be tested")
    remotes = tmp_path / "remotes"
    configuration = {
        "protocol.file.allow": "always",
        "user.name": "test",
        "user.email": "test@example.org",
        f"url.{remotes}/.insteadOf": "https://github.com/",
    }
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(configuration)))
    for i, (key, value) in enumerate(configuration.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{i}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{i}", value)
    nested = repository(remotes / "example/llama.cpp")
    write_tree(nested, f"{cpp_source.NESTED_SUBMODULE}/")
    commit(nested)
    outer = repository(remotes / "microsoft/BitNet")
    write_tree(outer)
    shutil.rmtree(outer / "3rdparty")
    git(outer, "submodule", "--quiet", "add", "https://github.com/example/llama.cpp", cpp_source.NESTED_SUBMODULE)
    commit(outer)
    return outer


@pytest.fixture
def project(tmp_path, upstream):
    """A clone of a project that has the stand-in as a submodule, not initialised."""
    origin = repository(tmp_path / "origin")
    git(origin, "submodule", "--quiet", "add", cpp_source.UPSTREAM_URL, cpp_source.SUBMODULE)
    commit(origin)
    git(tmp_path, "clone", "--quiet", str(origin), "project")
    return tmp_path / "project"


def test_the_submodule_is_fetched_with_its_own(project, upstream, tmp_path):
    fetched = cpp_source.fetch(project, tmp_path / "unused")
    assert fetched == project / cpp_source.SUBMODULE
    described = cpp_source.describe(fetched, "submodule")
    assert described.commit == git(upstream, "rev-parse", "HEAD")
    assert described.llama_cpp_commit == git(upstream / cpp_source.NESTED_SUBMODULE, "rev-parse", "HEAD")
    assert described.dirty is False
    (fetched / "CMakeLists.txt").write_text("# changed\n")
    assert cpp_source.describe(fetched, "submodule").dirty is True


def test_the_submodule_is_put_back_to_the_pinned_commit(project, upstream, tmp_path):
    pinned = git(upstream, "rev-parse", "HEAD")
    (upstream / "new.txt").write_text("later\n")
    later = commit(upstream)
    fetched = cpp_source.fetch(project, tmp_path / "unused")
    git(fetched, "checkout", "--quiet", later)
    assert cpp_source.git_commit(cpp_source.fetch(project, tmp_path / "unused")) == pinned


def test_without_a_checkout_the_pinned_commit_is_fetched_once(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_source, "PINNED_COMMIT", git(upstream, "rev-parse", "HEAD"))
    fetched = cpp_source.fetch(None, tmp_path / "cache")
    assert fetched == tmp_path / "cache"
    assert (fetched / cpp_source.NESTED_SUBMODULE / "src/llama.cpp").is_file()
    shutil.rmtree(upstream)
    assert cpp_source.fetch(None, tmp_path / "cache") == fetched


def test_no_network_is_explained_with_what_git_said(project, upstream, tmp_path):
    shutil.rmtree(upstream)
    with pytest.raises(
        UnavailableError, match=r"(?s)git submodule update.*no network\?.*works without it.*git said:"
    ):
        cpp_source.fetch(project, tmp_path / "unused")


def test_the_pinned_commit_is_the_one_the_repository_records():
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--stage", "--", cpp_source.SUBMODULE],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not done.stdout:
        pytest.skip("not a git checkout of the project, so there is no submodule entry to compare with")
    assert done.stdout.split()[1] == cpp_source.PINNED_COMMIT
    assert f"url = {cpp_source.UPSTREAM_URL}\n" in (ROOT / ".gitmodules").read_text()
