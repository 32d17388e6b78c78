"""The causal view: which layer's error matters for the output, and how much.

Two engines disagree in their logits. Take the hidden states that each recorded after layer ``i``, patch both into
the specification, and let it run the remaining layers for both. What is left of the disagreement was caused up to
layer ``i``; what vanished was caused after it. Layer by layer that is a curve from all recovered to nothing
recovered, and it falls where the error enters.

The continuation is the specification's (``crossval.model``), not an engine's own: a recorded engine cannot be
run from the middle. Hence a fault *after* layer ``i`` shows as recovered, whichever engine has it, and ``own_kl``
tells whose: how far an engine's logits are from the specification's continuation of its own state. And int8
codes at rounding ties flip under the smallest of differences, so two engines without a fault disagree too, in no
particular layer: ``noise_kl`` is the most that differences of binary16's rounding in the embedding, drawn a few
times, do to the specification's own logits, and ``reliable`` says whether the disagreement stands out from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.capture import Source
from crossval.compare.rerun import Whole, assemble
from crossval.errors import BadInputError
from crossval.model import taps
from crossval.model.graphs import before_layers, op_table
from crossval.model.kinds import FloatArray, Weight
from crossval.model.op import Op, WeightSource
from crossval.model.weights import SpecWeights
from crossval.passes import PassRecord
from crossval.terms import LOGITS, SIDES, Progress, Side

CONTINUED_BY = "the specification (float64, crossval.ops)"  # a word of the receipt's format

NOTHING = 0.1
"""At most this share recovered counts as nothing: codes that flip keep it from being exactly zero."""
STANDS_OUT = 4.0
"""The disagreement must exceed the noise this many times; engines without a fault reached 1.8 times (224 runs)."""
NOISE = 2.0**-12
"""Relative size of the disturbances that ``noise_kl`` is measured with."""
N_DISTURBANCES = 5
"""Odd, since two states run as a pair and one is undisturbed. Single ones give KLs 40 times apart."""


@dataclass(frozen=True)
class LayerEffect:
    """The hidden states after one layer (or the embedding), patched into the specification. KL in nats."""

    tap: str
    layer: int | None
    """None for the embedding."""
    kl: float
    """KL(candidate || reference) of the logits after both states went through the same remaining layers."""
    recovered: float | None
    """Share of the baseline that is gone: ``1 - kl / baseline``; None when there was no disagreement."""
    introduced: float | None
    """By how much ``recovered`` falls from the patch before to this one: what happened between the two."""
    candidate_own_kl: float
    """KL(candidate's logits || the continuation of its own state): what it did differently after this layer."""
    reference_own_kl: float
    equal_states: bool
    """The two states hold the same bits; ``kl`` is then 0 without computing."""


@dataclass(frozen=True)
class CausalView:
    """The effects in execution order, and what follows from them."""

    baseline_kl: float
    """KL(candidate || reference) of the logits as recorded, of the last token, in nats."""
    effects: tuple[LayerEffect, ...]
    nothing_recovered_from: str | None
    """First patch from which on none recovers anything: the error entered before it. None: the last patch does."""
    largest: str | None
    """Patch with the largest ``introduced``: the error entered between the patch before it and this one."""
    noise_kl: float
    """Largest logit KL of the specification with and without a disturbance of the embedding by up to ``NOISE``."""
    reliable: bool
    """Whether the disagreement stands out from the noise; otherwise it cannot be attributed to a layer."""
    not_patched: tuple[str, ...]
    """States that could not be patched because an engine did not give them for all tokens."""
    continued_by: str = CONTINUED_BY


def view_of_engines(
    candidate: Source, reference: Source, weights: SpecWeights, *, progress: Progress | None = None
) -> CausalView:
    """Make the view of two engines over the same passes from position 0.

    Takes the state of every token after every layer, of both engines: ``8 * n_tokens * n_layers * dim`` bytes.

    Raises:
        BadInputError: as ``causal_view``.
        UnavailableError, EngineCrashError: from a runner.
    """
    names = [name for name in taps.outline_taps(weights.config.n_layers) if name != "result_norm"]
    return causal_view(candidate.records(names), reference.records(names), weights, progress=progress)


def causal_view(
    candidate: Sequence[PassRecord],
    reference: Sequence[PassRecord],
    weights: SpecWeights,
    *,
    progress: Progress | None = None,
) -> CausalView:
    """Patch the states after each layer of two recorded runs and report what each explains of the last logits.

    Give the consecutive passes of the same tokens from position 0 with ``l_out`` taps and ``result_output``
    (``inp_embd`` too, if the embedding is in doubt). Every state that both recorded is patched. All patched states
    advance together, one layer's weights at a time: memory is two ``(n_tokens, dim)`` float64 arrays per patched
    layer and one layer's work; the cost grows with the square of the number of layers.

    Raises:
        BadInputError: other or no tokens, no logits, no state to patch, a shape that does not fit the model, or
            NaN or infinity.
    """
    config = weights.config
    if config.pooling is not None or len(before_layers(config)) > 1:
        raise BadInputError(
            f"architecture {config.architecture}: the causal view continues from the embedding to logits; it is "
            "not made for models that pool tokens or scale their embedding"
        )
    sides = (candidate, reference)
    n_tokens = _check_passes(sides)
    vocab_size, n_layers = weights.config.vocab_size, weights.config.n_layers
    recorded = tuple(
        _log_softmax(_logits(side, records, n_tokens, vocab_size))
        for side, records in zip(SIDES, sides, strict=True)
    )
    states, missing = _states(sides, n_tokens, weights.config.dim, n_layers)
    if not states:
        raise BadInputError("no layer's l_out was recorded by both engines for all tokens: nothing can be patched")
    tokens = [token for record in sides[0] for token in record.plan.token_ids]
    ends = _continue([*states, *_disturbed(weights, tokens)], weights, progress)
    exact, *others = (end for pair in ends[len(states) :] for end in pair)
    noise = max(_kl(exact, other) for other in others)
    baseline = _kl(recorded[0], recorded[1])
    effects = _effects(baseline, recorded, states, ends[: len(states)])
    return CausalView(
        baseline_kl=baseline,
        effects=effects,
        nothing_recovered_from=nothing_recovered_from(effects),
        largest=largest(effects),
        noise_kl=noise,
        reliable=is_reliable(baseline, noise, effects),
        not_patched=tuple(missing),
    )


def shares(baseline: float, kls: Sequence[float]) -> list[tuple[float | None, float | None]]:
    """Return what each patch recovers of the disagreement and what was introduced since the one before it.

    Both are None where there is no disagreement. Before the first patch the specification would run everything for
    both engines, which recovers all of it.
    """
    if baseline <= 0.0:
        return [(None, None)] * len(kls)
    recovered = [1.0 - kl / baseline for kl in kls]
    return [(now, before - now) for before, now in zip([1.0, *recovered], recovered, strict=False)]


def nothing_recovered_from(effects: Sequence[LayerEffect]) -> str | None:
    """Return the first patch from which on nothing is recovered, or None."""
    found = None
    for effect in reversed(effects):
        if effect.recovered is None or effect.recovered > NOTHING:
            break
        found = effect.tap
    return found


def largest(effects: Sequence[LayerEffect]) -> str | None:
    """Return the patch before which most of the disagreement came in, or None when there is none."""
    known = [(effect.introduced, -i) for i, effect in enumerate(effects) if effect.introduced is not None]
    if not known or max(known)[0] <= 0.0:
        return None
    return effects[-max(known)[1]].tap


def is_reliable(baseline: float, noise: float, effects: Sequence[LayerEffect]) -> bool:
    """Tell whether the disagreement stands out from what flipped int8 codes do by themselves.

    The smaller ``own_kl`` of the first patch is a second estimate of the noise: the engine without a fault, if
    there is one, differs from the specification by nothing else.
    """
    if not effects:
        return False
    return baseline > STANDS_OUT * max(noise, min(effects[0].candidate_own_kl, effects[0].reference_own_kl))


# --- what was recorded ----------------------------------------------------------------------------------------

_Sides = tuple[Sequence[PassRecord], Sequence[PassRecord]]


@dataclass(frozen=True)
class _Patch:
    """The states of both engines after one layer; ``first_layer`` is the layer that comes next."""

    tap: str
    first_layer: int
    arrays: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
    equal: bool


def _check_passes(sides: _Sides) -> int:
    """Return the number of tokens of two runs over the same ones."""
    fed = []
    for side, records in zip(SIDES, sides, strict=True):
        tokens: list[int] = []
        for record in records:
            if record.plan.start != len(tokens):
                raise BadInputError(
                    f"{side}: a pass starts at position {record.plan.start}, expected {len(tokens)}: the view "
                    "needs all passes from the beginning"
                )
            tokens += record.plan.token_ids
        fed.append(tokens)
    if not fed[0] or fed[0] != fed[1]:
        raise BadInputError("the causal view needs two runs over the same tokens, and at least one token")
    return len(fed[0])


def _whole(side: Side, records: Sequence[PassRecord], name: str) -> Whole | None:
    try:
        whole = assemble(records, name)
    except ValueError as error:
        raise BadInputError(f"{side}: {error}") from None
    if whole is not None and not np.isfinite(whole.array).all():
        raise BadInputError(f"{side}: {name} holds NaN or infinity; nothing follows from patching it")
    return whole


def _logits(side: Side, records: Sequence[PassRecord], n_tokens: int, vocab_size: int) -> FloatArray:
    """Return the last token's logits, float64 ``(vocab_size,)``."""
    whole = _whole(side, records[-1:], LOGITS)
    if whole is None or whole.positions[-1] != n_tokens - 1:
        raise BadInputError(f"{side}: no logits (result_output) of the last token were recorded")
    if whole.array.shape[1:] != (vocab_size,):
        raise BadInputError(f"{side}: expected logits of {vocab_size} tokens, found shape {whole.array.shape}")
    logits: FloatArray = whole.array[-1].astype(np.float64)
    return logits


def _states(sides: _Sides, n_tokens: int, dim: int, n_layers: int) -> tuple[list[_Patch], list[str]]:
    """Return the states to patch, of the embedding and after every layer, and those that an engine lacks."""
    patches, missing = [], []
    for first_layer, name in enumerate(["inp_embd", *(f"blk.{i}.l_out" for i in range(n_layers))]):
        # After the last layer only the last token matters, and engines need not give more.
        needed = (n_tokens - 1,) if first_layer == n_layers else tuple(range(n_tokens))
        arrays = []
        for side, records in zip(SIDES, sides, strict=True):
            whole = _whole(side, records[-1:] if first_layer == n_layers else records, name)
            if whole is None or not set(needed) <= set(whole.positions):
                continue
            if whole.array.shape[1:] != (dim,):
                raise BadInputError(f"{side}: {name}: expected rows of {dim}, found shape {whole.array.shape}")
            arrays.append(whole.array[[whole.positions.index(position) for position in needed]])
        if len(arrays) == 2:
            equal = bool((arrays[0].view(np.uint32) == arrays[1].view(np.uint32)).all())
            patches.append(_Patch(name, first_layer, (arrays[0], arrays[1]), equal))
        elif name != "inp_embd":
            missing.append(name)
    return patches, missing


def _disturbed(weights: SpecWeights, tokens: Sequence[int]) -> list[_Patch]:
    """Return the embedding as it is, then several times with every element off by up to ``NOISE``, in pairs."""
    embed = op_table(weights.config)[0]
    exact = embed.apply({"token_ids": np.asarray(tokens, dtype=np.int64)}, weights)
    random = np.random.default_rng(0)
    states = [
        exact,
        *(exact * (1.0 + NOISE * random.uniform(-1.0, 1.0, exact.shape)) for _ in range(N_DISTURBANCES)),
    ]
    narrow = [state.astype(np.float32) for state in states]
    pairs = zip(narrow[::2], narrow[1::2], strict=True)
    return [_Patch(embed.output, 0, pair, False) for pair in pairs]


# --- continuing -----------------------------------------------------------------------------------------------


def _continue(
    patches: Sequence[_Patch], weights: SpecWeights, progress: Progress | None
) -> list[tuple[FloatArray, FloatArray]]:
    """Run the remaining layers for every patched state; returns log-probabilities ``(vocab_size,)`` per engine."""
    config = weights.config
    table = op_table(config)
    waiting = dict(enumerate(patches))
    running: dict[tuple[int, int], FloatArray] = {}
    for layer in range(config.n_layers + 1):
        for index in [i for i, patch in waiting.items() if patch.first_layer == layer]:
            patch = waiting.pop(index)
            for engine in range(1 if patch.equal else 2):
                running[index, engine] = patch.arrays[engine].astype(np.float64)
        if layer == config.n_layers:
            break
        if progress is not None:
            progress("patching", layer, config.n_layers)
        ops = [op for op in table if taps.parse(op.output).layer == layer]
        held = _decoded(weights, ops)
        for key in running:
            running[key] = _run_ops(ops, held, running[key])
    if progress is not None:
        progress("patching", config.n_layers, config.n_layers)
    head = [op for op in table if op.output in taps.HEAD_TAPS]
    held = _decoded(weights, head)
    ends = {key: _log_softmax(_run_ops(head, held, hidden[-1:])[-1]) for key, hidden in running.items()}
    return [(ends[i, 0], ends[i, 0] if patch.equal else ends[i, 1]) for i, patch in enumerate(patches)]


def _decoded(weights: WeightSource, ops: Iterable[Op]) -> dict[str, Weight]:
    """Return the weights of a few operations, each decoded once."""
    return {name: weights[name] for op in ops for name in op.weights}


def _run_ops(ops: Sequence[Op], weights: WeightSource, hidden: FloatArray) -> FloatArray:
    """Run consecutive operations on the whole sequence from position 0; the first reads ``hidden``."""
    last_use = {name: i for i, op in enumerate(ops) for name in op.inputs}
    values: dict[str, npt.NDArray[Any]] = {ops[0].inputs[0]: hidden, "positions": np.arange(len(hidden))}
    for i, op in enumerate(ops):
        output = op.apply(values, weights)
        values[op.output] = output
        if op.appends_to is not None:
            values[op.appends_to] = output  # the sequence begins here, so this is all of the cache
        for name in op.inputs:
            if last_use[name] <= i:
                values.pop(name, None)
    return output


# --- what it means --------------------------------------------------------------------------------------------


def _effects(
    baseline: float,
    recorded: tuple[FloatArray, ...],
    patches: Sequence[_Patch],
    ends: Sequence[tuple[FloatArray, FloatArray]],
) -> tuple[LayerEffect, ...]:
    kls = [0.0 if patch.equal else _kl(*pair) for patch, pair in zip(patches, ends, strict=True)]
    return tuple(
        LayerEffect(
            tap=patch.tap,
            layer=taps.parse(patch.tap).layer,
            kl=kl,
            recovered=recovered,
            introduced=introduced,
            candidate_own_kl=_kl(recorded[0], candidate),
            reference_own_kl=_kl(recorded[1], reference),
            equal_states=patch.equal,
        )
        for patch, (candidate, reference), kl, (recovered, introduced) in zip(
            patches, ends, kls, shares(baseline, kls), strict=True
        )
    )


def _log_softmax(logits: FloatArray) -> FloatArray:
    """Return log-probabilities; float64, safe for large logits."""
    shifted: FloatArray = logits - logits.max()
    result: FloatArray = shifted - np.log(np.exp(shifted).sum())
    return result


def _kl(p: FloatArray, q: FloatArray) -> float:
    """Return KL(p || q) in nats of two arrays of log-probabilities; rounding never makes it negative."""
    return max(0.0, float((np.exp(p) * (p - q)).sum()))
