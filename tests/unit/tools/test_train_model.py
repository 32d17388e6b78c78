"""The PyTorch network: its rounding, its agreement with the engine, and that a run resumes exactly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'bitnet-parity[train]'")

import click  # noqa: E402

from bitnet_py.quants import quantize_absmean  # noqa: E402
from tools.train import corpus  # noqa: E402
from tools.train.agreement import MIN_COSINE, compare  # noqa: E402
from tools.train.export import gguf_names, rescaled, write_gguf  # noqa: E402
from tools.train.families import FAMILIES  # noqa: E402
from tools.train.model import BitNet, quantize_activation, quantize_weight, rope_table, rotate  # noqa: E402
from tools.train.shape import Shape  # noqa: E402
from tools.train.train import Recipe, Trainer, accuracy, build_tokenizer, run  # noqa: E402

SHAPE = Shape(n_layers=2, dim=128, n_heads=4, n_kv_heads=2, hidden_dim=256, vocab_size=400)
RECIPE = Recipe(n_steps=40, n_warmup=4, n_rows=4, row_length=64, vocab_size=400)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> corpus.Corpus:
    whole = corpus.build()
    parts = [
        tuple(question for name in part for question in part[name][:8])
        for part in (whole.by_family("train"), whole.by_family("held_out"))
    ]
    return corpus.Corpus(*parts)


def network(seed: int = 0) -> BitNet:
    torch.manual_seed(seed)
    net = BitNet(SHAPE)
    for name, parameter in net.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return net


def causal(n_tokens: int):
    return torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()[None, None]


def test_weights_are_rounded_as_export_rounds_them():
    weight = network().layers[0].ffn_down.weight
    ternary, scale = quantize_absmean(weight.detach().numpy())
    assert set(np.unique(ternary)) == {-1, 0, 1}
    np.testing.assert_allclose(quantize_weight(weight).detach().numpy(), ternary * scale, rtol=1e-5, atol=1e-7)


def test_activations_take_255_levels_of_the_largest_in_the_token():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [1e3]])
    steps = quantize_activation(x) * 127 / x.abs().amax(dim=-1, keepdim=True)
    assert (steps - steps.round()).abs().max() < 1e-3
    assert (steps.round() - x * 127 / x.abs().amax(dim=-1, keepdim=True)).abs().max() <= 0.501


def test_gradients_pass_the_roundings():
    weight = torch.randn(4, 8, requires_grad=True)
    factor = torch.randn(4, 8)
    (quantize_weight(weight) * factor).sum().backward()
    assert torch.equal(weight.grad, factor)
    x = torch.randn(2, 8, requires_grad=True)
    (quantize_activation(x) * factor[:2]).sum().backward()
    assert torch.equal(x.grad, factor[:2])


def test_rope_turns_pairs_half_a_head_apart():
    cos, sin = rope_table(SHAPE, 6)
    x = torch.zeros(6, SHAPE.head_dim)
    x[:, 3] = 1
    out = rotate(x, cos, sin)
    half = SHAPE.head_dim // 2
    angle = 5 * SHAPE.rope_base ** (-3 / half)
    assert out[5, 3].item() == pytest.approx(np.cos(angle), abs=1e-6)
    assert out[5, 3 + half].item() == pytest.approx(np.sin(angle), abs=1e-6)
    assert out[5].count_nonzero() == 2


def test_packed_documents_do_not_see_each_other():
    net = network()
    alone = net(torch.tensor([[5, 6, 7]]), causal(3))[0]
    document = torch.tensor([0, 0, 1, 1, 1])
    mask = causal(5) & (document[:, None] == document)[None, None]
    packed = net(torch.tensor([[90, 91, 5, 6, 7]]), mask)[0, 2:]
    # RoPE is relative, so that positions need no reset; int8 roundings may still flip by the last bit.
    assert torch.cosine_similarity(alone, packed, dim=-1).min() > 0.9999
    unmasked = net(torch.tensor([[90, 91, 5, 6, 7]]), causal(5))[0, 2:]
    assert torch.cosine_similarity(alone, unmasked, dim=-1).min() < 0.999


def test_the_engine_computes_the_network_from_the_exported_file(tmp_path, data):
    net = network()
    metadata, _ = build_tokenizer(data, SHAPE.vocab_size)
    state = net.state_dict()
    arrays = {name: state[key].numpy() for name, key in gguf_names(SHAPE).items()}
    write_gguf(tmp_path / "net.gguf", SHAPE, metadata, rescaled(arrays))
    result = compare(state, SHAPE, tmp_path / "net.gguf")
    assert result.agrees, result
    assert result.n_positions > 5000
    # The same file against another network, or one without its sub-norm, does not pass.
    assert not compare(network(1).state_dict(), SHAPE, tmp_path / "net.gguf").agrees
    state["layers.1.ffn_sub_norm.weight"] = torch.ones(SHAPE.hidden_dim)
    assert compare(state, SHAPE, tmp_path / "net.gguf").min_cosine < MIN_COSINE


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, data):
    def weights(out, *stops):
        out.mkdir()
        for stop in stops:
            trainer = Trainer(RECIPE, SHAPE, out, data)
            assert trainer.resume() is (stop != stops[0])
            run(trainer, stop_at=stop, eval_every=100, log_every=100)
        return trainer.net.state_dict()

    whole = weights(tmp_path / "whole", 6)
    parts = weights(tmp_path / "parts", 3, 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # Two workers at a time, or one after the other: the same bits.
    trainer = Trainer(RECIPE, SHAPE, tmp_path / "two", data, n_workers=2)
    for _ in range(6):
        trainer.advance()
    assert all(torch.equal(whole[name], tensor) for name, tensor in trainer.net.state_dict().items())
    other = Trainer(dataclasses.replace(RECIPE, seed=1), SHAPE, tmp_path / "whole", data)
    with pytest.raises(click.UsageError, match="expected a run of the same recipe"):
        other.resume()


def test_training_learns(tmp_path, data):
    trainer = Trainer(RECIPE, SHAPE, tmp_path, data)
    losses = [trainer.advance() for _ in range(RECIPE.n_steps)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_accuracy_is_that_of_greedy_generation(tmp_path, data):
    trainer = Trainer(RECIPE, SHAPE, tmp_path, data)
    for _ in range(RECIPE.n_steps):
        trainer.advance()
    examples = [example for group in trainer.train.values() for example in group]
    right = 0
    for example in examples:
        ids = example.ids[: example.n_prompt].tolist()
        while len(ids) < len(example.ids):
            ids.append(int(trainer.net(torch.tensor([ids]), causal(len(ids)))[0, -1].argmax()))
        right += ids == example.ids.tolist()
    assert right > 0
    assert accuracy(trainer.net, examples, RECIPE, trainer.device) == pytest.approx(
        right / len(examples), abs=0.02
    )


def test_the_schedule_warms_up_falls_and_stops_decaying_half_way():
    rates = [RECIPE.rate(step) for step in range(RECIPE.n_steps)]
    assert rates.index(max(rates)) in (3, 4)
    assert max(rates) == RECIPE.learning_rate
    assert rates[-1] < 0.02 * RECIPE.learning_rate
    assert [RECIPE.decay(step) > 0 for step in (0, 19, 20, 39)] == [True, True, False, False]
    assert len(FAMILIES) == 20
