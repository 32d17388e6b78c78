"""Engines that are really wrong: the C library built again from sources with one deliberate mistake.

The product contains no switch for faults; a mistake is a replacement in a source file, and the harness runs the
resulting library through ``BITNET_LIBRARY`` as a kernel developer would.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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


def build(mistake: Mistake, folder: Path) -> Path:
    """Build the C library with the mistake; returns the path of the shared library."""
    source = folder / "source"
    shutil.copytree(ROOT / "bitnet_py" / "csrc", source / "bitnet_py" / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    path = source / "bitnet_py" / "csrc" / mistake.file
    text = path.read_text()
    assert text.count(mistake.right) == 1, f"{mistake.name}: the source changed, adapt the mistake"
    path.write_text(text.replace(mistake.right, mistake.wrong))
    scripts = Path(sysconfig.get_path("scripts"))
    build_dir = folder / "build"
    configure = [scripts / "cmake", "-S", source, "-B", build_dir, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (
        [*configure, f"-DCMAKE_MAKE_PROGRAM={scripts / 'ninja'}"],
        [scripts / "cmake", "--build", build_dir],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
    return build_dir / "libbitnet_native.so"


SUB_NORM = "norm_and_quantize(r, b->kqv, w->attn_sub_norm, dim, n, b->attn_sub);"
SKIPPED_SUB_NORM = """if (layer != 2) {
        norm_and_quantize(r, b->kqv, w->attn_sub_norm, dim, n, b->attn_sub);
    } else {
        for (int64_t t = r->member; t < n; t += r->n_members) {
            memcpy(b->attn_sub + t * dim, b->kqv + t * dim, (size_t)dim * sizeof(float));
            quantize_row(r, b->attn_sub + t * dim, dim, t);
        }
    }"""

MISTAKES = (
    Mistake("attn_sub_norm skipped in layer 2", "forward.c", SUB_NORM, SKIPPED_SUB_NORM, 2, "attn_sub_norm"),
    Mistake("plain ReLU", "forward.c", "act[i] = relu * relu;", "act[i] = relu;", 0, "ffn_act"),
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
        "out[i] = ((float)d[i] - sum) / s * m->scale;",
        "out[i] = ((float)d[i] - sum) / s * (m->cols == e->model.hidden_dim ? 1.0f : m->scale);",
        0,
        "ffn_down",
    ),
)
