"""``crossval doctor``: its exit codes."""

from __future__ import annotations

import json

import pytest

from crossval.engines import doctor
from crossval.engines.doctor import PartCheck
from tests.support.strangers import run

OK = PartCheck("engine", True, "fine")
LIVE = PartCheck("bitnet.cpp library", True, "there", required=False, reference=True)
NO_LIVE = PartCheck("bitnet.cpp library", False, "not built", "make fetch-cpp", required=False)
GOLDENS = PartCheck("goldens (recorded bitnet.cpp)", True, "10", required=False, reference=True)
BROKEN = PartCheck("engine C library", False, "missing", "pip install .")


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ([OK, LIVE], 0),
        ([OK, NO_LIVE, GOLDENS], 0),
        ([OK, NO_LIVE], 3),
        ([OK], 3),
        ([OK, LIVE, BROKEN], 4),
        ([], 4),
    ],
)
def test_exit_codes(checks, code, monkeypatch):
    monkeypatch.setattr(doctor, "collect", lambda: checks)
    result, as_json = run("doctor"), run("doctor", "--json")
    assert (result.exit_code, as_json.exit_code) == (code, code)
    report = json.loads(as_json.stdout)
    assert report["ok"] == (code == 0)
    assert [check["name"] for check in report["checks"]] == [check.name for check in checks]
    for check in checks:
        assert check.remedy in result.stdout
