"""Our own engine, ``bitnet_py``, as a runner."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

import bitnet_py
from bitnet_py import _native
from bitnet_py.errors import InputError
from bitnet_py.model import KernelCount
from crossval.errors import BadInputError, CrossvalError
from crossval.model.taps import token_axis
from crossval.passes import OF_MAIN, EngineIdentity, Numerics, PassPlan, PassRecord, TapArray, pass_kind
from crossval.terms import LOGITS, Generation

DEFAULT_SIMD_WIDTH = 8
"""Reduction lanes when the reference does not state its own."""


def arithmetic_of(numerics: Numerics, *, follow_reference_graph: bool = False) -> bitnet_py.Arithmetic:
    """Return the engine's arithmetic that comes closest to what a reference states.

    Mainline rounds as bitnet.cpp's main does, but for sums in binary16. Activations in blocks belong to the type
    of the matrices, not to a generation. ``follow_reference_graph`` matters for main only.
    """
    blocks = numerics.quantizer_block is not None
    of_types: dict[str, Any] = {
        "block_quantizer": blocks,
        "fused_sums": blocks and bool(numerics.fused_sums),
        "fused_quantizer": bool(numerics.fused_quantizer) and (blocks or numerics.generation not in OF_MAIN),
    }
    width = numerics.simd_width or DEFAULT_SIMD_WIDTH
    of_types["bfloat_pairs"] = bool(numerics.bfloat_pairs) and width == 16
    if numerics.generation not in OF_MAIN:
        return bitnet_py.Arithmetic(simd_width=width, **of_types)
    return bitnet_py.Arithmetic(
        generation="main",
        simd_width=width,
        **of_types,
        half_sums=bool(numerics.binary16_sums),
        flash_attention=bool(numerics.flash_attention),
        attention_threads=numerics.attention_threads or 1,
        follow_reference=follow_reference_graph,
    )


def numerics_of(arithmetic: bitnet_py.Arithmetic, asked: Numerics | None = None) -> Numerics:
    """Return what the engine states about an arithmetic; ``asked`` decides between equal generations."""
    generation: Generation = arithmetic.generation
    if generation == "main" and asked is not None and asked.generation == "mainline":
        generation = "mainline"
    is_main = arithmetic.generation == "main"
    return Numerics(
        arithmetic.simd_width,
        arithmetic.fused_quantizer,
        generation=generation,
        binary16_sums=arithmetic.half_sums if is_main else None,
        flash_attention=arithmetic.flash_attention if is_main else None,
        attention_threads=arithmetic.attention_threads if arithmetic.flash_attention else None,
        activation_quantization="q8_k" if arithmetic.block_quantizer else None,
        fused_sums=arithmetic.fused_sums if arithmetic.block_quantizer else None,
        bfloat_pairs=None if asked is None or asked.bfloat_pairs is None else arithmetic.bfloat_pairs,
    )


class BitnetPyRunner:
    """Runs ``bitnet_py``; it rounds as ``numerics`` say (the reference's, usually).

    ``follow_reference_graph``: also compute what that reference computes instead of the model.
    """

    status: Literal["live"] = "live"
    plan: tuple[PassPlan, ...] | None = None

    def __init__(
        self,
        model_path: str | Path,
        *,
        n_threads: int | None = None,
        numerics: Numerics | None = None,
        follow_reference_graph: bool = False,
        kernel: str | None = None,
        n_ubatch: int = 512,
    ) -> None:
        self.model_path = Path(model_path)
        self._asked = numerics
        arithmetic = arithmetic_of(numerics or Numerics(), follow_reference_graph=follow_reference_graph)
        self._options: dict[str, Any] = {
            "n_threads": n_threads,
            "kernel": kernel,
            "arithmetic": arithmetic,
            "n_ubatch": n_ubatch,
        }
        self._model: bitnet_py.Model | None = None
        self._cache: bitnet_py.KVCache | None = None
        self._identity: EngineIdentity | None = None

    def __enter__(self) -> BitnetPyRunner:
        self._model = bitnet_py.Model.from_gguf(self.model_path, **self._options)
        self._cache = self._model.new_cache()
        library = _native.library_path().read_bytes()
        arithmetic = self._model.arithmetic
        followed = {"follow_reference_graph": True} if arithmetic.follow_reference else {}
        self._identity = EngineIdentity(
            name="bitnet_py",
            version=importlib.metadata.version("bitnet-parity"),
            library_digest=hashlib.sha256(library).hexdigest(),
            numerics=numerics_of(arithmetic, self._asked),
            settings={
                "n_threads": self._model.n_threads,
                "kernel": self._model.kernel_name,
                "n_ubatch": self._options["n_ubatch"],
                "libm": _native.libm_name() or "unknown",
                **followed,
            },
        )
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._model is not None:
            self._model.close()
        self._model = self._cache = None

    @property
    def model(self) -> bitnet_py.Model:
        """The open model. Raises ``CrossvalError`` outside the context manager."""
        if self._model is None:
            raise CrossvalError("the bitnet_py runner is not open")
        return self._model

    @property
    def identity(self) -> EngineIdentity:
        """Version, library digest, kernel family and numerics; known after entering."""
        if self._identity is None:
            raise CrossvalError("the bitnet_py runner was never opened")
        return self._identity

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids by the model's own tokenizer."""
        return self.model.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def reset(self) -> None:
        """Start over with an empty cache."""
        if self._cache is not None:
            self._cache.reset()

    def counters(self) -> list[KernelCount]:
        """Return the C library's own counters: proof of which kernels ran."""
        return self.model.counters()

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass. Raises ``BadInputError`` for tokens the model cannot take."""
        model, cache = self.model, self._cache
        assert cache is not None  # opened together with the model
        start = cache.n_tokens
        plan = PassPlan(pass_kind(len(token_ids), start), tuple(int(i) for i in token_ids), start)
        begun = time.perf_counter()
        try:
            result = model.forward(plan.token_ids, cache, taps=[n for n in select if n != LOGITS])
        except InputError as error:
            raise BadInputError(str(error)) from None
        elapsed = time.perf_counter() - begun
        n_tokens = len(plan.token_ids)
        last = (n_tokens - 1,)
        arrays = {
            # The last taps of the model have only the rows whose logits were requested: the last token's.
            name: TapArray(array, last if array.shape[token_axis(name)] < n_tokens else None)
            for name, array in result.taps.items()
        }
        if LOGITS in select and result.logits is not None:
            arrays[LOGITS] = TapArray(result.logits, last)
        return PassRecord(plan, arrays, elapsed)

    def prepare_best(self) -> None:
        """Build the int8 copy of the LM head that ``best`` searches, if the head is large enough to need one."""
        if self.model.searches_head:
            self.model.screen()

    def best(self, token_id: int) -> tuple[int, np.float32, float]:
        """Decode one token greedily: the best next token, its logit, and the seconds it took.

        Raises ``BadInputError`` for a token the model cannot take.
        """
        cache = self._cache
        assert cache is not None  # opened together with the model
        begun = time.perf_counter()
        try:
            found = self.model.largest([token_id], cache, 1)
        except InputError as error:
            raise BadInputError(str(error)) from None
        return int(found.ids[0]), found.logits[0], time.perf_counter() - begun
