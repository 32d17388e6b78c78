"""Fetch one file of a model repository with ``huggingface_hub`` (extra ``hub``), and check its sha256."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_py.errors import listed
from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256

HOW_TO_INSTALL = "huggingface_hub is not installed: pip install bitnet-parity[hub]"
_TRANSPORTS = frozenset({"httpx", "httpcore", "requests", "urllib"})
"""Packages, without the digits at the end, whose exceptions the hub's library lets through when there is no
connection (``httpx2``, ``urllib3``)."""
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched, or was there already."""

    path: Path
    repo: str
    commit: str
    size_bytes: int
    sha256: str
    """Of the file as it lies on disk."""
    stated_by_hub: bool
    """Whether the hub states a digest, which was compared."""
    asked_for: bool
    """Whether the caller gave a digest, which was compared."""


def fetch(repo: str, name: str | None = None, to: Path | None = None, sha256: str | None = None) -> Fetched:
    """Download one file of a repository, resuming an earlier try, and compare its sha256.

    Nothing else is downloaded. ``name``: the file; None: the only GGUF file there is. ``to``: a
    folder; None: the cache that programs share which use the hub. The list of files and the file
    are of the same commit.

    Raises:
        UnavailableError: the library is not installed, or the hub cannot be reached.
        BadInputError: no such repository or file, several GGUF files, another sha256 than stated.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError:
        raise UnavailableError(HOW_TO_INSTALL) from None
    with _told(errors, repo):
        info = hub.HfApi().model_info(repo, files_metadata=True)
        files = {str(one.rfilename): one for one in info.siblings or ()}
        chosen = _choose(repo, sorted(files), name)
        where = {} if to is None else {"local_dir": str(to)}
        path = Path(hub.hf_hub_download(repo, chosen, revision=info.sha, **where))
    lfs = files[chosen].lfs
    stated = None if lfs is None else str(lfs.sha256)
    found = file_sha256(path)
    for whose, expected in (("the hub states", stated), ("expected is", sha256)):
        if expected is not None and found != expected:
            raise BadInputError(
                f"{path} has sha256 {found}, {whose} {expected}: do not use this file; delete it and fetch again"
            )
    return Fetched(path, repo, str(info.sha), path.stat().st_size, found, stated is not None, sha256 is not None)


def _choose(repo: str, names: Sequence[str], asked: str | None) -> str:
    models = [name for name in names if name.lower().endswith(".gguf")]
    if asked is not None:
        if asked in names:
            return asked
        raise BadInputError(f"{repo} has no file {asked}; it has {_listed(models or names)}")
    if len(models) == 1:
        return models[0]
    if models:
        raise BadInputError(f"{repo} has {len(models)} GGUF files, choose one with --file: {_listed(models)}")
    raise BadInputError(f"{repo} has no GGUF file; it has {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    return listed(names, _MOST_SHOWN) or "no files"


@contextmanager
def _told(errors: Any, repo: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line of ours; anything unknown is let through."""
    try:
        yield
    except errors.GatedRepoError:
        raise UnavailableError(f"{repo} asks for an account: set HF_TOKEN, or copy the file here") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise BadInputError(
            f"there is no model repository {repo} (or it is private): expected OWNER/NAME"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise UnavailableError(
            f"cannot fetch {repo}: HF_HUB_OFFLINE is set; unset it, or copy the file here"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UnavailableError(_unreachable(repo)) from None
    except errors.HfHubHTTPError as error:
        raise UnavailableError(f"the model hub refused {repo}: {error}") from None
    except Exception as error:
        if _is_transport(error):
            raise UnavailableError(_unreachable(repo)) from None
        if isinstance(error, OSError):
            raise BadInputError(f"cannot write what was fetched from {repo}: {error}") from None
        raise


def _unreachable(repo: str) -> str:
    return (
        f"cannot fetch {repo}: the model hub cannot be reached from here; check the connection and try again "
        "(the download resumes), or copy the file from another machine"
    )


def _is_transport(error: Exception) -> bool:
    packages = {kind.__module__.partition(".")[0].rstrip("0123456789") for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(packages & _TRANSPORTS)
