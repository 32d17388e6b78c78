"""Build bitnet.cpp's ``llama`` library out of tree (``python -m crossval.bitnet_cpp.build``, ``make fetch-cpp``).

The source is the first of: ``BITNET_CPP_LIB`` (a ready library: only checked, nothing to build),
``BITNET_CPP_DIR`` (an existing checkout: no network, nothing written into it), a download of the
pinned commit. ``BITNET_CPP_GENERATION`` says which pinned commit, or what the checkout has to be.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp.builder import ISA_ARGUMENTS, FoundLibrary, Options, build, say
from crossval.bitnet_cpp.library import (
    PREFERENCE,
    asked_generation,
    build_dir_of,
    default_build_dir,
    find_library,
    repository_root,
)
from crossval.bitnet_cpp.manifest import LIBRARY_NAME
from crossval.bitnet_cpp.remedies import GENERATION_VARIABLE, LIBRARY_VARIABLE, SOURCE_VARIABLE
from crossval.bitnet_cpp.runner import open_library
from crossval.bitnet_cpp.toolchain import COMPILERS
from crossval.errors import BadInputError, CrossvalError


def obtain(options: Options, build_dir: Path | None = None) -> FoundLibrary:
    """Return a library by the first way that applies: ready library, given checkout, download.

    ``build_dir``: where to build; None: the place of the generation.

    Raises:
        UnavailableError: it cannot be obtained; the message says why and what works without it.
        BadInputError: the checkout is not of the generation asked for.
    """
    if os.environ.get(LIBRARY_VARIABLE):
        library = find_library()
        assert library is not None
        say(f"{LIBRARY_VARIABLE} is set: nothing to build")
        return library
    asked = asked_generation()
    directory = os.environ.get(SOURCE_VARIABLE)
    if directory:
        path, kind = Path(directory).expanduser(), "directory"
    else:
        wanted = asked or PREFERENCE[0]
        fallback = default_build_dir().parent / f"bitnet.cpp-source-{wanted}"
        path, kind = cpp_source.fetch(repository_root(), fallback, wanted), "submodule"
    source = cpp_source.describe(path.resolve(), kind)
    if asked is not None and source.generation != asked:
        raise BadInputError(
            f"{path} is a checkout of the generation {source.generation}, not {asked}, which "
            f"{GENERATION_VARIABLE} asks for"
        )
    return build(source, replace(options, build_dir=build_dir or build_dir_of(source.generation)))


def main(argv: Sequence[str] | None = None) -> int:
    """Obtain the library and print its path on stdout; return the exit code (0, or 3 if that is impossible)."""
    parser = argparse.ArgumentParser(prog="python -m crossval.bitnet_cpp.build", description=__doc__)
    parser.add_argument("--build-dir", type=Path, help=f"default: {default_build_dir()}, or a folder in it")
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
        build_dir=default_build_dir(),
        isa=args.isa,
        cflags=args.cflags,
        cc=args.cc,
        cxx=args.cxx,
        cmake_args=tuple(args.cmake_arg),
        n_jobs=max(0, args.jobs),
        force=args.force,
    )
    try:
        library = obtain(options, args.build_dir.resolve() if args.build_dir else None)
        facts = open_library(library.path)
    except CrossvalError as error:
        print(f"build_cpp: error: {error}", file=sys.stderr)
        return error.exit_code
    say(
        f"{LIBRARY_NAME} works: {facts['title']}, {facts['simd_width']} lanes, "
        f"fused quantiser {facts['fused_quantizer']}"
    )
    if not os.environ.get(LIBRARY_VARIABLE):
        default = find_library()
        if default is None or default.path != library.path:
            say(f"to use it: export {LIBRARY_VARIABLE}={library.path}")
    print(library.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
