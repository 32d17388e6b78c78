"""Write seeded synthetic BitNet models of any shape as GGUF: ``python -m bitnet_py.synth OUT``.

The weights are random, but the file is real: bitnet.cpp loads and runs it. The same configuration
gives the same bytes everywhere. Scales are chosen so that the residual stream and the logits stay
in a normal range at any depth (see ``write_model``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import numpy.typing as npt

from bitnet_py.config import ARCHITECTURES
from bitnet_py.errors import BitnetError, ModelError
from bitnet_py.ggml_types import BLOCK_LAYOUT, FILE_TYPES, GGMLType, tensor_size_bytes
from bitnet_py.projections import PROJECTIONS, block_of, ternary_tensor
from bitnet_py.quants import pack_codes
from bitnet_py.synth_random import Stream
from bitnet_py.synth_vocab import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, build_vocab
from bitnet_py.tables import TABLES

_RESIDUAL_RMS = 2.0
_LOGIT_STD = 3.0
_PROJECTION_RMS = {"attn_q": 1.3, "attn_k": 1.3, "attn_v": 1.0, "ffn_gate": 1.0, "ffn_up": 1.0}
_CODES = np.repeat(np.array([0, 1, 2], np.uint8), [77, 102, 77])
"""Code of each byte value: 30 % -1, 40 % 0, 30 % +1."""
_NONZERO = 154 / 256
_BIAS_RMS = 0.3
"""Of a bias, over that of the products it is added to."""
NORMS = {"f32": GGMLType.F32, "f16": GGMLType.F16}
"""Name on the command line -> type of the weights of norms."""
_RANDOM_BLOCKS = {GGMLType.Q6_K: (208, 18.5 * 73.9), GGMLType.Q3_K: (108, 2.35 * 18.5)}
"""Byte of the float16 in a block, and RMS of code times scale where all other bits are random."""


@dataclass(frozen=True)
class SynthConfig:
    """What to write; names as in ``ModelConfig``."""

    n_layers: int = 4
    dim: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden_dim: int = 768
    vocab_size: int = 512
    context_length: int = 2048
    rope_base: float = 500000.0
    rms_eps: float = 1e-5
    seed: int = 0
    arch: str = "bitnet-b1.58"
    projections: str = "i2_s"
    """Type of the ternary matrices: ``i2_s``, which bitnet.cpp reads, ``tq1_0`` or ``tq2_0``, which llama.cpp
    does (as ``--arch bitnet``), or ``f16`` or ``f32``, which converters write on the way."""
    embedding: str = "f16"
    """Type of the embedding, which is also the LM head unless there is another."""
    head: str | None = None
    """Type of a separate LM head; None: the embedding's."""
    norms: str = "f32"
    """Type of the weights of norms, ``f32`` or ``f16``."""
    pre: str = "llama-bpe"
    """Value of ``tokenizer.ggml.pre``; ``none`` omits the key, as the official 2B-4T file does."""
    untied_head: bool = False
    """Write a separate ``output.weight``; bitnet.cpp uses it in ``llama`` only, others load and ignore it."""
    sub_norms: bool = True
    """False omits ``attn_sub_norm`` and ``ffn_sub_norm``; bitnet.cpp rejects such a file. ``llama`` has none."""
    head_dim: int | None = None
    """Width of one head; None: ``dim / n_heads``, the only one that bitnet.cpp loads but for ``llama``."""
    biases: bool = False
    """Write biases of Q, K, V and the attention output."""
    rope_freqs: bool = False
    """Write ``rope_freqs.weight``, divisors of the angles of RoPE."""
    scales: bool = False
    """Write a ``.scale`` for every matrix."""
    rope_scaling: float = 1.0
    """Factor of linear RoPE scaling; 1 omits the keys."""

    @property
    def projection_type(self) -> GGMLType:
        """Return the type of the ternary matrices."""
        return PROJECTIONS[self.projections]

    @property
    def head_size(self) -> int:
        """Return the width of one head."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    def check(self) -> None:
        """Raise ``ModelError`` for a shape that no engine could run."""
        for name in ("n_layers", "dim", "n_heads", "n_kv_heads", "hidden_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ModelError(f"synthetic model: expected {name} of at least 1, found {getattr(self, name)}")
        if self.projections not in PROJECTIONS:
            names = " or ".join(PROJECTIONS)
            raise ModelError(f"synthetic model: expected projections {names}, found {self.projections!r}")
        for kind in (self.embedding, *([] if self.head is None else [self.head])):
            if kind not in TABLES:
                raise ModelError(f"synthetic model: expected embedding {' or '.join(TABLES)}, found {kind!r}")
            elements = BLOCK_LAYOUT[TABLES[kind]][0]
            if self.dim % elements:
                raise ModelError(
                    f"synthetic model: expected dim to be a multiple of {elements} for {kind}, found {self.dim}"
                )
        if self.norms not in NORMS:
            raise ModelError(f"synthetic model: expected norms {' or '.join(NORMS)}, found {self.norms!r}")
        block = block_of(self.projection_type)
        for name, value, divisor in (
            ("dim", self.dim, block),
            ("hidden_dim", self.hidden_dim, block),
            *([("dim", self.dim, 2 * self.n_heads)] if self.head_dim is None else []),
            ("head_dim", self.head_size, 2),
            ("n_heads * head_dim", self.n_heads * self.head_size, block),
            ("n_heads", self.n_heads, self.n_kv_heads),
        ):
            if value % divisor:
                raise ModelError(f"synthetic model: expected {name} to be a multiple of {divisor}, found {value}")
        if not MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE:
            limits = f"{MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}"
            raise ModelError(f"synthetic model: expected vocab_size from {limits}, found {self.vocab_size}")
        if self.arch not in ARCHITECTURES:
            raise ModelError(f"synthetic model: expected arch {' or '.join(ARCHITECTURES)}, found {self.arch!r}")
        known = ARCHITECTURES[self.arch]
        for name, has in (("biases", known.biases), ("rope_freqs", known.rope_factors), ("scales", known.scales)):
            if getattr(self, name) and not has:
                raise ModelError(f"synthetic model: expected no {name} in {self.arch}, found some")
        for name in ("rope_base", "rms_eps", "rope_scaling"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ModelError(f"synthetic model: expected {name} above 0, found {getattr(self, name)}")


# fmt: off
PRESETS = {
    "tiny": SynthConfig(),
    "small": SynthConfig(n_layers=5, dim=384, n_heads=6, n_kv_heads=2, hidden_dim=1024, vocab_size=1024),
    "odd": SynthConfig(n_layers=7, dim=640, n_heads=5, n_kv_heads=1, hidden_dim=1792, vocab_size=777),
    "2b-4t": SynthConfig(
        n_layers=30, dim=2560, n_heads=20, n_kv_heads=5, hidden_dim=6912, vocab_size=128256, context_length=4096
    ),
    "falcon3-1b": SynthConfig(
        n_layers=18, dim=2048, n_heads=8, n_kv_heads=4, hidden_dim=8192, vocab_size=131072, context_length=8192,
        rope_base=1000042.0, rms_eps=1e-6, arch="llama", head_dim=256, untied_head=True,
    ),
}
# fmt: on


@dataclass(frozen=True)
class _Plan:
    """One tensor to write: its place in the file and the typical size of its values."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    rms: float = 1.0
    """RMS of the outputs for a unit-RMS input (ternary matrices), or of the values (tables)."""


def _plan(config: SynthConfig) -> Iterator[_Plan]:
    """Yield the tensors in file order."""
    dim, hidden_dim = config.dim, config.hidden_dim
    q_dim, kv_dim = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    embedding_rms = _LOGIT_STD / math.sqrt(dim)
    branch_rms = _RESIDUAL_RMS / math.sqrt(2 * config.n_layers)
    yield _Plan("token_embd.weight", TABLES[config.embedding], (config.vocab_size, dim), embedding_rms)
    for layer in range(config.n_layers):
        norms: list[tuple[str, int]] = [("attn_norm", dim), ("ffn_norm", dim)]
        if config.sub_norms and ARCHITECTURES[config.arch].sub_norms:
            norms += [("attn_sub_norm", q_dim), ("ffn_sub_norm", hidden_dim)]
        for name, width in norms:
            yield _Plan(f"blk.{layer}.{name}.weight", NORMS[config.norms], (width,))
        for name, rows, cols in (
            ("attn_q", q_dim, dim),
            ("attn_k", kv_dim, dim),
            ("attn_v", kv_dim, dim),
            ("attn_output", dim, q_dim),
            ("ffn_gate", hidden_dim, dim),
            ("ffn_up", hidden_dim, dim),
            ("ffn_down", dim, hidden_dim),
        ):
            rms = _PROJECTION_RMS.get(name, branch_rms)
            yield _Plan(f"blk.{layer}.{name}.weight", config.projection_type, (rows, cols), rms)
            if config.scales:
                yield _Plan(f"blk.{layer}.{name}.scale", GGMLType.F32, (1,))
            if config.biases and name.startswith("attn_"):
                yield _Plan(f"blk.{layer}.{name}.bias", GGMLType.F32, (rows,), _BIAS_RMS * rms)
    if config.rope_freqs:
        yield _Plan("rope_freqs.weight", GGMLType.F32, (config.head_size // 2,))
    yield _Plan("output_norm.weight", NORMS[config.norms], (dim,))
    if config.untied_head or config.head is not None:
        yield _Plan(
            "output.weight", TABLES[config.head or config.embedding], (config.vocab_size, dim), embedding_rms
        )


def _f16_matrix(plan: _Plan, stream: Stream) -> npt.NDArray[np.float16]:
    """Return values of the sum of two uniform variables, chunk by chunk to bound memory."""
    rows, cols = plan.shape
    out = np.empty((rows, cols), np.float16)
    step = max(1, (1 << 22) // cols)
    # A uniform 16-bit integer has variance 2^32 / 12; exact float32 values up to one rounding.
    unit = np.float32(plan.rms * math.sqrt(6) / 65536)
    for start in range(0, rows, step):
        n_rows = min(step, rows - start)
        pairs = stream.uint16(2 * n_rows * cols).reshape(2, n_rows, cols).astype(np.int32)
        out[start : start + n_rows] = ((pairs[0] + pairs[1] - 65535).astype(np.float32) * unit).astype(np.float16)
    return out


def _norm(plan: _Plan, stream: Stream) -> npt.NDArray[np.floating[Any]]:
    """Return weights spread evenly over 0.5 .. 1.5, all exact in float32."""
    fraction: npt.NDArray[np.float32] = stream.uint16(plan.shape[0]).astype(np.float32) / np.float32(65536)
    fraction += np.float32(0.5)
    return fraction if plan.type is GGMLType.F32 else fraction.astype(np.float16)


def _bias(plan: _Plan, stream: Stream) -> npt.NDArray[np.float32]:
    """Return values spread evenly around 0."""
    values: npt.NDArray[np.float32] = stream.uint16(plan.shape[0]).astype(np.float32) - np.float32(32767.5)
    values *= np.float32(plan.rms * math.sqrt(12) / 65536)
    return values


def _rope_factors(plan: _Plan, stream: Stream) -> npt.NDArray[np.float32]:
    """Return divisors from 1 to 8, rising with the pair, as those of Llama 3.1 do."""
    rise = np.sort(stream.uint16(plan.shape[0])).astype(np.float32) / np.float32(65536)
    factors: npt.NDArray[np.float32] = np.float32(1) + np.float32(7) * rise
    return factors


def _ternary(plan: _Plan, stream: Stream) -> npt.NDArray[np.uint8]:
    """Return the bytes of a ternary tensor whose scale is its own: within 20 % of what gives ``plan.rms``."""
    rows, cols = plan.shape
    jitter = 0.8 + 0.4 * stream.below(1 << 16) / (1 << 16)
    scale = jitter * plan.rms / math.sqrt(_NONZERO * cols)
    codes = _CODES[stream.bytes(rows * cols)].reshape(rows, cols)
    return ternary_tensor(pack_codes(codes), scale, plan.type)


def _table(plan: _Plan, stream: Stream) -> npt.NDArray[Any]:
    """Return the rows of an embedding or a head: the values of ``_f16_matrix``, rounded to another type.

    Types that the ``gguf`` package cannot write get random codes and scales instead, of the same typical size.
    """
    if plan.type in _RANDOM_BLOCKS:
        return _random_blocks(plan, stream)
    values = _f16_matrix(plan, stream)
    if plan.type is GGMLType.F16:
        return values
    kind = gguf.GGMLQuantizationType(int(plan.type))
    step = max(1, (1 << 22) // values.shape[1])
    parts = [gguf.quantize(values[i : i + step].astype(np.float32), kind) for i in range(0, len(values), step)]
    return np.concatenate(parts)


def _random_blocks(plan: _Plan, stream: Stream) -> npt.NDArray[np.uint8]:
    rows, cols = plan.shape
    elements, size_bytes = BLOCK_LAYOUT[plan.type]
    n_blocks, (at, spread) = cols // elements, _RANDOM_BLOCKS[plan.type]
    out = stream.bytes(rows * n_blocks * size_bytes).reshape(rows, n_blocks, size_bytes)
    jitter = 0.8 + 0.4 * stream.uint16(rows * n_blocks).astype(np.float32).reshape(rows, n_blocks, 1) / 65536
    out[..., at : at + 2] = (jitter * np.float32(plan.rms / spread)).astype("<f2").view(np.uint8)
    return out.reshape(rows, -1)


def _tensor(plan: _Plan, seed: int) -> npt.NDArray[Any]:
    stream = Stream(seed, plan.name)
    if plan.name in ("token_embd.weight", "output.weight"):
        return _table(plan, stream)
    if plan.name.endswith(".bias"):
        return _bias(plan, stream)
    if plan.name == "rope_freqs.weight":
        return _rope_factors(plan, stream)
    return _ternary(plan, stream) if len(plan.shape) == 2 else _norm(plan, stream)


def _write_metadata(writer: Any, config: SynthConfig) -> None:
    arch = config.arch
    writer.add_string("general.name", f"synthetic {arch}, random weights, seed {config.seed}")
    writer.add_uint32("general.quantization_version", 2)
    writer.add_uint32("general.file_type", FILE_TYPES[config.projection_type])
    for key, value in (
        ("vocab_size", config.vocab_size),
        ("context_length", config.context_length),
        ("embedding_length", config.dim),
        ("block_count", config.n_layers),
        ("feed_forward_length", config.hidden_dim),
        ("rope.dimension_count", config.head_size),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.n_kv_heads),
    ):
        writer.add_uint32(f"{arch}.{key}", value)
    if config.head_dim is not None:
        writer.add_uint32(f"{arch}.attention.key_length", config.head_dim)
        writer.add_uint32(f"{arch}.attention.value_length", config.head_dim)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_eps)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_base)
    if config.rope_scaling != 1:
        writer.add_string(f"{arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{arch}.rope.scaling.factor", config.rope_scaling)
    vocab = build_vocab(config.vocab_size, config.seed)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    if config.pre != "none":
        writer.add_string("tokenizer.ggml.pre", config.pre)
    writer.add_array("tokenizer.ggml.tokens", list(vocab.tokens))
    writer.add_array("tokenizer.ggml.token_type", list(vocab.token_types))
    writer.add_array("tokenizer.ggml.merges", list(vocab.merges))
    writer.add_uint32("tokenizer.ggml.bos_token_id", vocab.bos_id)
    writer.add_uint32("tokenizer.ggml.eos_token_id", vocab.eos_id)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)


def write_model(path: str | os.PathLike[str], config: SynthConfig) -> None:
    """Write the model; the same configuration gives the same bytes.

    Scales: every projection of a unit-RMS input has an RMS near 1; the two branches of each layer
    add up to a residual stream of RMS near 2 at the end whatever the depth; embedding values of std
    3 / sqrt(dim) give logits of std near 3. Only one tensor is in memory at a time. The file
    appears complete or not at all.

    Raises:
        ModelError: a shape that no engine could run, or the file cannot be written.
    """
    config.check()
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        _write(partial, config)
        os.replace(partial, target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, config: SynthConfig) -> None:
    writer = gguf.GGUFWriter(path, config.arch)
    try:
        _write_metadata(writer, config)
        plans = list(_plan(config))
        for plan in plans:
            # Not uint8: for that dtype the writer would turn byte shapes into element shapes, and
            # it does not know the type I2_S. With any other dtype, shape, type and size are
            # written as given.
            dtype = {GGMLType.F16: np.float16, GGMLType.F32: np.float32}.get(plan.type, np.int8)
            size_bytes = tensor_size_bytes(plan.shape, plan.type)
            writer.add_tensor_info(plan.name, plan.shape, np.dtype(dtype), size_bytes, raw_dtype=int(plan.type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for plan in plans:
            writer.write_tensor_data(_tensor(plan, config.seed))
    finally:
        writer.close()


_OPTIONS = {
    "n_layers": "--layers",
    "dim": "--dim",
    "n_heads": "--heads",
    "n_kv_heads": "--kv-heads",
    "head_dim": "--head-dim",
    "hidden_dim": "--hidden",
    "vocab_size": "--vocab",
    "context_length": "--context",
    "rope_base": "--rope-base",
    "rms_eps": "--eps",
    "seed": "--seed",
    "arch": "--arch",
    "projections": "--projections",
    "embedding": "--embedding",
    "head": "--head",
    "norms": "--norms",
    "pre": "--pre",
    "rope_scaling": "--rope-scaling",
}


_DERIVED = {"head_dim": "dim / heads", "head": "the embedding's"}
"""What a field is without a value."""


def _shape_options(command: Any) -> Any:
    """Add one option per field of ``SynthConfig`` that takes a value."""
    choices = {"arch": ARCHITECTURES, "projections": PROJECTIONS, "embedding": TABLES, "head": TABLES}
    choices["norms"] = NORMS
    kinds = {"str | None": str, "int": int, "int | None": int, "float": float, "str": str}
    for field in reversed([field for field in fields(SynthConfig) if field.name in _OPTIONS]):
        also = ["--architecture"] if field.name == "arch" else []
        option = click.option(
            _OPTIONS[field.name],
            *also,
            field.name,
            type=click.Choice(list(choices[field.name])) if field.name in choices else kinds[str(field.type)],
            help=f"Default {_DERIVED.get(field.name, field.default)} without a preset.",
        )
        command = option(command)
    return command


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--preset", type=click.Choice(list(PRESETS)), default="tiny", help="Shape to start from.")
@_shape_options
@click.option("--untied-head", is_flag=True, help="Write a separate output.weight.")
@click.option("--no-sub-norms", is_flag=True, help="Omit the sub-norms (bitnet.cpp rejects such files).")
@click.option("--biases", is_flag=True, help="Write biases of Q, K, V and the attention output (llama).")
@click.option("--rope-freqs", is_flag=True, help="Write rope_freqs.weight, divisors of RoPE's angles (llama).")
@click.option("--scales", is_flag=True, help="Write a .scale for every matrix (bitnet, llama).")
def main(out: Path, preset: str, no_sub_norms: bool, **given: Any) -> None:
    """Write a synthetic BitNet model to OUT.

    Example: python -m bitnet_py.synth tiny.gguf --layers 4 --dim 256 --heads 4 --kv-heads 2
    --hidden 768
    """
    changed = {name: value for name, value in given.items() if value is not None and value is not False}
    config = replace(PRESETS[preset], **changed, sub_norms=not no_sub_norms)
    try:
        write_model(out, config)
    except BitnetError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"{out}: {out.stat().st_size} bytes", err=True)


if __name__ == "__main__":
    main()
