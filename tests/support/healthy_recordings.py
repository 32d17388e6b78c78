"""False alarms on recordings: every healthy arithmetic, every choice of taps.

``python -m tests.healthy --recordings`` runs it. The engine is ``tests/numpy_bitnet`` in one of its styles, or
ours with one of its kernel families, live or recorded; the reference is bitnet.cpp where it is built and otherwise
our engine, recorded over the same passes. Right engines are never a defect and never a divergence: they are
parity, or (exit code 3) what was recorded does not show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bitnet_py._native import kernel_families
from bitnet_py.resources import default_model_path
from bitnet_py.synth import SynthConfig, write_model
from bitnet_py.synth_random import Stream
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.model import taps
from crossval.passes import PassPlan, Runner, pass_kind
from tests.support.judged import Judged, judge
from tests.support.numpy_bitnet.model import Model
from tests.support.numpy_bitnet.recorded import only, record
from tests.support.numpy_bitnet.runner import NumpyBitnetRunner
from tests.support.numpy_bitnet.styles import STYLES, Style
from tests.support.recordings import RECORDINGS, Kept
from tests.zoo.detect import Replay
from tests.zoo.recording import Recording

SHAPES: dict[str, dict[str, object]] = {
    "two heads share one": {"n_layers": 3, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 640},
    "one head, one layer": {"n_layers": 1, "dim": 128, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 384},
    "five heads, one KV head": {"n_layers": 2, "dim": 640, "n_heads": 5, "n_kv_heads": 1, "hidden_dim": 896},
    "narrow heads": {"n_layers": 2, "dim": 640, "n_heads": 32, "n_kv_heads": 32, "hidden_dim": 384},
    "three wide heads": {"n_layers": 4, "dim": 384, "n_heads": 3, "n_kv_heads": 3, "hidden_dim": 1152},
    "deep": {"n_layers": 9, "dim": 128, "n_heads": 4, "n_kv_heads": 1, "hidden_dim": 256},
    "large eps": {"n_layers": 3, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "hidden_dim": 384, "rms_eps": 1e-2},
    "small RoPE base": {"n_layers": 2, "dim": 256, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 512,
                        "rope_base": 10000.0},
}  # fmt: skip
SHIPPED = "shipped"
VOCAB_SIZE = 300
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33, 48, 64, 100, 150, 225, 300)
KERNELS = tuple(f"bitnet_py, {family.name}" for family in kernel_families() if family.available)
ENGINES = (*(style.name for style in STYLES), *KERNELS)


@dataclass(frozen=True)
class Situation:
    """One run: which engine computes what."""

    number: int
    engine: str
    model: str
    n_tokens: int
    n_decode: int

    @property
    def is_live(self) -> bool:
        """Whether the engine runs under the harness; otherwise it was recorded. A prompt in pieces is recorded."""
        return self.number // len(ENGINES) % 2 == 1 and self.style is not None and self.style.split is None

    @property
    def style(self) -> Style | None:
        """The arithmetic; None: one of our own engine's kernels."""
        return next((one for one in STYLES if one.name == self.engine), None)

    @classmethod
    def draw(cls, number: int) -> Situation:
        """Return situation ``number``: the engines by rotation, the rest drawn from the number."""
        stream = Stream(number, "healthy recording")
        models = (*SHAPES, SHIPPED)
        return cls(
            number,
            ENGINES[number % len(ENGINES)],
            models[stream.below(len(models))],
            LENGTHS[stream.below(len(LENGTHS))],
            stream.below(4),
        )


@dataclass
class Models:
    """The model files, each written and read once."""

    folder: Path
    _held: dict[str, Model] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Model:
        if name not in self._held:
            path = default_model_path()
            if name != SHIPPED:
                number = list(SHAPES).index(name)
                path = self.folder / f"{number}.gguf"
                config = SynthConfig(vocab_size=VOCAB_SIZE, seed=number, **SHAPES[name])  # type: ignore[arg-type]
                write_model(path, config)
            self._held[name] = Model(path)
        return self._held[name]


def engine_recording(situation: Situation, model: Model) -> Recording:
    """Return what the situation's engine computes, with every tap."""
    stream = Stream(situation.number, "healthy prompt")
    prompt = [stream.below(len(model.embedding)) for _ in range(situation.n_tokens)]
    if situation.style is not None:
        return record(model, prompt, situation.n_decode, situation.style)
    with BitnetPyRunner(model.path, n_threads=2, kernel=situation.engine.split(", ")[1]) as runner:
        return ours(runner, _greedy_plans(runner, prompt, situation.n_decode), model.n_layers)


def _greedy_plans(runner: BitnetPyRunner, prompt: list[int], n_decode: int) -> list[PassPlan]:
    tokens = list(prompt)
    plans = [PassPlan(pass_kind(len(prompt), 0), tuple(prompt), 0)]
    for _ in range(n_decode):
        logits = runner.eval(plans[-1].token_ids, ("result_output",)).taps["result_output"].array
        plans.append(PassPlan("decode", (int(logits[-1].argmax()),), len(tokens)))
        tokens.append(plans[-1].token_ids[0])
    runner.reset()
    return plans


def ours(runner: Runner, plans: list[PassPlan], n_layers: int) -> Recording:
    """Return what an engine computes over passes, with every tap."""
    names = taps.of_model(n_layers)
    return Recording(runner.identity, [runner.eval(plan.token_ids, names) for plan in plans])


def run(
    numbers: Iterable[int], folder: Path, *, recordings: Sequence[Kept] = RECORDINGS, library: Path | None = None
) -> Iterator[tuple[Situation, str, Judged]]:
    """Yield the situations of these numbers with every recording, and the verdict.

    ``library``: of bitnet.cpp, which is then the reference instead of our engine.
    """
    models = Models(folder)
    with ExitStack() as stack:
        references: dict[str, Runner] = {}
        for number in numbers:
            situation = Situation.draw(number)
            model = models[situation.model]
            if situation.model not in references:
                references[situation.model] = stack.enter_context(
                    BitnetPyRunner(model.path, n_threads=1) if library is None
                    else BitnetCppRunner(model.path, library=library, n_threads=1)
                )  # fmt: skip
            made = engine_recording(situation, model)
            plans = [one.plan for one in made.passes]
            runner = references[situation.model]
            runner.reset()
            reference = ours(runner, plans, model.n_layers)
            n_prompt = len(plans) - situation.n_decode
            prompt = [token for plan in plans[:n_prompt] for token in plan.token_ids]
            for kept in recordings:
                engine: Runner = Replay(only(made, kept.keeps))
                if situation.is_live:
                    assert situation.style is not None
                    engine = NumpyBitnetRunner(model, situation.style, keeps=kept.keeps)
                found = judge(
                    engine, Replay(reference), prompt, model.path,
                    n_decode=situation.n_decode, diagnosed=False,
                )  # fmt: skip
                yield situation, kept.name, found


def table(counts: Counter[tuple[str, str, int]], engines: tuple[str, ...] = ENGINES) -> list[str]:
    """Return (parity, exit code 3, alarms) of every engine and recording as Markdown."""
    names = [kept.name for kept in RECORDINGS]
    lines = ["| engine | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for engine in engines:
        cells = ["/".join(str(counts[engine, name, code]) for code in (0, 3, 1)) for name in names]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return lines
