"""What is installed, what is missing, and what to do about it; nothing here raises for a missing part."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitnet_py import _native, resources
from bitnet_py.errors import BitnetError
from bitnet_py.gguf import GGUFFile
from bitnet_py.stops import stop_if_asked
from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp import toolchain as cpp_toolchain
from crossval.bitnet_cpp.remedies import HOW_TO_GET, SOURCE_VARIABLE
from crossval.engines import available
from crossval.engines.goldens import goldens_dir, list_goldens
from crossval.errors import CrossvalError, UnavailableError
from crossval.files import file_sha256

PACKAGES = ("numpy", "gguf", "tokenizers", "pandas", "jsonschema", "click", "safetensors", "rich", "jinja2")

_GIT_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class PartCheck:
    """The state of one part. ``required``: nothing works without it; otherwise only what is named is unavailable.

    ``remedy`` is what to do, empty when ``ok``. ``reference``: with this part there is something to compare with.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True
    reference: bool = False


def collect() -> list[PartCheck]:
    """Run every check, the cheap and necessary ones first."""
    checks: list[PartCheck] = []
    for check in (
        check_packages,
        check_c_library,
        check_kernels,
        check_libm,
        check_default_model,
        check_goldens,
        check_toolchain,
        check_git,
        check_submodule,
        check_bitnet_cpp,
    ):
        checks += _guarded(check)
    return checks


def _guarded(check: Callable[[], list[PartCheck]]) -> list[PartCheck]:
    """Run a check; one that itself fails is reported as such, so that the list is always complete."""
    try:
        return check()
    except Exception as error:
        stop_if_asked()
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return [
            PartCheck(
                name, False, f"the check itself failed: {type(error).__name__}: {error}", "report this as a bug"
            )
        ]


def check_packages() -> list[PartCheck]:
    """Return one check per Python package the project depends on."""
    checks = []
    for package in PACKAGES:
        try:
            checks.append(PartCheck(f"python package {package}", True, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            remedy = f"pip install {package}"
            checks.append(PartCheck(f"python package {package}", False, "not installed", remedy))
    return checks


def check_c_library() -> list[PartCheck]:
    """Return whether the engine's C library loads."""
    try:
        return [PartCheck("engine C library", True, str(_native.library_path()))]
    except BitnetError as error:
        return [PartCheck("engine C library", False, str(error), "pip install . (needs a C compiler and CMake)")]


def check_kernels() -> list[PartCheck]:
    """Return which kernel families this CPU can run."""
    try:
        families = _native.kernel_families()
    except BitnetError as error:
        return [PartCheck("engine kernels", False, str(error), "see: engine C library")]
    usable = [family.name for family in families if family.available]
    other = [family.name for family in families if not family.available]
    detail = ", ".join(usable) + (f" (not on this CPU: {', '.join(other)})" if other else "")
    remedy = "" if usable else "reinstall the package"
    return [PartCheck("engine kernels", bool(usable), detail or "none", remedy)]


def check_libm() -> list[PartCheck]:
    """Return whether cosf, sinf and powf round as they did on the machines that recorded the references."""
    try:
        name = _native.libm_name()
    except BitnetError:
        return []  # reported by the check of the C library
    if name is not None:
        return [PartCheck("C library's cosf, sinf, powf", True, f"bits as in {name}", "", required=False)]
    detail = "round differently from every C library that references were recorded with"
    remedy = "expect single bits of RoPE to differ from recorded references; compare with live bitnet.cpp instead"
    return [PartCheck("C library's cosf, sinf, powf", False, detail, remedy, required=False)]


def check_default_model() -> list[PartCheck]:
    """Return whether the model that ships with the project is there and readable."""
    try:
        path = resources.default_model_path()
        with GGUFFile.open(path) as gguf:
            detail = f"{path} ({len(gguf.tensors)} tensors, {path.stat().st_size / 1e6:.1f} MB)"
        return [PartCheck("default model", True, detail)]
    except BitnetError as error:
        return [PartCheck("default model", False, str(error), "reinstall the package, or give --model")]


def check_goldens() -> list[PartCheck]:
    """Return how many recordings of real bitnet.cpp fit the default model."""
    name = "goldens (recorded bitnet.cpp)"
    remedy = "record them with `make record` (needs bitnet.cpp)"
    try:
        model = resources.default_model_path()
        goldens = list_goldens(model)
        sha256 = file_sha256(model)
    except (BitnetError, CrossvalError) as error:
        return [PartCheck(name, False, str(error), remedy, required=False)]
    fitting = sum(golden.info.model.sha256 == sha256 for golden in goldens)
    if fitting == 0:
        detail = f"none of {len(goldens)} in {goldens_dir(model)} was recorded from this model file"
        return [PartCheck(name, False, detail, remedy, required=False)]
    detail = f"{fitting} in {goldens_dir(model)}"
    if fitting < len(goldens):
        return [PartCheck(name, False, f"{detail}; {len(goldens) - fitting} are of another model", remedy, False)]
    return [PartCheck(name, True, detail, required=False, reference=True)]


def check_toolchain() -> list[PartCheck]:
    """Return whether bitnet.cpp could be built here."""
    name = "compiler and CMake (to build bitnet.cpp)"
    try:
        tools = cpp_toolchain.find_toolchain()
    except UnavailableError as error:
        return [PartCheck(name, False, str(error), "install clang (or gcc) and CMake", required=False)]
    return [PartCheck(name, True, f"{tools.version}; {tools.cmake_version}; {tools.generator}", required=False)]


def check_git() -> list[PartCheck]:
    """Return whether git is there, which only downloading bitnet.cpp needs."""
    name = "git (to download bitnet.cpp)"
    git = shutil.which("git")
    if git is None:
        return [PartCheck(name, False, "not installed", "install git, or set BITNET_CPP_DIR", required=False)]
    try:
        done = subprocess.run(
            [git, "--version"], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [PartCheck(name, False, f"{git} does not run: {error}", "reinstall git", required=False)]
    return [
        PartCheck(
            name, done.returncode == 0, done.stdout.strip(), "" if done.returncode == 0 else "reinstall git", False
        )
    ]


def check_submodule() -> list[PartCheck]:
    """Return the state of bitnet.cpp's source: the directory configured, or the submodule."""
    name = "bitnet.cpp source"
    configured = os.environ.get(SOURCE_VARIABLE)
    root = cpp_library.repository_root()
    path = Path(configured) if configured else (root / cpp_source.SUBMODULE if root else None)
    where = f"{SOURCE_VARIABLE}={configured}" if configured else str(path)
    if path is None:
        return [PartCheck(name, False, "not a git checkout", HOW_TO_GET, required=False)]
    try:
        cpp_source.check_layout(path)
    except UnavailableError as error:
        # git makes an empty directory where a submodule would be.
        absent = not path.is_dir() or not any(path.iterdir())
        detail = f"the submodule {path} is not initialised" if absent and not configured else str(error)
        return [PartCheck(name, False, detail, HOW_TO_GET, required=False)]
    commit = cpp_source.git_commit(path)
    if not configured and commit not in (None, cpp_source.PINNED_COMMIT):
        detail = f"{where} is at {commit}, expected {cpp_source.PINNED_COMMIT}"
        return [PartCheck(name, False, detail, f"git submodule update {cpp_source.SUBMODULE}", required=False)]
    return [PartCheck(name, True, f"{where}, commit {commit or 'unknown (not a git checkout)'}", required=False)]


def check_bitnet_cpp() -> list[PartCheck]:
    """Return whether bitnet.cpp's library is there and, loaded in a child process, behaves as expected."""
    name = "bitnet.cpp library"
    try:
        found = next(available.bitnet_cpp())
    except CrossvalError as error:
        return [PartCheck(name, False, str(error), HOW_TO_GET, required=False)]
    numerics = found.numerics
    if numerics is None:
        detail = "not built" if found.where is None else str(found.why_not)
        return [PartCheck(name, False, detail, HOW_TO_GET, required=False)]
    built = f"built by {found.compiler}" if found.compiler else "no build manifest, so its origin is unknown"
    width, fused = numerics.simd_width, numerics.fused_quantizer
    detail = (
        f"{found.where} ({found.detail}; {built}; generation {numerics.generation}, simd_width {width}, "
        f"fused_quantizer {fused})"
    )
    if width is None or fused is None:
        remedy = "its rounding matches no known build, so bits will differ; build the pinned source for x86-64"
        return [PartCheck(name, False, detail, remedy, required=False)]
    return [PartCheck(name, True, detail, required=False, reference=True)]
