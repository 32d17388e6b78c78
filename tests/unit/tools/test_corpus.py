"""The corpus: correct answers, a clean split, suites that are up to date. No PyTorch."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from bitnet_py.synth_random import Stream
from crossval.smoke.suite import load_suite
from tools.train import corpus, suite, words
from tools.train.batches import Example, Sampler, encode, family_weights, pack, split
from tools.train.families import FAMILIES, Question
from tools.train.vocabulary import corpus_texts, load_tokenizer, train_vocabulary


@pytest.fixture(scope="module")
def data() -> corpus.Corpus:
    return corpus.build()


@pytest.fixture(scope="module")
def metadata(data):
    return train_vocabulary(corpus_texts(data.train), 1024)


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return load_tokenizer(metadata)


def sample(questions, count=400):
    stream = Stream(7, "test sample")
    return [stream.choice(questions) for _ in range(count)]


def numbers(text: str) -> list[int]:
    return [int(item) for item in re.findall(r"\d+", text)]


def listed(prompt: str) -> list[str]:
    return prompt.split(": ")[-1].rstrip(".?").split(" ")


def solve(question: Question) -> str | None:
    """Work the answer out of the prompt alone, by other code than the generator's; None for known facts."""
    prompt = question.prompt
    match question.family:
        case "sum":
            return str(sum(numbers(prompt)))
        case "difference":
            return str(numbers(prompt)[0] - numbers(prompt)[1])
        case "larger":
            return str((max if "larger" in prompt else min)(numbers(prompt)))
        case "yes or no":
            a, b = numbers(prompt)
            return "Yes" if ("larger" in prompt) == (a > b) else "No"
        case "odd or even":
            return ["even", "odd"][numbers(prompt)[0] % 2]
        case "sort":
            return " ".join(str(item) for item in sorted(numbers(prompt)))
        case "copy":
            return " ".join(listed(prompt))
        case "reverse":
            return " ".join(reversed(listed(prompt)))
        case "how many":
            return str(len(listed(prompt)))
        case "pick":
            if match := re.search(r"after (\w+) in", prompt):
                return listed(prompt)[listed(prompt).index(match[1]) + 1]
            return listed(prompt)[0 if "first" in prompt else -1]
        case "twice":
            return " ".join(listed(prompt) * 2)
        case "count on" if numbers(prompt):
            a, b, c = numbers(prompt)
            assert b - a == c - b
            return str(c + c - b)
        case "count on":
            return chr(ord(listed(prompt)[-1]) + 1)
    return None


def test_computed_answers_are_right(data):
    solved = Counter()
    for question in (*data.train, *data.held_out):
        answer = solve(question)
        if answer is not None:
            assert question.answer == f"{answer}.", question.prompt
            solved[question.family] += 1
    assert len(solved) == 12
    assert min(solved.values()) > 500


def test_facts_are_right_where_known_here(data):
    answers = {question.prompt: question.answer for question in (*data.train, *data.held_out)}
    for prompt, answer in {
        "What is the capital of Japan?": "Tokyo.",
        "Cairo is the capital of": "Egypt.",
        "The opposite of cold is": "hot.",
        "What day comes before Monday?": "Sunday.",
        "The month after December is": "January.",
        "What is the plural of mouse?": "mice.",
        "One book, two": "books.",
        "Which is larger, a whale or an ant?": "a whale.",
        "Is an ant larger than a cow?": "No.",
        "What is an apple?": "a fruit.",
        "Is gold a metal?": "Yes.",
    }.items():
        assert answers[prompt] == answer


def test_the_split_shares_no_question_and_no_key(data):
    train = {question.prompt for question in data.train}
    held_out = {question.prompt for question in data.held_out}
    assert len(train) == len(data.train)
    assert len(held_out) == len(data.held_out)
    assert not train & held_out
    keys = {(question.family, question.key) for question in data.train}
    assert not any((question.family, question.key) in keys for question in data.held_out)


def test_a_held_out_sum_is_unseen_in_either_order(data):
    seen = {frozenset(numbers(question.prompt)) for question in data.train if question.family == "sum"}
    unseen = [frozenset(numbers(question.prompt)) for question in data.held_out if question.family == "sum"]
    assert unseen
    assert not seen & set(unseen)


def test_every_family_is_in_both_parts_near_its_share(data):
    train, held_out = data.by_family("train"), data.by_family("held_out")
    for family in FAMILIES:
        share = len(held_out[family.name]) / (len(held_out[family.name]) + len(train[family.name]))
        assert len(held_out[family.name]) >= 10
        assert 0.4 * family.held_out < share < 2 * family.held_out, family.name


def test_facts_of_the_wording_families_are_all_asked_in_training(data):
    for family in ("capital", "country", "opposite", "calendar", "common"):
        asked = {question.key.split("/")[0] for question in data.train if question.family == family}
        unseen = {question.key.split("/")[0] for question in data.held_out if question.family == family}
        assert unseen <= asked, family


def test_neither_yes_nor_no_is_the_safe_guess(data):
    for family in ("yes or no", "size", "kind"):
        answers = Counter(question.answer for question in data.train if question.family == family)
        assert 0.3 < answers["Yes."] / (answers["Yes."] + answers["No."]) < 0.7, family


def test_the_corpus_repeats_and_follows_its_seed(data):
    assert corpus.build() == data
    assert corpus.build(corpus.SEED + 1) != data


def test_word_lists_hold_no_word_twice():
    for name in ("NOUNS", "REGULAR", "SIZES", "LETTERS"):
        items = getattr(words, name)
        assert len(set(items)) == len(items), name
    for name in ("CAPITALS", "COLOURS", "SOUNDS", "YOUNG", "IRREGULAR"):
        items = [left for left, _ in getattr(words, name)]
        assert len(set(items)) == len(items), name
    both = [word for pair in words.OPPOSITES for word in pair]
    assert len(set(both)) == len(both)


def test_suite_files_are_current(data):
    for name, text in suite.build(data).items():
        path = suite.FOLDER / f"{name}.jsonl"
        assert path.read_text("utf-8") == text, f"{path} is old; run python -m tools.train.suite"


def test_the_long_suite_tells_seen_from_unseen_truly(data):
    train = {question.prompt: question for question in data.train}
    keys = {(question.family, question.key) for question in data.train}
    held_out = {question.prompt: question for question in data.held_out}
    lines = suite.read("long-500")
    assert len(lines) == 500
    assert len({line["prompt"] for line in lines}) == 500
    for line in lines:
        question = (train if line["seen"] else held_out)[line["prompt"]]
        assert (question.family, question.answer) == (line["family"], line["answer"])
        assert ((question.family, question.key) in keys) is line["seen"]
    assert sum(not line["seen"] for line in lines) >= 250


def test_the_fixed_prompts_have_the_answers_of_the_corpus_or_the_rule(data):
    known = {question.prompt: question for question in (*data.train, *data.held_out)}
    lines = suite.read("fixed-10")
    assert len(lines) == 10
    for line in lines:
        question = known.get(line["prompt"]) or Question(line["family"], "", line["prompt"], line["answer"])
        assert question.answer == line["answer"]
        assert solve(question) in (None, line["answer"].rstrip("."))


@pytest.mark.parametrize("word", ["fixed", "long", "everyday"])
def test_crossval_reads_the_suites(word):
    assert load_suite(word).prompts


@pytest.mark.parametrize(
    ("number", "right", "wrong"),
    [
        (1, "The answer is 4.", "The answer is 42."),
        (2, "forty-two", "It is 24."),
        (6, "It's tokyo!", "Kyoto"),
        (10, "mice", "mouses"),
        (17, "They take in CO2.", "oxygen"),
        (18, "H2O", "HO"),
        (19, "Mercury is.", "Venus"),
    ],
)
def test_everyday_patterns_tell_right_from_wrong(number, right, wrong):
    pattern = suite.read("everyday")[number - 1]["pattern"]
    assert re.search(pattern, right)
    assert not re.search(pattern, wrong)


def test_every_digit_is_one_token_and_text_survives(data, tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("907+25", add_bos=False)] == list("907+25")
    for question in sample(data.held_out):
        text = f"{question.prompt} {question.answer}"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_list_words_are_single_tokens(tokenizer):
    for word in (*words.NOUNS, *words.LETTERS):
        assert len(tokenizer.encode(f" {word}", add_bos=False)) == 1, word


def test_regular_plurals_are_the_noun_and_an_s(tokenizer):
    for noun in words.REGULAR:
        ids = tokenizer.encode(f" {noun}", add_bos=False)
        assert tokenizer.encode(f" {noun}s.", add_bos=False)[: len(ids)] == ids, noun


def test_the_vocabulary_repeats(data, metadata):
    assert train_vocabulary(corpus_texts(data.train), 1024) == metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 1024


def test_examples_are_what_inference_sees(data, tokenizer):
    for question in sample(data.train):
        example = encode(tokenizer, question)
        assert example.ids[: example.n_prompt].tolist() == tokenizer.encode(question.prompt)
        assert tokenizer.decode(example.ids[example.n_prompt :]) == f" {question.answer}"
        assert example.ids[-1] == tokenizer.vocabulary.eos_id
        assert len(example.ids) <= 48


def test_packing_keeps_documents_apart_and_targets_are_the_answers(data, tokenizer):
    examples = [encode(tokenizer, question) for question in sample(data.train)]
    batch = pack(examples, 4, 96)
    assert 4 <= batch.n_examples < len(examples)
    for number, example in enumerate(examples[: batch.n_examples]):
        at = np.flatnonzero(batch.document.reshape(-1) == number)
        assert np.array_equal(batch.ids.reshape(-1)[at], example.ids)
        assert at[-1] - at[0] == len(at) - 1
        assert at[0] // 96 == at[-1] // 96
    flat = batch.ids.reshape(-1)
    assert np.array_equal(flat[batch.rows + 1], batch.targets)
    assert len(batch.rows) == sum(len(example.ids) - example.n_prompt for example in examples[: batch.n_examples])


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="at most 8 tokens, found one of 9"):
        pack([Example(np.arange(9), 3)], 2, 8)


def test_batches_depend_on_seed_and_step_alone(data, tokenizer):
    groups = {
        name: [encode(tokenizer, question) for question in questions[:20]]
        for name, questions in data.by_family("train").items()
    }

    def sampler(seed):
        return Sampler(groups, n_rows=4, row_length=64, seed=seed, weights=family_weights())

    first = [sampler(0).batch(step) for step in (0, 1)]
    assert np.array_equal(first[1].ids, sampler(0).batch(1).ids)
    assert not np.array_equal(first[0].ids, first[1].ids)
    assert not np.array_equal(first[1].ids, sampler(1).batch(1).ids)


def test_the_parts_of_a_batch_are_the_batch(data, tokenizer):
    examples = [encode(tokenizer, question) for question in data.train[::1700]]
    batch = pack(examples, 5, 96)
    parts = split(batch, 2)
    assert [len(part.ids) for part in parts] == [2, 3]
    assert np.array_equal(np.concatenate([part.ids for part in parts]), batch.ids)
    assert np.array_equal(np.concatenate([part.document for part in parts]), batch.document)

    def pairs(part, first_row):
        rows = part.rows + first_row * 96
        return set(zip(rows.tolist(), part.targets.tolist(), strict=True))

    assert pairs(parts[0], 0) | pairs(parts[1], 2) == pairs(batch, 0)
    assert sum(len(part.rows) for part in parts) == len(batch.rows)
