"""What was read of a model file and of its checkpoint: one row per tensor, one per key of the header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitnet_py.checkpoint_model import Role
from bitnet_py.tensor_facts import TensorFacts
from crossval.weights.blocks import Criterion

Scalar = bool | int | float | str | None
Level = Literal["wrong", "note"]


@dataclass(frozen=True)
class Expected:
    """What a tensor should hold, by the checkpoint."""

    source: str
    """Its name there."""
    role: Role
    shape: tuple[int, ...]
    dtype: str
    """Of its values in the checkpoint; ``uint8``: packed."""
    scale: float | None = None
    """Matrices: the float32 multiplier of the codes."""
    largest: float | None = None
    """Matrices of float weights: the largest absolute weight."""


@dataclass(frozen=True, order=True)
class Match:
    """A reading of a tensor under which it is, value by value, a tensor of the checkpoint."""

    tensor: str
    """GGUF name of that tensor."""
    how: tuple[str, ...]
    """Keys of ``readings.HOW``; empty: as it should be read."""


@dataclass(frozen=True)
class Compared:
    """A tensor compared with its own of the checkpoint, value by value."""

    n_values: int
    n_different: int
    n_at_ties: int
    """Of those, codes of weights so near to a rounding tie that the order of a float32 sum decides."""
    matches: tuple[Match, ...] = ()
    """Where they differ otherwise: the simplest readings that explain every value."""
    criterion: Criterion | None = None
    """Tables in blocks: by what values count as equal (``blocks``)."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the file or of the checkpoint."""

    name: str
    facts: TensorFacts | None
    """None: the file lacks it."""
    expected: Expected | None
    """None: the checkpoint has no such tensor, or there is no checkpoint."""
    compared: Compared | None = None
    skipped: str | None = None
    """Why it was not compared, although both have it."""
    copy_of: str | None = None
    """Another tensor of the file with the same bytes, where the checkpoint has no tensor of this name."""


@dataclass(frozen=True)
class KeyRow:
    """One key of the header, or one fact that several keys state."""

    key: str
    expected: Scalar
    found: Scalar
    """What an engine takes; where the key is missing, the default."""
    level: Level = "wrong"
    detail: str | None = None
    """More about a difference."""


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a checkpoint."""

    name: str
    sha256: str


@dataclass(frozen=True)
class WeightsResult:
    """Everything that was read and compared."""

    rows: tuple[TensorRow, ...]
    keys: tuple[KeyRow, ...]
    files: tuple[CheckpointFile, ...]
    """Of the checkpoint; none: there was none."""
    not_compared: tuple[str, ...] = ()
    """Why something besides tensors could not be compared."""

    @property
    def has_checkpoint(self) -> bool:
        """Return whether the file was compared with a checkpoint."""
        return bool(self.files)
