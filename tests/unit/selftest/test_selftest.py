from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from crossval import registry
from crossval.cli import cli
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.model_file import check_model
from crossval.errors import BadInputError
from crossval.examine import examination as examine
from crossval.receipts import file as receipt
from crossval.receipts.file import Receipt
from crossval.receipts.policy import Policy
from crossval.selftest import alter, catalogue
from crossval.selftest import trials as run
from crossval.selftest.alter import Altered
from crossval.selftest.damage import DamagedModel
from crossval.selftest.receipt import Found, Row, SelftestResult
from crossval.selftest.trials import Bench

SHAPE = {"n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "dim": 256, "hidden_dim": 640,
         "vocab_size": 1024, "context_length": 2048, "rope_base": 500000.0, "rms_eps": 1e-5}  # fmt: skip


@pytest.fixture(scope="module")
def model_path(make_model: Callable[..., Path]) -> Path:
    shape = {"n_layers": 2, "dim": 128, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 256, "vocab_size": 301}
    return make_model(**shape, seed=5)


@pytest.fixture(scope="module")
def done(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """The command's result and its receipt."""
    path = tmp_path_factory.mktemp("selftest") / "receipt.json"
    words = ["selftest", "--model", str(model_path), "--receipt", str(path)]
    return CliRunner().invoke(cli, words, env={"COLUMNS": "120"}), path


@pytest.fixture(scope="module")
def good(done: tuple[Result, Path]) -> Receipt:
    return receipt.read(done[1])


@pytest.fixture
def bench(model_path: Path) -> Iterator[Bench]:
    with run.open_bench(check_model(model_path)) as opened:
        yield opened


def failures(made: Receipt, policy: Policy | None = None) -> list[str]:
    return [check.name for check in registry.judge(made, policy) if not check.passed]


def test_every_fault_is_found_and_the_gate_agrees(done: tuple[Result, Path], good: Receipt) -> None:
    result, path = done
    assert result.exit_code == 0, result.output
    assert good["verdict"] == good["parity"]["status"] == "pass"
    assert good["results"]["summary"]["faults"]["n"] >= 20
    assert good["results"]["summary"]["healthy"] == {"n": 5, "ok": 5}
    assert failures(good) == []
    assert CliRunner().invoke(cli, ["gate", str(path)]).exit_code == 0
    for row in good["results"]["rows"]:
        assert (row["fault"] or f"nothing, {row['n_prompt']} tokens") in result.output
    assert "PASS" in result.output
    assert "WRONG" not in result.output


def test_faults_are_in_both_engines_in_files_and_outputs_in_both_kinds_of_pass(good: Receipt) -> None:
    rows = [row for row in good["results"]["rows"] if row["fault"]]
    assert {(row["how"], row["side"]) for row in rows} == {
        (how, side) for how in ("file", "output") for side in ("candidate", "reference")
    }
    assert {row["found"]["pass_kind"] for row in rows} == {"prefill", "decode"}
    assert {row["found"]["layer"] for row in rows} == {None, 0, 1}


def test_an_audit_that_sees_nothing_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seeing = examine.audit

    def blind(*arguments: Any, **more: Any) -> Any:
        return [replace(one, checks=(), first_guilty=None, verdict="clean") for one in seeing(*arguments, **more)]

    monkeypatch.setattr(examine, "audit", blind)
    result = run.run(bench)
    assert result.verdict == "fail"
    assert {row.ok for row in result.rows if row.case.fault} == {False}
    assert all(row.ok for row in result.rows if not row.case.fault)


def test_an_audit_that_blames_everyone_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seeing = examine.audit

    def severe(*arguments: Any, **more: Any) -> Any:
        blamed = []
        for one in seeing(*arguments, **more):
            first = one.first_guilty or replace(one.checks[0], status="guilty")
            blamed.append(replace(one, first_guilty=first, verdict="guilty"))
        return blamed

    monkeypatch.setattr(examine, "audit", severe)
    cases = catalogue.cases(bench.model.facts["shape"])
    result = run.run(bench, [cases[0], cases[-1]])
    assert [row.ok for row in result.rows] == [False, False]
    assert result.verdict == "fail"


def test_anything_else_than_expected_is_not_ok(bench: Bench) -> None:
    case = next(case for case in catalogue.cases(bench.model.facts["shape"]) if case.fault == "file-scale-one")
    right = run.run(bench, [case]).rows[0]
    assert right.ok
    for changes in (
        {"name": "undetermined"},
        {"layer": 1},
        {"op": "q"},
        {"pass_kind": "decode"},
        {"verdict": "both_differ"},
        {"op": None, "name": None},
    ):
        assert not Row(case, replace(right.found, **changes)).ok, changes


def rows_of(made: Receipt) -> list[dict[str, Any]]:
    return made["results"]["rows"]


def fault_row(made: Receipt, name: str = "file-scale-one") -> dict[str, Any]:
    return next(row for row in rows_of(made) if row["fault"] == name)


def miss(made: Receipt) -> None:
    """Report a fault in another layer, with consistent fields."""
    row = fault_row(made)
    row["found"]["layer"], row["ok"] = 1, False
    made["results"]["summary"]["faults"]["ok"] -= 1
    made["verdict"] = made["parity"]["status"] = "fail"


def expect_what_was_found(made: Receipt) -> None:
    row = fault_row(made)
    row["found"]["layer"] = row["expected"]["layer"] = 1


def drop_a_row(made: Receipt) -> None:
    rows_of(made).pop()
    made["results"]["summary"]["faults"] = {key: n - 1 for key, n in made["results"]["summary"]["faults"].items()}
    made["coverage"]["compared"] -= 1


def require_less(made: Receipt) -> None:
    drop_a_row(made)
    made["thresholds"]["n_faults"] -= 1
    made["coverage"]["required"] -= 1


EDITS: dict[str, tuple[Callable[[Receipt], Any], set[str]]] = {
    "found elsewhere, still ok": (lambda r: fault_row(r)["found"].update(layer=1), {"row status"}),
    "found under another name, still ok": (lambda r: fault_row(r)["found"].update(name="SiLU"), {"row status"}),
    "missed, still ok": (
        lambda r: fault_row(r)["found"].update(
            verdict="parity", layer=None, op=None, pass_kind=None, name=None, reference_audit="clean"
        ),
        {"row status"},
    ),
    "a verdict that does not follow": (
        lambda r: fault_row(r)["found"].update(reference_audit="clean"), {"row status"}
    ),
    "a finding without a guilty engine": (lambda r: rows_of(r)[0]["found"].update(op="q"), {"row status"}),
    "expected what was found": (expect_what_was_found, {"structure"}),
    "honestly missed": (miss, {"verdict"}),
    "missed, the verdict still pass": (
        lambda r: (miss(r), r.update(verdict="pass")), {"summary", "verdict"}
    ),
    "a row left out": (drop_a_row, {"structure", "summary", "verdict"}),
    "less required": (require_less, {"thresholds", "structure", "summary", "verdict"}),
    "nothing run": (lambda r: rows_of(r).clear(), {"structure", "summary", "verdict", "compared"}),
    "another side": (lambda r: fault_row(r).update(side="candidate"), {"structure"}),
    "another engine": (lambda r: r["candidate"].update(name="other"), {"structure"}),
    "a reference": (lambda r: r["reference"].update(status="live"), {"structure"}),
    "a longer prompt": (lambda r: r["prompt"]["token_ids"].append(1), {"structure"}),
    "no kernel": (lambda r: r["compute"].update(kernels=[]), {"compute path"}),
    "more right than there are": (
        lambda r: r["results"]["summary"]["faults"].update(ok=99), {"summary"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_the_gate_rejects_an_edited_receipt(good: Receipt, name: str) -> None:
    edit, expected = EDITS[name]
    made = copy.deepcopy(good)
    edit(made)
    found = set(failures(receipt.seal(made)))
    assert found >= expected, found


def test_without_a_new_digest_any_edit_is_seen(good: Receipt) -> None:
    made = copy.deepcopy(good)
    fault_row(made)["n_decode"] += 1
    assert "digest" in failures(made)


def test_a_policy_cannot_ask_for_numbers_or_a_live_reference(good: Receipt) -> None:
    assert failures(good, Policy(require_bitwise=True)) == ["bitwise"]
    assert failures(good, Policy(require_live=True)) == ["live reference"]


def test_json_mode_and_exit_1_when_a_fault_is_missed(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nothing_found(bench: Bench, *_: Any, **__: Any) -> SelftestResult:
        shape = bench.model.facts["shape"]
        found = Found("parity", "clean", "clean", "parity")
        return SelftestResult(tuple(Row(case, found) for case in catalogue.cases(shape)), shape)

    monkeypatch.setattr(run, "run", nothing_found)
    path = tmp_path / "receipt.json"
    arguments = ["selftest", "--model", str(model_path), "--receipt", str(path)]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == receipt.read(path)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert "expected weight scale ignored" in result.output


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5, 30])
def test_the_catalogue_depends_on_the_models_shape_alone(n_layers: int) -> None:
    shape = {**SHAPE, "n_layers": n_layers}
    cases = [case for case in catalogue.cases(shape) if case.side]
    assert len({case.fault for case in cases}) == len(cases) >= 20
    assert {case.expected.layer for case in cases} == {None, 0, n_layers // 2, n_layers - 1}
    assert all("{" not in name for case in cases for name in case.expected.names)


def test_a_fault_that_the_model_cannot_have_is_left_out() -> None:
    def names(**changes: Any) -> set[str | None]:
        return {case.fault for case in catalogue.cases({**SHAPE, **changes})}

    assert names() - names(n_layers=1) == {"file-of-another-layer"}
    assert names() - names(head_dim=128) == {"file-transposed"}
    assert names() ^ names(rope_base=10000.0) == {"file-rope-base-10000", "file-rope-base-500000"}
    assert names() - names(rms_eps=1e-6) == {"file-eps-1e-06"}
    assert names(context_length=5) == {None}
    nothing = SelftestResult((), {**SHAPE, "context_length": 1})
    assert nothing.verdict == "fail", "nothing to run is no pass"


def test_an_altered_engine_alters_one_array_in_one_kind_of_pass(model_path: Path) -> None:
    taps = ("blk.0.q", "blk.0.k")
    with BitnetPyRunner(model_path, n_threads=1) as engine:
        plain = [engine.eval([1, 2, 3], taps), engine.eval([4], taps)]
        altered = Altered(engine, "blk.0.q", "decode", alter.one_in_ten_thousand)
        altered.reset()
        records = [altered.eval([1, 2, 3], taps), altered.eval([4], taps)]
        assert set(altered.eval([5], ["blk.0.k"]).taps) == {"blk.0.k"}
    same = [
        before.taps[tap].array.tobytes() == after.taps[tap].array.tobytes()
        for before, after in zip(plain, records, strict=True)
        for tap in taps
    ]
    assert same == [True, True, False, True]
    assert [one.plan for one in records] == [one.plan for one in plain]


def test_the_faults_share_no_code_with_the_variants() -> None:
    for module in (alter, catalogue, run.damage):
        assert module.__file__ is not None
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert "variants" not in text


def test_faults_are_not_injected_into_other_types(make_model, tmp_path: Path) -> None:
    """Bytes of another layout would be another fault than the one that is named, or none."""
    path = make_model(n_layers=1, dim=256, hidden_dim=256, embedding="q6_k", projections="tq2_0")
    model = DamagedModel(Path(shutil.copy(path, tmp_path)))
    for read, name in ((model.f16, "token_embd"), (model.packed, "blk.0.attn_q"), (model.scale, "blk.0.ffn_up")):
        with pytest.raises(BadInputError, match=rf"tensor {name}\.weight: expected .*such as the shipped one"):
            read(f"{name}.weight")
    assert model.f32("output_norm.weight").shape == (256,)
