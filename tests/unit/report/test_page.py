"""The page of a receipt says what the receipt says, by itself, and to everybody."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

import crossval
from crossval.audit import summary
from crossval.errors import BadInputError, UnavailableError
from crossval.receipts.file import Receipt
from crossval.report import figure, operations, page, steps
from crossval.report.figure import SVG, Figure, render
from crossval.report.heat import heat_map
from crossval.report.states import STATES

ROOT = Path(__file__).parents[3]
DEFECT = ROOT / "receipts/main/layers-shipped-main-defect.json"
PARITY = ROOT / "receipts/layers-shipped.json"
GREEDY = ROOT / "receipts/greedy-shipped-zen5.json"
BENCH = ROOT / "receipts/bench-shipped.json"
KINDS = (
    DEFECT,
    PARITY,
    GREEDY,
    BENCH,
    ROOT / "receipts/selftest.json",
    ROOT / "receipts/metamorphic-shipped.json",
)
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "page.html"
    crossval.write_report(KINDS, path)
    return path


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def visible(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)))


def test_a_page_needs_nothing_but_itself(html: str) -> None:
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|\son[a-z]+=", html)
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= {SVG, "http://www.w3.org/1999/xlink"}


def test_the_largest_committed_receipt_makes_less_than_a_megabyte(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    crossval.write_report([ROOT / "receipts/layers-2b-4t-shape.json"], path)
    assert path.stat().st_size < page.MAX_BYTES


def test_verdict_cause_worst_value_and_command_are_there(html: str) -> None:
    text = visible(html)
    assert "REFERENCE_DEFECT bitnet_py against bitnet.cpp (live): 53 of 53 comparisons" in text
    assert "The reference is wrong: the candidate does what the model defines." in text
    assert "reference bitnet.cpp: layer 0, ops ffn_act to ffn_out (pass 0, prefill)" in text
    assert "SiLU instead of squared ReLU" in text
    assert "recorded 145.297531, expected -0" in text
    assert "crossval layers --prompt &#39;What is 2+2?&#39;" in text
    assert "Do not change the candidate." in text


def test_every_kind_is_shown_with_what_the_terminal_prints(html: str) -> None:
    assert html.count("<section") == len(KINDS)
    assert html.count("Everything the command printed") == len(KINDS)
    assert "healthy" in visible(html)  # the self-test, which has no figure


def test_every_place_that_scrolls_is_reached_by_keyboard_and_has_a_name(html: str) -> None:
    regions = re.findall(r"<div class=\"scroll\"[^>]*>", html)
    figures = [region for region in regions if "role=" in region]
    assert figures
    assert all('tabindex="0"' in region and "aria-label=" in region for region in figures)


def test_text_of_a_receipt_is_never_markup(tmp_path: Path) -> None:
    receipt = Receipt(copy.deepcopy(dict(crossval.open_receipt(DEFECT))))
    bad = "<script>alert(1)</script>"
    receipt["prompt"]["text"] = receipt["candidate"]["name"] = receipt["diagnosis"][0]["command"] = bad
    receipt["notes"] = [bad]
    made = page.make_page([(bad, receipt, bad)])
    assert "<script" not in made
    assert made.count("&lt;script&gt;") >= 6


def test_a_missing_renderer_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    figure._renderer.cache_clear()
    try:
        with pytest.raises(UnavailableError, match=r"pip install 'bitnet-parity\[report\]'"):
            crossval.write_report([PARITY], tmp_path / "page.html")
    finally:
        figure._renderer.cache_clear()
    assert not list(tmp_path.iterdir())


def test_no_receipt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no receipt in"):
        crossval.write_report([tmp_path], tmp_path / "page.html")


def cells(drawn: Figure) -> list[dict[str, str]]:
    values: list[dict[str, str]] = drawn.spec["data"]["values"]
    return values


def test_every_audited_operation_is_a_cell_of_its_state() -> None:
    receipt = crossval.open_receipt(DEFECT)
    drawn = list(operations.audited_figures(receipt))
    assert len(drawn) == 4
    for side, figures in (("candidate", drawn[:2]), ("reference", drawn[2:])):
        rows = [summary.row_from_json(row) for row in receipt["audit"][side]["rows"]]
        by_place = {(cell["row"], cell["column"]): cell["state"] for cell in cells(figures[1])}
        assert len(by_place) == len(rows)
        for row in rows:
            layer, _, name = row.tap.removeprefix("blk.").rpartition(".")
            state = by_place[layer or "model", name]
            wrong = summary.status_of(row) == "guilty"
            assert (state == "beyond its bound") == wrong
            assert (state == "exact") == (row.ratio == 0 and not wrong)
        points = cells(figures[0])
        assert sum(point["ratio"] > 1 for point in points) == sum(
            row.ratio is None or row.ratio > 1 for row in rows
        )  # type: ignore[operator]


def test_every_step_is_a_cell_and_another_token_a_cross() -> None:
    receipt = Receipt(copy.deepcopy(dict(crossval.open_receipt(GREEDY))))
    step = receipt["results"]["prompts"][3]["steps"][5]
    step["candidate_token"] = step["reference_token"] + 1
    step["near_tie"] = False
    timeline = cells(next(iter(steps.greedy_figures(receipt))))
    assert len(timeline) == 320
    crosses = [(cell["row"], cell["column"]) for cell in timeline if cell["sign"] == "✗"]
    assert crosses == [("3", "5")]


def test_marks_say_their_values_and_states_differ_in_more_than_colour() -> None:
    shown = [
        {"column": str(at), "row": "0", "state": state, "says": f"cell {at}"} for at, state in enumerate(STATES)
    ]
    svg = ElementTree.fromstring(
        render(Figure("All states.", heat_map(shown, [c["column"] for c in shown], ["0"])))
    )
    titles = {title.text for title in svg.iter(f"{{{SVG}}}title")}
    assert {cell["says"] for cell in shown} <= titles
    texts = {text.text for text in svg.iter(f"{{{SVG}}}text")}
    signs = [sign for _, sign in STATES.values()]
    assert {sign for sign in signs if sign} <= texts
    assert len(set(signs[1:])) == len(signs[1:])  # "exact" and "within its bound" are both good
    assert svg.get("aria-label") == "All states."


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_the_page_without_complaint(written: Path, tmp_path: Path) -> None:
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", written.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert "REFERENCE_DEFECT" in done.stdout
    assert done.stdout.count("<svg") == written.read_text(encoding="utf-8").count("<svg")
