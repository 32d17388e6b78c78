"""Mistakes with fitted parameters: drawn ones are named with their parameter, and nothing else is."""

from dataclasses import replace

import numpy as np
import pytest

from crossval.audit.bounds import Arithmetic
from crossval.diagnose.diagnosis import UNDETERMINED
from crossval.diagnose.search import diagnose, diagnose_passes
from crossval.diagnose.variants import fitted
from crossval.diagnose.variants.places import Rule, described, rules
from crossval.diagnose.variants.rows import looked_up
from crossval.passes import Numerics
from tests.support.drawn_products import DRAWN, draw_sum_twice, inputs, product, quantised, read, recorded
from tests.support.extra import sampled

N_DRAWN = 3
KNOWN = Arithmetic(Numerics(8, False), n_heads=1)


def drawn(kind, n):
    """Yield inputs, output and correct names of drawn mistakes of a kind that change something."""
    found, seed = 0, 0
    while found < n:
        rng = np.random.default_rng([seed, *kind.encode()])
        seed += 1
        given = inputs(rng)
        made = DRAWN[kind](rng, given)
        if made is not None:
            found += 1
            output, names = made
            yield given, output, (names,) if isinstance(names, str) else names


class TestDrawn:
    @pytest.mark.parametrize("kind", sampled(DRAWN, 2))
    def test_mistakes_are_named_with_their_parameter(self, kind):
        for given, output, names in drawn(kind, N_DRAWN):
            found = diagnose(recorded(given, output))
            assert found.name.startswith(names), f"{given.x.shape}, {given.signs.shape}: {found.explanation}"
            assert found.ratio <= 1e-6

    @pytest.mark.parametrize("kind", sampled(DRAWN, 3))
    def test_one_value_that_does_not_fit_takes_the_name_away(self, kind):
        """Every name was verified on all values: one output of another size is enough to lose it."""
        for given, output, _ in drawn(kind, 1):
            wrong = output.copy()
            possible = np.isfinite(wrong) & (np.abs(wrong) < 1e15)
            good = np.argwhere(possible.all(axis=1)[:, None] & (np.abs(wrong) > 1e-3))
            token, feature = good[len(good) // 2]
            wrong[token, feature] += 0.0137 * np.abs(output[token]).max()
            found = diagnose(recorded(given, wrong), KNOWN)
            assert not found.determined, found.explanation

    def test_noise_has_no_fit(self):
        rng = np.random.default_rng(5)
        given = inputs(rng, 5)
        right = product(given)
        noise = recorded(given, right + rng.normal(size=right.shape) * right.std())
        assert list(fitted(noise)) == []
        assert diagnose(noise).name == UNDETERMINED


def _flipped(rng, given):
    weights, hit = given.signs.copy(), rng.random(given.signs.shape) < rng.choice([0.001, 0.05, 0.5])
    weights[hit] = rng.integers(-1, 2, np.count_nonzero(hit))
    return product(given, weights)


def _stochastic(rng, given):
    codes, scale = quantised(given.x, rounding=lambda p: np.floor(p + rng.random(p.shape)))
    return product(given, codes=codes, scale=scale)


def _one_code_wrapped(rng, given):
    codes, _ = quantised(given.x)
    codes[:, rng.integers(codes.shape[1])] -= 256
    return product(given, codes=codes)


def _half_a_token_lost(rng, given):
    output = product(given)
    output[rng.integers(len(output)), : output.shape[1] // 2] = np.nan
    return output


UNKNOWN = {
    "weights flipped at random": _flipped,
    "stochastic rounding": _stochastic,
    "one code wrapped": _one_code_wrapped,
    "half a token lost": _half_a_token_lost,
    "a factor for each row": lambda rng, given: product(given) * rng.uniform(0.5, 2, given.signs.shape[0]),
    "a factor for each token": lambda rng, given: product(given) * rng.uniform(0.5, 2, (len(given.x), 1)),
    "a bias": lambda rng, given: product(given) + rng.normal(size=given.signs.shape[0]),
    "columns in any order": lambda rng, given: product(given, rng.permuted(given.signs, axis=1)),
    "saturated": lambda rng, given: np.clip(product(given), -0.3, 0.3),
}


class TestUnknown:
    @pytest.mark.parametrize("what", UNKNOWN)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_what_belongs_to_no_family_has_no_name(self, what, seed):
        rng = np.random.default_rng([seed, *what.encode()])
        given = inputs(rng)
        found = diagnose(recorded(given, UNKNOWN[what](rng, given)))
        assert found.name == UNDETERMINED
        assert found.candidates == ()


class TestEqualExplanations:
    def test_rows_of_zeros_are_unwritten_or_zero_weights(self):
        (given, output, names), *_ = drawn("lost_rows", 1)
        found = diagnose(recorded(given, output))
        assert found.name == names[0]
        words = names[0].removesuffix(" zero")
        assert [e.name for e in found.candidates] == [
            f"{words} never written",
            f"weight rows of {words} read as zeros",
        ]

    def test_columns_of_zeros_have_three_mechanisms(self):
        rng = np.random.default_rng(6)
        given = inputs(rng, 5)
        weights = given.signs.copy()
        weights[:, 64:96] = 0
        found = diagnose(recorded(given, product(given, weights)))
        assert found.name == "inputs 64 to 96 (exclusive) count as zero"
        assert [e.name for e in found.candidates][:2] == [
            "inputs 64 to 96 (exclusive) left out of the sums",
            "weights of inputs 64 to 96 (exclusive) read as zeros",
        ]

    def test_an_input_that_sets_the_scale_tells_what_is_read_from_what_is_summed(self):
        rng = np.random.default_rng(7)
        given = inputs(rng, 5)
        x = given.x.copy()
        x[:, 70] = 1.5 * np.abs(x).max()
        given = replace(given, x=x)
        weights = given.signs.copy()
        weights[:, 64:96] = 0
        found = diagnose(recorded(given, product(given, weights)))
        assert "inputs 64 to 96 (exclusive) not read" not in [e.name for e in found.candidates]
        assert len(found.candidates) == 2

    @pytest.mark.parametrize(
        ("n", "first", "said"),
        [
            (18, 16, ["tokens from 16 on zero", *(f"last n mod {m} tokens zero" for m in (4, 8, 16))]),
            (19, 16, ["tokens from 16 on zero", *(f"last n mod {m} tokens zero" for m in (4, 8, 16))]),
            (23, 16, ["tokens from 16 on zero", "last n mod 8 tokens zero", "last n mod 16 tokens zero"]),
            (24, 15, ["tokens from 15 on zero"]),
        ],
    )
    def test_a_limit_and_groups_of_any_size_are_all_listed(self, n, first, said):
        given = inputs(np.random.default_rng(n), n)
        output = product(given)
        output[first:] = 0.0
        found = diagnose(recorded(given, output))
        assert [e.name for e in found.candidates] == said
        assert found.name == (said[0] if len(said) == 1 else f"tokens {first} to {n} (exclusive) zero")

    def test_other_passes_tell_a_limit_from_groups(self):
        contexts = []
        for n in (18, 21):
            given = inputs(np.random.default_rng(n), n)
            output = product(given)
            output[16:] = 0.0
            contexts.append(recorded(given, output))
        names = [e.name for e in diagnose_passes(contexts).candidates]
        assert names == ["tokens from 16 on zero", "last n mod 8 tokens zero", "last n mod 16 tokens zero"]
        given = inputs(np.random.default_rng(40), 40)
        output = product(given)
        output[16:] = 0.0
        assert diagnose_passes([*contexts, recorded(given, output)]).name == "tokens from 16 on zero"

    def test_a_pass_that_is_right_excludes_what_would_show_there(self):
        given = inputs(np.random.default_rng(8), 7)
        output = product(given)
        output[4:] = 0.0
        right = inputs(np.random.default_rng(9), 8)
        alone = diagnose_passes([recorded(given, output)])
        assert [e.name for e in alone.candidates] == ["tokens from 4 on zero", "last n mod 4 tokens zero"]
        both = diagnose_passes([recorded(given, output)], right=[recorded(right, product(right))])
        assert both.name == "last n mod 4 tokens zero"


class TestSeveralAtOnce:
    def test_what_shows_in_a_prompt_only_is_replayed_on_decoded_tokens(self):
        rng = np.random.default_rng(10)
        prompt = inputs(rng, 9)
        output, name = draw_sum_twice(np.random.default_rng(11), prompt)
        output[np.arange(9) % 4 != 0] = np.nan
        decoded = replace(prompt, x=prompt.x[:1] * 3)
        again, same = draw_sum_twice(np.random.default_rng(11), decoded)
        assert name == same
        found = diagnose_passes([recorded(prompt, output), recorded(decoded, again, 9)], KNOWN)
        assert found.name == f"{name}; in passes of several tokens, tokens t mod 4 ≠ 0 never written"

    def test_a_decoded_token_with_another_mistake_takes_the_name_away(self):
        rng = np.random.default_rng(12)
        prompt = inputs(rng, 9)
        output = product(prompt)
        output[np.arange(9) % 4 != 0] = np.nan
        decoded = replace(prompt, x=prompt.x[:1] * 3)
        found = diagnose_passes([recorded(prompt, output), recorded(decoded, 2 * product(decoded), 9)], KNOWN)
        assert not found.determined

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
    def test_one_bad_value_is_no_unwritten_token(self, value):
        given = inputs(np.random.default_rng(13), 5)
        output = product(given)
        output[2, 3] = value
        found = diagnose(recorded(given, output))
        assert found.name == UNDETERMINED
        assert found.candidates == ()

    def test_tokens_that_are_bad_and_a_rest_that_is_unknown_stay_undetermined(self):
        rng = np.random.default_rng(14)
        given = inputs(rng, 8)
        output = product(given) * rng.uniform(0.5, 2, (8, given.signs.shape[0]))
        output[[1, 5]] = np.nan
        found = diagnose(recorded(given, output))
        assert found.name == UNDETERMINED
        assert "of the rest: all tokens and features deviate" in found.explanation

    def test_a_layout_without_ties_is_not_said_with_a_rounding_of_ties(self):
        given = inputs(np.random.default_rng(15), 3)
        weights = np.asarray([-2.0, -1.0, 0.0, 0.0])[read(given, "codes read four in a row")]
        found = diagnose(recorded(given, product(given, weights)))
        assert [e.name for e in found.candidates] == [
            "codes read four in a row; code table -2, -1, 0 (activation sum subtracted twice)"
        ]


class TestPlaces:
    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("0110", "tokens 1 to 3 (exclusive)"),
            ("0100", "token 1"),
            ("01110111", "tokens t mod 4 ≠ 0"),
            ("010001000", "tokens t mod 4 = 1"),
            ("01100110", "tokens t mod 4 in 1, 2"),
            ("110111", "tokens 0-1, 3-5"),
            ("010010", "tokens t mod 3 = 1"),
            ("01001", "tokens 1, 4"),
        ],
    )
    def test_words(self, flags, words):
        assert described(np.asarray([f == "1" for f in flags]), "token") == words

    @pytest.mark.parametrize("n", range(2, 40))
    def test_every_rule_hits_exactly_what_it_was_made_from(self, n):
        rng = np.random.default_rng(n)
        for _ in range(20):
            flags = rng.random(n) < rng.random()
            made = list(rules(flags))
            assert bool(made) == (flags.any() and not flags.all())
            assert all(np.array_equal(rule.hits(n), flags) for rule in made)

    def test_a_rule_in_other_passes(self):
        assert Rule("rest", group=4).hits(6).tolist() == [False] * 4 + [True] * 2
        assert not Rule("rest", group=4).hits(3).any()
        assert not Rule("remainder", part=(False, True, True, True)).hits(1).any()
        assert Rule("these", part=(False, True)).hits(1).tolist() == [False]


def test_looking_up_finds_equal_vectors_only():
    rng = np.random.default_rng(16)
    expected = rng.normal(size=(50, 3))
    order = rng.permutation(50)
    recorded_rows = expected[order] * (1 + 1e-7)
    recorded_rows[7] += 0.01
    found = looked_up(recorded_rows, expected)
    assert found[7] == -1
    assert np.array_equal(np.delete(found, 7), np.delete(order, 7))
