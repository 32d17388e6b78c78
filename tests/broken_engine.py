"""Engines that are really wrong: the C library built again from sources with one deliberate mistake.

The product contains no switch for faults; a mistake is a replacement in a source file, and the harness runs the
resulting library through ``BITNET_LIBRARY`` as a kernel developer would.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests import native_build
from tests.native_build import ROOT


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


def build(mistake: Mistake | TextMistake, folder: Path) -> Path:
    """Build the C library with the mistake; returns the path of the shared library."""
    edits = mistake.edits if isinstance(mistake, TextMistake) else ((mistake.right, mistake.wrong),)
    source = folder / "source"
    shutil.copytree(ROOT / "bitnet_py" / "csrc", source / "bitnet_py" / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    path = source / "bitnet_py" / "csrc" / mistake.file
    text = path.read_text()
    for right, wrong in edits:
        assert text.count(right) == 1, f"{mistake.name}: the source changed, adapt the mistake"
        text = text.replace(right, wrong)
    path.write_text(text)
    native_build.build(source, folder / "build")
    return folder / "build" / native_build.LIBRARY


SUB_NORM = "norm_and_quantize(r, b->kqv, w->attn_sub_norm, dim, n, b->attn_sub);"
SKIPPED_SUB_NORM = """if (layer != 2) {
        norm_and_quantize(r, b->kqv, w->attn_sub_norm, dim, n, b->attn_sub);
    } else {
        for (int64_t t = r->member; t < n; t += r->n_members) {
            memcpy(b->attn_sub + t * dim, b->kqv + t * dim, (size_t)dim * sizeof(float));
            quantize_row(r, b->attn_sub + t * dim, dim, t);
        }
    }"""

ACTIVATION = """\
e->kernels->gated_relu_squared(b->gate + t * hidden, b->up + t * hidden, hidden, b->act + t * hidden,
                                       b->prod + t * hidden);"""
ANOTHER_ACTIVATION = """
    for (int64_t t = r->member; t < n_rows; t += r->n_members)
        for (int64_t i = t * hidden; i < (t + 1) * hidden; i++) {{
            b->act[i] = {};
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
        "const float *cosines = e->rope_cos + (r->pass->start + t + (r->pass->n_tokens == 1)) * half;",
        0,
        "q_rope",
        "decode",
    ),
    Mistake(
        "scale of the weights forgotten in ffn_down",
        "forward.c",
        RESCALE,
        RESCALE.replace("m->scale", "m->cols == e->model.hidden_dim ? 1.0f : m->scale"),
        0,
        "ffn_down",
    ),
)

INTERLEAVED = """for (int64_t i = 0; i < half; i++) {
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
    for (int64_t block = 0; block < n; block += 128) {
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
        (("e->kernels->rope(x + at, cosines, sines, (int)half, out + at);", INTERLEAVED),),
    ),
    TextMistake(
        "sequential I2_S decode",
        "the four codes of a byte are taken for four neighbours",
        ((QUANTIZE, SEQUENTIAL),),
    ),
    TextMistake(
        "skipped attention sub-norm",
        "attn_sub_norm is left out in every layer",
        ((SUB_NORM, "norm_and_quantize(r, b->kqv, NULL, dim, n, b->attn_sub);"),),
    ),
    TextMistake(
        "skipped FFN sub-norm",
        "ffn_sub_norm is left out in every layer",
        (
            (
                "norm_and_quantize(r, b->prod, w->ffn_sub_norm, hidden, n_rows, b->ffn_sub);",
                "norm_and_quantize(r, b->prod, NULL, hidden, n_rows, b->ffn_sub);",
            ),
        ),
    ),
    TextMistake(
        "SiLU",
        "x * sigmoid(x) instead of relu(x)^2",
        ((ACTIVATION, SILU),),
    ),
)
"""What makes a model talk nonsense; which of these it is, its text does not say."""
