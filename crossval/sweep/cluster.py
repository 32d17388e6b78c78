"""Cells on a Dask cluster that is there already (extra ``dask``); Dask distributes, crossval only submits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from crossval.errors import BadInputError, UnavailableError

CONNECT_S = 20
MEMORY = "MEMORY"
"""Name of the resource by which workers state their memory, in bytes, as in Dask's documentation."""


@contextmanager
def workers(address: str) -> Iterator[tuple[Callable[[int], Executor], int]]:
    """Yield what runs a cell that needs so many bytes, and how many cells the cluster runs at a time.

    Workers that state the resource MEMORY are given no more cells than fit; of others each must
    hold as many as it has threads.

    Raises:
        UnavailableError: the package is not installed, nobody answers, or the cluster has no worker.
        BadInputError: from the function, where a cell does not fit.
    """
    distributed = _package()
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"no Dask scheduler answers at {address}: {error}") from error
    with client:
        found = client.scheduler_info(n_workers=-1)["workers"]
        if not found:
            raise UnavailableError(f"the Dask cluster at {address} has no workers")

        @functools.cache
        def executor_of(needed: int) -> Executor:
            resources = {MEMORY: needed} if _fits(found, needed) else None
            made: Executor = client.get_executor(pure=False, resources=resources)
            return made

        yield executor_of, sum(worker["nthreads"] for worker in found.values())


def _package() -> ModuleType:
    try:
        import distributed
    except ImportError as error:
        raise UnavailableError(
            "--dask needs the package distributed: pip install 'bitnet-parity[dask]'"
        ) from error
    return distributed  # type: ignore[no-any-return,unused-ignore]


def _fits(found: Mapping[str, Mapping[str, Any]], needed: int) -> bool:
    """Return whether Dask must count the memory of cells; False: every thread of every worker has enough."""
    stated = [worker["resources"].get(MEMORY, 0) for worker in found.values()]
    if any(stated):
        if max(stated) < needed:
            raise BadInputError(
                f"a cell takes up to {needed >> 20} MiB, and the largest worker states {int(max(stated)) >> 20}"
            )
        return True
    for name, worker in found.items():
        if worker["memory_limit"] < needed * worker["nthreads"]:
            raise BadInputError(
                f"Dask worker {name}: {worker['nthreads']} cells of up to {needed >> 20} MiB do not fit into "
                f"its {worker['memory_limit'] >> 20}; start workers with fewer threads, or with "
                f"--resources {MEMORY}=BYTES"
            )
    return False
