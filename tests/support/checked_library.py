"""The C library under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and valgrind.

``tests/csrc/checks.c`` exercises it without Python in between. ``python -m tests.support.checked_library CHECK``
(`make sanitize`, `make tsan`, `make valgrind`) runs one check, then breaks a copy of the sources once per
mistake below: a check that lets one of them pass has no power, and fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.native_build import ROOT, build


@dataclass(frozen=True)
class Edit:
    """One replacement in one place of a source file."""

    name: str
    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Mistake(Edit):
    """A fault, and the words with which the check has to report it."""

    report: str


@dataclass(frozen=True)
class Check:
    """How the program is compiled and started, and what of the sources is changed to see more."""

    options: tuple[str, ...]
    mistakes: tuple[Mistake, ...]
    command: tuple[str, ...] = ()
    instruments: tuple[Edit, ...] = ()


class MissingTool(Exception):
    """This machine cannot run the check; the message states what to install."""


DEBUG = ("-Og", "-g1", "-fno-omit-frame-pointer")
"""Lines in the reports, no variables: those take a third of the compiler's time."""

# All activations lie in one allocation, where AddressSanitizer cannot tell one buffer from the next.
RED_ZONES = (
    Edit(
        "AddressSanitizer's interface",
        "buffers.c",
        "#include <math.h>\n",
        "#include <math.h>\n#include <sanitizer/asan_interface.h>\n",
    ),
    Edit(
        "a red zone after every activation buffer",
        "buffers.c",
        "    a->used += (n * item + 63) / 64 * 64;\n",
        """    const size_t size = n * item, room = (size + 63) / 64 * 64 + 64;
    if (p) __asan_poison_memory_region((char *)p + size, room - size);
    a->used += room;
""",
    ),
)

# On few processors three threads wait for each other most of the time: they give the processor away at once.
NO_POLLING = tuple(
    Edit(
        f"no {name.lower()}",
        "thread_pool.c",
        f"    SPINS_BEFORE_{name} = {spins},",
        f"    SPINS_BEFORE_{name} = 1,",
    )
    for name, spins in (("YIELD", 4096), ("SLEEP", 40000))
)

CHECKS = {
    "sanitize": Check(
        (*DEBUG, "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
        (
            Mistake(
                "a kernel reads one element past the end",
                "kernels_scalar.c",
                "out[i] = bn_half_to_float(x[i]);",
                "out[i] = bn_half_to_float(x[i]) + 0 * bn_half_to_float(x[i + 1]);",
                "heap-buffer-overflow",
            ),
            Mistake(
                "an operation reads one element past its activations",
                "forward.c",
                "for (int64_t i = 0; i < n; i++)\n        for (int r = 0; r < n_rows; r++) sum[r] +=",
                "for (int64_t i = 0; i <= n; i++)\n        for (int r = 0; r < n_rows; r++) sum[r] +=",
                "use-after-poison",
            ),
            Mistake(
                "the AVX-512 dot takes a last single block for a pair",
                "kernels_avx512vnni.c",
                "return single ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)w)) :",
                "(void)single;\n    return",
                "heap-buffer-overflow",
            ),
            Mistake(
                "the AMX dot reads whole tiles of columns",
                "kernels_amx.c",
                "cols[2] = {n_cols < SIDE ? n_cols : SIDE,",
                "cols[2] = {SIDE,",
                "heap-buffer-overflow",
            ),
            Mistake(
                "a shift by more bits than there are",
                "kernels_scalar.c",
                "sum += (byte >> 6)",
                "sum += (byte >> (p + 6))",
                "shift exponent",
            ),
            Mistake(
                "an engine's table is never freed",
                "buffers.c",
                "    free(e->rope_sin);\n",
                "",
                "detected memory leaks",
            ),
        ),
        instruments=(*RED_ZONES, *NO_POLLING),
    ),
    "tsan": Check(
        (*DEBUG, "-fsanitize=thread"),
        (
            Mistake(
                "a barrier is missing in the layer",
                "forward.c",
                "bn_barrier(r);\n    bn_record(r, layer, BN_TAP_KQV_OUT",
                "bn_record(r, layer, BN_TAP_KQV_OUT",
                "data race",
            ),
            Mistake(
                "a thread arrives at the barrier before it reads how many are active",
                "thread_pool.c",
                "memory_order_acq_rel) == n_active - 1",
                "memory_order_acq_rel) == pool->n_active - 1",
                "data race",
            ),
        ),
    ),
    "valgrind": Check(
        ("-O1", "-g"),
        (
            Mistake(
                "the tail of a quantised row is never written",
                "kernels_scalar.c",
                "v < -128 ? -128 : v;\n        q[i] = (int8_t)v;",
                "v < -128 ? -128 : v;\n        if (i < 128) q[i] = (int8_t)v;",
                "uninitialised",
            ),
            Mistake(
                "softmax leaves the masked scores as they were",
                "kernels_scalar.c",
                "for (int64_t i = n_visible; i < n_padded; i++) row[i] = 0.0f;",
                "(void)n_padded;",
                "uninitialised",
            ),
        ),
        ("valgrind", "--quiet", "--error-exitcode=99", "--leak-check=full"),
    ),
}


def require_tools(check: Check, folder: Path) -> None:
    """Raise ``MissingTool`` unless a program can be compiled, linked and started the way the check needs."""
    compiler = os.environ.get("CC", "cc")
    for tool in (compiler, *check.command[:1]):
        if shutil.which(tool) is None:
            raise MissingTool(f"{tool} is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    source, program = folder / "empty.c", folder / "empty"
    source.write_text("int main(void) { return 0; }\n")
    for command in ([compiler, *check.options, source, "-o", program], [*check.command, program]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            raise MissingTool(f"an empty program does not get through {Path(command[0]).name}: {said[0]}")


def edited(text: str, edit: Mistake) -> str:
    """Return a source with an edit, which has to have exactly one place there."""
    assert text.count(edit.old) == 1, f"{edit.name}: the source changed, adapt the edit"
    return text.replace(edit.old, edit.new)


def build_copy(
    check: Check, folder: Path, mistake: Mistake | None = None, *options: str, target: str = "checks"
) -> Path:
    """Build a program from a copy of the sources and return its path; ``options``: more of CMake's."""
    shutil.rmtree(folder, ignore_errors=True)  # nothing of an earlier mistake
    source = folder / "source"
    for part in ("bitnet_py/csrc", "tests/csrc"):
        shutil.copytree(ROOT / part, source / part)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    for edit in (*check.instruments, *([mistake] if mistake else [])):
        path = source / "bitnet_py" / "csrc" / edit.file
        path.write_text(edited(path.read_text(), edit))
    build_dir = folder / "build"
    every = ("-DBITNET_TEST_BUILD=ON", f"-DBITNET_TEST_OPTIONS={';'.join(check.options)}", *options)
    build(source, build_dir, *every, target=target)
    return build_dir / target


def run(check: Check, folder: Path, mistake: Mistake | None = None) -> subprocess.CompletedProcess[str]:
    """Build the program from a copy of the sources and run it; stdout holds the output of program and check."""
    program = build_copy(check, folder, mistake)
    return subprocess.run(
        [*check.command, program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


def main(name: str) -> int:
    """Run the check, then prove it on injected faults; returns the exit code."""
    check, folder = CHECKS[name], ROOT / "build" / "checked" / name
    try:
        require_tools(check, folder)
    except MissingTool as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 3
    done = run(check, folder / "whole")
    print(done.stdout, end="")
    if done.returncode != 0:
        return 1
    blind = 0
    for mistake in check.mistakes:
        broken = run(check, folder / "broken", mistake)
        seen = broken.returncode != 0 and mistake.report in broken.stdout
        blind += not seen
        print(f"{'seen' if seen else 'NOT SEEN'}: {mistake.name}")
    return 1 if blind else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
