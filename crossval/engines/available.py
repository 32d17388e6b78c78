"""Which engines are here: the word of each, whose arithmetic it has and from where, or why it cannot be run."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitnet_py import _native, resources
from bitnet_py.errors import BitnetError
from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp import runner as cpp_runner
from crossval.bitnet_cpp.builder import built_library_path
from crossval.bitnet_cpp.manifest import combined_digest, manifest_for
from crossval.bitnet_cpp.remedies import HOW_TO_GET
from crossval.engines import llama_package, registry, transformers
from crossval.engines.goldens import Golden, goldens_dir, list_goldens
from crossval.errors import CrossvalError
from crossval.files import file_sha256
from crossval.passes import EngineIdentity, Numerics


@dataclass(frozen=True)
class Available:
    """One engine, or one build of it, as ``--candidate`` and ``--reference`` take it.

    ``recorded``: it can be compared with, but not run. ``why_not``: why it cannot be used, with what
    to do about it; None when it can.
    """

    word: str
    what: str
    why_not: str | None = None
    where: str | None = None
    recorded: bool = False
    version: str | None = None
    source_commit: str | None = None
    library_digest: str | None = None
    compiler: str | None = None
    numerics: Numerics | None = None
    """None: not stated, or it computes as the engine that it is compared with."""
    detail: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it can be used."""
        return self.why_not is None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        numerics = None if self.numerics is None else self.numerics.to_json()
        return {"ok": self.ok, **vars(self), "numerics": numerics}


def collect() -> list[Available]:
    """Return every engine that this installation knows, and every build that it finds."""
    found: list[Available] = []
    for engine, look in (
        ("bitnet_py", bitnet_py),
        ("bitnet.cpp", bitnet_cpp),
        ("llama.cpp", llama_cpp),
        ("transformers", hugging_face),
        ("spec", spec),
        ("auto", goldens),
    ):
        found += _guarded(engine, look)
    return found


def _guarded(word: str, look: Callable[[], Iterator[Available]]) -> list[Available]:
    """Return what a look finds; one that fails is an engine that cannot be used."""
    try:
        return list(look())
    except (BitnetError, CrossvalError, OSError) as error:
        return [_row(word, why_not=" ".join(str(error).split()))]


def _row(word: str, **facts: Any) -> Available:
    what = registry.row_of(registry.find_word("reference", word)).what
    return Available(word, what, **facts)


def bitnet_py() -> Iterator[Available]:
    """Yield this project's engine, with the kernel families that this CPU runs."""
    path, families = _native.library_path(), _native.kernel_families()
    usable = ", ".join(family.name for family in families if family.available)
    yield _row(
        "bitnet_py",
        why_not=None if usable else "no kernel family runs on this CPU: reinstall the package",
        where=str(path),
        version=importlib.metadata.version("bitnet-parity"),
        library_digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        detail=f"kernels {usable}; computes as the other engine states",
    )


def bitnet_cpp() -> Iterator[Available]:
    """Yield the bitnet.cpp that its word alone means, then the other builds made here."""
    library = cpp_library.find_library()
    if library is None:
        yield _row("bitnet.cpp", why_not=f"not built: {HOW_TO_GET}")
    else:
        yield examined("bitnet.cpp", library.path, detail=library.origin)
    kept = [cpp_library.build_dir_of(generation) for generation in cpp_library.PREFERENCE]
    kept += sorted((cpp_library.default_build_dir() / "sources").glob("*"))
    for folder in kept:
        path = built_library_path(folder)
        if path.is_file() and (library is None or path.resolve() != library.path.resolve()):
            yield replace(examined("bitnet.cpp", path), word=f"bitnet.cpp:{folder}")


def llama_cpp() -> Iterator[Available]:
    """Yield the llama.cpp inside the installed ``llama-cpp-python``."""
    path, version = llama_package.find_library(), llama_package.version()
    if path is None:
        yield _row("llama.cpp", why_not=f"not installed: {llama_package.HOW_TO_GET}")
    else:
        yield replace(examined("llama.cpp", path, detail=llama_package.DISTRIBUTION), version=version)


def hugging_face() -> Iterator[Available]:
    """Yield the installed transformers, if PyTorch is there, too."""
    versions = {}
    for package in transformers.PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield _row(transformers.NAME, why_not=f"{package} is not installed: {transformers.HOW_TO_GET}")
            return
    yield _row(
        transformers.NAME,
        version=versions["transformers"],
        detail=f"float32 or bfloat16; torch {versions['torch']}",
    )


def examined(word: str, path: Path, detail: str | None = None) -> Available:
    """Return a build, loaded in a child process and checked by its behaviour."""
    row = _row(word, where=str(path), detail=detail)
    try:
        facts = cpp_runner.open_library(path)
    except CrossvalError as error:
        return replace(row, why_not=" ".join(str(error).split()))
    manifest = manifest_for(facts["files"])
    return replace(
        row,
        source_commit=manifest.source_commit if manifest else None,
        library_digest=combined_digest(facts["files"]),
        compiler=manifest.compiler if manifest else None,
        numerics=Numerics(
            facts["simd_width"],
            facts["fused_quantizer"],
            generation=facts["generation"],
            binary16_sums=facts["binary16_sums"],
        ),
    )


def spec() -> Iterator[Available]:
    """Yield the specification."""
    yield _row("spec", detail="float64; int8 activations in ternary products")


def goldens() -> Iterator[Available]:
    """Yield the recordings of the default model, one row per build that was recorded."""
    model = resources.default_model_path()
    sha256 = file_sha256(model)
    builds: dict[str, list[Golden]] = {}
    for golden in list_goldens(model):
        if golden.info.model.sha256 == sha256:
            builds.setdefault(_build(golden.info.engine), []).append(golden)
    if not builds:
        yield _row("auto", recorded=True, why_not=f"{goldens_dir(model)} holds no recording of the default model")
    for recorded in builds.values():
        engine = recorded[0].info.engine
        yield _row(
            "auto",
            where=str(goldens_dir(model)),
            recorded=True,
            version=engine.version,
            source_commit=engine.source_commit,
            library_digest=engine.library_digest,
            compiler=engine.compiler,
            numerics=engine.numerics,
            detail=f"{len(recorded)} recorded prompts of {model.name}",
        )


def _build(engine: EngineIdentity) -> str:
    return repr((engine.name, engine.source_digest, engine.library_digest, engine.numerics))
