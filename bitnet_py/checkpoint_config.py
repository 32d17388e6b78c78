"""``config.json`` of a checkpoint as the hyper-parameters that a GGUF states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bitnet_py.config import ARCHITECTURES, Activation, RopePairing
from bitnet_py.errors import ModelError, clip, model_error

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({"relu2": "relu_squared", "silu": "silu"})
"""``hidden_act`` -> activation."""


@dataclass(frozen=True)
class Header:
    """Shape and hyper-parameters of a checkpoint, under the names of ``ModelConfig``."""

    arch: str
    """Architecture of the GGUF."""
    activation: Activation
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    hidden_dim: int
    vocab_size: int
    context_length: int
    rope_base: float
    """Value of a float32."""
    rms_eps: float
    """Value of a float32."""
    rope_factor: float
    """Linear scaling of positions; 1: none."""

    def keys(self) -> dict[str, int | float]:
        """Return the GGUF keys, without the architecture's name before them; floats are float32 values."""
        keys: dict[str, int | float] = {
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
            "embedding_length": self.dim,
            "block_count": self.n_layers,
            "feed_forward_length": self.hidden_dim,
            "rope.dimension_count": self.head_dim,
            "attention.head_count": self.n_heads,
            "attention.head_count_kv": self.n_kv_heads,
            "attention.layer_norm_rms_epsilon": self.rms_eps,
            "rope.freq_base": self.rope_base,
        }
        if self.head_dim * self.n_heads != self.dim:
            keys |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        if self.rope_factor != 1:
            keys["rope.scaling.factor"] = self.rope_factor
        return keys


def architecture_for(activation: Activation, pairing: RopePairing) -> str | None:
    """Return the first architecture whose name implies both, or None."""
    for name, implied in ARCHITECTURES.items():
        if (implied.activation, implied.rope_pairing) == (activation, pairing):
            return name
    return None


def read_header(config: Mapping[str, Any], folder: Path, *, halves: bool) -> Header:
    """Read the hyper-parameters; ``halves``: the GGUF's architecture rotates halves of a head, as checkpoints do.

    Raises:
        ModelError: a missing or unusable value, or a feature that changes the result and is not supported.
    """
    return _Reader(config, folder / "config.json").header(halves=halves)


class _Reader:
    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.config = config
        self.path = path

    def error(self, key: str, expected: object, found: object) -> ModelError:
        remedy = "this checkpoint cannot be converted"
        return model_error(self.path, key, expected=expected, found=found, remedy=remedy)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= 1 << 31:
            raise self.error(key, "an integer of at least 1", "no such key" if value is None else clip(str(value)))
        return value

    def number(self, key: str, value: Any) -> float:
        """Return a number as the float32 that a GGUF holds."""
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self.error(key, "a number", "no such key" if value is None else clip(str(value)))
        with np.errstate(over="ignore"):
            number = float(np.float32(value))
        if not (math.isfinite(number) and number > 0):
            raise self.error(key, "a finite number above 0", clip(str(value)))
        return number

    def rope(self) -> tuple[float, float]:
        """Return base and linear factor; newer files have both in ``rope_parameters``."""
        given = self.config.get("rope_parameters") or {}
        scaling = given or self.config.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise self.error("rope_scaling", "an object", clip(str(scaling)))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "linear"):
            raise self.error("rope_scaling", "none, or linear", clip(str(kind)))
        factor = self.number("rope_scaling, factor", scaling.get("factor", 1.0)) if kind == "linear" else 1.0
        base = given.get("rope_theta", self.config.get("rope_theta"))
        return self.number("rope_theta", base), factor

    def header(self, *, halves: bool) -> Header:
        named = str(self.config.get("hidden_act"))
        if named not in ACTIVATIONS:
            raise self.error("hidden_act", " or ".join(ACTIVATIONS), clip(named))
        activation = ACTIVATIONS[named]
        pairing: RopePairing = "halves" if halves else "adjacent"
        arch = architecture_for(activation, pairing)
        if arch is None:
            raise self.error("hidden_act", f"the activation of an architecture with {pairing} RoPE pairs", named)
        n_heads, dim = self.integer("num_attention_heads"), self.integer("hidden_size")
        n_kv_heads = self.integer("num_key_value_heads", n_heads)
        if n_heads % n_kv_heads:
            raise self.error("num_key_value_heads", f"a divisor of {n_heads} heads", n_kv_heads)
        base, factor = self.rope()
        return Header(
            arch=arch,
            activation=activation,
            n_layers=self.integer("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=self.integer("head_dim", max(dim // n_heads, 1)),
            dim=dim,
            hidden_dim=self.integer("intermediate_size"),
            vocab_size=self.integer("vocab_size"),
            context_length=self.integer("max_position_embeddings"),
            rope_base=base,
            rms_eps=self.number("rms_norm_eps", self.config.get("rms_norm_eps")),
            rope_factor=factor,
        )
