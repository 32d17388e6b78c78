"""Speed of this engine on this machine: prompt, decoding, memory, weight bandwidth beside memory bandwidth."""

from __future__ import annotations

import random
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_py import _native
from bitnet_py.errors import InputError
from bitnet_py.model import KernelCount, Model

READ_BUFFER_BYTES = 256 << 20
"""Larger than the caches of most machines."""
READ_PASSES = 4
"""Passes over the buffer by the same threads, so that starting them does not count as reading."""
READS = 3
"""Repetitions, of which the fastest counts: disturbances only make a read slower."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several values."""

    median: float
    min: float
    max: float


def spread(values: Sequence[float]) -> Spread | None:
    """Return median and range; None when there is no value."""
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def random_ids(seed: int, n_tokens: int, vocab_size: int) -> list[int]:
    """Return arbitrary token ids, the same for a seed with every version of Python."""
    draw = random.Random(seed).random  # the only method whose sequence Python guarantees
    return [int(draw() * vocab_size) for _ in range(n_tokens)]


class BandwidthProbe:
    """Measures the bandwidth of this machine: streaming reads of a buffer by several threads.

    Attributes:
        n_bytes: bytes that one measurement reads from memory.
    """

    def __init__(self, n_threads: int, buffer_bytes: int = READ_BUFFER_BYTES) -> None:
        self.n_bytes = buffer_bytes * READ_PASSES
        self._n_threads = n_threads
        self._words: npt.NDArray[np.uint64] = np.ones(buffer_bytes // 8, np.uint64)

    def seconds(self) -> float:
        """Read the buffer a few times; return the seconds of the fastest.

        Raises:
            NativeError: a thread could not be started.
        """
        times = []
        for _ in range(READS):
            begun = time.perf_counter()
            _native.probe_bandwidth(self._words, self._n_threads, n_passes=READ_PASSES)
            times.append(time.perf_counter() - begun)
        return min(times)


def peak_resident_bytes(pid: int | None = None) -> int | None:
    """Return the peak resident memory of a process (None: this one), mapped weights included; None: unknown."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        if pid is not None:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def weight_reads(before: Iterable[KernelCount], after: Iterable[KernelCount]) -> dict[str, int]:
    """Return operation -> bytes of weights it read between two readings of the counters."""
    earlier = {count.name: count.bytes for count in before}
    read = {c.name: c.bytes - earlier.get(c.name, 0) for c in after if c.reads_weights}
    return {name: n for name, n in read.items() if n}


@dataclass(frozen=True)
class BenchReport:
    """What ``bench`` measured; the lists hold one value per round, in seconds."""

    n_prompt: int
    n_decode: int
    prefill_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    """Time of all ``n_decode`` tokens, one at a time after the prompt."""
    read_s: tuple[float, ...]
    read_bytes: int
    weight_bytes_per_token: float
    """Weights read in decoding, by the C library's own counters."""
    peak_resident_bytes: int | None
    last_logits: npt.NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        """Return times, rates and bandwidths as plain JSON values, without the logits."""
        return {
            "prefill": _rates(self.n_prompt, self.prefill_s),
            "decode": _rates(self.n_decode, self.decode_s),
            "peak_resident_bytes": self.peak_resident_bytes,
            "weight_bytes_per_token": self.weight_bytes_per_token,
            "decode_bytes_per_s": self.decode_bytes_per_s,
            "read_bytes_per_s": self.read_bytes_per_s,
        }

    @property
    def decode_bytes_per_s(self) -> float:
        """Bandwidth of reading weights in decoding, of the median round."""
        return self.weight_bytes_per_token * self.n_decode / statistics.median(self.decode_s)

    @property
    def read_bytes_per_s(self) -> float:
        """Memory bandwidth of this machine, of the median read."""
        return self.read_bytes / statistics.median(self.read_s)


def _rates(n_tokens: int, elapsed_s: Sequence[float]) -> dict[str, Any]:
    found = spread([n_tokens / s for s in elapsed_s])
    assert found is not None  # there is at least one round
    return {"n_tokens": n_tokens, "elapsed_s": list(elapsed_s), "tok_per_s": asdict(found)}


def bench(model: Model, *, n_prompt: int, n_decode: int, n_rounds: int, seed: int = 0) -> BenchReport:
    """Measure a model on arbitrary tokens, after one round of warm-up.

    Raises:
        InputError: a number below 1, or more tokens than the model's context.
    """
    if min(n_prompt, n_decode, n_rounds) < 1:
        raise InputError("a benchmark needs at least one prompt token, one decoded token and one round")
    if n_prompt + n_decode > model.config.context_length:
        held = model.config.context_length
        raise InputError(f"{n_prompt} prompt tokens and {n_decode} decoded ones, the model's context holds {held}")
    ids = random_ids(seed, n_prompt + n_decode, model.config.vocab_size)
    cache = model.new_cache()
    prefill_s, decode_s = [], []
    for _ in range(n_rounds + 1):
        cache.reset()
        begun = time.perf_counter()
        model.forward(ids[:n_prompt], cache)
        prefilled, counted = time.perf_counter(), model.counters()
        for token in ids[n_prompt:]:
            logits = model.forward([token], cache).logits
        decode_s.append(time.perf_counter() - prefilled)
        prefill_s.append(prefilled - begun)
        read = weight_reads(counted, model.counters())
    peak = peak_resident_bytes()  # before the probe allocates its buffer
    probe = BandwidthProbe(model.n_threads)
    assert logits is not None  # forward gives the last token's
    return BenchReport(
        n_prompt=n_prompt,
        n_decode=n_decode,
        prefill_s=tuple(prefill_s[1:]),
        decode_s=tuple(decode_s[1:]),
        read_s=tuple(probe.seconds() for _ in range(n_rounds)),
        read_bytes=probe.n_bytes,
        weight_bytes_per_token=sum(read.values()) / n_decode,
        peak_resident_bytes=peak,
        last_logits=logits,
    )
