"""The kinds of receipts: all are listed, and adding one takes a package, a row and its schema."""

from __future__ import annotations

import functools
import importlib
import io
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from crossval import registry, schema
from crossval.cli import cli
from crossval.console import console
from crossval.receipts import file, kind
from tests.support import receipt_samples as samples

TOY = """
from crossval.receipts.kind import Amount, Kind, Summary


def amount(receipt):
    rows = receipt["results"]["rows"]
    return Amount(len(rows), len(receipt["prompt"]["token_ids"]), f"{len(rows)} rows")


def small(receipt):
    return [f"row {i} is {n}, the most is 9" for i, n in enumerate(receipt["results"]["rows"]) if n > 9]


TOY = Kind(
    name="toy",
    counted="rows",
    to_json=lambda rows: {"thresholds": {"least": 2}, "results": {"rows": rows, "total": sum(rows)}},
    from_json=lambda receipt: receipt["results"]["rows"],
    summarize=lambda rows: Summary("pass" if min(rows) >= 2 else "fail", len(rows), len(rows), 1.0),
    derived=lambda rows: {"total": sum(rows)},
    checks={"small": small},
    amount=amount,
)


def show_toy(out, receipt):
    out.print(f"a toy of {receipt['results']['total']}")
"""
DEFINITIONS = {
    "toy_criterion": {"type": "object", "additionalProperties": False, "properties": {"least": {"const": 2}}},
    "toy_results": {
        "type": "object",
        "additionalProperties": False,
        "required": ["rows", "total"],
        "properties": {
            "rows": {"type": "array", "items": {"$ref": "#/$defs/count"}},
            "total": {"$ref": "#/$defs/count"},
        },
    },
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kind.Kind[list[int]]:
    """A feature package, its row in the registry, and its results in the schema."""
    (tmp_path / "toyfeature.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    feature = importlib.import_module("toyfeature")
    monkeypatch.setitem(registry.KINDS, "toy", registry.Entry("toyfeature:TOY", "toyfeature:show_toy"))
    schemas = tmp_path / "schemas"
    shutil.copytree(schema.schema_dir(), schemas)
    path = schemas / "receipt.v1.schema.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["$defs"] |= DEFINITIONS
    data["properties"]["kind"]["enum"].append("toy")
    data["properties"]["thresholds"]["anyOf"].append({"$ref": "#/$defs/toy_criterion"})
    nothing, results = (
        {"properties": {"results": {"$ref": f"#/$defs/{name}"}}} for name in ("no_results", "toy_results")
    )
    unavailable = {"properties": {"thresholds": {"type": "null"}}}
    either = {"if": unavailable, "then": nothing, "else": results}
    data["allOf"].append({"if": {"properties": {"kind": {"const": "toy"}}}, "then": either})
    path.write_text(json.dumps(data), encoding="utf-8")
    monkeypatch.setattr(schema, "schema_dir", lambda: schemas)
    for made in (schema.load, schema.validator, schema._predicate):
        monkeypatch.setattr(schema, made.__name__, functools.cache(made.__wrapped__))
    return feature.TOY


def test_every_kind_of_the_schema_is_listed() -> None:
    schema_kinds = schema.load("receipt.v1")["properties"]["kind"]["enum"]
    assert list(registry.KINDS) == [entry.kind.name for entry in registry.KINDS.values()]
    assert set(registry.KINDS) == set(schema_kinds)


def test_a_further_kind_needs_a_feature_a_row_and_its_schema(toy: kind.Kind[list[int]], tmp_path: Path) -> None:
    made = kind.build(toy, [2, 3], samples.context())
    path = tmp_path / "toy.json"
    file.write(path, made)
    gated = CliRunner().invoke(cli, ["gate", str(path)])
    assert gated.exit_code == 0, gated.output
    assert "1 of the rows, 0 required" in gated.output
    out = io.StringIO()
    registry.show_receipt(console(out), made)
    assert "tiny.gguf" in out.getvalue()
    assert "a toy of 5" in out.getvalue()


@pytest.mark.parametrize(
    ("forgery", "check"),
    [
        (("results", "total", 6), "summary"),
        (("verdict", "incomplete"), "summary"),
        (("results", "rows", [10, 3]), "small"),
        (("results", "rows", [1, 4]), "verdict"),
        (("results", "rows", 7), None),
    ],
)
def test_what_is_false_in_one_fails(
    toy: kind.Kind[list[int]], tmp_path: Path, forgery: tuple[str, ...], check: str | None
) -> None:
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(samples.forge(kind.build(toy, [2, 3], samples.context()), *forgery)))
    gated = CliRunner().invoke(cli, ["gate", "--json", str(path)])
    assert gated.exit_code == (4 if check is None else 1)
    report = json.loads(gated.stdout)["receipts"][0]
    failed = [one["name"] for one in report["checks"] if not one["passed"]]
    assert (check in failed) if check else report["error"]


def test_one_that_could_not_be_had_never_passes(toy: kind.Kind[list[int]]) -> None:
    made = kind.build_unavailable(toy, samples.context())
    assert made["verdict"] == "incomplete"
    assert [one.name for one in registry.judge(made) if not one.passed] == ["reference"]
