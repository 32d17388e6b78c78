from __future__ import annotations

import dataclasses
import io
import json

import pytest

from crossval.cli.doctor import show_parts
from crossval.compare.rows import Skip
from crossval.console import PLAIN_WIDTH, console
from crossval.engines.doctor import PartCheck
from crossval.examine.greedy_receipt import GREEDY
from crossval.passes import PassPlan
from crossval.receipts import file as receipt
from crossval.receipts.kind import build_unavailable
from crossval.receipts.party import Party
from crossval.receipts.policy import GateCheck
from crossval.receipts.show import show_checks
from crossval.registry import show_receipt
from tests.support import receipt_samples as samples


def shown(made: receipt.Receipt) -> str:
    out = io.StringIO()
    show_receipt(console(out), made)
    return out.getvalue()


def cells(text: str, first: str) -> list[str]:
    """Return the words of the table line that starts with ``first``."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(first + "  ")]
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


def test_equal_bits_are_one_sign() -> None:
    text = shown(samples.layers_receipt())
    for tap in ("inp_embd", "layer 0", "layer 1", "result_norm", "result_output"):
        assert cells(text, tap) == [tap, "=", "=", "="]
    assert "PARITY  bitnet_py against bitnet.cpp (live): 15 of 15 comparisons, all bits equal" in text
    assert "first" not in text
    assert "Operations" not in text


def test_what_differs_shows_its_size_and_its_floors() -> None:
    made = samples.layers_receipt({(0, "blk.1.l_out"): 1e-3})
    row = made["results"]["rows"][2]
    text = shown(made)
    assert cells(text, "layer 1")[1] == f"{row['nmse']:.1e} ({(row['nmse'] / row['floor']) ** 0.5:.2g}x)"
    assert "95.27 % of the values bit-equal" in text
    place = f"layer 1, ops attn_norm to l_out (pass 0, prefill, worst at position {row['worst_token']})"
    assert f"first inexact bits: {place}" in text
    assert "first divergence" not in text


def test_a_difference_of_a_few_ulp_is_given_in_ulp() -> None:
    made = samples.build(samples.layers_result({(0, "blk.1.l_out"): 2.0**-22}))
    row = next(row for row in made["results"]["rows"] if row["tap"] == "blk.1.l_out" and not row["pass_index"])
    assert 0 < row["max_ulp"] <= 8
    line = next(line for line in shown(made).splitlines() if line.strip().startswith("layer 1"))
    assert f"{row['max_ulp']} ulp" in line


def test_a_divergence_shows_the_layers_operations() -> None:
    text = shown(samples.layers_receipt({(1, "blk.0.ffn_down"): 0.9, (1, "blk.0.l_out"): 0.9}))
    assert text.count("Operations of layer 0 in pass 1 (decode).") == 1
    assert cells(text, "ffn_down")[1] == "diverged"
    assert "DIVERGENCE" in text
    assert (
        "first divergence: layer 0, ops attn_norm to ffn_down (pass 1, decode, worst at position 3): cosine"
        in text
    )


def test_nothing_that_was_not_compared_looks_compared() -> None:
    skip = Skip(2, "blk.1.l_out", "the candidate did not give it")
    made = samples.build(samples.layers_result(skipped=(skip,)), samples.context())
    text = shown(made)
    assert cells(text, "layer 1") == ["layer 1", "=", "=", "skipped"]
    assert "INCOMPLETE  bitnet_py against bitnet.cpp (live): 14 of 15 comparisons" in text
    assert "not compared: pass 2 blk.1.l_out: the candidate did not give it" in text


def test_invalid_rows_are_called_so() -> None:
    result = samples.layers_result()
    broken = dataclasses.replace(result.rows[1], nmse=None, max_abs=None, cosine=None, note="candidate: 3 NaN")
    made = samples.build(
        dataclasses.replace(result, rows=(result.rows[0], broken, *result.rows[2:])), samples.context()
    )
    text = shown(made)
    assert cells(text, "layer 0")[1] == "invalid"
    assert "candidate: 3 NaN" in text


def test_many_decoded_tokens_share_a_column_that_shows_the_worst() -> None:
    plan = (samples.PLAN[0], *(PassPlan("decode", (7,), 3 + index) for index in range(9)))
    errors = {(4, "blk.1.l_out"): 1e-3, (8, "blk.1.l_out"): 1e-2}
    made = samples.build(samples.layers_result(errors, plan=plan), samples.context())
    worst = next(row for row in made["results"]["rows"] if (row["pass_index"], row["tap"]) == (8, "blk.1.l_out"))
    text = shown(made)
    assert "9 more, worst" in text
    assert cells(text, "layer 0") == ["layer 0", "=", "="]
    assert cells(text, "layer 1")[2].startswith(f"{worst['nmse']:.1e} ")


def test_greedy() -> None:
    text = shown(samples.greedy_receipt())
    assert cells(text, "0")[2:] == ["3/3", "100 %", "-", "=", "0.5"]
    assert "100 % of the tokens equal" in text
    text = shown(samples.greedy_receipt(differs_at=1))
    assert "2/3" in text
    assert "step 1: 99 for 51, near tie" in text
    assert "first divergence: prompt 0, step 1: candidate 99, reference 51: close" in text


def test_a_share_below_one_never_shows_as_all() -> None:
    made = samples.layers_receipt({(0, "blk.1.l_out"): 1e-3})
    made["parity"]["exact_match_rate"] = 0.9999999
    assert "99.99 % of the values bit-equal" in shown(made)


def test_notes_are_shown() -> None:
    assert "note: output.weight is ignored" in shown(samples.layers_receipt(notes=("output.weight is ignored",)))


def test_a_receipt_without_reference_can_be_shown() -> None:
    nobody = Party("unavailable", samples.THEIRS, note="not built")
    made = build_unavailable(GREEDY, samples.context(reference=nobody))
    text = shown(made)
    assert "INCOMPLETE" in text
    assert "not built" in text


def test_plain_text_without_a_terminal() -> None:
    text = shown(samples.layers_receipt({(0, "blk.1.l_out"): 0.9}))
    assert "\x1b" not in text
    tables = [
        line
        for line in text.splitlines()
        if not line.startswith(("first", "DIVERGENCE", "candidate", "reference"))
    ]
    assert max(map(len, tables)) <= PLAIN_WIDTH


def test_text_from_outside_cannot_drive_the_terminal() -> None:
    hostile = "x\x1b[2J\x07\r\u202e[bold red]y[/]"
    engine = dataclasses.replace(samples.THEIRS, compiler=hostile)
    made = samples.layers_receipt(text=hostile, notes=(hostile,), reference=Party("live", engine))
    text = shown(made)
    assert not set("\x1b\x07\r\u202e") & set(text)
    assert "note: x\\x1b[2J\\x07\\r\\u202e[bold red]y[/]" in text


def test_an_ascii_stream_gets_replacements_instead_of_an_error() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    show_receipt(console(stream), samples.layers_receipt(text="né"))
    stream.flush()
    assert b"n?" in raw.getvalue()


@pytest.mark.parametrize(("passed", "word"), [(True, "PASS"), (False, "FAIL")])
def test_checks(passed: bool, word: str) -> None:
    out = io.StringIO()
    show_checks(console(out), "r.json", [GateCheck("digest", passed, "detail\x1b")], passed)
    assert f"{word}  r.json" in out.getvalue()
    assert cells(out.getvalue(), "digest")[1:] == ["pass" if passed else "FAIL", "detail\\x1b"]


def test_findings_end_with_what_to_do() -> None:
    out = io.StringIO()
    findings = [
        PartCheck("a", True, "1.0"),
        PartCheck("b", False, "none", "do this"),
        PartCheck("c", False, "none", "", False),
    ]
    show_parts(console(out), findings)
    text = out.getvalue()
    assert cells(text, "a")[1] == "ok"
    assert cells(text, "b")[1] == "MISSING"
    assert cells(text, "c")[1] == "missing"
    assert text.rstrip().endswith("b: do this")


def test_receipts_read_from_a_file_show_the_same() -> None:
    made = samples.layers_receipt({(0, "blk.1.l_out"): 1e-3})
    assert shown(json.loads(receipt.to_text(made))) == shown(made)
