"""bitnet.cpp or llama.cpp inside the child process: the library, one model, its contexts, one pass at a time.

Two contexts share the model: a plain one without any callback, for passes of which only logits are
wanted, and one with ``cb_eval`` for passes that are traced (llama.cpp takes the callback when a
context is created). When a sequence changes from one kind of pass to the other, the KV cache is
copied exactly from one context to the other.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossval.bitnet_cpp import abi, limits, probe, probe_blocks
from crossval.bitnet_cpp.abi import Library
from crossval.bitnet_cpp.capture import Capture, CapturedTap, PassShape
from crossval.bitnet_cpp.pooled import embedding_taps
from crossval.bitnet_cpp.table import MESSAGE, Nodes
from crossval.errors import BadInputError, UnavailableError
from crossval.model.config import may_pool

_TOKENIZER_NONE = 0
_I2S_WEIGHTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
DEFAULT_N_CTX = 2048


def unknown_graph(path: str | Path, arch: str, title: str, known: Iterable[str]) -> str:
    """Say that a generation has no graph of an architecture, or none that is known."""
    return f"{path}: architecture {arch!r}; of {title} the graphs of {' and '.join(known)} are known here"


class RefusedError(Exception):
    """bitnet.cpp itself reported a failure; its log says why."""


@dataclass
class _Context:
    address: int
    n_past: int = 0


@dataclass(frozen=True)
class EvalResult:
    """Result of one pass: taps by full name, logits ``(1, vocab_size)``, seconds of ``llama_decode``."""

    taps: dict[str, CapturedTap]
    logits: npt.NDArray[np.float32]
    elapsed_s: float


@dataclass
class Engine:
    """One loaded library with at most one model."""

    stack_bytes: int
    library: Library | None = None
    model: int | None = None
    vocab: int | None = None
    n_past: int = 0
    n_ctx: int = 0
    n_ubatch: int = 0
    n_threads: int = 1
    flash_attention: bool = False
    nodes: Nodes = field(default_factory=dict)
    n_vocab: int = 0
    n_embd: int = 0
    head_dim: int = 0
    is_pooled: bool = False
    """The model's result is one vector of a text: every token is an output, and they are pooled."""
    plain: _Context | None = None
    tapped: _Context | None = None
    capture: Capture | None = None
    _keep: list[Any] = field(default_factory=list)

    @property
    def lib(self) -> Library:
        """Return the library, which ``open`` must have loaded."""
        if self.library is None:
            raise RuntimeError("no library has been opened")
        return self.library

    def open(self, path: str) -> dict[str, Any]:
        """Load the library, find its generation, probe how it rounds; return facts about it.

        Raises:
            UnavailableError: it cannot be loaded or is of no known generation.
        """
        library = abi.open_library(path)
        library.backend_init()
        self.library = library
        table = library.table
        return {
            "generation": table.generation,
            "engine": table.engine,
            "title": table.title,
            "architectures": list(table.graphs),
            "files": mapped_libraries(),
            **probe.rounding(library),
            "in_blocks": probe_blocks.rounding(library),
            "system_info": library.system_info().decode("utf-8", "replace").strip(),
        }

    def load(
        self,
        path: str,
        overrides: Mapping[str, Any],
        *,
        n_ctx: int | None,
        n_ubatch: int,
        n_threads: int,
        flash_attention: bool | None,
        input_norms: bool = False,
    ) -> dict[str, Any]:
        """Load a model and create the plain context; return its shape and the limits in force.

        ``overrides``: metadata key -> value that replaces the file's.

        ``flash_attention`` None: on where the generation has it on by default. ``input_norms``: the model has
        norms before its matrices.

        Raises:
            RefusedError: the library could not load the model or make a context.
            BadInputError: the context asked for is longer than the model's, or its architecture is none
                whose graph is known.
            UnavailableError: what was asked for is not possible with this library.
        """
        lib, table = self.lib, self.lib.table
        if flash_attention and table.flash_attention is None:
            raise UnavailableError(f"flash attention of {table.title} is not supported here")
        self._load(path, overrides)
        arch = self._meta("general.architecture") or ""
        if arch not in table.graphs:
            raise BadInputError(unknown_graph(path, arch, table.title, table.graphs))
        n_layers, n_ctx_train = lib.n_layer(self.model), lib.n_ctx_train(self.model)
        if n_ctx is not None and n_ctx > n_ctx_train:
            raise BadInputError(f"n_ctx {n_ctx} is longer than the model's context of {n_ctx_train} tokens")
        if flash_attention is None:
            flash_attention = table.flash_attention is not None
        self.n_threads, self.flash_attention = n_threads, flash_attention
        limit = self._ubatch_limit()
        self.n_ubatch = n_ubatch if limit is None else min(n_ubatch, limit)
        self.n_ctx = min(DEFAULT_N_CTX, n_ctx_train) if n_ctx is None else n_ctx
        self.n_vocab = lib.n_vocab(self.vocab)
        n_heads = lib.n_head(self.model)
        self.head_dim = int(self._meta(f"{arch}.attention.key_length") or lib.n_embd(self.model) // n_heads)
        self.n_embd = lib.n_embd(self.model)
        self.nodes = table.nodes(arch, flash_attention, input_norms)
        self.is_pooled = may_pool(arch) and int(self._meta(f"{arch}.pooling_type") or 0) > 0
        if self.is_pooled and not lib.has("pooled"):
            raise UnavailableError(f"pooling by {table.title} is not supported here")
        self.plain = self._new_context(None)
        return {
            "arch": arch,
            "n_layers": n_layers,
            "vocab_size": self.n_vocab,
            "dim": self.n_embd,
            "n_heads": n_heads,
            "head_dim": self.head_dim,
            "n_ctx_train": n_ctx_train,
            "n_ctx": lib.n_ctx(self.plain.address),
            "n_ubatch": lib.n_ubatch(self.plain.address),
            "ubatch_limit": limit,
            "n_threads": n_threads,
            "flash_attention": flash_attention if table.flash_attention is not None else None,
            "is_pooled": self.is_pooled,
            "has_vocab": lib.vocab_type(self.vocab) != _TOKENIZER_NONE,
            "has_output_weight": bool(self._tensor("output.weight")),
        }

    def load_vocabulary(self, path: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Load the vocabulary of a model file and nothing else; values of ``overrides`` replace the file's.

        Raises:
            RefusedError: the library could not load it.
        """
        self._load(path, overrides, vocab_only=True)
        self.n_vocab = self.lib.n_vocab(self.vocab)
        return {
            "vocab_size": self.n_vocab,
            "has_vocab": self.lib.vocab_type(self.vocab) != _TOKENIZER_NONE,
        }

    def _load(self, path: str, overrides: Mapping[str, Any], *, vocab_only: bool = False) -> None:
        params = self.lib.default_model_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        if overrides:
            values = abi.overrides(overrides)
            self._keep.append(values)
            params.kv_overrides = ctypes.cast(values, ctypes.c_void_p)
        self.model = self.lib.load_model(path.encode(), params)
        if not self.model:
            raise RefusedError(f"{self.lib.table.engine} could not load {path}")
        self.vocab = self.lib.vocab_of(self.model)

    def pieces(self, *, special: bool) -> list[bytes]:
        """Return ``llama_token_to_piece`` of every token; ``special``: control tokens as text, not nothing."""
        buffer = ctypes.create_string_buffer(256)
        found = []
        for token in range(self.n_vocab):
            size = self.lib.token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = self.lib.token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
            found.append(buffer.raw[:size])
        return found

    def tokenize(self, data: bytes, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return ``llama_tokenize`` of UTF-8; BOS and EOS follow the model's own settings when ``add_bos``.

        Raises:
            BadInputError: the model has no vocabulary.
        """
        if self.lib.vocab_type(self.vocab) == _TOKENIZER_NONE:
            raise BadInputError("the model has no vocabulary, so it cannot be used to tokenize")
        capacity = len(data) + 8
        for _ in range(2):
            buffer = (ctypes.c_int32 * capacity)()
            count = self.lib.tokenize(self.vocab, data, len(data), buffer, capacity, add_bos, parse_special)
            if count >= 0:
                return list(buffer[:count])
            capacity = -count
        raise RefusedError(f"llama_tokenize asked for {capacity} tokens and then for more")

    def tokenize_guarded(self, data: bytes, **options: bool) -> list[int] | str:
        """As ``tokenize``, in a copy of this process; how that ended (``SIGABRT``) when the text ends it."""
        reading, writing = os.pipe()
        copy = os.fork()
        if copy == 0:
            status = 1
            try:
                ids = self.tokenize(data, **options)
                with os.fdopen(writing, "wb") as pipe:
                    pipe.write(np.array(ids, np.int32).tobytes())
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            written = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
        if status < 0:
            return signal.Signals(-status).name
        return f"exit status {status}" if status else np.frombuffer(written, np.int32).tolist()

    def apply_template(self, template: str, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return ``llama_chat_apply_template``, the assistant's turn begun; None for an unknown template."""
        parts = [(message["role"].encode(), message["content"].encode()) for message in messages]
        listed: Any = (MESSAGE.struct * len(parts))()
        for entry, (role, content) in zip(listed, parts, strict=True):
            entry.role, entry.content = role, content
        size = 2 * sum(len(role) + len(content) for role, content in parts) + 1024
        model = [self.model] if self.lib.table.template_takes_model else []
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            found = self.lib.apply_template(*model, template.encode(), listed, len(parts), True, buffer, size)
            if found <= size:
                return None if found < 0 else buffer.raw[:found].decode()
            size = found
        raise RefusedError(f"llama_chat_apply_template asked for {size} bytes and then for more")

    def reset(self) -> None:
        """Empty the KV cache."""
        for context in (self.plain, self.tapped):
            if context is not None:
                self.lib.empty_cache(context.address)
                context.n_past = 0
        self.n_past = 0

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> EvalResult:
        """Run one pass, copying out the selected taps, and advance the KV cache.

        Raises:
            RefusedError: ``llama_decode`` reported a failure.
            ValueError: a captured node has an unexpected type, place or shape.
        """
        context = self._context_for(bool(select))
        n_tokens = len(token_ids)
        n_kv = self.n_past + n_tokens
        if select and self.capture is not None:
            self.capture.arm(select, PassShape(n_tokens, n_kv, self.head_dim))
        batch = self._batch(token_ids)
        start = time.perf_counter()
        status = self.lib.decode(context.address, batch)
        self.lib.synchronize(context.address)
        elapsed_s = time.perf_counter() - start
        if select and self.capture is not None and self.capture.error is not None:
            raise self.capture.error
        if status != 0:
            raise RefusedError(f"llama_decode returned {status} for {n_tokens} tokens at position {self.n_past}")
        pointer = self.lib.logits(context.address, -1)
        if not pointer:
            raise RefusedError(f"{self.lib.table.engine} gave no logits")
        logits = np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy().reshape(1, self.n_vocab)
        self.n_past = context.n_past = n_kv
        taken = dict(self.capture.taken) if select and self.capture is not None else {}
        if self.is_pooled and select:
            taken |= embedding_taps(self._pooled(context), select, n_tokens)
        return EvalResult(taken, logits, elapsed_s)

    def _pooled(self, context: _Context) -> npt.NDArray[np.float32]:
        pointer = self.lib.pooled(context.address, 0)
        if not pointer:
            raise RefusedError(f"{self.lib.table.engine} gave no pooled vector")
        vector: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self.n_embd,)).copy()
        return vector

    def _context_for(self, tapped: bool) -> _Context:
        """Return the context to use, with the KV cache of the sequence so far in it."""
        if self.plain is None:
            raise RuntimeError("no model has been loaded")
        if tapped and self.tapped is None:
            self.capture = Capture(self.lib, self.nodes)
            callback = self.capture.callback()
            self._keep.append(callback)
            self.tapped = self._new_context(callback)
        target, other = (self.tapped, self.plain) if tapped else (self.plain, self.tapped)
        assert target is not None
        # The sequence only grows, so exactly the context that ran its last pass has all of it.
        if target.n_past != self.n_past:
            assert other is not None
            self._copy_cache(other, target)
        return target

    def _copy_cache(self, source: _Context, target: _Context) -> None:
        size = self.lib.state_size(source.address, 0)
        buffer = ctypes.create_string_buffer(size)
        written = self.lib.get_state(source.address, buffer, size, 0)
        self.lib.empty_cache(target.address)
        if not written or not self.lib.set_state(target.address, buffer, written, 0):
            raise RefusedError(f"{self.lib.table.engine} could not copy its KV cache between contexts")
        target.n_past = self.n_past

    def _new_context(self, callback: Any | None) -> _Context:
        params = self.lib.default_context_params()
        params.n_ctx = self.n_ctx
        params.n_batch = params.n_ubatch = self.n_ubatch
        params.n_threads = params.n_threads_batch = self.n_threads
        if self.lib.table.flash_attention is not None:
            setattr(params, self.lib.table.flash_attention, int(self.flash_attention))
        params.embeddings = self.is_pooled
        if callback is not None:
            params.cb_eval = ctypes.cast(callback, ctypes.c_void_p)
        address = self.lib.new_context(self.model, params)
        if not address:
            raise RefusedError(f"{self.lib.table.engine} could not make a context of {self.n_ctx} tokens")
        return _Context(address)

    def _batch(self, token_ids: Sequence[int]) -> Any:
        """Build a batch of one sequence; its outputs are the last token, or all where tokens are pooled."""
        n_tokens = len(token_ids)
        tokens = (ctypes.c_int32 * n_tokens)(*token_ids)
        positions = (ctypes.c_int32 * n_tokens)(*range(self.n_past, self.n_past + n_tokens))
        counts = (ctypes.c_int32 * n_tokens)(*[1] * n_tokens)
        sequence = (ctypes.c_int32 * 1)(0)
        pointer = ctypes.cast(sequence, ctypes.POINTER(ctypes.c_int32))
        sequences = (ctypes.POINTER(ctypes.c_int32) * n_tokens)(*[pointer] * n_tokens)
        outputs = (ctypes.c_int8 * n_tokens)(*[self.is_pooled] * n_tokens)
        outputs[n_tokens - 1] = 1
        batch: Any = self.lib.table.batch.struct(n_tokens, tokens, None, positions, counts, sequences, outputs)
        # ctypes structs do not keep what their pointers point to alive.
        batch.keep = (tokens, positions, counts, sequence, sequences, outputs)
        return batch

    def _ubatch_limit(self) -> int | None:
        """Return the longest pass that the stack allows; None when nothing depends on the stack.

        Raises:
            UnavailableError: not even one token fits.
        """
        if not self.lib.table.products_on_stack:
            return None
        # All layers have the same shapes.
        weights = (self._tensor(f"blk.0.{weight}.weight") for weight in _I2S_WEIGHTS)
        rows = [int(weight.ne[1]) for weight in weights if weight is not None]
        limit = limits.max_ubatch(self.stack_bytes, rows, self.n_threads)
        if limit < 1:
            raise UnavailableError(
                f"a stack of {self.stack_bytes} bytes is too small for this model; "
                "raise the hard limit (ulimit -Hs)"
            )
        return limit

    def _tensor(self, name: str) -> Any | None:
        """Return a tensor of the loaded model; None when there is none, or when this library cannot tell."""
        address = self.lib.model_tensor(self.model, name.encode()) if self.lib.has("model_tensor") else None
        return self.lib.tensor(address) if address else None

    def _meta(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        length = self.lib.metadata(self.model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else None


def mapped_libraries(maps: Path = Path("/proc/self/maps")) -> dict[str, str]:
    """Return path -> sha256 of the llama and ggml libraries that this process has actually mapped."""
    paths = set()
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and Path(fields[5]).name.startswith(("libllama", "libggml")):
            paths.add(fields[5])
    digests = {}
    for path in sorted(paths):
        try:
            digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise UnavailableError(f"cannot read the library {path} that is mapped: {error}") from error
    return digests
