"""Small embedding models, the same on every platform, and bitnet.cpp's results for them.

The traces in ``tests/data/embedding`` are of bitnet.cpp's main: every tap, and with flash attention the outline
and the attention's output.
"""

from __future__ import annotations

from pathlib import Path

from bitnet_py.synth import write_model
from bitnet_py.synth_config import SynthConfig

GOLDENS = Path(__file__).resolve().parents[1] / "data" / "embedding"
TEXTS = {"qwen3": "query: a house", "gemma3": "hi"}
MODELS = {
    "qwen3": SynthConfig(
        n_layers=2, dim=128, n_heads=2, n_kv_heads=1, head_dim=128, hidden_dim=256, vocab_size=400, arch="qwen3",
        norms="f16", pooling="last", seed=5,
    ),
    "gemma3": SynthConfig(
        n_layers=2, dim=384, n_heads=2, n_kv_heads=1, head_dim=256, hidden_dim=256, vocab_size=400, arch="gemma3",
        norms="f16", pooling="mean", rms_eps=1e-6, seed=5,
    ),
}  # fmt: skip
"""Heads of another width than ``dim / n_heads``; of Gemma a root of dim that binary16 does not hold."""


def written(name: str, folder: Path) -> Path:
    """Return the file of a model, written on first use."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        write_model(path, MODELS[name])
    return path
