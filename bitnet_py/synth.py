"""Write seeded synthetic BitNet models of any shape as GGUF: ``python -m bitnet_py.synth OUT``.

The weights are random, but the file is real: bitnet.cpp loads and runs it. The same configuration
gives the same bytes everywhere. Scales are chosen so that the residual stream and the logits stay
in a normal range at any depth (see ``write_model``).
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np

from bitnet_py.config import ARCHITECTURES, POOLINGS
from bitnet_py.errors import BitnetError, ModelError
from bitnet_py.ggml_types import FILE_TYPES, GGMLType, tensor_size_bytes
from bitnet_py.projections import PROJECTIONS
from bitnet_py.synth_config import NORMS, PRESETS, SynthConfig
from bitnet_py.synth_sentencepiece import SentencePieceVocab, build_sentencepiece
from bitnet_py.synth_tensors import plans, tensor
from bitnet_py.synth_vocab import Vocab, build_vocab
from bitnet_py.tables import TABLES

__all__ = ["PRESETS", "SynthConfig", "write_model"]


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
    if config.pooling is not None:
        writer.add_uint32(f"{arch}.pooling_type", POOLINGS.index(config.pooling))
    _write_tokenizer(writer, config)


def _write_tokenizer(writer: Any, config: SynthConfig) -> None:
    """Write a vocabulary; embedding models append EOS."""
    is_sentencepiece = config.sentencepiece
    build = build_sentencepiece if is_sentencepiece else build_vocab
    vocab: SentencePieceVocab | Vocab = build(config.vocab_size, config.seed)
    writer.add_string("tokenizer.ggml.model", "llama" if is_sentencepiece else "gpt2")
    if config.pre_type != "none":
        writer.add_string("tokenizer.ggml.pre", config.pre_type)
    writer.add_array("tokenizer.ggml.tokens", list(vocab.tokens))
    writer.add_array("tokenizer.ggml.token_type", list(vocab.token_types))
    if isinstance(vocab, Vocab):
        writer.add_array("tokenizer.ggml.merges", list(vocab.merges))
    else:
        writer.add_array("tokenizer.ggml.scores", list(vocab.scores))
        writer.add_bool("tokenizer.ggml.add_space_prefix", config.arch != "gemma3")
    writer.add_uint32("tokenizer.ggml.bos_token_id", vocab.bos_id)
    writer.add_uint32("tokenizer.ggml.eos_token_id", vocab.eos_id)
    writer.add_bool("tokenizer.ggml.add_bos_token", config.arch != "qwen3")
    if not ARCHITECTURES[config.arch].in_march:
        writer.add_bool("tokenizer.ggml.add_eos_token", True)


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
        planned = list(plans(config))
        for plan in planned:
            # Not uint8: for that dtype the writer would turn byte shapes into element shapes, and
            # it does not know the type I2_S. With any other dtype, shape, type and size are
            # written as given.
            dtype = {GGMLType.F16: np.float16, GGMLType.F32: np.float32}.get(plan.type, np.int8)
            size_bytes = tensor_size_bytes(plan.shape, plan.type)
            writer.add_tensor_info(plan.name, plan.shape, np.dtype(dtype), size_bytes, raw_dtype=int(plan.type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for plan in planned:
            writer.write_tensor_data(tensor(plan, config.seed))
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
    "pooling": "--pooling",
}


_DERIVED = {"head_dim": "dim / heads", "head": "the embedding's", "pre": "the architecture's", "pooling": "no key"}
"""What a field is without a value."""


def _shape_options(command: Any) -> Any:
    """Add one option per field of ``SynthConfig`` that takes a value."""
    choices = {"arch": ARCHITECTURES, "projections": PROJECTIONS, "embedding": TABLES, "head": TABLES}
    choices |= {"norms": NORMS, "pooling": dict.fromkeys(POOLINGS)}
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
@click.option("--no-sub-norms", is_flag=True, help="Omit the sub-norms (bitnet.cpp rejects that), or *_norm_in.")
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
