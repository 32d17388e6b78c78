"""Samples of the zoo's other tables; ``python -m tests.zoo --recordings`` and ``--drawn N`` run all."""

from __future__ import annotations

import pytest

from tests.support.extra import sampled
from tests.support.judged import judge
from tests.support.recordings import BY_NAME, RECORDINGS, answers
from tests.zoo import coarse, coarse_table, drawn
from tests.zoo.build import ROOT
from tests.zoo.catalogue import FAULTS
from tests.zoo.detect import Replay
from tests.zoo.draw import Right, draw
from tests.zoo.fault import TraceFault
from tests.zoo.faults.drawn import FAMILIES
from tests.zoo.unstated import LAYER, unstated_cells
from tests.zoo.world import World, is_about_tokens

N_FAULTS, N_DRAWN, SEED = 4, 14, 3
QUICK = set(coarse.COLUMNS) - {"every third `l_out`", "logits only"}
"""Recordings that are checked quickly."""

QUANTISER = (
    "float activations", "128 levels", "63 levels", "truncation", "floor", "clamp at 126", "per-tensor scale",
    "float row sum",
)  # fmt: skip
HIDDEN = [
    (kept, layer, name)
    for kept, layers, names in (
        ("every `l_out`", (None,), ("float activations", "F16 RoPE tables")),
        ("every `l_out`", (LAYER,), (*QUANTISER, "LayerNorm", "another norm's weight", "mask sees the next token",
                                     "KQ scale x sqrt 2")),
        ("no norms", (None,), ("float activations", "128 levels", "truncation", "float row sum", "eps x 10",
                               "V 19 % wrong")),
        ("no scores", (None, LAYER), ("KQ scale x 1.05", "KQ scale x sqrt 2", "bf16 KV")),
    )
    for layer in layers
    for name in names
]  # fmt: skip
"""Recording, layer (None: all), and a bug of an engine that does not state how it rounds."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("zoo"))


def test_no_recording_of_a_broken_engine_is_parity(world):
    cases = [case for case in coarse.first_places() if not is_about_tokens(case)]
    cells = list(coarse.cells(world, cases[:: len(cases) // N_FAULTS], QUICK))
    assert {cell.recording for cell in cells} == QUICK
    assert [cell for cell in cells if cell.place in coarse.WRONG] == []
    in_traces = {fault.name for fault in FAULTS if isinstance(fault, TraceFault)}
    whole = [cell for cell in cells if cell.recording == "all taps"]
    assert {cell.place for cell in whole if cell.fault not in in_traces} == {"found"}
    assert {cell.place for cell in whole if cell.fault in in_traces} <= {"found", "recording"}


@pytest.mark.parametrize(("kept", "layer", "name"), sampled(HIDDEN, 2, lambda case: case[:2]))
def test_a_mistake_that_once_got_parity_is_found(kept, layer, name):
    """With a tolerance for flipped codes, segments of several operations let these pass.

    A sample: whole layers that are all wrong take long. ``python -m tests.zoo --recordings`` has the others, and
    more decoded tokens.
    """
    (cell,) = unstated_cells([name], {kept}, [layer], n_decode=1)
    everywhere = name == "float activations" and layer is None  # then it is how the engine computes: not unsaid
    assert (cell.place, cell.verdict) == ("found", "deviates" if everywhere else "candidate_defect"), cell


def test_verdict_and_place_do_not_depend_on_the_diagnosis(world):
    case = next(case for case in coarse.first_places() if case.fault.name == "file-read-sequentially")
    runners = [Replay(world.faulty(case)), Replay(world.healthy("plain"))]
    plans = runners[0].plan
    told, silent = (
        judge(
            *runners, plans[0].token_ids, world.model("plain"),
            n_decode=len(plans) - 1, diagnosed=diagnosed,
        )
        for diagnosed in (True, False)
    )  # fmt: skip
    assert told.found.findings
    assert not silent.found.findings
    assert (told.verdict, told.exit_code, told.guilty) == (silent.verdict, silent.exit_code, silent.guilty)
    assert told.verdict == "candidate_defect"


def test_documentation_has_every_fault_by_recording():
    text = (ROOT / "docs" / "recordings.md").read_text()
    told = [fault.name for fault in FAULTS if not all(map(is_about_tokens, fault.cases()))]
    assert [name for name in told if f"| `{name}` |" not in text] == [], "python -m tests.zoo --recordings"
    assert f"| {' | '.join(coarse.COLUMNS)} |" in text
    parity = next(line for line in text.splitlines() if line.startswith("| parity:"))
    assert parity.endswith("|" + " 0 |" * len(coarse.COLUMNS))
    assert all(kept.name in coarse_table.HOLDS for kept in RECORDINGS)


def test_drawn_faults_are_found_in_their_places_and_not_misnamed(tmp_path):
    results = list(drawn.outcomes(N_DRAWN, SEED, tmp_path, first=SEED * N_DRAWN))
    assert len({one.fault.family for one in results}) == N_DRAWN
    bad = [one for one in results if not (one.side and one.op)]
    assert bad == []
    assert [f"{one.fault.id}: {one.said}" for one in results if one.naming == "wrong"] == []


def test_a_drawn_fault_is_the_same_every_time():
    for number in range(len(FAMILIES)):
        one, again = draw(5, number), draw(5, number)
        assert one.id == again.id
        assert one.prompt == again.prompt
    assert len({draw(seed, 0).id for seed in range(20)}) > 10


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ("code table -2, -1, 0: twice", True),
        ("code table -2, -1, +1", False),
        ("table of codes -2, -1, 0", False),
        ("code table -2.0, -1, 0", True),
        ("code table -21, -1, 0", False),
    ],
)
def test_a_name_is_right_with_its_words_and_numbers(said, fits):
    assert Right(("code table",), ((-2, -1, 0),)).fits(said) == fits


def test_a_mistake_can_show_at_what_reads_it(world):
    config = world.weights("plain").config
    keeps = BY_NAME["no norms"].keeps
    assert answers(config, "blk.1.attn_norm", keeps) == {f"blk.1.{name}" for name in "qkv"}
    assert answers(config, "blk.1.v", BY_NAME["every third `l_out`"].keeps) == {"blk.2.l_out"}
    assert answers(config, "blk.1.v", BY_NAME["all taps"].keeps) == {"blk.1.v"}
    assert answers(config, "blk.3.kq", BY_NAME["every third `l_out`"].keeps) == {"result_norm"}


def test_a_scale_that_the_sub_norm_takes_away_leaves_no_trace(world):
    """The recording of every l_out equals the correct engine's; with another bug of that matrix it does not."""
    healthy = world.healthy("plain")
    for name, hidden in (("file-scale-one", True), ("file-read-sequentially", False)):
        faulty = world.faulty(next(case for case in coarse.first_places() if case.fault.name == name))
        assert coarse.leaves_no_trace(healthy, faulty, BY_NAME["every `l_out`"].keeps) == hidden
        assert not coarse.leaves_no_trace(healthy, faulty, BY_NAME["all taps"].keeps)
