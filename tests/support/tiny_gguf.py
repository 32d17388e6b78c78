"""A small random model for tests of the specification, written from the format's definition, no project code."""

import struct
from pathlib import Path

import numpy as np

from tests.support.gguf_bytes import Container, Tensor

F32, F16, I2_S = 0, 1, 36
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9

ARCH = "bitnet-b1.58"


def i2_s_bytes(signs: np.ndarray, scale: float) -> bytes:
    """Pack -1, 0, +1 ``(rows, cols)``: each element is sent to its byte and shift by its column number."""
    rows, cols = signs.shape
    col = np.arange(cols)
    byte = col // 128 * 32 + col % 32
    shift = np.array([6, 4, 2, 0])[col % 128 // 32]
    packed = np.zeros((rows, cols // 4), np.uint8)
    np.add.at(packed, (np.arange(rows)[:, None], byte), ((signs + 1) << shift).astype(np.uint8))
    return packed.tobytes() + struct.pack("<f", scale) + bytes(28)


def write_gguf(path: Path, metadata: dict, tensors: dict) -> Path:
    """Write ``metadata`` (key: (type, value)) and ``tensors`` (name: (type, shape, bytes))."""
    container = Container(
        keys=[(key, kind, value) for key, (kind, value) in metadata.items()],
        tensors=[Tensor(name, shape, kind, data) for name, (kind, shape, data) in tensors.items()],
    )
    path.write_bytes(container.to_bytes())
    return path


def tiny_model(seed: int = 0, *, n_layers: int = 2, sub_norms: bool = True, tied: bool = True):
    """Return (metadata, tensors, signs): dim 128, 2 heads, 1 KV head, hidden 256, 40 tokens."""
    rng = np.random.default_rng(seed)
    dim, hidden, vocab, kv_dim = 128, 256, 40, 64
    metadata = {
        "general.architecture": (STRING, ARCH),
        f"{ARCH}.block_count": (UINT32, n_layers),
        f"{ARCH}.context_length": (UINT32, 32),
        f"{ARCH}.embedding_length": (UINT32, dim),
        f"{ARCH}.feed_forward_length": (UINT32, hidden),
        f"{ARCH}.attention.head_count": (UINT32, 2),
        f"{ARCH}.attention.head_count_kv": (UINT32, 1),
        f"{ARCH}.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        f"{ARCH}.rope.freq_base": (FLOAT32, 500000.0),
        f"{ARCH}.vocab_size": (UINT32, vocab),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "llama-bpe"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, [chr(ord("!") + i) for i in range(vocab)])),
        "tokenizer.ggml.token_type": (ARRAY, (UINT32, [1] * vocab)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, [])),
        "tokenizer.ggml.bos_token_id": (UINT32, 0),
    }
    tensors, signs = {}, {}

    def matrix(name: str, rows: int, cols: int) -> None:
        signs[name] = rng.integers(-1, 2, (rows, cols))
        tensors[name] = I2_S, (rows, cols), i2_s_bytes(signs[name], float(np.float32(rng.uniform(0.02, 0.1))))

    def norm(name: str, n: int) -> None:
        tensors[name] = F32, (n,), rng.uniform(0.5, 1.5, n).astype("<f4").tobytes()

    def table(name: str) -> None:
        tensors[name] = F16, (vocab, dim), rng.normal(size=(vocab, dim)).astype("<f2").tobytes()

    table("token_embd.weight")
    norm("output_norm.weight", dim)
    if not tied:
        table("output.weight")
    for blk in (f"blk.{i}." for i in range(n_layers)):
        norm(blk + "attn_norm.weight", dim)
        norm(blk + "ffn_norm.weight", dim)
        if sub_norms:
            norm(blk + "attn_sub_norm.weight", dim)
            norm(blk + "ffn_sub_norm.weight", hidden)
        matrix(blk + "attn_q.weight", dim, dim)
        matrix(blk + "attn_k.weight", kv_dim, dim)
        matrix(blk + "attn_v.weight", kv_dim, dim)
        matrix(blk + "attn_output.weight", dim, dim)
        matrix(blk + "ffn_gate.weight", hidden, dim)
        matrix(blk + "ffn_up.weight", hidden, dim)
        matrix(blk + "ffn_down.weight", dim, hidden)
    return metadata, tensors, signs
