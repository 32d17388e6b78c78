"""``crossval doctor``: its exit codes."""

from __future__ import annotations

import json

import pytest

from crossval.cli.doctor import REFERENCES
from crossval.engines import doctor
from crossval.engines.doctor import Check
from tests.support.strangers import run

OK = Check("engine", True, "fine")
LIVE = Check("bitnet.cpp library", True, "there", required=False)
NO_LIVE = Check("bitnet.cpp library", False, "not built", "make fetch-cpp", required=False)
GOLDENS = Check("goldens (recorded bitnet.cpp)", True, "10", required=False)
BROKEN = Check("engine C library", False, "missing", "pip install .")


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


def test_it_knows_the_checks_that_give_a_reference():
    names = {check.name for check in doctor.check_goldens()}
    assert names | {"bitnet.cpp library"} == set(REFERENCES)
