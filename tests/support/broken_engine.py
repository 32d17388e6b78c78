"""Engines that are really wrong: the C library built again from sources with one deliberate mistake.

The product contains no switch for faults; a mistake is a replacement in a source file, and the harness runs the
resulting library through ``BITNET_LIBRARY`` as a kernel developer would.

A test of a mistake that is never reached shows nothing, and which code is reached depends on the kernel family.
So every mistake says that it took effect (``REACHED``, ``INSTEAD``), and ``run`` fails when it did not.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import native_build
from tests.support.native_build import ROOT

BUILD = ROOT / "build" / "broken"
"""One tree for all mistakes, so that only the file with the mistake is compiled anew."""
MARK = "BN_MISTAKE_REACHED"
"""Environment variable with the path of the file that a mistake writes when it takes effect."""
MARKER = f"""\
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Says once that the mistake of this build took effect. */
static inline int mistake_reached(void) {{
    static atomic_flag said = ATOMIC_FLAG_INIT;
    const char *path = getenv("{MARK}");
    FILE *file = path && !atomic_flag_test_and_set(&said) ? fopen(path, "w") : NULL;
    if (file) fclose(file);
    return 1;
}}
#define REACHED mistake_reached()

/* The wrong value in the place of the right one; it took effect when they differ. */
#define INSTEAD(right, wrong) __extension__({{ \\
    __typeof__((right) + (wrong)) right_ = (right), wrong_ = (wrong); \\
    if (wrong_ != right_) mistake_reached(); \\
    wrong_; \\
}})

/* Whether the mistake is the one that the environment names, where a build holds several. */
static inline int is(const char *name) {{
    const char *wanted = getenv("MISTAKE");
    return wanted && !strcmp(wanted, name);
}}
"""


@dataclass(frozen=True)
class Mistake:
    """One replacement: the text must occur exactly once in the file."""

    name: str
    file: str
    right: str
    wrong: str
    layer: int | None
    """Where the harness has to find it."""
    op: str
    pass_kind: str = "prefill"


@dataclass(frozen=True)
class TextMistake:
    """A mistake in every layer at once, told by the text it makes; ``edits`` are (right, wrong) in forward.c.

    forward.c calls the kernels of whatever family runs, so a mistake there is the same in all of them.
    """

    name: str
    what: str
    """One line for the table in docs/smoke.md."""
    edits: tuple[tuple[str, str], ...]
    file: str = "forward.c"


def build(mistakes: Sequence[Mistake | TextMistake], library: Path) -> Path:
    """Build the C library with the mistakes, which are in one file; returns ``library``, the path it is put at."""
    (file,) = {mistake.file for mistake in mistakes}
    csrc = ROOT / "bitnet_py" / "csrc"
    text = (csrc / file).read_text()
    for mistake in mistakes:
        for right, wrong in _edits(mistake):
            assert text.count(right) == 1, f"{mistake.name}: the source changed, adapt the mistake"
            assert "REACHED" in wrong or "INSTEAD(" in wrong, f"{mistake.name}: does not say when it is reached"
            text = text.replace(right, wrong)
    wanted = {path.name: path.read_text() for path in csrc.iterdir()}
    wanted[file] = f'#include "mistake.h"\n{text}'
    wanted["mistake.h"] = MARKER
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test workers, one tree
        source = BUILD / "source"
        _write(source, {"CMakeLists.txt": (ROOT / "CMakeLists.txt").read_text()})
        _write(source / "bitnet_py" / "csrc", wanted)
        native_build.build(source, BUILD / "build")
        shutil.copy(BUILD / "build" / native_build.LIBRARY, library)
    return library


def _edits(mistake: Mistake | TextMistake) -> Sequence[tuple[str, str]]:
    return mistake.edits if isinstance(mistake, TextMistake) else ((mistake.right, mistake.wrong),)


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write the files that are new or changed, and leave the others as old as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in files:
            path.unlink()
    for name, text in files.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def run(
    command: Sequence[str | Path],
    library: Path,
    *,
    kernel: str | None = None,
    reached: bool = True,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command on a broken library, with one kernel family if named.

    Raises:
        AssertionError: the mistake was not ``reached``, or was and should not be.
    """
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "reached"
        chosen = {} if kernel is None else {"BITNET_KERNEL": kernel}
        done = subprocess.run(
            command,
            env={**os.environ, "BITNET_LIBRARY": str(library), MARK: str(mark), **chosen, **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert mark.exists() == reached, f"the mistake was {'never' if reached else ''} reached\n{done.stderr}"
    return done


SUB_NORM = "norm_and_quantize(r, b->kqv, w->attn_sub_norm, q_dim, n, b->attn_sub);"
FFN_SUB_NORM = "norm_and_quantize(r, b->prod, w->ffn_sub_norm, hidden, n_rows, b->ffn_sub);"
SKIPPED_SUB_NORM = """if (layer != 2) {
        norm_and_quantize(r, b->kqv, w->attn_sub_norm, q_dim, n, b->attn_sub);
    } else {
        for (int64_t t = r->thread; REACHED && t < n; t += r->n_threads) {
            memcpy(b->attn_sub + t * q_dim, b->kqv + t * q_dim, (size_t)q_dim * sizeof(float));
            quantize_row(r, b->attn_sub + t * q_dim, q_dim, t);
        }
    }"""

ACTIVATION = (
    "activate(b->gate + t * hidden, b->up + t * hidden, hidden, b->act + t * hidden, b->prod + t * hidden);"
)
ANOTHER_ACTIVATION = """
    for (int64_t t = r->thread; t < n_rows; t += r->n_threads)
        for (int64_t i = t * hidden; i < (t + 1) * hidden; i++) {{
            b->act[i] = INSTEAD(b->act[i], {});
            b->prod[i] = b->act[i] * b->up[i];
        }}"""
PLAIN_RELU = ACTIVATION + ANOTHER_ACTIVATION.format("b->gate[i] > 0 ? b->gate[i] : 0.0f")
SILU = ACTIVATION + ANOTHER_ACTIVATION.format("b->gate[i] / (1.0f + expf(-b->gate[i]))")
RESCALE = "e->kernels->rescale(acc + c * n_rows, n_rows, sum, s, m->scale, out);"

MISTAKES = (
    Mistake("attn_sub_norm skipped in layer 2", "forward.c", SUB_NORM, SKIPPED_SUB_NORM, 2, "attn_sub_norm"),
    Mistake("plain ReLU", "forward.c", ACTIVATION, PLAIN_RELU, 0, "ffn_act"),
    Mistake(
        "position off by one in decode",
        "forward.c",
        "const float *cosines = e->rope_cos + (r->pass->start + t) * half;",
        "const float *cosines = e->rope_cos + (r->pass->start + INSTEAD(t, t + (r->pass->n_tokens == 1))) * half;",
        0,
        "q_rope",
        "decode",
    ),
    Mistake(
        "scale of the weights forgotten in ffn_down",
        "forward.c",
        RESCALE,
        RESCALE.replace("m->scale", "INSTEAD(m->scale, m->cols == e->model.hidden_dim ? 1.0f : m->scale)"),
        0,
        "ffn_down",
    ),
)

INTERLEAVED = """for (int64_t i = 0; REACHED && i < half; i++) {
                const float x0 = x[at + 2 * i], x1 = x[at + 2 * i + 1];
                out[at + 2 * i] = x0 * cosines[i] - x1 * sines[i];
                out[at + 2 * i + 1] = x0 * sines[i] + x1 * cosines[i];
            }"""

# Code c of byte p of a block belongs to element 32 c + p; read in sequence it would belong to element 4 p + c. The
# sum of products is the same whether the codes or the activations they meet are exchanged; these are in one place.
QUANTIZE = """e->kernels->quantize(x, n, e->fused_quantizer, e->buffers.q8 + row * n, &e->buffers.q8_scale[row],
                         &e->buffers.q8_sum[row]);"""
SEQUENTIAL = (
    QUANTIZE
    + """
    for (int64_t block = 0; REACHED && block < n; block += 128) {
        int8_t *q = e->buffers.q8 + row * n + block, in_sequence[128];
        for (int p = 0; p < 32; p++)
            for (int c = 0; c < 4; c++) in_sequence[32 * c + p] = q[4 * p + c];
        memcpy(q, in_sequence, sizeof in_sequence);
    }"""
)

TEXT_MISTAKES = (
    TextMistake(
        "interleaved RoPE",
        "pairs (2i, 2i+1) are rotated instead of (i, i + head_dim/2)",
        (("rotate(x + at, cosines, sines, (int)half, out + at);", INTERLEAVED),),
    ),
    TextMistake(
        "sequential I2_S decode",
        "the four codes of a byte are taken for four neighbours",
        ((QUANTIZE, SEQUENTIAL),),
    ),
    TextMistake(
        "skipped attention sub-norm",
        "attn_sub_norm is left out in every layer",
        ((SUB_NORM, SUB_NORM.replace("w->attn_sub_norm", "REACHED ? NULL : w->attn_sub_norm")),),
    ),
    TextMistake(
        "skipped FFN sub-norm",
        "ffn_sub_norm is left out in every layer",
        ((FFN_SUB_NORM, FFN_SUB_NORM.replace("w->ffn_sub_norm", "REACHED ? NULL : w->ffn_sub_norm")),),
    ),
    TextMistake(
        "SiLU",
        "x * sigmoid(x) instead of relu(x)^2",
        ((ACTIVATION, SILU),),
    ),
)
"""What makes a model talk nonsense; which of these it is, its text does not say."""
