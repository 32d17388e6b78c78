"""Forward hooks on the modules of a PyTorch model: what goes in and what comes out, copied when it is computed.

Names, as tap maps use them: a module's path is its output (of several, the first), ``PATH:input`` its first tensor
argument, ``PATH:output.1`` its second result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossval.errors import BadInputError

MAX_RESULTS = 4
"""Results of a module that have names."""
_FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}


class Hooks:
    """Hooks on those modules of which a name is wanted; in force within ``with``. The model is not changed."""

    def __init__(self, model: Any, wanted: Callable[[str], bool]) -> None:
        """``wanted``: says of a name whether it is copied."""
        self._model = model
        self._wanted = wanted
        self._handles: list[Any] = []
        self._taken: dict[str, npt.NDArray[np.float32]] = {}
        self.names: list[str] = []
        """What the hooks may give."""
        self.selected: Collection[str] | None = None
        """What they are to copy; None: all."""
        self.dtypes: dict[str, str] = {}
        """Name -> the format its tensor had: ``f32``, ``bf16``, ``f16``, ``f64``."""

    def __enter__(self) -> Hooks:
        for path, module in self._model.named_modules():
            results = [name for name in result_names(path) if self._wanted(name)]
            inputs = [name for name in (f"{path}:input",) if self._wanted(name)]
            for name in inputs:
                hook = module.register_forward_pre_hook(self._on_input(name), with_kwargs=True)
                self._handles.append(hook)
            if results:
                self._handles.append(module.register_forward_hook(self._on_output(path, frozenset(results))))
            self.names += inputs + results
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def keep(self, name: str, tensor: Any) -> None:
        """Copy a tensor, widened to float32, under a name; what is not selected, or no floating tensor, is left.

        Raises:
            BadInputError: there is already one of this name in this pass.
        """
        dtype = dtype_name(tensor)
        if dtype is None:
            return
        if self.selected is not None and name not in self.selected:
            return
        if name in self._taken:
            raise BadInputError(
                f"module {name} was called more than once in one pass: which of its tensors is meant is not clear; "
                "leave it out of the tap map"
            )
        self._taken[name] = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
        self.dtypes[name] = dtype

    def take(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return what was copied since the last call."""
        taken, self._taken = self._taken, {}
        return taken

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            self.keep(name, given[0] if given else None)

        return hook

    def _on_output(self, path: str, wanted: frozenset[str]) -> Callable[..., None]:
        def hook(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
            results = output if isinstance(output, tuple | list) else (output,)
            for name, result in zip(result_names(path), results, strict=False):
                if name in wanted:
                    self.keep(name, result)

        return hook


def dtype_name(tensor: Any) -> str | None:
    """Return the format of a floating tensor; None: it is something else."""
    return _FLOATS.get(tensor.dtype) if isinstance(tensor, torch.Tensor) else None


def result_names(path: str) -> Iterator[str]:
    """Yield what a module's results are called: its path, then ``PATH:output.1`` and so on."""
    yield path
    yield from (f"{path}:output.{index}" for index in range(1, MAX_RESULTS))
