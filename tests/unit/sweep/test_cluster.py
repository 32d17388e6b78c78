"""Sweeps on a Dask cluster."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from crossval.errors import BadInputError
from crossval.sweep import cluster, job
from tests.support.sweeping import in_process, stable, written


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs Dask: pip install 'bitnet-parity[dask]'"
)
def test_a_cluster_of_two_workers_gives_the_same(sweep, tmp_path: Path) -> None:
    import distributed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run", in_process)
        sweep()
    local = written(tmp_path)
    for path in (tmp_path / "out/cells").glob("*.json"):
        path.unlink()
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as made:
        done = sweep("--dask", made.scheduler_address)
    assert done.exit_code == 0, done.output
    assert stable(written(tmp_path)) == stable(local)


def _worker(**more: Any) -> dict[str, Any]:
    return {"nthreads": 2, "memory_limit": 1000, "resources": {}, **more}


def test_workers_take_no_more_than_fits() -> None:
    assert cluster._fits({"a": _worker()}, 500) is False
    assert cluster._fits({"a": _worker(resources={"MEMORY": 600}), "b": _worker()}, 501) is True
    with pytest.raises(BadInputError, match="2 cells of up to"):
        cluster._fits({"a": _worker()}, 501)
    with pytest.raises(BadInputError, match="largest worker"):
        cluster._fits({"a": _worker(resources={"MEMORY": 400})}, 401)
