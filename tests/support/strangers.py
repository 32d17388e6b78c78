"""Our engine under another name and build, correct or wrong in chosen places; the command line, run in-process."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

import bitnet_py
from crossval.cli import cli
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.formats import to_f16
from crossval.model.weights import SpecWeights
from crossval.passes import EngineIdentity, Numerics, PassRecord, TapArray
from crossval.selftest import damage

PROMPT = "Hello there"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="crossval")


def error_line(result: Result) -> str:
    """Return the message of a failed command: one line on stderr, nothing like a traceback anywhere."""
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@dataclasses.dataclass(frozen=True)
class Fault:
    """The faults of a stranger; none by default."""

    rolled_from: str | None = None
    """``1/ffn_sub_norm``: the features of this layer's ffn_sub_norm are shifted by one, and used that way."""
    scaled: tuple[tuple[str, float], ...] = ()
    """``("blk.0.ffn_act", 1.01)``: the largest element of this tap in every pass, times the factor."""
    invalid: str | None = None
    """A tap that is NaN throughout."""
    ignores_output: bool = False
    """Whether the LM head uses the embedding although the model has a separate table, as bitnet.cpp does."""


class Stranger(BitnetPyRunner):
    """Our engine under another identity."""

    name = "bitnet.cpp"
    fault = Fault()
    anonymous = False
    """Does not state how it rounds."""
    _rolled: int | None = None
    """Layer whose ffn_down multiplies moved features."""

    @property
    def identity(self) -> EngineIdentity:
        numerics = Numerics() if self.anonymous else super().identity.numerics
        return dataclasses.replace(super().identity, name=self.name, library_digest="f" * 64, numerics=numerics)

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        self._use_rolled()
        wanted = [*select, "result_norm"] if self.fault.ignores_output else select
        record = super().eval(token_ids, wanted)
        given = dict(record.taps)
        self._roll(given)
        for tap, factor in self.fault.scaled:
            if tap in given:
                flat = given[tap].array.reshape(-1)
                flat[np.abs(flat).argmax()] *= np.float32(factor)
        if self.fault.invalid in given:
            given[self.fault.invalid].array[...] = np.nan
        if self.fault.ignores_output and "result_output" in given:
            table = SpecWeights(self.model_path)["token_embd.weight"]
            logits = to_f16(given["result_norm"].array) @ np.asarray(table, np.float64).T
            given["result_output"] = TapArray(logits.astype(np.float32), given["result_output"].rows)
        return PassRecord(record.plan, {name: given[name] for name in given if name in select})

    def _use_rolled(self) -> None:
        """Load the model with the columns of ffn_down moved: on unmoved features it gives what moved ones give."""
        layer = int(self.fault.rolled_from.partition("/")[0]) if self.fault.rolled_from else None
        if layer == self._rolled:
            return
        assert layer is not None
        self._rolled = layer
        with tempfile.TemporaryDirectory() as folder:
            damaged = damage.damaged_copy(self.model_path, Path(folder) / "rolled.gguf")
            packed = damaged.packed(f"blk.{layer}.ffn_down.weight")
            packed[:] = damage.pack(np.roll(damage.codes(packed), -1, axis=-1))
            assert self._model is not None
            self._model.close()
            self._model = bitnet_py.Model.from_gguf(damaged.path, n_threads=1)
        self._cache = self._model.new_cache()

    def _roll(self, given: dict[str, TapArray]) -> None:
        found = given.get(f"blk.{self._rolled}.ffn_sub_norm")
        if found is not None:
            found.array[...] = np.roll(found.array, 1, axis=-1)
