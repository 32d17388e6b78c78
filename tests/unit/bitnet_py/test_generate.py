from types import SimpleNamespace

import numpy as np
import pytest

from bitnet_py.errors import InputError, ModelError
from bitnet_py.generate import generate
from bitnet_py.logits import check_logits, largest
from bitnet_py.model import Model
from bitnet_py.resources import default_model_path
from bitnet_py.sampler import GreedySampler, RandomSampler

VOCAB = 10


class CountingModel:
    """Predicts the successor of the last token, and keeps what it was asked to evaluate."""

    def __init__(self, context_length=100, bad_after=None):
        self.config = SimpleNamespace(vocab_size=VOCAB, context_length=context_length)
        self.calls = []
        self.bad_after = bad_after

    def new_cache(self):
        return []

    def largest(self, ids, cache, n):
        self.calls.append(list(ids))
        cache.extend(ids)
        assert len(cache) <= self.config.context_length
        logits = np.zeros(VOCAB, np.float32)
        logits[(cache[-1] + 1) % VOCAB] = 1
        if self.bad_after is not None and len(self.calls) > self.bad_after:
            logits[3] = np.nan
        check_logits(logits)
        best = largest(logits, n)
        return SimpleNamespace(ids=best, logits=logits[best], all_logits=lambda: logits)


def run(model, prompt, **options):
    return list(generate(model, prompt, **{"max_tokens": 5, "sampler": GreedySampler(), **options}))


def test_only_the_new_token_is_evaluated_per_step():
    model = CountingModel()
    tokens = run(model, [4, 5, 6])
    assert [token.id for token in tokens] == [7, 8, 9, 0, 1]
    assert model.calls == [[4, 5, 6], [7], [8], [9], [0]]
    assert [token.finish for token in tokens] == [None] * 4 + ["max_tokens"]
    assert all(token.all_logits().shape == (VOCAB,) for token in tokens)
    assert all(token.all_logits().argmax() == token.id for token in tokens)
    assert all(token.elapsed_s > 0 for token in tokens)


def test_stops_after_a_stop_token():
    model = CountingModel()
    tokens = run(model, [4], stop_ids={7, 2})
    assert [(token.id, token.finish) for token in tokens] == [(5, None), (6, None), (7, "stop")]
    assert len(model.calls) == 3


def test_stops_when_the_context_is_full():
    model = CountingModel(context_length=5)
    tokens = run(model, [1, 2, 3], max_tokens=50)
    # positions 3 and 4 are evaluated; the token they give has no place any more
    assert [(token.id, token.finish) for token in tokens] == [(4, None), (5, None), (6, "context")]
    assert [(token.id, token.finish) for token in run(CountingModel(3), [1, 2, 3])] == [(4, "context")]


def test_streams_one_forward_pass_per_step():
    model = CountingModel()
    tokens = generate(model, [1], max_tokens=50, sampler=GreedySampler())
    assert model.calls == []
    next(tokens)
    assert len(model.calls) == 1
    next(tokens)
    assert len(model.calls) == 2


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 101, {}, "the prompt has 101 tokens, the model's context 100"),
        ([1, 10], {}, "token 1 of the prompt has id 10, outside the model's vocabulary of 10 tokens"),
        ([-1], {}, "token 0 of the prompt has id -1"),
        ([1], {"max_tokens": 0}, "max_tokens is 0, expected 1 or more"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(prompt, options, message):
    model = CountingModel()
    with pytest.raises(InputError, match=message):
        generate(model, prompt, **{"max_tokens": 5, "sampler": GreedySampler(), **options})
    assert model.calls == []


def test_not_finite_logits_end_it_with_an_error():
    tokens = generate(CountingModel(bad_after=1), [1], max_tokens=5, sampler=GreedySampler())
    next(tokens)
    with pytest.raises(ModelError, match="not finite"):
        next(tokens)


@pytest.fixture(scope="module")
def model():
    with Model.from_gguf(default_model_path(), n_threads=1) as model:
        yield model


class TestShippedModel:
    def test_cached_steps_choose_what_a_fresh_pass_over_everything_chooses(self, model):
        prompt = model.tokenizer.encode("What is 2+2?")
        made = [token.id for token in run(model, prompt, max_tokens=12)]
        for n in range(len(made)):
            logits = model.forward(prompt + made[:n], model.new_cache()).logits
            assert int(logits[-1].argmax()) == made[n]

    def test_seeded_sampling_repeats(self, model):
        prompt = model.tokenizer.encode("The capital of")
        runs = [
            [token.id for token in run(model, prompt, max_tokens=20, sampler=RandomSampler(seed=seed))]
            for seed in (1, 1, 2)
        ]
        assert runs[0] == runs[1] != runs[2]
