"""A model's configuration and weights, and an arithmetic, as the C library's structs."""

from __future__ import annotations

from dataclasses import asdict

from bitnet_py import _native
from bitnet_py.arithmetic import GENERATIONS, Arithmetic
from bitnet_py.ggml_types import GGMLType
from bitnet_py.tables import TABLE_TYPES, Table
from bitnet_py.weights import I2SMatrix, LayerWeights, Weights


def _matrix(matrix: I2SMatrix) -> _native.Matrix:
    return _native.Matrix(
        _native.address(matrix.data),
        matrix.rows,
        matrix.cols,
        matrix.scale,
        matrix.factor,
        _native.address(matrix.bias),
    )


def _layer(weights: LayerWeights) -> _native.Layer:
    layer = _native.Layer()
    for name in _native.LAYER_NORMS:
        setattr(layer, name, _native.address(getattr(weights, name)))
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        setattr(layer, name, _matrix(getattr(weights, name)))
    return layer


def _table(rows: Table, kind: GGMLType) -> _native.TableStruct:
    return _native.TableStruct(_native.address(rows), TABLE_TYPES.index(kind))


def model_struct(weights: Weights) -> _native.ModelStruct:
    """Return the C struct of a model, which points into the arrays of ``weights``: these must outlive it."""
    config = weights.config
    return _native.ModelStruct(
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        vocab_size=config.vocab_size,
        activation=_native.ACTIVATIONS.index(config.architecture.activation),
        rope_pairing=_native.ROPE_PAIRINGS.index(config.architecture.rope_pairing),
        rms_eps=config.rms_eps,
        rope_base=config.rope_base,
        rope_scale=config.rope_scale,
        rope_factors=_native.address(weights.rope_factors),
        embedding_scale=config.embedding_scale,
        query_scale=config.query_scale or 0.0,
        token_embd=_table(weights.token_embd, weights.token_embd_type),
        output=_table(weights.head, weights.head_type),
        own_head=config.architecture.own_head,
        output_norm=_native.address(weights.output_norm),
        layers=(_native.Layer * config.n_layers)(*map(_layer, weights.layers)),
    )


def arithmetic_struct(arithmetic: Arithmetic) -> _native.ArithmeticStruct:
    """Return the C struct of an arithmetic."""
    values = asdict(arithmetic) | {"generation": GENERATIONS.index(arithmetic.generation)}
    return _native.ArithmeticStruct(**values)
