"""Everything a zoo case needs, made once: model files, the faulty library, healthy recordings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bitnet_py.gguf import GGUFFile
from bitnet_py.tokenizer import Tokenizer
from crossval.audit.checks import AuditResult
from crossval.model.weights import SpecWeights
from crossval.selftest.damage import damaged_copy
from tests.zoo import models
from tests.zoo.detect import audited
from tests.zoo.engine import Select, all_faults, faulty_library
from tests.zoo.fault import Case, TraceFault, WeightFault
from tests.zoo.faults.files import TOKENS
from tests.zoo.recording import Recording, record

TEXT = "It's 12345 o'clock:\n\n  what'll we DO? a'The <|start_header_id|>"
"""Tokenised differently by every tokeniser fault."""


def is_about_tokens(case: Case) -> bool:
    """Return whether the fault changes what a text is tokenised into, and no tensor."""
    return case.tap == TOKENS


@dataclass
class World:
    """A folder with the model files; ``open`` it to run C faults."""

    folder: Path
    _healthy: dict[str, Recording] = field(default_factory=dict, repr=False)
    _weights: dict[str, SpecWeights] = field(default_factory=dict, repr=False)
    _audits: dict[str, AuditResult] = field(default_factory=dict, repr=False)
    _select: Select | None = None

    @cached_property
    def library(self) -> Path:
        """Path of the build with all C faults."""
        return all_faults()

    def model(self, base: str) -> Path:
        """Return the path of a base model, written on first use."""
        path = self.folder / f"{base}.gguf"
        if not path.exists():
            models.write_base(base, path)
        return path

    def healthy(self, base: str) -> Recording:
        """Return what the healthy engine computes."""
        if base not in self._healthy:
            assert self._select is None, "record the healthy engine before the faulty one is loaded"
            self._healthy[base] = record(self.model(base))
        return self._healthy[base]

    def weights(self, base: str) -> SpecWeights:
        """Return the correct weights as the specification reads them."""
        if base not in self._weights:
            self._weights[base] = SpecWeights(self.model(base))
        return self._weights[base]

    def healthy_audit(self, base: str) -> AuditResult:
        """Return the audit of the healthy engine."""
        if base not in self._audits:
            self._audits[base] = audited(self.healthy(base), self.weights(base))
        return self._audits[base]

    @contextmanager
    def engine_faults(self) -> Iterator[None]:
        """Load the faulty library for the block; nothing else of the engine may be in use."""
        for base in models.BASES:
            self.healthy(base)
        with faulty_library(self.library) as select:
            self._select = select
            try:
                yield
            finally:
                self._select = None

    @property
    def select(self) -> Select:
        """Switch a C fault on; only inside ``engine_faults``."""
        assert self._select is not None, "C faults need the faulty library"
        return self._select

    def faulty(self, case: Case, kernel: str | None = None) -> Recording:
        """Return what an engine with this fault computes; C faults only inside ``engine_faults``."""
        fault = case.fault
        if isinstance(fault, WeightFault):
            return record(self.damaged(case), kernel)
        if isinstance(fault, TraceFault):
            recording = self.healthy(fault.base).copy()
            fault.change(recording, recording.first_pass(case.pass_kind), case.tap)
            return recording
        self.select(case.selection)
        try:
            return record(self.model(fault.base), kernel)
        finally:
            self.select("")

    def damaged(self, case: Case) -> Path:
        """Return a modified copy of the model file, valid until the next call."""
        fault = case.fault
        assert isinstance(fault, WeightFault)
        path = self.folder / "damaged.gguf"
        fault.damage(damaged_copy(self.model(fault.source or fault.base), path), case.tap)
        return path


def token_ids(model: Path) -> list[int]:
    """Tokenise ``TEXT`` with the tokenizer of a model file."""
    with GGUFFile.open(model) as gguf:
        return Tokenizer.from_gguf(gguf).encode(TEXT)
