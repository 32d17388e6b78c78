"""Forward hooks on the modules of a PyTorch model: what goes in and what comes out, copied when it is computed.

Names, as tap maps use them: a module's path is its output (of several, the first), ``PATH:input`` its first tensor
argument, ``PATH:output.1`` its second result. What no module computes is seen where it goes into a function of
PyTorch or comes out: ``PATH:matmul`` is the result of the first ``torch.matmul`` called inside the module,
``PATH:matmul.input`` its first argument, and the same of ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from crossval.errors import BadInputError

MAX_RESULTS = 4
"""Results of a module that have names."""
_FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
_FUNCTIONS = {
    torch.matmul: "matmul",
    torch.nn.functional.scaled_dot_product_attention: "scaled_dot_product_attention",
}


class _Calls(TorchFunctionMode):  # type: ignore[misc]  # PyTorch is not installed where types are checked
    """Sees the functions of PyTorch that are called while a module runs."""

    def __init__(self, keep: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._keep = keep
        self.inside: list[tuple[str, set[str]]] = []
        """Modules that run now and of which calls are wanted, with the functions they have called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; of the first call inside a module, keep argument and result."""
        name = _FUNCTIONS.get(func)
        if name is None or not self.inside or name in self.inside[-1][1]:
            return func(*args, **(kwargs or {}))
        path, called = self.inside[-1]
        called.add(name)
        self._keep(f"{path}:{name}.input", args[0] if args else None)
        result = func(*args, **(kwargs or {}))
        self._keep(f"{path}:{name}", result)
        return result


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
        self.calls = _Calls(self.keep)
        """To be entered around each pass."""
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
            calls = [name for name in call_names(path) if self._wanted(name)]
            if calls:
                self._handles.append(module.register_forward_pre_hook(self._on_begin(path)))
                self._handles.append(module.register_forward_hook(self._on_end, always_call=True))
            self.names += inputs + results + calls
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
                f"module {name} was called more than once in one pass: which of its tensors is meant is not "
                "clear; leave it out of the tap map"
            )
        self._taken[name] = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
        self.dtypes[name] = dtype

    def take(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return what was copied since the last call."""
        taken, self._taken = self._taken, {}
        return taken

    def _on_begin(self, path: str) -> Callable[..., None]:
        return lambda *_: self.calls.inside.append((path, set()))

    def _on_end(self, *_: Any) -> None:
        self.calls.inside.pop()

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


def call_names(path: str) -> Iterator[str]:
    """Yield what arguments and results of functions inside a module are called."""
    for name in _FUNCTIONS.values():
        yield from (f"{path}:{name}", f"{path}:{name}.input")


def dtype_name(tensor: Any) -> str | None:
    """Return the format of a floating tensor; None: it is something else."""
    return _FLOATS.get(tensor.dtype) if isinstance(tensor, torch.Tensor) else None


def result_names(path: str) -> Iterator[str]:
    """Yield what a module's results are called: its path, then ``PATH:output.1`` and so on."""
    yield path
    yield from (f"{path}:output.{index}" for index in range(1, MAX_RESULTS))
