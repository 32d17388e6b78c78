"""Compile the ``llama`` library of a source checkout out of tree, and record how."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp.manifest import (
    CMAKE_CACHE,
    CMAKE_DIR,
    LIBRARY_NAME,
    MANIFEST_NAME,
    MANIFEST_VERSION,
    SHADOW_DIR,
    BuildManifest,
    read_cmake_cache,
    read_manifest,
)
from crossval.bitnet_cpp.remedies import STILL_WORKS
from crossval.bitnet_cpp.source import Source
from crossval.bitnet_cpp.toolchain import Toolchain, find_toolchain, search_path
from crossval.errors import UnavailableError
from crossval.files import file_sha256, write_atomically
from crossval.receipts import provenance

# fmt: off
ISA_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "native": ("-DGGML_NATIVE=ON",),
    "avx2": ("-DGGML_NATIVE=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON",
             "-DGGML_AVX512=OFF"),
    "avx512": ("-DGGML_NATIVE=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON",
               "-DGGML_AVX512=ON"),
}
# fmt: on
"""CMake options per instruction set (``ggml/CMakeLists.txt``, ``ggml/src/CMakeLists.txt``)."""

NOT_BUILT = ("TESTS", "EXAMPLES", "SERVER", "TOOLS", "COMMON", "APP", "UI")
"""Parts of llama.cpp beside the library."""

_LOG_TAIL_LINES = 25
_PROGRESS_EVERY_S = 10.0
_RECORDED = re.compile(
    r"CMAKE_BUILD_TYPE|CMAKE_(C|CXX)_FLAGS(_RELEASE)?|OpenMP_C_FLAGS|BITNET_\w+"
    r"|GGML_(NATIVE|AVX\w*|FMA|F16C|SVE|LLAMAFILE|OPENMP|LTO|BLAS|CUDA|METAL|VULKAN)"
)
"""CMake cache entries recorded in the manifest: those that decide how the library computes."""


@dataclass(frozen=True)
class Options:
    """Options of a build."""

    build_dir: Path
    isa: str = "native"
    cflags: str = ""
    cc: str | None = None
    cxx: str | None = None
    cmake_args: tuple[str, ...] = ()
    n_jobs: int = 0
    force: bool = False


@dataclass(frozen=True)
class FoundLibrary:
    """A libllama on disk; ``origin`` states how it was found."""

    path: Path
    origin: str
    manifest: BuildManifest | None


def built_library_path(build_dir: Path) -> Path:
    """Return the path at which a build places its libllama."""
    return build_dir / "lib" / LIBRARY_NAME


def say(text: str) -> None:
    """Print a progress line on stderr."""
    print(f"build_cpp: {text}", file=sys.stderr, flush=True)


def build(source: Source, options: Options) -> FoundLibrary:
    """Configure and compile the ``llama`` target, and write the manifest beside the library.

    Several processes may build into one directory: one does, the others wait and find it up to date.

    Raises:
        UnavailableError: a tool is missing or the build failed; the message has the tail of its
        log.
    """
    tools = find_toolchain(options.cc, options.cxx)
    with _locked(options.build_dir):
        current = up_to_date(source, tools, options)
        if current is not None:
            say(f"already built from this source with these options: {current.path}")
            return current
        return _build(source, tools, options)


def _build(source: Source, tools: Toolchain, options: Options) -> FoundLibrary:
    started = time.monotonic()
    build_dir = options.build_dir
    tree, adaptations = _prepare(build_dir, source, options)
    log = build_dir / "build.log"
    log.unlink(missing_ok=True)
    say(f"source {source.path} ({source.kind}, {source.generation}, commit {source.commit or 'unknown'})")
    say(f"compiler {tools.cc} ({tools.version}), {tools.generator}, isa {options.isa}")
    for adaptation in adaptations:
        say(f"adapted in a copy: {adaptation}")
    cmake_dir = build_dir / CMAKE_DIR
    _run(_configure_command(tools, tree, cmake_dir, options), log, "configuring")
    jobs = options.n_jobs or len(os.sched_getaffinity(0))
    _run(
        [tools.cmake, "--build", str(cmake_dir), "--target", "llama", "--parallel", str(jobs)],
        log,
        f"compiling with {jobs} jobs",
    )
    # The older generation puts its libraries where it is told, the newer ones into bin.
    fresh = next(
        (cmake_dir / name for name in ("lib", "bin") if (cmake_dir / name / LIBRARY_NAME).is_file()), None
    )
    if fresh is None:
        raise UnavailableError(f"the build succeeded but left no {LIBRARY_NAME}; its log is {log}")
    manifest = _manifest(source, adaptations, tools, options, cmake_dir, fresh, time.monotonic() - started)
    write_atomically(fresh / MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode())
    # Only now, so that a failed build leaves the last good library in place.
    library = built_library_path(build_dir)
    shutil.rmtree(library.parent, ignore_errors=True)
    fresh.replace(library.parent)
    return FoundLibrary(library, "build", read_manifest(library.parent))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory for this process alone, waiting for it if necessary."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise UnavailableError(f"cannot write the build directory {directory}: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up_to_date(source: Source, tools: Toolchain, options: Options) -> FoundLibrary | None:
    """Return the library of the last build if source, compiler, options and built files are unchanged."""
    library = built_library_path(options.build_dir)
    manifest = read_manifest(library.parent)
    if manifest is None or options.force:
        return None
    same_files = all(
        (library.parent / name).is_file() and file_sha256(library.parent / name) == digest
        for name, digest in manifest.libraries.items()
    )
    facts = (manifest.source_digest, manifest.source_commit, manifest.compiler, manifest.data.get("options"))
    wanted = (source.digest, source.commit, tools.version, _option_facts(options))
    return FoundLibrary(library, "build", manifest) if same_files and facts == wanted else None


def _option_facts(options: Options) -> dict[str, Any]:
    return {"isa": options.isa, "cflags": options.cflags, "cmake_args": list(options.cmake_args)}


def _prepare(build_dir: Path, source: Source, options: Options) -> tuple[Path, tuple[str, ...]]:
    """Return the tree to build and what was adapted in it; discard CMake's files of an earlier build."""
    if (
        source.generation == "march"
        and any("TL1=ON" in a or "TL2=ON" in a for a in options.cmake_args)
        and not (source.path / cpp_source.LUT_HEADER).is_file()
    ):
        raise UnavailableError(
            f"{source.path} lacks {cpp_source.LUT_HEADER}, which TL1 and TL2 kernels need; generate it with "
            "upstream's setup_env.py or leave these options out (I2_S models do not use them)"
        )
    try:
        build_dir.mkdir(parents=True, exist_ok=True)
        prepared = cpp_source.buildable_tree(source, build_dir / SHADOW_DIR)
        # CMake does not allow a build directory to change its source or compiler.
        shutil.rmtree(build_dir / CMAKE_DIR, ignore_errors=True)
    except OSError as error:
        raise UnavailableError(f"cannot write the build directory {build_dir}: {error}") from error
    return prepared


def _configure_command(tools: Toolchain, tree: Path, cmake_dir: Path, options: Options) -> list[str]:
    return [
        tools.cmake,
        "-S",
        str(tree),
        "-B",
        str(cmake_dir),
        "-G",
        tools.generator,
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        f"-DCMAKE_C_COMPILER={tools.cc}",
        f"-DCMAKE_CXX_COMPILER={tools.cxx}",
        f"-DCMAKE_C_FLAGS={options.cflags}",
        f"-DCMAKE_CXX_FLAGS={options.cflags}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={cmake_dir / 'lib'}",
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
        *(f"-DLLAMA_BUILD_{what}=OFF" for what in NOT_BUILT),
        *ISA_ARGUMENTS[options.isa],
        *options.cmake_args,
    ]


def _run(command: Sequence[str], log: Path, what: str) -> None:
    """Run a program with its output appended to the log, reporting progress every few seconds."""
    say(what)
    started = time.monotonic()
    environment = dict(os.environ)
    environment["PATH"] = search_path()
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        # In a process group of its own, so that the compilers end with the program that started them.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while True:
                try:
                    code = process.wait(_PROGRESS_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    say(f"{what}: {time.monotonic() - started:.0f} s, {_last_line(log)}")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code != 0:
        tail = "\n".join(f"  {line}" for line in _log_lines(log)[-_LOG_TAIL_LINES:])
        raise UnavailableError(f"{what} bitnet.cpp failed (status {code}); {STILL_WORKS}; end of {log}:\n{tail}")


def _log_lines(log: Path) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _last_line(log: Path) -> str:
    lines = _log_lines(log)
    steps = [line for line in lines if line.startswith("[")]
    return (steps or lines or [""])[-1].strip()[:100]


def _manifest(
    source: Source,
    adaptations: tuple[str, ...],
    tools: Toolchain,
    options: Options,
    cmake_dir: Path,
    library_dir: Path,
    elapsed_s: float,
) -> dict[str, Any]:
    cache = read_cmake_cache(cmake_dir / CMAKE_CACHE)
    recorded = {key: value for key, value in sorted(cache.items()) if _RECORDED.fullmatch(key)}
    flags = [f"isa={options.isa}", f"-O: {cache.get('CMAKE_C_FLAGS_RELEASE', '')}"]
    flags += [f"cflags: {options.cflags}"] if options.cflags else []
    flags += list(options.cmake_args)
    flags.append("openmp" if cache.get("OpenMP_C_FLAGS", "NOTFOUND") not in ("", "NOTFOUND") else "no openmp")
    host = provenance.host_facts()
    # The names that a process has mapped: those of the files, not of links to them.
    libraries = sorted({path.resolve() for path in library_dir.glob("lib*.so")})
    return {
        "version": MANIFEST_VERSION,
        "source": {
            "kind": source.kind,
            "generation": source.generation,
            "path": str(source.path),
            "commit": source.commit,
            "llama_cpp_commit": source.llama_cpp_commit,
            "dirty": source.dirty,
            "digest": source.digest,
            "adaptations": list(adaptations),
        },
        "compiler": {"cc": tools.cc, "cxx": tools.cxx, "version": tools.version},
        "cmake": {
            "version": tools.cmake_version,
            "generator": tools.generator,
            "flags": ", ".join(flags),
            "cache": recorded,
        },
        "options": _option_facts(options),
        "host": {"cpu_model": host["cpu_model"], "isa_flags": host["isa_flags"]},
        "libraries": {path.name: file_sha256(path) for path in libraries},
        "built_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "elapsed_s": round(elapsed_s, 1),
    }
