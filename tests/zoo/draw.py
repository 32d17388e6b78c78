"""Faults drawn at random: a family, its parameter, a place, an engine and a model, all from one seed and number.

They are mistakes of ``tests/numpy_bitnet``, so that everything behind the first wrong tensor is computed from it,
as in a real engine. No code and no list of values is shared with ``crossval.diagnose.variants``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.support.numpy_bitnet.engine import Mistake
from tests.support.numpy_bitnet.styles import STYLES, Style
from tests.zoo.faults import drawn as families

SHAPES: dict[str, dict[str, object]] = {
    "two heads a KV head": {"n_layers": 3, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 512},
    "four KV heads": {"n_layers": 4, "dim": 256, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 640},
    "as many KV heads": {"n_layers": 3, "dim": 384, "n_heads": 6, "n_kv_heads": 6, "hidden_dim": 512},
    "large eps": {"n_layers": 3, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 384, "rms_eps": 1e-2},
}  # fmt: skip
VOCAB_SIZE = 301
ENGINES = tuple(
    style for style in STYLES if style.split is None and not style.name.startswith(("float32, 4", "float32, 32"))
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?(?:/\d+)?")


@dataclass(frozen=True)
class Right:
    """A correct diagnosis: contains one of these words, and all numbers of one of these choices."""

    words: tuple[str, ...]
    choices: tuple[tuple[float, ...], ...] = ((),)
    names: tuple[str, ...] = ()
    """Or it has one of these names, which leave the parameter open: it is lost in the rounding."""

    def fits(self, said: str) -> bool:
        """Return whether a diagnosis (name and sentence) is correct."""
        lower = said.lower()
        if any(lower.startswith(f"{name}:") for name in self.names):
            return True
        found = [_value(text) for text in _NUMBER.findall(lower)]
        return any(word.lower() in lower for word in self.words) and any(
            all(any(abs(one - number) <= 2e-3 * max(abs(number), 1e-12) for one in found) for number in numbers)
            for numbers in self.choices
        )


def _value(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


@dataclass(frozen=True)
class Drawn:
    """One fault in its place."""

    seed: int
    number: int
    family: str
    what: str
    """With its parameter."""
    mistake: Mistake
    tap: str
    """Full name of the first tap that is wrong."""
    pass_kind: str
    """Kind of the first pass that is wrong."""
    right: Right
    shape: str
    style: Style
    prompt: tuple[int, ...]
    n_decode: int

    @property
    def id(self) -> str:
        """What repeats it, and what it is."""
        place = f"{self.tap}, {self.pass_kind}, {self.style.name}"
        return f"{self.seed}:{self.number} {self.family} ({self.what}), {place}"


Draw = Callable[[Random, "families.Site"], families.Planned]


def draw(seed: int, number: int, attempt: int = 0) -> Drawn:
    """Return fault ``number``: families by rotation, the rest drawn; ``attempt``: draws the same number again."""
    rng = Random(f"{seed}/{number}/{attempt}")
    name, plan = families.FAMILIES[number % len(families.FAMILIES)]
    shape = rng.choice(list(SHAPES))
    size = SHAPES[shape]
    n_tokens = rng.randint(6, 20)
    site = families.Site(size, n_tokens, VOCAB_SIZE)
    made = plan(rng, site)
    layer = rng.randrange(int(size["n_layers"])) if made.layer is None else made.layer  # type: ignore[call-overload]
    kind = rng.choice(made.kinds)
    outside = made.op in ("inp_embd", "result_norm", "result_output")
    layers = None if outside else frozenset({layer})
    return Drawn(
        seed, number, name, made.what,
        Mistake(name, made.ops or (made.op,), made.code, layers, kind),
        made.op if outside else f"blk.{layer}.{made.op}",
        kind or "prefill",
        Right(made.words, (made.numbers, *made.or_numbers), made.or_names),
        shape,
        rng.choice(ENGINES),
        tuple(rng.randrange(VOCAB_SIZE) for _ in range(n_tokens)),
        2,
    )  # fmt: skip
