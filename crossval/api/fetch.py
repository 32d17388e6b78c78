"""A model file from the model hub."""

from __future__ import annotations

from pathlib import Path

from crossval.engines import model_hub
from crossval.engines.model_hub import Fetched


def fetch_model(
    repo: str, *, file: str | None = None, to: str | Path | None = None, sha256: str | None = None
) -> Fetched:
    """Fetch one file of a model repository, resuming an earlier try, and compare its sha256.

    Needs the extra ``hub``. ``repo``: ``OWNER/NAME``. ``file``: by default the only GGUF file of
    the repository. ``to``: a folder; None: the cache that programs share which use the hub.
    ``sha256``: what the file must have; what the hub states is compared in any case.

    Raises:
        UnavailableError: the extra is not installed, or the hub cannot be reached.
        BadInputError: no such repository or file, several GGUF files, another sha256.
    """
    return model_hub.fetch(repo, file, None if to is None else Path(to), sha256)
