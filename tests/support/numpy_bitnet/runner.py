"""The NumPy engine as a live engine: it runs any prompt, any number of times."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Literal

from crossval.errors import UnavailableError
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord
from tests.support.numpy_bitnet.engine import Engine, Mistake
from tests.support.numpy_bitnet.main import Build, MainEngine
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.recorded import one_pass
from tests.support.numpy_bitnet.styles import PLAIN, Style


class NumpyBitnetRunner:
    """Gives the taps that ``keeps`` lets through, and no others; ``build``: it computes as bitnet.cpp's main."""

    status: Literal["live"] = "live"
    plan: tuple[PassPlan, ...] | None = None

    def __init__(
        self,
        model: Model,
        style: Style = PLAIN,
        mistakes: Sequence[Mistake] = (),
        *,
        keeps: Callable[[str], bool] = lambda name: True,
        numerics: Numerics | None = None,
        build: Build | None = None,
    ) -> None:
        stated = numerics or (Numerics() if build is None else build.numerics)
        self.identity = EngineIdentity("numpy", numerics=stated)
        self._new: Callable[[], Engine] = (
            (lambda: Engine(model, style, mistakes))
            if build is None
            else (lambda: MainEngine(model, style, mistakes, build=build))
        )
        self._keeps = keeps
        self.reset()

    def __enter__(self) -> NumpyBitnetRunner:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Refuse.

        Raises:
            UnavailableError: always; this engine is given tokens.
        """
        raise UnavailableError("the NumPy engine has no tokenizer")

    def reset(self) -> None:
        """Start a new sequence."""
        self._engine = self._new()

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run the next pass."""
        made = one_pass(self._engine, tuple(token_ids))
        return PassRecord(made.plan, {n: tap for n, tap in made.taps.items() if n in select and self._keeps(n)})
