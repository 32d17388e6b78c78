"""Traces of PyTorch models: ``crossval.torch.record`` (docs/pytorch.md)."""

try:
    import torch as _  # noqa: F401
except ImportError as error:
    raise ImportError("crossval.torch needs PyTorch: pip install 'bitnet-parity[hf]'") from error

from crossval.torch.recorder import record

__all__ = ["record"]
