"""The PyTorch model in the ``gpu/`` folder of a bitnet.cpp checkout, run on the CPU.

Its ``model.py`` and ``pack_weight.py`` are the checkout's own. What they need and a CPU does not have is stood in
for here: the four things of xformers that it imports, as xformers documents them, and the CUDA library that it
loads, which multiplies int8 codes by packed 2-bit weights in the order that the kernel's addresses say
(``gpu/bitnet_kernels/bitnet_kernels.h``, ``ladder_int8xint2_kernel``).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crossval.model.config import SpecConfig
from crossval.model.weights import SpecWeights
from tests.support.torch_models import fused_state

Split = Callable[[int], Sequence[int]]
"""Rows of a matrix -> how many of them follow each of its scales."""


class RMSNorm(nn.Module):
    """``xformers.ops.RMSNorm``: its second positional argument is not eps. Rounded once, at the end."""

    def __init__(self, dim: int, include_weight: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        assert include_weight
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Any) -> Any:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight.float()).to(x.dtype)


@dataclass(frozen=True)
class Mask:
    """``BlockDiagonalCausalWithOffsetPaddedKeysMask`` of one sequence: its last query sees all keys so far."""

    n_queries: int
    n_keys: int
    padding: int

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int]) -> Mask:
        (queries,), (keys,) = q_seqlen, kv_seqlen
        assert queries <= keys <= kv_padding
        return cls(queries, keys, kv_padding)

    def positions(self) -> Any:
        return torch.arange(self.n_keys - self.n_queries, self.n_keys)


def rope_padded(
    xq: Any, xk: Any, xv: Any, cache_k: Any, cache_v: Any, attn_bias: Mask, *, theta: float = 10000.0
) -> Any:
    """Rotate adjacent pairs in binary32; keys and values go into the cache, which is shared by a group's heads."""
    assert cache_k.shape[1] == attn_bias.padding
    positions, width = attn_bias.positions(), xq.shape[-1]
    angles = positions[:, None] * theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    cos, sin = (f(angles).float()[None, :, None, None] for f in (torch.cos, torch.sin))

    def rotated(x: Any) -> Any:
        a, b = x[..., ::2].float(), x[..., 1::2].float()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)

    cache_k[:, positions, :, 0], cache_v[:, positions, :, 0] = rotated(xk)[..., 0, :], xv[..., 0, :]
    return rotated(xq)


def attention(q: Any, k: Any, v: Any, attn_bias: Mask, op: object) -> Any:
    """Scores and sums in binary32; weights are rounded to the format of the values, as flash attention does."""
    seen = torch.arange(k.shape[1])[None] <= attn_bias.positions()[:, None]
    scores = torch.einsum("bnghd,bkghd->bghnk", q.float(), k.float()) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    mixed = torch.einsum("bghnk,bkghd->bnghd", weights.to(v.dtype).float(), v.float())
    return (mixed / weights.sum(-1).permute(0, 3, 1, 2)[..., None]).to(q.dtype)


class KernelLibrary:
    """The CUDA library: one token, bfloat16 scales and results, at addresses.

    ``split``: which rows follow which scale; the kernel's own choice is ``thirds_for_qkv``.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def bitlinear_int8xint2(
        self, x: Any, w: Any, out: Any, s: Any, ws: Any, m: Any, n: Any, k: Any, _: Any
    ) -> None:
        assert m.value == 1
        rows, width = n.value, k.value
        codes = _at(x, np.int8, width).astype(np.int64)
        sums = torch.from_numpy(unpacked(_at(w, np.uint32, rows * width // 16), rows, width) @ codes).float()
        counts = torch.tensor(self._split(rows))
        scales = _bf16(_at(ws, np.uint16, 4))[: len(counts)].repeat_interleave(counts)
        result = (sums / _bf16(_at(s, np.uint16, 1)) * scales).bfloat16()
        _at(out, np.int16, rows)[:] = result.view(torch.int16).numpy()


def unpacked(words: Any, rows: int, width: int) -> Any:
    """Return the signs of packed weights: ``(rows, width)``, int64.

    The kernel's thread ``(x, y)`` of block ``b`` reads, for its turn ``t``, 16 codes of row ``16 b + y`` from
    column ``16 (8 t + x)`` on out of one 32-bit word; byte ``j`` of it holds codes ``j``, ``4 + j``, and so on.
    """
    row, chunk = np.meshgrid(np.arange(rows), np.arange(width // 16), indexing="ij")
    y, x, turn = row % 16, chunk % 8, chunk // 8
    at = row // 16 * 4 * width + turn * 512 + x // 2 * 128 + y // 8 * 64 + x % 2 * 32 + y % 8 * 4  # in bytes
    order = np.arange(16)
    return ((words[at // 4][..., None] >> (order % 4 * 8 + order // 4 * 2) & 3).astype(np.int64) - 2).reshape(
        rows, width
    )


def _at(pointer: Any, dtype: Any, n: int) -> Any:
    raw = (ctypes.c_uint8 * (n * np.dtype(dtype).itemsize)).from_address(pointer.value)
    return np.frombuffer(raw, dtype)


def _bf16(bits: Any) -> Any:
    return torch.from_numpy(bits.copy().view(np.int16)).view(torch.bfloat16).float()


@contextmanager
def stood_in(split: Split) -> Iterator[None]:
    """Let xformers, the CUDA library and the current CUDA stream be these, and nothing be compiled."""
    fmha = SimpleNamespace(memory_efficient_attention_forward=attention, flash=SimpleNamespace(FwOp=None))
    found = {
        "xformers": SimpleNamespace(),
        "xformers.ops": SimpleNamespace(RMSNorm=RMSNorm, fmha=fmha, rope_padded=rope_padded),
        "xformers.ops.fmha": fmha,
        "xformers.ops.fmha.attn_bias": SimpleNamespace(BlockDiagonalCausalWithOffsetPaddedKeysMask=Mask),
    }
    stream, load = SimpleNamespace(cuda_stream=0), ctypes.CDLL
    torch.compiler.set_stance("force_eager")
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, module in found.items():
                patch.setitem(sys.modules, name, module)
            library = "bitnet_kernels/libbitnet.so"
            patch.setattr(ctypes, "CDLL", lambda name: KernelLibrary(split) if name == library else load(name))
            patch.setattr(torch.cuda, "current_stream", lambda: stream)
            yield
    finally:
        torch.compiler.set_stance("default")


def imported(folder: Path, name: str) -> Any:
    """Return a module of the checkout's ``gpu/`` folder, which stays where it is."""
    spec = importlib.util.spec_from_file_location(f"gpu_folder_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both_models(folder: Path, path: Path, dtype: torch.dtype, *, kernel: bool) -> tuple[Any, Any]:
    """Return the folder's models for prefill and decoding of a GGUF file in one module, and what runs them.

    To be called, and run, within ``stood_in``. ``kernel``: decoding multiplies by packed weights, as the folder's
    ``generate.py`` has it; else both models multiply in floating point.
    """
    model, weights = imported(folder, "model"), SpecWeights(path)
    config = weights.config
    pack = imported(folder, "pack_weight").convert_weight_int8_to_int2

    def made(use_kernel: bool) -> Any:
        with torch.device("meta"):
            one = model.Transformer(arguments(model, config, use_kernel))
        one.load_state_dict(fused_state(weights, dtype, pack if use_kernel else None), strict=True, assign=True)
        return one

    both = nn.ModuleDict({"prefill": made(False), "decode": made(kernel)}).requires_grad_(False).eval()
    length = 16
    cache = model.make_cache(arguments(model, config, False), length, dtype=dtype)

    def forward(token_ids: Sequence[int], start: int) -> Any:
        one = both["decode" if len(token_ids) == 1 and start else "prefill"]
        return one(torch.tensor(token_ids), torch.tensor([len(token_ids)]), torch.tensor([start]), cache, length)

    return both, forward


def arguments(model: Any, config: SpecConfig, use_kernel: bool) -> Any:
    """Return the folder's description of a file's shape."""
    return model.ModelArgs(
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        ffn_dim=config.hidden_dim,
        norm_eps=config.rms_eps,
        rope_theta=config.rope_base,
        use_kernel=use_kernel,
    )
