"""Where a result comes from: the tool's version and commit, the host, the sha256 of the model file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from crossval.errors import BadInputError
from crossval.files import write_atomically

DISTRIBUTION = "bitnet-parity"
CODE_PATHS = ("bitnet_py", "crossval", "schemas", "models", "pyproject.toml")
"""What ``dirty`` looks at: a change to one of these changes what the tool computes."""

# fmt: off
ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)
# fmt: on
"""The features that decide which kernels can run, as the kernel of the OS spells them."""

_CHUNK_BYTES = 4 << 20
_CACHE_MIN_BYTES = 64 << 20
_CACHE_SETTLED_S = 2.0
_CACHE_MAX_ENTRIES = 256


def tool_facts() -> dict[str, Any]:
    """Return version, commit and dirty flag of the code that runs; None for what cannot be known."""
    commit, dirty = git_state(Path(__file__).resolve().parents[1])
    return {"name": "crossval", "version": _version(), "commit": commit, "dirty": dirty}


def _version() -> str | None:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return ``(commit, dirty)`` of the checkout at ``root``, or ``(None, None)`` when it is not one.

    A package installed below somebody else's repository must not report that repository's commit, so
    ``root`` itself has to be the top of a checkout that tracks ``crossval``.
    """
    if not (root / ".git").exists() or _git(root, "ls-files", "--error-unmatch", "crossval/__init__.py") is None:
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain", "--ignore-submodules=all", "--", *CODE_PATHS)
    return commit, None if status is None else bool(status)


def _git(root: Path, *args: str) -> str | None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, env=env, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def host_facts(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return CPU model, ISA flags, usable and online cores, OS and Python version of this machine."""
    model, flags = _cpu(cpuinfo)
    return {
        "cpu_model": model or platform.processor() or platform.machine() or "unknown",
        "machine": platform.machine() or "unknown",
        "isa_flags": [flag for flag in ISA_FLAGS if flag in flags],
        "n_cores": os.cpu_count() or 1,
        "n_cores_usable": _usable_cores(),
        "os": f"{platform.system()} {platform.release()}".strip(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "python": platform.python_version(),
    }


def _cpu(cpuinfo: Path) -> tuple[str | None, frozenset[str]]:
    """Return the model name and feature flags of the first CPU in ``cpuinfo`` (x86 and ARM spellings)."""
    fields: dict[str, str] = {}
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                key, separator, value = line.partition(":")
                if separator:
                    fields.setdefault(key.strip(), value.strip())
    except OSError:
        return None, frozenset()
    model = fields.get("model name") or fields.get("Model") or fields.get("CPU part")
    return model or None, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def file_sha256(path: str | Path) -> str:
    """Return the lower-case hexadecimal sha256 of a file, read in chunks.

    Large files are looked up in the user's cache by (path, device, inode, size, mtime, ctime) first.

    Raises:
        BadInputError: the file cannot be read, or it changed while it was being read.
    """
    file = Path(path)
    try:
        before = file.stat()
        key = _cache_key(file, before) if before.st_size >= _CACHE_MIN_BYTES else None
        known = _cache_get(key) if key else None
        if known:
            return known
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        after = file.stat()
    except OSError as error:
        raise BadInputError(f"cannot read {file}: {error.strerror or error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadInputError(f"{file} changed while it was being hashed; try again when nothing writes to it")
    # A file written moments ago could change again without its timestamps moving: do not remember it.
    if key and time.time() - max(after.st_mtime, after.st_ctime) > _CACHE_SETTLED_S:
        _cache_put(key, digest.hexdigest())
    return digest.hexdigest()


def _cache_key(path: Path, stat: os.stat_result) -> str:
    parts = (path.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return "|".join(str(part) for part in parts)


def cache_path() -> Path:
    """Return the file that remembers the sha256 of large files."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / DISTRIBUTION / "sha256.json"


def _cache_read() -> dict[str, str]:
    try:
        data = json.loads(cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: value for key, value in data.items() if isinstance(value, str) and len(value) == 64}


def _cache_get(key: str) -> str | None:
    return _cache_read().get(key)


def _cache_put(key: str, digest: str) -> None:
    """Remember a digest. A cache that cannot be written costs time, nothing else, so errors are dropped."""
    try:
        entries = {**_cache_read(), key: digest}
        kept = dict(list(entries.items())[-_CACHE_MAX_ENTRIES:])
        write_atomically(cache_path(), json.dumps(kept, indent=1).encode())
    except (OSError, RuntimeError):
        return
