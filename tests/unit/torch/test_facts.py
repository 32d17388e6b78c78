"""What docs/pytorch.md says of transformers' arithmetic, seen in the installed version."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.torch_models import need

need("torch", "transformers")

import torch  # noqa: E402
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights  # noqa: E402

from crossval.model.kinds import quantize_activations  # noqa: E402

WIDTH, ROWS, SCALE = 256, 64, 0.064


@pytest.fixture(autouse=True)
def _not_compiled():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def x():
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def signs():
    return torch.randint(-1, 2, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1)).float()


def offline(cls, signs, dtype, *, bias=False):
    made = cls(WIDTH, ROWS, bias, dtype=dtype)
    packed = cls is BitLinear
    made.weight = pack_weights(signs.clone()) if packed else torch.nn.Parameter(signs.to(dtype), False)
    made.weight_scale = torch.tensor([1 / SCALE if packed else SCALE], dtype=dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quotient_of_a_number_and_a_tensor_is_rounded_twice(x, dtype):
    largest = x.abs().amax(-1).to(dtype)
    found = 127 / largest
    assert torch.equal(found, largest.reciprocal() * 127)
    exact = (127 / largest.double()).to(dtype)
    assert not torch.equal(found, exact)
    off = (found.double() - 127 / largest.double()).abs() * largest.double() / 127
    assert off.max() < {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 0.05, 0.3), (torch.float16, 0.005, 0.05)])
def test_bitlinear_quantises_in_the_format_of_the_model(x, signs, dtype, least, most):
    given = x.to(dtype)
    codes, _ = offline(BitLinear, signs, dtype).activation_quant(given)
    right, _ = quantize_activations(given.double().numpy())
    off = codes.numpy().astype(int) - right
    assert np.abs(off).max() == 1
    assert least < np.mean(off != 0) < most
    codes, _ = offline(BitLinear, signs, torch.float32).activation_quant(x)
    right, _ = quantize_activations(x.double().numpy())
    assert np.mean(codes.numpy() != right) < 1e-3  # at ties only


def test_autobitlinear_quantises_in_float32_and_rounds_what_it_multiplies(x, signs):
    given = x.bfloat16()
    found = offline(AutoBitLinear, signs, torch.bfloat16)(given)
    wide = given.float()
    scale = 127 / wide.abs().amax(-1, keepdim=True)
    activations = ((wide * scale).round() / scale).bfloat16()
    sums = torch.nn.functional.linear(activations, signs.bfloat16())
    assert torch.equal(found, sums * torch.tensor(SCALE).bfloat16())
    assert not torch.equal(activations.float(), (wide * scale).round() / scale)


def test_in_binary16_the_scales_of_bitlinear_overflow_and_those_of_autobitlinear_do_not(x, signs):
    largest = x.abs().amax(-1, keepdim=True)
    below, above = (
        x / largest * (127 / 65504 * factor) for factor in (0.9, 16.5)
    )  # over the weight's scale: x 15.6
    for given, is_zero in ((below, True), (above, False)):
        assert bool((offline(BitLinear, signs, torch.float16)(given.half()) == 0).all()) == is_zero
        assert not (offline(AutoBitLinear, signs, torch.float16)(given.half()) == 0).all()


def test_autobitlinear_scales_the_bias_and_bitlinear_does_not(x, signs):
    for cls, factor in ((AutoBitLinear, SCALE), (BitLinear, 1.0)):
        made = offline(cls, signs, torch.float32, bias=True)
        with torch.no_grad():
            made.bias.fill_(0)
            without = made(x)
            made.bias.fill_(8)
            added = (made(x) - without).mean()
        assert float(added) == pytest.approx(8 * factor, rel=1e-4)


def test_online_quantisation_changes_the_scale_of_weights_that_are_ternary(x, signs):
    online = AutoBitLinear(WIDTH, ROWS, False, online_quant=True)
    online.weight = torch.nn.Parameter(signs * SCALE, requires_grad=False)
    share = float((signs != 0).float().mean())
    right = offline(AutoBitLinear, signs, torch.float32)(x)
    assert torch.allclose(online(x), right * share, rtol=1e-4, atol=1e-4)
