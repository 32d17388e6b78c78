"""What broken engines print: every fault that the shipped model can have, and mistakes around the engine.

``python -m tests.zoo --texts`` writes crossval/data/triage/texts.json, on which ``crossval triage --output`` ranks
suspects, and the tables of docs/triage.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_py import Model
from bitnet_py.resources import default_model_path
from crossval.selftest.damage import damaged_copy
from tests.zoo import around
from tests.zoo.around import RIGHT, Around
from tests.zoo.catalogue import FAULTS
from tests.zoo.engine import all_faults, faulty_library
from tests.zoo.fault import FAMILIES, EngineFault, Fault, TraceFault, WeightFault
from tests.zoo.faults.files import TOKENS

N_TOKENS = 24
PROMPTS = (
    "What is 2+2?", "What is the capital of France?", "What is the opposite of hot?",
    "What day comes after Monday?", "What comes next: 4 5 6?", "Sort these numbers: 3 1 2.",
    "Say these words backwards: sun moon star.", "Is 7 larger than 3?", "What is the plural of cat?",
    "Say these words twice: fish cake.",
)  # fmt: skip
"""Those of the suite ``fixed-10``: evidence is taken from them."""
HELD_OUT = (
    "The capital of Kenya is", "Ankara is the capital of", "What day comes before Friday?", "Is a peach a day?",
    "What comes next: 32 30 28?", "Repeat these words: island wind map.",
    "Say these words twice: teacher map ice.", "How many words: map boat hill pen desk?", "Is 70 larger than 8?",
    "Is an elephant larger than a lion?",
)  # fmt: skip
"""Of the suite ``long-500``: they measure how good the ranking is."""
UNUSED = (
    "file-head-not-tied",
    "file-pre-tokeniser-default",
    "file-pre-tokeniser-not-named",
    "file-special-tokens-as-text",
)
"""Weight faults made for other files than the shipped model."""


@dataclass(frozen=True)
class Broken:
    """One broken engine."""

    fault: str
    family: str
    what: str
    place: str = "everywhere"
    """Where the fault sits: ``everywhere``, one layer, one operation, one kind of pass."""
    select: str = ""
    """In the words of ``BN_FAULT``; "" for none."""
    damage: WeightFault | None = None
    around: Around = RIGHT


@dataclass(frozen=True)
class Text:
    """What one engine printed for one prompt."""

    engine: Broken
    prompt: str
    text: str


def broken() -> Iterator[Broken]:
    """Yield every engine: each fault everywhere and in fewer places, then the mistakes around the engine."""
    for fault in FAULTS:
        if isinstance(fault, EngineFault):
            yield from _of_engine(fault)
        elif isinstance(fault, WeightFault) and fault.name not in UNUSED:
            places = ["everywhere"] if not fault.layers or fault.layers == (0,) else ["everywhere", "one layer"]
            yield from (Broken(fault.name, family(fault), fault.what, place, damage=fault) for place in places)
        else:
            assert isinstance(fault, TraceFault) or fault.name in UNUSED  # these break no engine of this model
    for mistake in around.FAULTS:
        yield Broken(mistake.name, mistake.family, mistake.what, around=mistake)


def family(fault: Fault) -> str:
    """Return the fault's class."""
    return around.READS if fault.taps == (TOKENS,) else FAMILIES[fault.family - 1]


def _of_engine(fault: EngineFault) -> Iterator[Broken]:
    places = {"everywhere": ""}
    ops = list(dict.fromkeys(fault.ops.values()))
    if len(ops) > 1:
        places |= {f"op {op}": f":op={op}" for op in (ops[0], ops[-1])}
    if fault.layers:
        places["one layer"] = ":layer=1"
    if len(fault.passes) > 1:
        places |= {f"{kind} only": f":pass={kind}" for kind in fault.passes}
    for place, words in places.items():
        yield Broken(fault.name, family(fault), fault.what, place, select=fault.name + words)


def texts(engines: Sequence[Broken], prompts: Sequence[str], folder: Path) -> Iterator[Text]:
    """Yield what each engine prints for each prompt, greedily; ``folder`` takes modified model files."""
    source = default_model_path()
    with faulty_library(all_faults()) as select:
        with Model.from_gguf(source, n_threads=1) as model:
            for engine in engines:
                if engine.damage is None:
                    select(engine.select)
                    yield from _texts(engine, model, prompts)
                    select("")
        for engine in engines:
            if engine.damage is not None:
                path = _damaged(engine, source, folder / "damaged.gguf")
                with Model.from_gguf(path, n_threads=1) as model:
                    yield from _texts(engine, model, prompts)


def _damaged(engine: Broken, source: Path, path: Path) -> Path:
    fault, copy = engine.damage, damaged_copy(source, path)
    assert fault is not None
    layers: list[int | None] = list(range(copy.n_layers)) if engine.place == "everywhere" else [1]
    if not fault.layers:
        layers = [None]
    if fault.layers == (0,):
        layers = [0]
    for tap in fault.taps:
        for layer in layers:
            fault.damage(copy, tap if layer is None else f"blk.{layer}.{tap}")
    return path


def _texts(engine: Broken, model: Model, prompts: Sequence[str]) -> Iterator[Text]:
    for prompt in prompts:
        yield _answer(engine, model, prompt)


def _answer(engine: Broken, model: Model, prompt: str) -> Text:
    way, tokenizer = engine.around, model.tokenizer
    pending, made, cache = way.encode(tokenizer, prompt), [], model.new_cache()
    for step in range(N_TOKENS):
        logits = model.forward(pending, cache, logits="all").logits
        made.append(way.pick(logits[way.row if step == 0 else -1], step))
        pending = [way.feeds(made, step)]
        if way.ends(tokenizer, made[-1], step):
            break
    return Text(engine, prompt, way.show(tokenizer, made))
