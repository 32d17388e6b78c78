"""Model files of the zoo: small synthetic ones; ``crossval.selftest.damage`` makes modified copies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from bitnet_py.synth import SynthConfig, write_model
from crossval.selftest.damage import DamagedModel

SHAPE = SynthConfig(n_layers=5, dim=256, n_heads=4, n_kv_heads=2, hidden_dim=512, vocab_size=301, seed=7)
"""Odd enough to tell things apart: 2 query heads per key head, a vocabulary that no tile divides."""
BASES = (
    "plain",
    "untied",
    "large-eps",
    "saturated",
    "ties",
    "pre-default",
    "pre-none",
    "llama",
    "llama-extras",
    "bitnet",
    "bitnet-scales",
)
"""``untied`` has an ``output.weight``; ``large-eps`` an eps that matters; ``saturated`` drives every int8
activation of layer 0 to 127 at one token; ``ties`` puts activations of layer 0 exactly between two integers there;
two name another pre-tokeniser, or none; ``llama`` is one with a head of its own, ``llama-extras`` has everything
that such a file may have; ``bitnet-scales`` has a ``.scale`` for every matrix."""
SPECIAL_TOKEN = 100
"""The token whose embedding ``saturated`` and ``ties`` change."""
OF_ARCHITECTURES = {
    "llama": {"arch": "llama"},
    "llama-extras": {
        "arch": "llama", "biases": True, "rope_freqs": True, "scales": True, "rope_scaling": 4.0,
    },
    "bitnet": {"arch": "bitnet"},
    "bitnet-scales": {"arch": "bitnet", "scales": True},
}  # fmt: skip
LOUD = 4
"""Factor of every ``ffn_norm``: gates of ±6 and more, where activation functions with a limit differ."""


def write_base(base: str, path: Path) -> None:
    """Write one of ``BASES``."""
    pre = base.removeprefix("pre-") if base.startswith("pre-") else SHAPE.pre
    eps = 1e-2 if base == "large-eps" else SHAPE.rms_eps
    untied = base in ("untied", "llama")
    write_model(path, replace(SHAPE, untied_head=untied, pre=pre, rms_eps=eps, **OF_ARCHITECTURES.get(base, {})))
    model = DamagedModel(path)
    for layer in range(SHAPE.n_layers):
        model.f32(f"blk.{layer}.ffn_norm.weight")[:] *= LOUD
    if base in ("saturated", "ties"):
        model.f32("blk.0.attn_norm.weight")[:] = 1
        row = model.f16("token_embd.weight")[SPECIAL_TOKEN]
        row[:] = 0.25 if base == "saturated" else np.where(np.arange(row.size) % 3, -0.125, 0.125)
        row[0] = 0.25
