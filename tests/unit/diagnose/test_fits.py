"""Fitted mistakes: whatever the parameter, the correct name or none; equal explanations are reported together."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from crossval.diagnose.diagnosis import UNDETERMINED
from crossval.diagnose.search import diagnose, diagnose_passes
from crossval.diagnose.variants import fitted, of_records
from crossval.engines.spec import SpecRunner
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from crossval.passes import PassRecord, TapArray
from tests.support import drawn

PASSES = ((5, 95, 41, 299, 23, 63, 140, 250, 77), (181,), (33, 201, 0, 111, 250, 33, 58), (92,), (4,))
DRAWS = 8


class Scenes:
    """A healthy recording, in which one output at a time is replaced."""

    def __init__(self, path):
        self.weights = SpecWeights(path)
        self.table = {op.output: op for op in op_table(self.weights.config)}
        with SpecRunner(path) as runner:
            self.records = [runner.eval(tokens, list(self.table)) for tokens in PASSES]

    def scene(self, op, layer, index):
        return drawn.Scene(op, layer, self.records, index, self.weights)

    def name(self, op, layer):
        return op if layer is None else f"blk.{layer}.{op}"

    def contexts(self, name, outputs):
        """The operation in the passes of ``outputs`` (by index), which hold these."""
        records = list(self.records)
        for index, output in outputs.items():
            old = records[index].taps[name]
            array = output[-old.array.shape[0] :].astype(np.float32).reshape(old.array.shape)
            records[index] = PassRecord(
                records[index].plan, {**records[index].taps, name: TapArray(array, old.rows)}
            )
        of = lambda i: of_records(self.table[name], records, self.weights.config, self.weights, index=i)  # noqa: E731
        return [of(index) for index in outputs]


@pytest.fixture(scope="module")
def scenes(make_model):
    return Scenes(make_model(n_layers=3, dim=128, n_heads=4, n_kv_heads=2, hidden_dim=256))


def place(rng, ops):
    op = str(rng.choice(ops))
    layer = None if op in ("inp_embd", "result_norm", "result_output") else int(rng.integers(3))
    return op, layer, int(rng.integers(3))


def as_float32(rng, mistake, op, output):
    """Add the noise of float32 arithmetic where there is arithmetic."""
    copied = op == "inp_embd" or mistake is drawn.another_layer
    return output if copied else output * (1 + 1e-7 * rng.normal(size=output.shape))


def diagnosed(scenes, mistake, seed):
    """Draw place and parameter; return what was drawn, the diagnosis and where, or None where nothing changes."""
    rng = np.random.default_rng([seed, *map(ord, mistake.__name__)])
    op, layer, index = place(rng, drawn.MISTAKES[mistake])
    if op.startswith("result") and mistake is drawn.token_order:
        return None
    with np.errstate(all="ignore"):
        one = mistake(rng, scenes.scene(op, layer, index))
    if one is None:
        return None
    (context,) = scenes.contexts(scenes.name(op, layer), {index: as_float32(rng, mistake, op, one.recorded)})
    return one, diagnose(context), f"{mistake.__name__} in {scenes.name(op, layer)} of pass {index}"


ONE_TOKEN = (drawn.sinks, drawn.norm_part, drawn.norm_eps, drawn.norm_root)
"""Of one token, these have as many unknowns as recorded values: nothing to name."""
LEAST = 0.93


class TestDrawnMistakes:
    def test_names_are_right_or_left_open(self, scenes):
        counts = Counter()
        for mistake in drawn.MISTAKES:
            if mistake is drawn.missing_shard:  # shows in all passes at once; below
                continue
            cases = [case for seed in range(DRAWS) if (case := diagnosed(scenes, mistake, seed))]
            assert cases, mistake.__name__
            for one, found, where in cases:
                if found.determined:
                    assert one.is_named(found.name), f"{where}: {one.words}{one.numbers} was called {found.name}"
            named = sum(found.determined for _, found, _ in cases)
            if mistake not in ONE_TOKEN:
                counts.update(named=named, drawn=len(cases))
            assert named, f"{mistake.__name__} was never named"
        assert counts["named"] >= LEAST * counts["drawn"], counts


class TestSeveralPasses:
    def test_decoded_tokens_together_tell_an_offset_from_a_scale(self, scenes):
        outputs = {}
        for index in (1, 3, 4):
            scene = scenes.scene("q_rope", 1, index)
            outputs[index] = drawn._rope(scene, scene.positions + 5)
        contexts = scenes.contexts("blk.1.q_rope", outputs)
        assert diagnose(contexts[0]).name == "other positions"
        assert diagnose_passes(contexts).name == "position +5"

    def test_decoded_tokens_together_tell_eps_from_a_factor(self, scenes):
        outputs = {}
        for index in (1, 3, 4):
            scene = scenes.scene("ffn_norm", 1, index)
            outputs[index] = drawn._normed(scene.tap("ffn_inp"), scene.norm_weight, 0.25)
        assert diagnose_passes(scenes.contexts("blk.1.ffn_norm", outputs)).name == "eps 0.25"
        (alone,) = scenes.contexts("blk.1.ffn_norm", {3: outputs[3]})
        assert diagnose(alone).name == UNDETERMINED


class TestEmbeddingRowsOfZeros:
    def zeroed(self, scenes, gone):
        """Every pass with rows of zeros where ``gone(ids, position in pass)``."""
        table = scenes.weights["token_embd.weight"]
        outputs = {}
        for index, ids in enumerate(PASSES):
            flags = np.array([gone(token, place) for place, token in enumerate(ids)])
            if flags.any():
                outputs[index] = np.where(flags[:, None], 0.0, table[list(ids)].astype(np.float64))
        return scenes.contexts("inp_embd", outputs)

    def test_a_missing_shard_that_no_rule_of_places_explains(self, scenes):
        contexts = self.zeroed(scenes, lambda token, place: token >= 111)
        found = diagnose_passes([c for c in contexts if c.n_tokens > 1])
        assert found.name == "rows of token ids from 111 on (or from a lower one above 95) zero"

    def test_a_shard_and_unwritten_tokens_are_equal_explanations(self, scenes):
        """Only the fourth and eighth token hold zeros, and they have the largest ids."""
        (context,) = self.zeroed(scenes, lambda token, place: token >= 250 and place != 4)[:1]
        found = diagnose(context)
        names = [one.name for one in found.candidates]
        assert "zero" in found.name
        assert any("token ids" in name for name in names) or found.name.startswith("tokens")

    def test_a_decoded_token_of_zeros_may_be_a_row_of_the_table_or_unwritten(self, scenes):
        """Where the same id holds its row in another decode pass, the table is cleared."""
        ids = {index: token for index, (token, *more) in enumerate(PASSES) if not more}
        once = next(index for index, token in ids.items() if sum(token in found for found in PASSES) == 1)
        (context,) = self.zeroed(scenes, lambda token, place: token == ids[once])
        found = diagnose(context)
        assert found.name == "output zero"
        assert "output zero" in [one.name for one in found.candidates]
        assert any("rows" in one.name for one in found.candidates)
        decoded = [one for one in context.passes if one.plan.kind == "decode"]
        right = next(one for one in decoded if one.taps["inp_embd"].array.any())
        seen_there = replace(right, plan=replace(right.plan, token_ids=(ids[once],)))
        cleared = diagnose(replace(context, passes=(*context.passes, seen_there)))
        assert [one.name for one in cleared.candidates] == ["output zero"]

    def test_an_id_that_is_zero_here_and_not_there_clears_the_table(self, scenes):
        """Token 33 occurs twice in the third pass; only the sixth place holds zeros."""
        contexts = self.zeroed(scenes, lambda token, place: place == 5 and token == 33)
        found = diagnose(contexts[0])
        assert all("ids" not in one.name for one in found.candidates)
        assert found.name == "token 5 zero"


class TestMalformed:
    @pytest.mark.parametrize("op", drawn.EVERY)
    def test_fits_need_nothing_but_their_own_arrays(self, scenes, op):
        """Neither other taps nor other passes; not-a-number and zeros in the output."""
        name = scenes.name(op, None if op in ("inp_embd", "result_norm", "result_output") else 1)
        (context,) = scenes.contexts(name, {2: scenes.records[2].taps[name].array})
        bare = replace(context, values={}, previous=(), passes=())
        for filled in (np.nan, 0.0, np.inf):
            damaged = replace(bare, recorded=np.full_like(bare.recorded, filled))
            with np.errstate(all="ignore"):
                outputs = [one.compute(damaged) for one in fitted(damaged)]
            assert all(output is None or output.shape == damaged.target.shape for output in outputs)
