"""The shape of the model, shared by training, export and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of the network; names as in ``bitnet_py.ModelConfig``."""

    n_layers: int = 4
    dim: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden_dim: int = 640
    vocab_size: int = 1024
    context_length: int = 2048
    rope_base: float = 1000.0
    rms_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        """Return the width of K and V."""
        return self.head_dim * self.n_kv_heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return (rows, cols) of a layer's ternary matrices by GGUF name, in file order."""
        return {
            "attn_q": (self.dim, self.dim),
            "attn_k": (self.kv_dim, self.dim),
            "attn_v": (self.kv_dim, self.dim),
            "attn_output": (self.dim, self.dim),
            "ffn_gate": (self.hidden_dim, self.dim),
            "ffn_up": (self.hidden_dim, self.dim),
            "ffn_down": (self.dim, self.hidden_dim),
        }

    def norms(self) -> dict[str, int]:
        """Return the width of a layer's norms by GGUF name, in file order."""
        return {
            "attn_norm": self.dim,
            "ffn_norm": self.dim,
            "attn_sub_norm": self.dim,
            "ffn_sub_norm": self.hidden_dim,
        }
