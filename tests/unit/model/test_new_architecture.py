"""What adding an architecture requires: one file with its graph, and one line that names it.

The toy has no sub-norms, SiLU, its own head, heads wider than ``dim / n_heads`` and RoPE on neighbours; its engine
is written here, in NumPy, and audited.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossval.audit.audit import audit
from crossval.capture import Capture
from crossval.engines.recorded import RecordedRunner
from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.model.graphs import GRAPHS, op_table
from crossval.model.kinds import TernaryMatrix, Weight
from crossval.passes import EngineIdentity, PassPlan, PassRecord, TapArray
from crossval.traces.read import TraceModel
from crossval.traces.write import TraceWriter

GRAPH = '''
"""The toy's graph."""

from crossval.model.graphs.decoder import HIDDEN, KEYS, LOGITS, MERGED, QUERIES, SCORES, WIDE
from crossval.model.kinds import (
    Add, Attend, AttentionScores, BitLinear, Embedding, Head, Multiply, RmsNorm, Rope, Silu, Softmax,
)
from crossval.model.op import Op


def operations(c):
    norm, rope = RmsNorm(c.rms_eps), Rope(c.rope_base, "adjacent")
    ops = [Op("inp_embd", None, Embedding(), ("token_ids",), ("token_embd.weight",), HIDDEN)]
    for i in range(c.n_layers):
        b, x, last = f"blk.{i}.", ops[-1].output, i == c.n_layers - 1
        ops += [
            Op("attn_norm", i, norm, (x,), (b + "attn_norm.weight",), HIDDEN),
            Op("q", i, BitLinear(c.n_heads), (b + "attn_norm",), (b + "attn_q.weight",), QUERIES),
            Op("k", i, BitLinear(c.n_kv_heads), (b + "attn_norm",), (b + "attn_k.weight",), KEYS),
            Op("v", i, BitLinear(c.n_kv_heads), (b + "attn_norm",), (b + "attn_v.weight",), KEYS, b + "v_cache"),
            Op("q_rope", i, rope, (b + "q", "positions"), (), QUERIES),
            Op("k_rope", i, rope, (b + "k", "positions"), (), KEYS, b + "k_cache"),
            Op("kq", i, AttentionScores(), (b + "q_rope", b + "k_cache"), (), SCORES),
            Op("kq_soft_max", i, Softmax(c.head_dim**-0.5), (b + "kq", "positions"), (), SCORES),
            Op("kqv_out", i, Attend(), (b + "kq_soft_max", b + "v_cache"), (), MERGED),
            Op("attn_o_out", i, BitLinear(), (b + "kqv_out",), (b + "attn_output.weight",), HIDDEN),
            Op("ffn_inp", i, Add(), (b + "attn_o_out", x), (), HIDDEN, output_rows=last),
            Op("ffn_norm", i, norm, (b + "ffn_inp",), (b + "ffn_norm.weight",), HIDDEN, output_rows=last),
            Op("ffn_gate", i, BitLinear(), (b + "ffn_norm",), (b + "ffn_gate.weight",), WIDE, output_rows=last),
            Op("ffn_up", i, BitLinear(), (b + "ffn_norm",), (b + "ffn_up.weight",), WIDE, output_rows=last),
            Op("ffn_act", i, Silu(), (b + "ffn_gate",), (), WIDE, output_rows=last),
            Op("ffn_out", i, Multiply(), (b + "ffn_act", b + "ffn_up"), (), WIDE, output_rows=last),
            Op("ffn_down", i, BitLinear(), (b + "ffn_out",), (b + "ffn_down.weight",), HIDDEN, output_rows=last),
            Op("l_out", i, Add(), (b + "ffn_down", b + "ffn_inp"), (), HIDDEN, output_rows=last),
        ]
    ops.append(Op("result_norm", None, norm, (ops[-1].output,), ("output_norm.weight",), HIDDEN))
    ops.append(Op("result_output", None, Head(), ("result_norm",), ("output.weight",), LOGITS))
    return tuple(ops)
'''
CONFIG = SpecConfig(
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=48,
    dim=128,
    hidden_dim=256,
    vocab_size=70,
    context_length=64,
    rope_base=10000.0,
    rms_eps=1e-5,
    architecture="toy",
)
PLANS = [PassPlan("prefill", (3, 14, 15, 9, 26, 5), 0), PassPlan("decode", (35,), 6)]


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Add the toy: a file in a package of its own, and its line in the table."""
    folder = tmp_path_factory.mktemp("toy")
    package = folder / "more_graphs"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "toy.py").write_text(GRAPH)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(GRAPHS, "toy", importlib.import_module("more_graphs.toy").operations)
        yield


@pytest.fixture(scope="module")
def weights(toy: None) -> Weights:
    return Weights()


class Weights:
    """Random weights of every tensor that the graph names."""

    config = CONFIG

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.held: dict[str, Weight] = {}
        q_dim, kv_dim = CONFIG.n_heads * CONFIG.head_dim, CONFIG.n_kv_heads * CONFIG.head_dim
        rows = {"attn_q": q_dim, "attn_k": kv_dim, "attn_v": kv_dim, "ffn_gate": 256, "ffn_up": 256}
        cols = {"attn_output": q_dim, "ffn_down": CONFIG.hidden_dim}
        for name in (name for op in op_table(CONFIG) for name in op.weights):
            tensor = name.split(".")[-2]
            if "norm" in tensor:
                self.held[name] = rng.uniform(0.5, 1.5, CONFIG.dim).astype(np.float32).astype(np.float64)
            elif tensor in ("token_embd", "output"):
                self.held[name] = rng.normal(size=(CONFIG.vocab_size, CONFIG.dim)).astype(np.float16)
            else:
                shape = rows.get(tensor, CONFIG.dim), cols.get(tensor, CONFIG.dim)
                self.held[name] = TernaryMatrix(rng.integers(-1, 2, shape).astype(np.float32), 0.125)

    def reuse(self, weights: Iterable[Weight]) -> None:
        """Keep them: they are few."""

    def __getitem__(self, name: str, /) -> Any:
        return self.held[name]


class Engine:
    """The toy in float32; ``fault`` is made in layer 1."""

    status = "live"
    plan = None
    identity = EngineIdentity("toy")

    def __init__(self, weights: Weights, fault: str = "", keeps: Collection[str] | None = None) -> None:
        self.weights, self.fault, self.keeps = weights, fault, keeps
        self.reset()

    def reset(self) -> None:
        self.cache: dict[str, np.ndarray] = {}
        self.start = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        plan = PassPlan(
            "decode" if self.start and len(token_ids) == 1 else "prefill", tuple(token_ids), self.start
        )
        made = self.forward(np.asarray(token_ids))
        self.start += len(token_ids)
        wanted = [n for n in made if n in select and (self.keeps is None or n.split(".")[-1] in self.keeps)]
        return PassRecord(plan, {name: TapArray(np.ascontiguousarray(made[name], np.float32)) for name in wanted})

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(CONFIG.rms_eps))
        return x / root * self.weights[name + ".weight"].astype(np.float32)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        matrix = self.weights[name + ".weight"]
        scale = np.float32(127) / np.abs(x).max(axis=-1, keepdims=True)
        return np.rint(x * scale) @ matrix.signs.T / scale * np.float32(matrix.scale)

    def rope(self, x: np.ndarray, halves: bool) -> np.ndarray:
        half = x.shape[-1] // 2
        angle = (self.start + np.arange(len(x)))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
        turn = np.exp(1j * angle)
        turned = (x[..., :half] + 1j * x[..., half:] if halves else x[..., ::2] + 1j * x[..., 1::2]) * turn
        axis = -2 if halves else -1
        return np.stack([turned.real, turned.imag], axis=axis).reshape(x.shape).astype(np.float32)

    def grow(self, name: str, rows: np.ndarray) -> np.ndarray:
        self.cache[name] = np.concatenate([self.cache[name], rows]) if name in self.cache else rows
        return np.repeat(self.cache[name], CONFIG.n_heads // CONFIG.n_kv_heads, axis=1)

    def forward(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        n = len(tokens)
        t: dict[str, np.ndarray] = {}
        x = t["inp_embd"] = self.weights["token_embd.weight"][tokens].astype(np.float32)
        for layer in range(CONFIG.n_layers):
            b, fault = f"blk.{layer}.", self.fault if layer == 1 else ""
            h = t[b + "attn_norm"] = self.norm(x, b + "attn_norm")
            for part in "qkv":
                t[b + part] = self.linear(h, f"{b}attn_{part}").reshape(n, -1, CONFIG.head_dim)
            for part in "qk":
                t[f"{b}{part}_rope"] = self.rope(t[b + part], fault == "RoPE on halves")
            k, v = self.grow(b + "k", t[b + "k_rope"]), self.grow(b + "v", t[b + "v"])
            t[b + "kq"] = np.einsum("thd,shd->hts", t[b + "q_rope"], k)
            hidden = np.arange(len(k)) > self.start + np.arange(n)[:, None]
            scaled = np.where(hidden, -np.inf, t[b + "kq"] / np.float32(CONFIG.head_dim) ** 0.5)
            e = np.exp(scaled - scaled.max(axis=-1, keepdims=True)).astype(np.float32)
            t[b + "kq_soft_max"] = e / e.sum(axis=-1, keepdims=True)
            h = t[b + "kqv_out"] = np.einsum("hts,shd->thd", t[b + "kq_soft_max"], v).reshape(n, -1)
            h = t[b + "attn_o_out"] = self.linear(h, b + "attn_output")
            x = t[b + "ffn_inp"] = h + x
            h = t[b + "ffn_norm"] = self.norm(x, b + "ffn_norm")
            gate = t[b + "ffn_gate"] = self.linear(h, b + "ffn_gate")
            up = t[b + "ffn_up"] = self.linear(h, b + "ffn_up")
            act = np.maximum(gate, 0) ** 2 if fault == "squared ReLU" else gate / (1 + np.exp(-gate))
            h = t[b + "ffn_act"] = act
            h = t[b + "ffn_out"] = h * up
            h = t[b + "ffn_down"] = self.linear(h, b + "ffn_down")
            x = t[b + "l_out"] = h + x
        h = t["result_norm"] = self.norm(x, "output_norm")
        table = "token_embd.weight" if self.fault == "tied head" else "output.weight"
        t["result_output"] = h @ self.weights[table].astype(np.float32).T
        return t


@pytest.mark.parametrize(
    "keeps", [None, ("l_out", "result_output"), ("inp_embd", "ffn_gate", "kq", "result_output")]
)
def test_a_healthy_engine_is_clean(weights: Weights, keeps: Collection[str] | None) -> None:
    (result,) = audit([Capture(Engine(weights, keeps=keeps), CONFIG, PLANS)], weights)
    assert result.verdict == "clean"
    assert result.n_covered == result.n_ops == 2 * (2 * 18 + 3)


@pytest.mark.parametrize(
    ("fault", "tap"),
    [
        ("RoPE on halves", "blk.1.q_rope"),
        ("squared ReLU", "blk.1.ffn_act"),
        ("tied head", "result_output"),
    ],
)
def test_a_wrong_operation_is_found(weights: Weights, fault: str, tap: str) -> None:
    for keeps in (None, ("l_out", "result_output")):
        (result,) = audit([Capture(Engine(weights, fault, keeps), CONFIG, PLANS)], weights)
        assert result.verdict == "guilty"
        assert result.first_guilty is not None
        assert result.first_guilty.tap == (tap if keeps is None or tap in keeps else "blk.1.l_out")


def test_its_traces_have_their_shapes_from_the_graph(weights: Weights, tmp_path: Path) -> None:
    c = CONFIG
    shape = TraceModel(
        "ab" * 32, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.dim, c.hidden_dim, c.vocab_size
    )
    engine = Engine(weights)
    names = [op.output for op in op_table(CONFIG)]
    with TraceWriter(tmp_path / "trace", shape) as writer:
        for plan in PLANS:
            writer.add_pass(engine.eval(plan.token_ids, names))
        writer.finish(engine=engine.identity, prompt_ids=PLANS[0].token_ids, prompt_text=None)
    with RecordedRunner(tmp_path / "trace") as runner:
        (result,) = audit([Capture(runner, CONFIG, PLANS)], weights)
    assert result.verdict == "clean"


def operations_of(source: str) -> Any:
    found: dict[str, Any] = {}
    exec(source, found)
    return found["operations"]


def test_a_tap_of_its_own_joins_the_vocabulary_where_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPHS, "toy", operations_of(GRAPH.replace('"kqv_out"', '"toy_out"')))
    names = taps.vocabulary()
    assert list(names)[list(names).index("kq_soft_max") + 1] == "toy_out"
    optional = {name for name in names if names[name].optional}
    assert optional == taps.OPTIONAL_TAPS | {"toy_out", "kqv_out"}


def test_a_tap_means_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = GRAPH.replace('(b + "ffn_gate",), (), WIDE', '(b + "ffn_gate",), (), HIDDEN')
    monkeypatch.setitem(GRAPHS, "toy", operations_of(changed))
    with pytest.raises(ValueError, match="toy: ffn_act is also the name of another tensor"):
        taps.vocabulary()
