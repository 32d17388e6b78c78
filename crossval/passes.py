"""The interface between the harness and an engine, whether live, recorded or the specification.

A *pass* is one call of the engine: a prompt batch (``prefill``) or one decoded token (``decode``); the two are
different code paths in every engine. A runner keeps a KV cache; ``eval`` appends to it, ``reset`` empties it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from bitnet_py import arithmetic
from crossval.formats import Dtype
from crossval.terms import Generation, Side

Activations = Literal["int8", "q8_k", "none"]
"""What a projection multiplies: int8 codes with one step per token (the model's definition), int8 codes with a
step per 256 values (llama.cpp's Q8_K), or the activations as they are."""
Weights = Literal["packed", "f32", "f16", "bf16"]
"""What it multiplies them with: signs, whose scale comes afterwards; or weights brought back to their size, each
``scale * sign`` rounded to this format."""
Q8_K_BLOCK = 256

PassKind = Literal["prefill", "decode"]
OF_MAIN = ("main", "mainline")
"""Generations that compute, and read text, as bitnet.cpp's main does."""


@dataclass(frozen=True)
class PassPlan:
    """One call of an engine: which tokens, starting at which position."""

    kind: PassKind
    token_ids: tuple[int, ...]
    start: int

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Positions of the tokens in the sequence."""
        return tuple(range(self.start, self.start + len(self.token_ids)))


@dataclass(frozen=True)
class TapArray:
    """One recorded tensor: float32, C-contiguous, shaped as ``crossval.model.taps`` says.

    ``rows`` lists which tokens of the pass the token axis covers, or is None when it covers all of them
    (bitnet.cpp's last layer keeps only the output rows after attention). ``dtype``: what it was stored in, so that
    its values were rounded to that when they were recorded, if not before.
    """

    array: npt.NDArray[np.float32]
    rows: tuple[int, ...] | None = None
    dtype: Dtype = "f32"


@dataclass(frozen=True)
class PassRecord:
    """What an engine computed in one pass. ``taps`` may load lazily; it holds what was selected and exists."""

    plan: PassPlan
    taps: Mapping[str, TapArray]
    elapsed_s: float | None = None


_GATED = ("ffn_act",)
_INSIDE: Mapping[str, tuple[str, ...]] = {"qwen3": (), "gemma3": ("q_scaled",)}
_WITHOUT_INPUT_NORMS = {"qwen3": (*_GATED, "attn_o_out"), "gemma3": ("attn_o_out",)}
_IN_MAINLINE = {"gemma3": _GATED}
"""What main computes inside other operations, or does not name: SiLU in the product with the gate, where a graph
is not given here; the scaled queries; with no norm in between, the projection of the merged heads. Mainline has
GELU in the product, too."""


@dataclass(frozen=True)
class Numerics:
    """How an engine rounds in the places where bitnet.cpp's result depends on its build (docs/numerics.md).

    ``simd_width``: float32 lanes of the reductions (16: AVX-512 build, 8: AVX2 build; None: not of that family).
    ``fused_quantizer``: the activation quantiser rounds ``x*s`` to an integer in one step (gcc builds do), without
    rounding the product first.
    ``compute_dtype``: what tensors between operations, and elementwise steps, are rounded to; sums are carried in
    binary32 or better. None: not stated, ``f32`` is assumed.
    ``op_dtypes``: operations, or kinds of operations, that compute in another format than that; in JSON both are
    one object, ``{"default": "f32", "ops": {"bitlinear": "bf16"}}``.
    ``activation_quantization``: see ``Activations``. None: not stated, ``int8`` is assumed.
    ``weights``: see ``Weights``. None: not stated, ``packed`` is assumed.
    ``accumulate``: what projections that multiply floating-point numbers are summed in. None: binary32 or better.
    ``kv_dtype``: what keys and values are rounded to when they enter the cache. None: not stated.
    ``generation``: whose arithmetic it is, beyond lanes and quantiser (docs/numerics.md). None: not stated; an
    engine that states its lanes and nothing here computes as bitnet.cpp of March 2026 does.
    ``binary16_sums``: dot products of binary16 vectors accumulate in binary16 (builds for AVX512-FP16).
    ``flash_attention``: scores, softmax and weighted sum are one operation that rounds otherwise.
    ``attention_threads``: over how many threads flash attention splits the cells of a single token, which changes
    its bits.
    ``fused_sums``: of activations in blocks (Q8_K), the scaled sum of a block is added to the others in one
    rounding (gcc builds).
    ``bfloat_pairs``: products with an LM head of BF16 are added in pairs (builds for AVX512-BF16).
    ``fused``: operations, without their layer, whose results exist only inside the kernel that reads them.
    """

    simd_width: int | None = None
    fused_quantizer: bool | None = None
    compute_dtype: Dtype | None = None
    kv_dtype: Dtype | None = None
    generation: Generation | None = None
    binary16_sums: bool | None = None
    flash_attention: bool | None = None
    attention_threads: int | None = None
    fused_sums: bool | None = None
    bfloat_pairs: bool | None = None
    op_dtypes: tuple[tuple[str, Dtype], ...] = ()
    activation_quantization: Activations | None = None
    weights: Weights | None = None
    accumulate: Dtype | None = None
    fused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fused", tuple(self.fused))  # JSON has lists
        if self.generation is None and self.simd_width is not None:
            object.__setattr__(self, "generation", "march")
        if self.generation == "march" and self.binary16_sums is False:
            object.__setattr__(self, "binary16_sums", None)  # no build of that generation has such sums

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Numerics:
        """Return what ``to_json`` wrote, or an older version did (``quantizer_block``).

        Raises:
            ValueError: both ways to state the quantiser, contradicting each other.
        """
        fields: dict[str, Any] = {k: int(one) if isinstance(one, float) else one for k, one in data.items()}
        compute = fields.get("compute_dtype")
        if isinstance(compute, Mapping):
            fields["compute_dtype"] = compute["default"]
            fields["op_dtypes"] = tuple(sorted(compute.get("ops", {}).items()))
        if fields.pop("quantizer_block", None) is not None:
            if fields.get("activation_quantization", "q8_k") not in ("q8_k", None):
                raise ValueError("numerics: quantizer_block contradicts activation_quantization")
            fields["activation_quantization"] = "q8_k"
        return cls(**fields)

    @property
    def quantizer_block(self) -> int | None:
        """How many activations share a step, where that is not a whole row."""
        return Q8_K_BLOCK if self.activation_quantization == "q8_k" else None

    @property
    def formats(self) -> frozenset[Dtype]:
        """Every format that it states to compute in; binary32 where it states none."""
        return frozenset({self.compute_dtype or "f32", *(dtype for _, dtype in self.op_dtypes)})

    def inside_others(self, architecture: str | None, input_norms: bool = False) -> frozenset[str]:
        """Return the taps that such an engine computes inside another operation of a model of an architecture.

        It may not have them as tensors. ``input_norms``: the model has ``*_norm_in``, for which main has a graph
        of its own.
        """
        unnamed: tuple[str, ...] = ()
        if self.generation in ("main", "mainline"):
            unnamed = _INSIDE.get(architecture or "", _GATED)
            unnamed += () if input_norms else _WITHOUT_INPUT_NORMS.get(architecture or "", ())
        if self.generation == "mainline":
            unnamed += _IN_MAINLINE.get(architecture or "", ())
        attention = ("kq", "kq_soft_max") if self.flash_attention else ()
        return frozenset((*unnamed, *attention, *self.fused))

    def words(self) -> list[str]:
        """Return what is stated, for people."""
        stated = (
            self.generation,
            self.simd_width and f"{self.simd_width} lanes",
            self.fused_quantizer and "fused quantiser",
            self.quantizer_block and f"activations in blocks of {self.quantizer_block}",
            self.activation_quantization == "none" and "activations not quantised",
            self.weights not in (None, "packed") and f"weights dequantised to {self.weights}",
            self.accumulate and f"projections summed in {self.accumulate}",
            self.fused_sums and "fused sums of blocks",
            self.binary16_sums and "sums in binary16",
            self.bfloat_pairs and "bfloat16 in pairs",
            self.flash_attention and "flash attention",
            self.compute_dtype and f"computes in {self.compute_dtype}",
            self.op_dtypes and ", ".join(f"{name} in {dtype}" for name, dtype in self.op_dtypes),
            self.kv_dtype and f"keys and values in {self.kv_dtype}",
            self.fused and f"{', '.join(self.fused)} inside other kernels",
        )
        return [text for text in stated if text]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values; what is not stated only for lanes and quantiser."""
        always = ("simd_width", "fused_quantizer")
        fields = {**asdict(self), "fused": list(self.fused) or None}
        ops = dict(fields.pop("op_dtypes"))
        if ops:
            fields["compute_dtype"] = {"default": self.compute_dtype or "f32", "ops": ops}
        return {name: value for name, value in fields.items() if value is not None or name in always}


def tokenizer_rules(stated: Mapping[Side, Numerics]) -> arithmetic.Generation:
    """Return the generation of bitnet.cpp by whose rules text is read where an engine has no tokenizer of its own.

    The reference's generation, or the candidate's where the reference states none; March is the default.
    ``stated``: of the engines that take part. Mainline reads as main does.
    """
    found = (stated[side].generation for side in ("reference", "candidate") if side in stated)
    return "main" if next(filter(None, found), None) in OF_MAIN else "march"


@dataclass(frozen=True)
class EngineIdentity:
    """Which engine computed a trace, with what is needed to identify the build; None where unknown."""

    name: str
    """``bitnet_py``, ``bitnet.cpp``, ``specification``, or the name a third-party trace gives."""
    version: str | None = None
    source_commit: str | None = None
    source_digest: str | None = None
    library_digest: str | None = None
    compiler: str | None = None
    flags: str | None = None
    numerics: Numerics = field(default_factory=Numerics)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Threads, kernel name and the like; JSON scalars only. ``n_ubatch``: the longest pass, where there is one."""

    def to_json(self) -> dict[str, Any]:
        """Return the identity as plain JSON values."""
        data = {**asdict(self), "numerics": self.numerics.to_json()}
        data["settings"] = dict(self.settings)
        return data


class Runner(Protocol):
    """An engine, as the harness runs it. Use as a context manager: entering loads it, leaving frees it.

    Errors: ``BadInputError`` (unusable model or tokens), ``UnavailableError`` (not built, not recorded),
    ``EngineCrashError`` (abort, crash, time-out). After a crash the runner is closed.
    """

    @property
    def identity(self) -> EngineIdentity:
        """Identity of the engine; complete only after entering."""

    @property
    def status(self) -> Literal["live", "recorded"]:
        """Whether results are computed now or come from a trace."""

    @property
    def plan(self) -> tuple[PassPlan, ...] | None:
        """The only passes that a recorded trace can give; None for a runner that can run any."""

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of ``text`` by the engine's own tokenizer."""

    def reset(self) -> None:
        """Empty the KV cache; the next ``eval`` starts at position 0."""

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass over ``token_ids`` and return the selected taps.

        One token is a decode pass when the cache is not empty; ``result_output`` is the last token's logits,
        shape ``(1, vocab_size)``, rows ``(n_tokens - 1,)``. From ``ffn_inp`` of the last layer on, engines
        may return only the last token's row; ``rows`` says so.
        """

    def __enter__(self) -> Runner:
        """Load the engine and the model."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Free the engine."""


def pass_kind(n_tokens: int, start: int) -> PassKind:
    """Return the kind of a pass: one token after others is a decode pass, everything else is prefill."""
    return "decode" if n_tokens == 1 and start > 0 else "prefill"


def longest_pass(*runners: Runner) -> int | None:
    """Return how many tokens all of these engines take in one pass, or None when none of them has a limit.

    A trace has none: its passes are what they are.
    """
    stated = [runner.identity.settings.get("n_ubatch") for runner in runners if runner.status == "live"]
    return min((limit for limit in stated if isinstance(limit, int)), default=None)


def cut_prompt(token_ids: Sequence[int], longest: int | None) -> tuple[PassPlan, ...]:
    """Return the passes of a prompt: whole, or cut after every ``longest`` tokens, as llama.cpp cuts it.

    Where a prompt is cut decides its bits, so engines that are compared get the same pieces.
    """
    ids = tuple(map(int, token_ids))
    step = len(ids) if longest is None else longest
    starts = range(0, len(ids), max(1, step))
    pieces = ((start, ids[start : start + step]) for start in starts)
    return tuple(PassPlan(pass_kind(len(piece), start), piece, start) for start, piece in pieces)


def prompt_passes(plans: Sequence[PassPlan], n_prompt: int) -> int:
    """Return how many of these passes feed the prompt of ``n_prompt`` tokens: one at least; the rest decode."""
    ends = (plan.start + len(plan.token_ids) for plan in plans)
    return next((index for index, end in enumerate(ends, 1) if end >= n_prompt), 1)


def n_after(plans: Sequence[PassPlan], n_prompt: int) -> int:
    """Return how many of these passes come after the prompt: the tokens that were decoded."""
    return max(0, len(plans) - prompt_passes(plans, n_prompt))


def check_rows(name: str, rows: tuple[int, ...] | None, n_tokens: int) -> None:
    """Check that ``rows`` lists tokens of the pass, ascending; None stands for all of them.

    Raises:
        ValueError: empty, repeated, unsorted, or outside the pass.
    """
    if rows is None:
        return
    if not rows or any(b <= a for a, b in pairwise(rows)) or rows[0] < 0 or rows[-1] >= n_tokens:
        raise ValueError(f"{name}: rows must be ascending token indices below {n_tokens}, got {short_list(rows)}")


def short_list(values: Sequence[int]) -> str:
    """Return a list of numbers for a message, cut after eight."""
    return f"[{', '.join(map(str, values[:8]))}{', …' if len(values) > 8 else ''}]"
