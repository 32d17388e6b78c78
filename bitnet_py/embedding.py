"""One vector that stands for a text: the pooled hidden states of a model, normalised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitnet_py.config import ModelConfig, Pooling
from bitnet_py.errors import InputError, ModelError
from bitnet_py.model import Model

Vector = npt.NDArray[np.float32]


def embed(
    model: Model,
    ids: Sequence[int] | npt.NDArray[np.int32],
    *,
    pooling: Pooling | None = None,
    normalize: bool = True,
) -> Vector:
    """Return the vector of a text, float32 ``(dim,)``, bit-identical to that of bitnet.cpp's ``llama-embedding``.

    All tokens are evaluated in one pass, and the LM head not at all. ``llama-embedding`` has flash
    attention by default: ``Arithmetic(flash_attention=True)``.

    Args:
        model: an open model, with an arithmetic of bitnet.cpp's main.
        ids: its tokens, at least one.
        pooling: how the vectors of the tokens become one; None: as the file says.
        normalize: divide by its length.

    Raises:
        InputError: no pooling, or as ``Model.forward``.
        ModelError: a value is not finite.
    """
    pooled = model.forward(
        ids, model.new_cache(), logits="none", pooling=pooling_for(model.config, pooling)
    ).pooled
    assert pooled is not None
    vector = normalized(pooled) if normalize else pooled
    if not np.isfinite(vector).all():
        raise ModelError(
            f"{model.path}: the vector has values that are not finite; "
            "check the weights with `bitnet inspect --verify`"
        )
    return vector


def pooling_for(config: ModelConfig, given: Pooling | None = None) -> Pooling:
    """Return the pooling given, or the file's. Raises ``InputError`` where there is none."""
    pooling = config.pooling if given is None else given
    if pooling == "none":
        said = "the file" if given is None else "the option"
        raise InputError(f"{said} gives no pooling, so that there is no vector of a text: name mean, last or cls")
    return pooling


def normalized(vector: Vector) -> Vector:
    """Return a vector of length 1, or 0 for one of length 0.

    Source: bitnet.cpp's main, common.cpp, ``common_embd_normalize``: squares in binary32, their
    sum one after the other in binary64, its inverse root rounded to binary32.
    """
    length = np.sqrt(np.cumsum((vector * vector).astype(np.float64))[-1])
    factor = np.float32(1.0 / length) if length > 0 else np.float32(0.0)
    out: Vector = vector * factor
    return out
