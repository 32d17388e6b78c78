"""False alarms on strangers: healthy engines of other makes, in drawn situations.

``python -m tests.healthy --strangers`` runs it. The engines: the four of ``examples/`` as they are shipped, each
writing its own trace; ours under another name and build (``strangers.Stranger``), on every architecture; those in
other precisions (``tests.zoo.precisions``). Drawn are the model, the prompt, its passes, the taps left out (fused
operations, whole blocks, any), and whether the engine states how it computes. The reference is our engine over the
same passes. No healthy engine is a defect or diverges; one that deviates from the model is told so.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitnet_py.resources import default_model_path
from bitnet_py.synth import SynthConfig, write_model
from bitnet_py.synth_random import Stream
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.recorded import RecordedRunner
from crossval.model import taps
from crossval.model.graphs import op_table
from crossval.model.weights import SpecWeights
from crossval.passes import PassPlan, Runner, pass_kind
from tests.support import healthy_recordings, recordings
from tests.support.judged import Judged, judge
from tests.support.narrow_engine import NarrowEngine
from tests.support.numpy_bitnet.recorded import only
from tests.support.recordings import RECORDINGS
from tests.support.strangers import Stranger
from tests.support.third_engine import EXAMPLE, third_engine
from tests.zoo import precisions
from tests.zoo.detect import Replay
from tests.zoo.recording import Recording

FOLDER = EXAMPLE.parent
THIRD, OURS = "third engine", "ours as a stranger"
_COMPILED: dict[str, tuple[str, str]] = {
    "C engine": (".", "cc -std=c99 -O2 -o {out}/c c_engine.c -lm"),
    "Rust engine": (
        "rust-trace-writer",
        "cargo build --release --offline --example engine --target-dir {out}/rust",
    ),
    "Go engine": ("go-trace-writer", "go build -o {out}/go ./engine"),
}
"""Engine of ``examples/`` -> the folder there, and the command that builds it."""
_BUILT = {"C engine": "c", "Rust engine": "rust/release/examples/engine", "Go engine": "go"}
EXAMPLES = (THIRD, *(name for name, (_, command) in _COMPILED.items() if shutil.which(command.split()[0])))
ENGINES = (*EXAMPLES, *(OURS,) * 4, *precisions.ENGINES)
"""By rotation; ours more often, because it runs every architecture."""
_SHAPE: dict[str, Any] = {"n_layers": 3, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 384}
_EMBEDDING: dict[str, Any] = {**_SHAPE, "head_dim": 128, "vocab_size": 400}
OF_TEXT = (*healthy_recordings.SHAPES, healthy_recordings.SHIPPED)
"""Models that every engine here can run."""
SHAPES: dict[str, dict[str, Any]] = {
    **healthy_recordings.SHAPES,
    "bitnet-25": {**_SHAPE, "arch": "bitnet-25"},
    "bitnet": {**_SHAPE, "arch": "bitnet", "scales": True},
    "bitnet, TQ2_0, Q6_K": {
        **_SHAPE,
        "hidden_dim": 512,
        "arch": "bitnet",
        "projections": "tq2_0",
        "embedding": "q6_k",
    },
    "llama": {**_SHAPE, "arch": "llama", "untied_head": True, "biases": True, "rope_freqs": True},
    "llama, wide heads": {**_SHAPE, "arch": "llama", "head_dim": 128, "rope_scaling": 4.0, "scales": True},
    "qwen3, mean": {**_EMBEDDING, "arch": "qwen3", "norms": "f16", "pooling": "mean"},
    "qwen3, last": {**_EMBEDDING, "arch": "qwen3", "sub_norms": False, "pooling": "last"},
    "gemma3, mean": {**_EMBEDDING, "arch": "gemma3", "norms": "f16", "pooling": "mean"},
    "gemma3, first": {**_EMBEDDING, "arch": "gemma3", "sub_norms": False, "pooling": "cls"},
}
LENGTHS = (1, 2, 3, 5, 7, 8, 13, 17, 32, 45)


def _without(*missing: str) -> Callable[[str], bool]:
    return lambda name: taps.parse(name).tap not in missing


LEFT_OUT: dict[str, Callable[[str], bool]] = {
    **{one.name: one.keeps for one in RECORDINGS},
    "SwiGLU": _without("ffn_gate", "ffn_up", "ffn_act"),
    "gate_up": _without("ffn_gate", "ffn_up"),
    "norm, matrix and RoPE": _without("attn_norm", "q", "k"),
    "norms and scores": _without(*recordings.NORMS, *recordings.SCORES),
    "attention": _without("attn_norm", "q", "k", "v", "q_rope", "k_rope", *recordings.SCORES, "kqv_out"),
    "feed-forward block": _without("ffn_norm", "ffn_gate", "ffn_up", "ffn_act", "ffn_out", "ffn_sub_norm"),
}
"""Name -> whether a tap is recorded."""
ANY = "any taps"
CHOICES = (*LEFT_OUT, *(ANY,) * 4)


@dataclass(frozen=True)
class Situation:
    """One run: which engine computes what, and what is recorded of it."""

    number: int
    engine: str
    model: str
    pieces: tuple[int, ...]
    """Tokens of the prompt in each of its passes."""
    n_decode: int
    states: bool
    """Whether it states how it computes; the engines of ``examples/`` state nothing."""
    left_out: str

    @classmethod
    def draw(cls, number: int) -> Situation:
        """Return situation ``number``: the engines by rotation, the rest drawn from the number."""
        stream = Stream(number, "healthy stranger")
        engine = ENGINES[number % len(ENGINES)]
        model = _one_of(stream, tuple(SHAPES) if engine == OURS else OF_TEXT)
        n_tokens, n_decode = _one_of(stream, LENGTHS), stream.below(4)
        first = 1 + stream.below(n_tokens)
        pieces = (first, n_tokens - first) if first < n_tokens and stream.below(3) == 0 else (n_tokens,)
        if SHAPES.get(model, {}).get("pooling"):  # one pass gives the vector
            pieces, n_decode = (n_tokens,), 0
        if engine in EXAMPLES:
            pieces = (n_tokens,)
        states = engine not in EXAMPLES and stream.below(2) == 0
        return cls(number, engine, model, pieces, n_decode, states, _one_of(stream, CHOICES))

    @property
    def allowed(self) -> frozenset[str]:
        """Verdicts that are right: with every tap one, with fewer also that it is not shown (exit code 3)."""
        whole = precisions.HEALTHY.get(self.engine, "parity")
        return frozenset({whole} if self.left_out == "all taps" else {whole, "incomplete", "agrees_within"})

    def keeps(self) -> Callable[[str], bool]:
        """Return whether a tap is recorded."""
        if self.left_out != ANY:
            return LEFT_OUT[self.left_out]
        stream = Stream(self.number, "taps left out")
        every, least = 2 + stream.below(5), frozenset({"inp_embd", "result_output"})
        chosen: dict[str, bool] = {}
        return lambda name: name in least or chosen.setdefault(name, stream.below(every) > 0)

    def prompt(self, vocab_size: int) -> list[int]:
        """Return the prompt's tokens."""
        stream = Stream(self.number, "healthy stranger's prompt")
        return [stream.below(vocab_size) for _ in range(sum(self.pieces))]

    def plans(self, prompt: Sequence[int], vocab_size: int) -> list[PassPlan]:
        """Return the passes; decoded tokens are drawn as well."""
        stream, found, start = Stream(self.number, "decoded tokens"), list[PassPlan](), 0
        for size in self.pieces:
            found.append(PassPlan(pass_kind(size, start), tuple(prompt[start : start + size]), start))
            start += size
        return found + [PassPlan("decode", (stream.below(vocab_size),), start + i) for i in range(self.n_decode)]


def _one_of(stream: Stream, items: Sequence[Any]) -> Any:
    return items[stream.below(len(items))]


@dataclass
class Bench:
    """Models, compiled engines and traces in one folder, each made on first use."""

    folder: Path
    _references: dict[str, tuple[Path, int, list[str]]] = field(default_factory=dict)

    def model(self, name: str) -> tuple[Path, int, list[str]]:
        """Return the file, the size of the vocabulary, and every tap."""
        if name not in self._references:
            path = default_model_path()
            if name in SHAPES:
                number = list(SHAPES).index(name)
                path = self.folder / f"{number}.gguf"
                fields = {"vocab_size": healthy_recordings.VOCAB_SIZE, **SHAPES[name]}
                write_model(path, SynthConfig(seed=number, **fields))
            config = SpecWeights(path).config
            self._references[name] = path, config.vocab_size, [op.output for op in op_table(config)]
        return self._references[name]

    def example(self, name: str) -> Path:
        """Return the program of an engine in ``examples/``."""
        built, (source, command) = self.folder / _BUILT[name], _COMPILED[name]
        if not built.exists():
            words = [word.format(out=self.folder.resolve()) for word in command.split()]
            subprocess.run(words, cwd=FOLDER / source, check=True, capture_output=True, timeout=500)
        return built

    def of_example(self, situation: Situation, path: Path, prompt: Sequence[int], names: list[str]) -> Recording:
        """Let an engine of ``examples/`` write its trace, and read it."""
        trace, ids = self.folder / "trace", ",".join(map(str, prompt))
        shutil.rmtree(trace, ignore_errors=True)
        rest = ["--decode", str(situation.n_decode)]
        if situation.engine == THIRD:
            third_engine().main([str(path), "--tokens", ids, "--out", str(trace), "--taps", "all", *rest])
        else:
            command = [self.example(situation.engine), path, trace, ids, *rest]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        with RecordedRunner(trace) as runner:
            assert runner.plan is not None
            return recorded(runner, runner.plan, names)


def recorded(runner: Runner, plans: Iterable[PassPlan], names: Sequence[str]) -> Recording:
    """Return what an engine gives over passes."""
    return Recording(runner.identity, [runner.eval(plan.token_ids, names) for plan in plans])


def judged(situation: Situation, bench: Bench) -> Judged:
    """Judge a situation as ``crossval layers`` does."""
    path, vocab_size, names = bench.model(situation.model)
    prompt = situation.prompt(vocab_size)
    plans = situation.plans(prompt, vocab_size)
    if situation.engine in EXAMPLES:
        made = bench.of_example(situation, path, prompt, names)
        plans = [one.plan for one in made.passes]
    elif situation.engine == OURS:
        with Stranger(path, n_threads=1) as runner:
            runner.anonymous = not situation.states
            made = recorded(runner, plans, names)
    else:
        style = replace(precisions.ENGINES[situation.engine], states=situation.states)
        made = NarrowEngine(path, style).record(plans)
    with BitnetPyRunner(path, n_threads=1) as runner:
        reference = recorded(runner, plans, names)
    return judge(
        Replay(only(made, situation.keeps())), Replay(reference), prompt, path,
        n_decode=situation.n_decode, diagnosed=False,
    )  # fmt: skip


def run(numbers: Iterable[int], folder: Path) -> Iterator[tuple[Situation, Judged]]:
    """Yield the situations of these numbers, and what was said of each."""
    bench = Bench(folder)
    for number in numbers:
        situation = Situation.draw(number)
        yield situation, judged(situation, bench)


def table(counts: Counter[tuple[str, str]]) -> list[str]:
    """Return how often each engine got each verdict as Markdown."""
    verdicts = sorted({verdict for _, verdict in counts})
    lines = [f"| engine | {' | '.join(verdicts)} |", "|---" * (len(verdicts) + 1) + "|"]
    for engine in dict.fromkeys(ENGINES):
        lines.append(f"| {engine} | {' | '.join(str(counts[engine, verdict]) for verdict in verdicts)} |")
    return lines
