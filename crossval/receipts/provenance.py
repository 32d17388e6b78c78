"""Where a result comes from: the tool's version and commit, and the host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

DISTRIBUTION = "bitnet-parity"
CODE_PATHS = ("bitnet_py", "crossval", "schemas", "models", "pyproject.toml")
"""Paths that ``dirty`` covers: a change to one of these changes what the tool computes."""

# fmt: off
ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)
# fmt: on
"""The CPU features that decide which kernels can run, as the operating system spells them."""


def tool_facts() -> dict[str, Any]:
    """Return version, commit and dirty flag of the running code; None where unknown."""
    commit, dirty = git_state(Path(__file__).resolve().parents[2])
    return {"name": "crossval", "version": version(), "commit": commit, "dirty": dirty}


def version() -> str | None:
    """Return the version of the running code; None where it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return ``(commit, dirty)`` of the checkout at ``root``, or ``(None, None)`` when it is not one.

    A package installed below another project's repository must not report that repository's commit, so
    ``root`` itself has to be the top of a checkout that tracks ``crossval``.
    """
    if not (root / ".git").exists() or _git(root, "ls-files", "--error-unmatch", "crossval/__init__.py") is None:
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain", "--ignore-submodules=all", "--", *CODE_PATHS)
    return commit, None if status is None else bool(status)


def _git(root: Path, *args: str) -> str | None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env["GIT_OPTIONAL_LOCKS"] = "0"  # `status` would renew the index, and killed meanwhile leave it locked
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
