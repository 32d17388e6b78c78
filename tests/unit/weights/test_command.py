"""``crossval weights`` and its receipts: exit codes, JSON, what the gate accepts, and errors in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_py import cli as bitnet_cli
from bitnet_py.layout_evidence import established, means
from bitnet_py.layouts import LAYOUTS
from bitnet_py.quantize import quantize
from bitnet_py.quants import pack_codes
from crossval.cli import cli
from crossval.receipts import file as receipt
from crossval.weights.judge import UNDETERMINED, findings, verdict
from crossval.weights.readings import Stored, Targets, find_matches
from crossval.weights.rows import KeyRow, Match
from crossval.weights.scales import Scale, explain, summation_error
from tests.support.checkpoints import Small
from tests.support.edited_gguf import EditedGGUF
from tests.support.weights_samples import ROWS, weights_receipt, weights_result

SHIPPED = Path(__file__).resolve().parents[3] / "models" / "bitnet-qa.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Small(n_layers=1, dim=128, hidden=128).write(tmp_path_factory.mktemp("checkpoint"))
    quantize(folder, folder / "m.gguf")
    return folder


@pytest.fixture
def inverted(folder: Path, tmp_path: Path) -> Path:
    file = EditedGGUF(Path(shutil.copy(folder / "m.gguf", tmp_path / "inverted.gguf")))
    for name in file.matrices():
        file.scale(name)[:] = 1 / file.scale(name)
    return file.save()


def run(*args: object) -> Any:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_a_file_that_is_right(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    result = run("weights", folder / "m.gguf", "--against", folder, "--receipt", out)
    assert result.exit_code == 0, result.output
    assert "PASS" in result.output
    assert run("gate", out).exit_code == 0
    made = receipt.read(out)
    assert (made["kind"], made["compute"]["path"], made["candidate"]["status"]) == ("weights", "none", "unused")
    for options in (["--min-tokens", "2"], ["--min-exact-match", "1", "--require-live"]):
        assert run("gate", out, *options).exit_code == 1
    assert run("gate", out, "--min-exact-match", "1").exit_code == 0


def test_a_file_that_is_wrong(folder: Path, inverted: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    result = run("weights", inverted, "--against", folder, "--receipt", out, "--json")
    assert result.exit_code == 1
    made = json.loads(result.stdout)
    assert {one["cause"] for one in made["results"]["findings"]} == {"inverted"}
    assert made == receipt.read(out)
    gated = run("gate", out)
    assert gated.exit_code == 1
    assert "fail (recomputed)" in gated.stdout
    shown = run("weights", inverted, "--against", folder).stdout
    assert "inverted" in shown
    assert "7 findings, 7 with an established cause" in shown


def test_nothing_compared_is_no_pass(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert run("weights", folder / "m.gguf", "--receipt", out).exit_code == 3
    gated = run("gate", out)
    assert gated.exit_code == 1
    assert "incomplete (recomputed)" in gated.stdout


def test_a_tokenizer_that_is_not_read_is_no_pass(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    result = run("weights", folder / "m.gguf", "--against", tmp_path / "c")
    assert result.exit_code == 3
    assert "not compared: tokenizer" in result.stdout


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("nothing.gguf",), 4),
        ((SHIPPED, "--against", "nothing"), 4),
        ((SHIPPED, "--against", SHIPPED.parent), 4),
        ((), 2),
    ],
)
def test_unusable_input_is_one_line(args: tuple[object, ...], code: int) -> None:
    result = run("weights", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
    if code == 4:
        assert len(result.stderr.splitlines()) == 1


def test_another_models_checkpoint(folder: Path) -> None:
    result = run("weights", SHIPPED, "--against", folder)
    assert result.exit_code == 1
    assert "block_count: 4, the checkpoint says 1" in result.stdout


def test_inspect_deep(tmp_path: Path) -> None:
    result = CliRunner().invoke(bitnet_cli.main, ["inspect", "--model", str(SHIPPED), "--deep", "--json"])
    assert result.exit_code == 0
    deep = json.loads(result.stdout)["deep"]
    assert deep["layout"] == "i2_s"
    by_name = {one["name"]: one for one in deep["tensors"]}
    file = EditedGGUF(Path(shutil.copy(SHIPPED, tmp_path / "m.gguf")))
    name = "blk.1.ffn_up.weight"
    counts = np.bincount(file.codes(name).reshape(-1), minlength=4)
    assert by_name[name]["histogram"] == counts.tolist()
    assert by_name[name]["scale"] == file.scale(name)[0]
    norm = file.norm("output_norm.weight")
    shown = by_name["output_norm.weight"]["values"]
    assert (shown["min"], shown["max"], shown["n_invalid"]) == (norm.min(), norm.max(), 0)
    assert shown["rms"] == pytest.approx(float(np.sqrt((norm.astype(np.float64) ** 2).mean())), rel=1e-12)
    text = CliRunner().invoke(bitnet_cli.main, ["inspect", "--model", str(SHIPPED), "--deep"]).stdout
    assert "layout of the codes: i2_s by the file alone" in text


def test_verdict_of_rows() -> None:
    assert verdict(weights_result()) == "pass"
    assert verdict(weights_result(files=())) == "incomplete"
    assert verdict(weights_result(rows=(), keys=())) == "incomplete"
    assert verdict(weights_result(not_compared=("the tokenizer",))) == "incomplete"
    assert verdict(weights_result(keys=(KeyRow("a", 1, 1.0),))) == "fail"
    assert verdict(weights_result(keys=(KeyRow("a", 1, 2, "note"),))) == "pass"


def replaced(**changes: Any) -> Any:
    return weights_result(rows=(*ROWS[:2], dataclasses.replace(ROWS[2], **changes)))


def test_a_cause_is_named_only_when_one_reading_explains_everything() -> None:
    compared = ROWS[2].compared
    assert compared is not None
    first, second = Match(ROWS[2].name, ("sequential",)), Match(ROWS[2].name, ("transposed",))
    for matches, cause in (((first,), "sequential"), ((), UNDETERMINED), ((first, second), UNDETERMINED)):
        wrong = dataclasses.replace(compared, n_different=9, matches=matches)
        (found,) = [one for one in findings(replaced(compared=wrong)) if one.level == "wrong"]
        assert (found.aspect, found.cause) == ("codes", cause)


def test_a_tensor_that_was_skipped_or_is_missing() -> None:
    assert verdict(replaced(compared=None, skipped="type Q6_K")) == "incomplete"
    assert [one.cause for one in findings(replaced(facts=None, compared=None)) if one.level == "wrong"] == [
        "missing"
    ]
    (found,) = [one for one in findings(replaced(expected=None, compared=None)) if one.level == "wrong"]
    assert found.cause == "not in the checkpoint"


def test_a_scale_with_two_explanations_has_no_name() -> None:
    scale = Scale(1.0, 1.5, 1000, "uint8", "I2_S")
    assert explain(scale, {}) == ["one"]
    assert explain(scale, {"other": 1.0}) == ["one"], "of a coarse value a coincidence is likely"
    one = Scale(1.0, 1.0, 1000, "float32", "I2_S")
    assert explain(one, {}) is None, "an absmean of 1 is right, not inverted"
    fine = float(np.float32(0.3))
    assert explain(Scale(fine, 0.7, 1000, "float32", "I2_S"), {"a": fine, "b": fine}) == ["of a", "of b"]
    assert explain(Scale(fine, 0.7, 1000, "float32", "I2_S"), {"a": fine, "b": 0.9}) == ["of a"]


def test_the_tolerance_of_a_scale_is_the_error_of_a_sum() -> None:
    rng = np.random.default_rng(0)
    for n in (128, 4096, 1 << 18):
        values = np.abs(rng.standard_normal(n)).astype(np.float32)
        exact = values.astype(np.float64).mean()
        assert abs(float(values.mean(dtype=np.float32)) / exact - 1) <= summation_error(n)
    bound = summation_error(4096)
    for factor, right in ((1 + 0.9 * bound, True), (1 + 1.5 * bound, False), (1 - 1.5 * bound, False)):
        assert (explain(Scale(0.3 * factor, 0.3, 4096, "float32", "I2_S"), {}) is None) is right


def test_a_layout_is_established_by_a_margin() -> None:
    assert established([]) is None
    assert means([{"i2_s": 2.0, "sequential": 0.0}, {"i2_s": 4.0, "sequential": 1.0}]) == {
        "i2_s": 10.0,
        "sequential": 0.5,
    }
    assert established([{"i2_s": 6.4, "sequential": 1.0}]) == "i2_s"
    assert established([{"i2_s": 6.3, "sequential": 1.0}]) is None
    assert established([{"i2_s": 9.0, "sequential": 6.0}]) == "i2_s"
    assert established([{"i2_s": 9.0, "sequential": 6.5}]) is None


@pytest.mark.parametrize(
    ("path", "value", "check"),
    [
        (("verdict",), "fail", "summary"),
        (("results", "findings"), [], "summary"),
        (("results", "rows", 2, "facts", "scale"), 4.0, "summary"),
        (("results", "rows", 2, "facts", "histogram"), [5000, 6384, 5001, 0], "tensors"),
        (("results", "rows", 0, "compared", "n_different"), 1, "summary"),
        (("results", "keys", 1, "found"), 3, "structure"),
        (("candidate", "status"), "live", "structure"),
        (("thresholds", "max_chance"), 1.0, "thresholds"),
    ],
)
def test_what_is_false_in_a_receipt_fails(
    tmp_path: Path, path: tuple[Any, ...], value: object, check: str
) -> None:
    made = json.loads(json.dumps(weights_receipt()))
    part = made
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    made["digest"] = receipt.digest(made)
    (tmp_path / "r.json").write_text(json.dumps(made))
    gated = run("gate", "--json", tmp_path / "r.json")
    checks = json.loads(gated.stdout)["receipts"][0]["checks"]
    failed = [one["name"] for one in checks if not one["passed"]]
    assert gated.exit_code == 1
    assert check in failed


def test_being_another_matrix_is_a_deviation_like_any_other() -> None:
    """One reading gives the matrix itself, the same number of deviations and another name are one more."""
    codes = np.random.default_rng(0).integers(0, 3, (128, 128)).astype(np.uint8)
    stored = Stored("a", codes.shape, codes.shape, pack_codes(codes), codes, None, False)
    targets = Targets()
    targets.add("a", 2 - codes)
    targets.add("b", LAYOUTS["sequential"].unpack(pack_codes(codes), 128, 128))
    assert find_matches(stored, targets) == (Match("a", ("signs flipped",)),)
    targets.add("c", codes)
    assert find_matches(stored, targets) == (Match("a", ("signs flipped",)), Match("c", ()))
    only_b = Targets({"b": targets.known["b"]})
    assert find_matches(stored, only_b) == (Match("b", ("sequential",)),)
