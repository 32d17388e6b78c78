"""A Hugging Face causal model, called pass by pass with its own KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from crossval.errors import BadInputError


class CachedModel:
    """Calls the model; the keys and values of earlier passes are in its cache."""

    def __init__(self, model: Any) -> None:
        """Raise ``BadInputError`` where the model is not one that can be called so."""
        if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
            raise BadInputError(
                f"{type(model).__name__} is not a causal model of transformers: give `forward`, a function of the "
                "token ids of a pass and the position of the first, which runs the model with its cache and "
                "returns the logits"
            )
        from transformers import DynamicCache

        self._model = model
        self._new_cache = DynamicCache
        self._cache: Any = None
        self._seen = (0, 0)
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # its name in older versions

    def __call__(self, token_ids: Sequence[int], start: int) -> Any:
        """Run one pass and return the logits; from position 0 the cache is empty."""
        if start == 0:
            self._cache = self._new_cache()
        ids = torch.tensor([list(token_ids)], dtype=torch.long, device=self._model.device)
        given = self._model(input_ids=ids, use_cache=True, **{self._cache_name: self._cache})
        self._seen = (start, start + len(token_ids))
        return given.logits

    def cached(self) -> Iterator[tuple[str, Any]]:
        """Yield the keys of the last pass as the cache holds them: ``past_key_values.{i}:keys``.

        ``(1, n_kv_heads, n_tokens, head_dim)``, rotated. A cache of another make has none.
        """
        for index, layer in enumerate(getattr(self._cache, "layers", ())):
            keys = getattr(layer, "keys", None)
            if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[2] == self._seen[1]:
                yield keys_name(index), keys[:, :, slice(*self._seen)]


def keys_name(layer: int) -> str:
    """Return what tap maps call a layer's keys in the cache."""
    return f"past_key_values.{layer}:keys"
