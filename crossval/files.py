"""Files: atomic writes, bounded reads, cached sha256 digests, and the time that they state."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from crossval.errors import BadInputError

CACHE_NAME = "bitnet-parity"
"""Folder of this package within the user's cache."""
STREAM = Path("-")
"""Names stdin where a file is read, stdout where one is written."""
_SUFFIX = ".crossval"
_OURS = re.compile(rf"[a-z0-9_]+{re.escape(_SUFFIX)}")
_TO_LOCK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_TRIES = 100
_CHUNK_BYTES = 4 << 20
_CACHE_MIN_BYTES = 64 << 20
_CACHE_SETTLED_S = 2.0
_CACHE_MAX_ENTRIES = 256


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old or the new file, never a part; ``-``: to stdout.

    Raises:
        OSError: the directory cannot be created or written.
    """
    if path == STREAM:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path.parent, f".{path.name}.") as made:
        with made.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(made, 0o666 & ~umask)
        os.replace(made, path)


@contextlib.contextmanager
def temporary(place: Path, prefix: str, *, is_folder: bool = False) -> Iterator[Path]:
    """Make a file or folder that is removed when the block ends, or moved away in it.

    Nothing cleans up after a process that was killed (SIGKILL): what such ones left under the same prefix is
    removed first. It is told by its lock, which the system releases with the process.

    Raises:
        OSError: it cannot be made, or not be opened again (a umask that takes reading away from its owner).
    """
    prefix = prefix[:200]
    with contextlib.suppress(OSError):
        for path in place.iterdir():
            if path.name.startswith(prefix) and _OURS.fullmatch(path.name[len(prefix) :]):
                _remove_left(path)
    for _ in range(_MOST_TRIES):
        made = _new(place, prefix, is_folder=is_folder)
        lock = _lock(made, without=True)
        try:
            if lock is not None and made.exists():  # else another process took it for one that was left
                yield made
                return
        finally:
            _remove(made)
            if lock is not None:
                os.close(lock)
    raise OSError(errno.EAGAIN, "a temporary file can be made and not be opened again")


def _new(place: Path, prefix: str, *, is_folder: bool) -> Path:
    if is_folder:
        return Path(tempfile.mkdtemp(_SUFFIX, prefix, place))
    handle, name = tempfile.mkstemp(_SUFFIX, prefix, place)
    os.close(handle)
    return Path(name)


def _lock(path: Path, *, without: bool) -> int | None:
    """Open and lock a file or folder and return the descriptor; None: another process has it, or it is gone.

    ``without``: whether to do without the lock on file systems that have none.
    """
    try:
        handle = os.open(path, _TO_LOCK)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError) or not without:
            os.close(handle)
            return None
    return handle


def _remove_left(path: Path) -> None:
    """Remove what a process of this user left, unless one still has it."""
    lock = _lock(path, without=False)
    if lock is not None:
        if os.fstat(lock).st_uid == os.geteuid():
            _remove(path)
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_limited(path: Path, what: str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file, or of stdin (``-``); ``what`` names it in messages.

    Raises:
        BadInputError: it cannot be read, is not a regular file, or is larger than ``max_bytes``.
    """
    if path != STREAM:
        check_regular(path, what)
    try:
        with contextlib.nullcontext(_stdin()) if path == STREAM else path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise BadInputError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > max_bytes:
        raise BadInputError(f"{path}: larger than {max_bytes} bytes")
    return data


def _stdin() -> BinaryIO:
    if sys.stdin is None:
        raise ValueError("stdin is closed")
    return sys.stdin.buffer


def check_regular(path: Path, what: str = "") -> None:
    """Check that a path names a regular file: reading anything else may block forever.

    Raises:
        BadInputError: it does not, or it does not exist (from FileNotFoundError).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadInputError(f"{path}: not a regular file")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputError(f"cannot read {what}{' ' * bool(what)}{path}: {reason}") from error


def utc_now() -> str:
    """Return the date and time of day in UTC as files state it, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


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
        raise BadInputError(f"{file} changed while it was being hashed; try again once nothing writes to it")
    # A file written moments ago could change again within the same timestamp: do not cache it.
    if key and time.time() - max(after.st_mtime, after.st_ctime) > _CACHE_SETTLED_S:
        _cache_put(key, digest.hexdigest())
    return digest.hexdigest()


def _cache_key(path: Path, at: os.stat_result) -> str:
    parts = (path.resolve(), at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
    return "|".join(str(part) for part in parts)


def cache_path() -> Path:
    """Return the path of the cache of sha256 digests of large files."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / CACHE_NAME / "sha256.json"


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
    """Cache a digest; errors are ignored, because without the cache only time is lost."""
    try:
        entries = {**_cache_read(), key: digest}
        kept = dict(list(entries.items())[-_CACHE_MAX_ENTRIES:])
        write_atomically(cache_path(), json.dumps(kept, indent=1).encode())
    except (OSError, RuntimeError):
        return
