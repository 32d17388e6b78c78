import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitnet_py.errors import InputError, ModelError
from bitnet_py.logits import check_logits, largest
from bitnet_py.sampler import GreedySampler, RandomSampler

finite_logits = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-30, 30, width=32))


def f32(*values):
    return np.array(values, np.float32)


def sample(sampler, logits):
    """What ``Model.largest`` and ``generate`` do with all logits."""
    check_logits(logits)
    ids = largest(logits, sampler.n_candidates)
    return sampler.choose(ids, logits[ids])


def draws(sampler, logits, n):
    return [sample(sampler, logits) for _ in range(n)]


class TestGreedy:
    @given(finite_logits)
    def test_lowest_id_of_the_largest(self, logits):
        chosen = sample(GreedySampler(), logits)
        assert chosen == min(i for i, value in enumerate(logits) if value == max(logits))

    def test_ties(self):
        assert sample(GreedySampler(), f32(1, 3, 3, 2, 3)) == 1
        assert sample(GreedySampler(), f32(-0.0, 0.0)) == 0


class TestRandom:
    def test_seed_makes_it_repeatable_and_another_seed_different(self):
        logits = np.linspace(0, 1, 100, dtype=np.float32)
        runs = [draws(RandomSampler(seed=seed), logits, 30) for seed in (7, 7, 8)]
        assert runs[0] == runs[1] != runs[2]

    def test_drawn_seed_repeats_the_run(self):
        logits = np.linspace(0, 1, 100, dtype=np.float32)
        first = RandomSampler()
        again = RandomSampler(seed=first.seed)
        assert draws(first, logits, 30) == draws(again, logits, 30)
        assert RandomSampler().seed != first.seed

    def test_frequencies_follow_the_softmax(self):
        logits = np.log(f32(0.5, 0.3, 0.15, 0.05))
        for temperature in (1.0, 0.5):
            sampler = RandomSampler(temperature=temperature, top_k=0, top_p=1, seed=3)
            counts = np.bincount(draws(sampler, logits, 20_000), minlength=4) / 20_000
            expected = np.array([0.5, 0.3, 0.15, 0.05]) ** (1 / temperature)
            # 5 standard errors of a share near 0.5 from 20,000 draws
            np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.018)

    def test_top_k_keeps_k_tokens_and_the_lower_id_among_equals(self):
        logits = f32(1, 2, 2, 2, 0)
        sampler = RandomSampler(temperature=100, top_k=2, top_p=1, seed=1)
        assert set(draws(sampler, logits, 300)) == {1, 2}

    @pytest.mark.parametrize(
        ("top_p", "kept"), [(0.45, {2}), (0.5, {2}), (0.55, {2, 0}), (0.81, {0, 1, 2}), (1, {0, 1, 2, 3})]
    )
    def test_top_p_keeps_the_token_that_reaches_it(self, top_p, kept):
        # the share of token 2 is a little above 1/2, so that rounding cannot push it below
        logits = np.log(f32(0.3, 0.15, 0.5000001, 0.0499999))
        sampler = RandomSampler(temperature=50, top_k=0, top_p=top_p, seed=1)
        assert set(draws(sampler, logits, 600)) == kept

    def test_top_p_is_applied_before_temperature(self):
        # At temperature 100 all shares are near 1/4: applied after it, top-p 0.5 would keep more than one token.
        sampler = RandomSampler(temperature=100, top_k=0, top_p=0.5, seed=1)
        assert set(draws(sampler, f32(5, 1, 1, 1), 200)) == {0}

    def test_tiny_temperature_is_greedy(self):
        sampler = RandomSampler(temperature=1e-300, top_k=0, top_p=1, seed=1)
        assert set(draws(sampler, f32(1, 30000, 29999, -30000), 50)) == {1}

    @given(finite_logits, st.integers(0, 60), st.floats(0.01, 1), st.floats(0.01, 10), st.integers(0, 2**64 - 1))
    def test_choice_is_always_among_the_top_k(self, logits, top_k, top_p, temperature, seed):
        sampler = RandomSampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        chosen = sample(sampler, logits)
        order = sorted(range(logits.size), key=lambda i: (-logits[i], i))
        assert chosen in order[: top_k or None]

    def test_top_k_of_one_is_greedy(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            logits = np.round(rng.standard_normal(30), 1).astype(np.float32)
            assert sample(RandomSampler(top_k=1, seed=0), logits) == sample(GreedySampler(), logits)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"temperature": 0}, "temperature is 0, expected a number above 0"),
            ({"temperature": -1}, "temperature is -1"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"temperature": float("inf")}, "temperature is inf"),
            ({"top_k": -1}, "top-k is -1, expected 0"),
            ({"top_p": 0}, "top-p is 0, expected a number above 0"),
            ({"top_p": 1.1}, "top-p is 1.1"),
            ({"top_p": float("nan")}, "top-p is nan"),
            ({"seed": -1}, "seed is -1, expected 0 to 18446744073709551615"),
            ({"seed": 2**64}, "seed is 18446744073709551616"),
        ],
    )
    def test_settings_outside_their_range(self, setting, message):
        with pytest.raises(InputError, match=message):
            RandomSampler(**setting)


@pytest.mark.parametrize("sampler", [GreedySampler(), RandomSampler(seed=1)])
class TestUnusableLogits:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, sampler, bad):
        with pytest.raises(ModelError, match=r"2 of 5 logits are not finite \(first: token 1 is "):
            sample(sampler, f32(0, bad, 1, bad, 2))

    @pytest.mark.parametrize("shape", [(0,), (1, 3), ()])
    def test_not_one_row(self, sampler, shape):
        with pytest.raises(ModelError, match="logits have shape"):
            sample(sampler, np.zeros(shape, np.float32))
