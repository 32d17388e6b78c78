"""Build bitnet.cpp's ``llama`` library out of tree and record how (``python -m crossval.bitnet_cpp.build``).

The source is the first of: ``BITNET_CPP_LIB`` (a ready library: only checked, nothing to build),
``BITNET_CPP_DIR`` (an existing checkout: no network, nothing written into it), the pinned
submodule.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp.library import (
    LIBRARY_NAME,
    LIBRARY_VARIABLE,
    MANIFEST_NAME,
    MANIFEST_VERSION,
    SOURCE_VARIABLE,
    STILL_WORKS,
    BuiltLibrary,
    built_library_path,
    default_build_dir,
    find_library,
    read_manifest,
    repository_root,
)
from crossval.bitnet_cpp.runner import open_library
from crossval.bitnet_cpp.source import Source
from crossval.bitnet_cpp.toolchain import COMPILERS, Toolchain, find_toolchain, search_path
from crossval.errors import CrossvalError, UnavailableError
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


def say(text: str) -> None:
    """Print a progress line on stderr."""
    print(f"build_cpp: {text}", file=sys.stderr, flush=True)


def build(source: Source, options: Options) -> BuiltLibrary:
    """Configure and compile the ``llama`` target, and write the manifest beside the library.

    Raises:
        UnavailableError: a tool is missing or the build failed; the message has the tail of its
        log.
    """
    started = time.monotonic()
    tools = find_toolchain(options.cc, options.cxx)
    build_dir = options.build_dir
    current = up_to_date(source, tools, options)
    if current is not None:
        say(f"already built from this source with these options: {current.path}")
        return current
    tree, adaptations = _prepare(build_dir, source, options)
    log = build_dir / "build.log"
    log.unlink(missing_ok=True)
    say(f"source {source.path} ({source.kind}, commit {source.commit or 'unknown'})")
    say(f"compiler {tools.cc} ({tools.version}), {tools.generator}, isa {options.isa}")
    for adaptation in adaptations:
        say(f"adapted in a copy: {adaptation}")
    cmake_dir = build_dir / "cmake"
    _run(_configure_command(tools, tree, cmake_dir, options), log, "configuring")
    jobs = options.n_jobs or len(os.sched_getaffinity(0))
    _run(
        [tools.cmake, "--build", str(cmake_dir), "--target", "llama", "--parallel", str(jobs)],
        log,
        f"compiling with {jobs} jobs",
    )
    fresh = cmake_dir / "lib"
    if not (fresh / LIBRARY_NAME).is_file():
        raise UnavailableError(f"the build succeeded but left no {LIBRARY_NAME}; its log is {log}")
    manifest = _manifest(source, adaptations, tools, options, cmake_dir, time.monotonic() - started)
    write_atomically(fresh / MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode())
    # Only now, so that a failed build leaves the last good library in place.
    library = built_library_path(build_dir)
    shutil.rmtree(library.parent, ignore_errors=True)
    fresh.replace(library.parent)
    return BuiltLibrary(library, "build", read_manifest(library.parent))


def up_to_date(source: Source, tools: Toolchain, options: Options) -> BuiltLibrary | None:
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
    return BuiltLibrary(library, "build", manifest) if same_files and facts == wanted else None


def _option_facts(options: Options) -> dict[str, Any]:
    return {"isa": options.isa, "cflags": options.cflags, "cmake_args": list(options.cmake_args)}


def _prepare(build_dir: Path, source: Source, options: Options) -> tuple[Path, tuple[str, ...]]:
    """Return the tree to build and what was adapted in it; discard CMake's files of an earlier build."""
    if (
        any("TL1=ON" in a or "TL2=ON" in a for a in options.cmake_args)
        and not (source.path / cpp_source.LUT_HEADER).is_file()
    ):
        raise UnavailableError(
            f"{source.path} lacks {cpp_source.LUT_HEADER}, which TL1 and TL2 kernels need; generate it with "
            "upstream's setup_env.py or leave these options out (I2_S models do not use them)"
        )
    try:
        build_dir.mkdir(parents=True, exist_ok=True)
        prepared = cpp_source.buildable_tree(source.path.resolve(), build_dir / "source")
        # CMake does not allow a build directory to change its source or compiler.
        shutil.rmtree(build_dir / "cmake", ignore_errors=True)
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
        *(f"-DLLAMA_BUILD_{what}=OFF" for what in ("TESTS", "EXAMPLES", "SERVER")),
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
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                try:
                    code = process.wait(_PROGRESS_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    say(f"{what}: {time.monotonic() - started:.0f} s, {_last_line(log)}")
        except BaseException:
            process.kill()
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
    elapsed_s: float,
) -> dict[str, Any]:
    cache = read_cmake_cache(cmake_dir / "CMakeCache.txt")
    recorded = {key: value for key, value in sorted(cache.items()) if _RECORDED.fullmatch(key)}
    flags = [f"isa={options.isa}", f"-O: {cache.get('CMAKE_C_FLAGS_RELEASE', '')}"]
    flags += [f"cflags: {options.cflags}"] if options.cflags else []
    flags += list(options.cmake_args)
    flags.append("openmp" if cache.get("OpenMP_C_FLAGS", "NOTFOUND") not in ("", "NOTFOUND") else "no openmp")
    host = provenance.host_facts()
    libraries = sorted((cmake_dir / "lib").glob("lib*.so"))
    return {
        "version": MANIFEST_VERSION,
        "source": {
            "kind": source.kind,
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


def read_cmake_cache(path: Path) -> dict[str, str]:
    """Return the entries of a CMakeCache.txt (``NAME:TYPE=VALUE`` lines)."""
    entries = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"([A-Za-z_][\w.+-]*):\w+=(.*)$", line)
        if match:
            entries[match.group(1)] = match.group(2)
    return entries


def obtain(options: Options) -> BuiltLibrary:
    """Return a library by the first way that applies: ready library, given checkout, download.

    Raises:
        UnavailableError: it cannot be obtained; the message says why and what works without it.
    """
    if os.environ.get(LIBRARY_VARIABLE):
        library = find_library()
        assert library is not None
        say(f"{LIBRARY_VARIABLE} is set: nothing to build")
        return library
    directory = os.environ.get(SOURCE_VARIABLE)
    if directory:
        path, kind = Path(directory).expanduser(), "directory"
    else:
        say(f"downloading {cpp_source.UPSTREAM_URL} at {cpp_source.PINNED_COMMIT[:12]} and its llama.cpp")
        path = cpp_source.fetch(repository_root(), options.build_dir.parent / "bitnet.cpp-source")
        kind = "submodule"
    return build(cpp_source.describe(path.resolve(), kind), options)


def main(argv: Sequence[str] | None = None) -> int:
    """Obtain the library and print its path on stdout; return the exit code (0, or 3 if that is impossible)."""
    parser = argparse.ArgumentParser(prog="python -m crossval.bitnet_cpp.build", description=__doc__)
    parser.add_argument("--build-dir", type=Path, default=default_build_dir(), help="default: %(default)s")
    parser.add_argument(
        "--isa", choices=sorted(ISA_ARGUMENTS), default="native", help="instruction set to build for"
    )
    parser.add_argument("--cflags", default="", help="extra flags for the C and C++ compiler")
    parser.add_argument("--cc", help=f"C compiler; default: the first of {', '.join(COMPILERS[:3])}, ..., gcc")
    parser.add_argument("--cxx", help="C++ compiler; default: the one that belongs to the C compiler")
    parser.add_argument("--cmake-arg", action="append", default=[], metavar="-DNAME=VALUE", help="repeatable")
    parser.add_argument("--jobs", type=int, default=0, help="parallel compilations; default: all cores")
    parser.add_argument("--force", action="store_true", help="build even if nothing has changed")
    args = parser.parse_args(argv)
    options = Options(
        build_dir=args.build_dir.resolve(),
        isa=args.isa,
        cflags=args.cflags,
        cc=args.cc,
        cxx=args.cxx,
        cmake_args=tuple(args.cmake_arg),
        n_jobs=max(0, args.jobs),
        force=args.force,
    )
    try:
        library = obtain(options)
        facts = open_library(library.path)
    except CrossvalError as error:
        print(f"build_cpp: error: {error}", file=sys.stderr)
        return error.exit_code
    say(f"{LIBRARY_NAME} works: {facts['simd_width']} lanes, fused quantiser {facts['fused_quantizer']}")
    if library.origin == "build" and args.build_dir.resolve() != default_build_dir():
        say(f"to use it: export {LIBRARY_VARIABLE}={library.path}")
    print(library.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
