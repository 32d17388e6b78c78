"""The model: weights mapped from a file, a C engine over them, and the forward pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from ctypes import byref, c_int, c_void_p, pointer
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_py import _native, taps
from bitnet_py._structs import arithmetic_struct, model_struct
from bitnet_py.arithmetic import MAIN, MARCH, Arithmetic
from bitnet_py.cache import KVCache
from bitnet_py.config import POOLINGS, ModelConfig, Pooling
from bitnet_py.errors import InputError
from bitnet_py.ggml_types import GGMLType
from bitnet_py.gguf import GGUFFile
from bitnet_py.logits import check_logits, largest
from bitnet_py.screen import HEAD_ROWS_AT_ONCE, MAX_DIM, MAX_TOP, Screen
from bitnet_py.tokenizer import Tokenizer
from bitnet_py.weights import Weights

KERNEL_VARIABLE = "BITNET_KERNEL"
"""Environment variable that forces a kernel family; it is an error if the family is unknown or
unavailable."""
DEFAULT_BYTES_PER_THREAD = 4 << 20
"""Measured on a 2-core machine: waking a thread takes about as long as reading a few megabytes."""
DEFAULT_UBATCH = 512
"""Tokens per pass of a long prompt, bitnet.cpp's default."""

DEFAULT_SCREEN_FROM_BYTES = 32 << 20
"""An LM head that fits the processor's caches is read faster than it is screened."""

Logits = Literal["last", "all", "none"]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Forward:
    """Result of a forward pass."""

    logits: Float32Array | None
    """``(n, vocab_size)``: of the last token, of all tokens, or None."""
    taps: dict[str, Float32Array]
    """The recorded tensors by name, with the shapes of ``bitnet_py.taps``."""
    pooled: Float32Array | None = None
    """``(dim,)``: one vector made of those of all tokens, or None."""


@dataclass(frozen=True)
class Largest:
    """The largest logits of the last token of a pass, bit-identical to those of the whole LM head."""

    ids: npt.NDArray[np.int32]
    """``(n,)``: largest logit first; ties by lower id."""
    logits: Float32Array
    """``(n,)``."""
    n_rows_read: int
    """Rows of the LM head that were read in binary16: all, or those that could still be among
    the largest."""
    all_logits: Callable[[], Float32Array]
    """Returns all logits, ``(vocab_size,)``; after the model's next pass it raises
    ``RuntimeError``."""


@dataclass(frozen=True)
class KernelCount:
    """How often an operation ran in the C library since the model was loaded."""

    name: str
    """Operation and kernel family, e.g. ``i2s_gemv_avx2``."""
    calls: int
    bytes: int
    """Bytes of weights or KV cache it read."""
    operation: str
    """E.g. ``i2s_gemv``."""
    family: str
    """Family of the kernels that ran, e.g. ``avx2``."""
    quantized: bool
    """Whether it multiplies packed ternary weights."""
    reads_weights: bool
    """Whether ``bytes`` are bytes of weights."""


class Model:
    """A loaded model. Not thread-safe: one forward pass at a time. Use as a context manager or ``close`` it.

    Weights stay in the mapped file; nothing is copied.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        *,
        n_threads: int | None = None,
        kernel: str | None = None,
        arithmetic: Arithmetic | None = None,
        n_ubatch: int = DEFAULT_UBATCH,
        bytes_per_thread: int = DEFAULT_BYTES_PER_THREAD,
        screen_from_bytes: int = DEFAULT_SCREEN_FROM_BYTES,
    ) -> None:
        if n_ubatch < 1:
            raise InputError(f"n_ubatch must be at least 1, not {n_ubatch}")
        self.path: Path = gguf.path
        self.weights = Weights.load(gguf)
        self.config: ModelConfig = self.weights.config
        self.n_threads = available_cores() if n_threads is None else n_threads
        self.arithmetic = _arithmetic(self.config, arithmetic)
        self.n_ubatch = n_ubatch
        self._gguf = gguf
        self._tokenizer: Tokenizer | None = None
        self._engine: c_void_p | None = None
        fits = self.weights.head.nbytes >= screen_from_bytes and self.config.dim <= MAX_DIM
        fits = fits and self.weights.head_type is GGMLType.F16
        self.searches_head = fits and not self.arithmetic.half_sums
        """Whether ``largest`` uses the compact copy of the LM head. Its bounds hold for a head of F16 and
        sums in binary32."""
        self._screen: Screen | None = None
        self._n_passes = 0
        self._is_first_search = True
        self._absent_taps = taps.absent(self.weights, self.arithmetic)

        kernel = kernel or os.environ.get(KERNEL_VARIABLE) or None
        options = _native.Options(
            arithmetic_struct(self.arithmetic),
            self.n_threads,
            bytes_per_thread,
            kernel.encode() if kernel else None,
        )
        engine = c_void_p()
        _native.call("bn_engine_create", byref(model_struct(self.weights)), byref(options), byref(engine))
        self._engine = engine

    @classmethod
    def from_gguf(
        cls,
        path: str | os.PathLike[str],
        *,
        n_threads: int | None = None,
        kernel: str | None = None,
        arithmetic: Arithmetic | None = None,
        n_ubatch: int = DEFAULT_UBATCH,
        bytes_per_thread: int = DEFAULT_BYTES_PER_THREAD,
        screen_from_bytes: int = DEFAULT_SCREEN_FROM_BYTES,
    ) -> Model:
        """Open a GGUF file and prepare the engine.

        Args:
            path: a GGUF file of one of ``config.ARCHITECTURES`` with ternary projections.
            n_threads: worker threads; default: the cores this process may use. Never changes
                results.
            kernel: kernel family to force (default: ``BITNET_KERNEL``, else the best). Never
                changes results.
            arithmetic: whose results to reproduce; by default those of an AVX2 build of bitnet.cpp
                of March 2026, or without flash attention of its main for architectures that only
                main has.
            n_ubatch: a longer prompt is processed in passes of this many tokens.
            bytes_per_thread: a pass that reads fewer bytes of weights per thread uses fewer
                threads.
            screen_from_bytes: ``largest`` searches an LM head of this size or more with a compact
                copy. Never changes results.

        Raises:
            ModelError: the file is missing, malformed, unsupported or holds unusable values.
            InputError: the arithmetic of March for an architecture that only main has.
            NativeError: the C library is missing, or the forced kernel cannot run here.
        """
        gguf = GGUFFile.open(path)
        try:
            return cls(
                gguf,
                n_threads=n_threads,
                kernel=kernel,
                arithmetic=arithmetic,
                n_ubatch=n_ubatch,
                bytes_per_thread=bytes_per_thread,
                screen_from_bytes=screen_from_bytes,
            )
        except BaseException:
            gguf.close()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the model file, built on first use.

        Raises ``TokenizerError`` when it is unusable, ``ModelError`` for a token that is not UTF-8.
        """
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_gguf(self._gguf, self.arithmetic.generation)
        return self._tokenizer

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the model file."""
        return self._gguf.metadata

    @property
    def kernel_name(self) -> str:
        """The kernel family in use."""
        return str(_native.library().bn_engine_kernel(self._handle()).decode())

    def new_cache(self) -> KVCache:
        """Return an empty KV cache for one sequence."""
        return KVCache(self.config, self.arithmetic)

    def forward(
        self,
        ids: Sequence[int] | npt.NDArray[np.int32],
        cache: KVCache,
        *,
        taps: Collection[str] = (),
        logits: Logits = "last",
        pooling: Pooling = "none",
    ) -> Forward:
        """Append tokens to a sequence and compute their logits; only these tokens are computed.

        More than ``n_ubatch`` tokens run in several passes, but with a pooling in one; taps can be
        recorded in a single pass only.

        Args:
            ids: token ids, at least one.
            cache: the sequence so far; it grows by ``len(ids)``.
            taps: names of intermediate tensors to record.
            logits: of the last token, all tokens, or none.
            pooling: how to make one vector of these tokens' rows of ``result_norm``; with logits of
                all tokens, or none, and an arithmetic of main. Without logits the LM head is not
                computed.

        Raises:
            InputError: no tokens, an id outside the vocabulary, more tokens than the model's
                context, or a pooling that cannot be computed.
        """
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        self._check(tokens, cache, taps if pooling == "none" else ())
        cache.reserve(cache.n_tokens + tokens.size)
        n_rows = {"last": 1, "all": tokens.size, "none": 0}[logits]
        out = np.empty((n_rows, self.config.vocab_size), np.float32)
        if pooling != "none":
            return self._pool(tokens, cache, out if n_rows else None, taps, pooling)
        recorded: dict[str, Float32Array] = {}
        for first, chunk in _split(tokens, self.n_ubatch):
            is_last = first + chunk.size == tokens.size
            n_outputs = chunk.size if logits == "all" else int(logits == "last" and is_last)
            rows = out[first:] if logits == "all" else out
            recorded = self._run(chunk, cache, n_outputs, rows if n_outputs else None, taps)
        return Forward(out if n_rows else None, recorded)

    def _pool(
        self,
        tokens: npt.NDArray[np.int32],
        cache: KVCache,
        logits: Float32Array | None,
        names: Collection[str],
        pooling: Pooling,
    ) -> Forward:
        if logits is not None and len(logits) != tokens.size:
            raise InputError("a pooling goes with the logits of all tokens, or of none")
        if self.arithmetic.generation != "main":
            raise InputError(
                "a pooling is computed as bitnet.cpp's main does: give an arithmetic of that generation"
            )
        pooled = np.empty(self.config.dim, np.float32)
        recorded = self._run(tokens, cache, tokens.size, logits, names, pooling=pooling, pooled=pooled)
        return Forward(logits, recorded, pooled)

    def largest(self, ids: Sequence[int] | npt.NDArray[np.int32], cache: KVCache, n: int) -> Largest:
        """Append tokens to a sequence and return the ``n`` largest logits of the last one; 0: all of them.

        From the second call on, a large LM head is not read completely: an int8 copy of it bounds
        every logit, and only rows that can still be among the largest are read in binary16
        (``screen``). The first call makes no copy, so that the first token comes as early as
        possible.

        Raises:
            InputError: as ``forward``, or ``n`` is negative.
            ModelError: a logit is not finite (with the copy: one of those that were read).
        """
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        self._check(tokens, cache, ())
        if n < 0:
            raise InputError(f"{n} logits requested, expected 0 (all) or more")
        is_first, self._is_first_search = self._is_first_search, False
        can_search = self.searches_head and 0 < n <= min(MAX_TOP, self.config.vocab_size)
        if can_search and (self._screen is not None or not is_first):
            return self._search(tokens, cache, n)
        logits = self.forward(tokens, cache).logits
        assert logits is not None
        row = logits[-1]
        check_logits(row)
        best = largest(row, n).astype(np.int32)
        return Largest(best, row[best], self.config.vocab_size, lambda: row)

    def _search(self, tokens: npt.NDArray[np.int32], cache: KVCache, n: int) -> Largest:
        screen = self.screen()
        cache.reserve(cache.n_tokens + tokens.size)
        ids, logits = np.empty(n, np.int32), np.empty(n, np.float32)
        found = _native.TopStruct(pointer(screen.struct()), n, _native.address(ids), _native.address(logits), 0)
        for first, chunk in _split(tokens, self.n_ubatch):
            is_last = first + chunk.size == tokens.size
            self._run(chunk, cache, int(is_last), None, (), found if is_last else None)
        check_logits(logits, ids)
        pass_index = self._n_passes

        def all_logits() -> Float32Array:
            if self._n_passes != pass_index:
                raise RuntimeError("the model has run another pass: the logits were available only until then")
            head = self.weights.head
            row = np.empty(len(head), np.float32)
            for first in range(0, row.size, HEAD_ROWS_AT_ONCE):
                part = row[first : first + HEAD_ROWS_AT_ONCE]
                _native.call("bn_engine_last_logits", self._handle(), first, part.size, _native.address(part))
                self._gguf.release_pages(head[first : first + part.size])
            return row

        return Largest(ids, logits, found.n_rescored, all_logits)

    def screen(self) -> Screen:
        """Return the compact copy of the LM head that ``largest`` searches, made on first use.

        Pages of the head are returned to the system as they are copied, so that only the copy stays
        resident.
        """
        if self._screen is None:
            head = self.weights.head
            self._screen = Screen.build(
                self._handle(),
                *head.shape,
                after=lambda first, n: self._gguf.release_pages(head[first : first + n]),
            )
        return self._screen

    def _check(self, tokens: npt.NDArray[np.int32], cache: KVCache, names: Collection[str]) -> None:
        if tokens.ndim != 1 or tokens.size == 0:
            raise InputError("a forward pass needs at least one token: the prompt is empty")
        if cache.n_tokens + tokens.size > self.config.context_length:
            raise InputError(
                f"{cache.n_tokens} + {tokens.size} tokens do not fit the model's context of "
                f"{self.config.context_length}: shorten the prompt"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        if names and tokens.size > self.n_ubatch:
            raise InputError(
                f"taps are recorded in a single pass: {tokens.size} tokens exceed n_ubatch = {self.n_ubatch}"
            )

    def _run(
        self,
        tokens: npt.NDArray[np.int32],
        cache: KVCache,
        n_outputs: int,
        logits: Float32Array | None,
        names: Collection[str],
        top: _native.TopStruct | None = None,
        *,
        pooling: Pooling = "none",
        pooled: Float32Array | None = None,
    ) -> dict[str, Float32Array]:
        at = taps.PassShape(tokens.size, cache.n_tokens, n_outputs)
        self._n_passes += 1
        missing = set(self._absent_taps)
        if logits is None:
            missing.add("result_output")
        if pooled is None:
            missing.add("pooled")
        arrays, table = taps.allocate(names, self.config, at, missing)
        _native.call(
            "bn_engine_forward",
            self._handle(),
            byref(
                _native.Pass(
                    tokens=_native.address(tokens),
                    n_tokens=tokens.size,
                    start=cache.n_tokens,
                    n_outputs=n_outputs,
                    capacity=cache.capacity,
                    k_cache=_native.address(cache.keys),
                    v_cache=_native.address(cache.values),
                    logits=_native.address(logits),
                    top=None if top is None else pointer(top),
                    pooling=POOLINGS.index(pooling),
                    pooled=_native.address(pooled),
                    taps=_native.address(table) if arrays else None,
                )
            ),
        )
        cache.n_tokens += tokens.size
        return arrays

    def counters(self) -> list[KernelCount]:
        """Return the C library's counters of its own kernels since the model was loaded."""
        buffer, n = (_native.Counter * 64)(), c_int()
        _native.call("bn_engine_counters", self._handle(), buffer, len(buffer), byref(n))
        return [
            KernelCount(
                name=c.name.decode(),
                calls=c.calls,
                bytes=c.bytes,
                operation=c.operation.decode(),
                family=c.family.decode(),
                quantized=bool(c.quantized),
                reads_weights=bool(c.reads_weights),
            )
            for c in buffer[: n.value]
        ]

    def _handle(self) -> c_void_p:
        if self._engine is None:
            raise InputError("the model is closed")
        return self._engine

    def close(self) -> None:
        """Free the engine and unmap the file. Safe to call twice."""
        if self._engine is not None:
            _native.library().bn_engine_free(self._engine)
            self._engine = None
            self._gguf.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            self.close()


def _arithmetic(config: ModelConfig, given: Arithmetic | None) -> Arithmetic:
    """Return the arithmetic given, or the default of an architecture."""
    if given is None:
        return MARCH if config.architecture.in_march else MAIN
    if given.generation == "march" and not config.architecture.in_march:
        raise InputError(
            f"bitnet.cpp of March has no architecture {config.arch}: give an arithmetic of generation main"
        )
    return given


def available_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _split(tokens: npt.NDArray[np.int32], n_ubatch: int) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    for first in range(0, tokens.size, n_ubatch):
        yield first, tokens[first : first + n_ubatch]
