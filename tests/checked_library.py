"""The C library under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and valgrind.

``tests/csrc/checks.c`` exercises it without Python in between. ``python -m tests.checked_library CHECK`` (`make
sanitize`, `make tsan`, `make valgrind`) runs one check, then breaks a copy of the sources once per mistake below:
a check that lets one of them pass has no power, and fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.native_build import ROOT, build


@dataclass(frozen=True)
class Mistake:
    """One replacement in one place of a source file, and the words by which the check has to report it."""

    name: str
    file: str
    right: str
    wrong: str
    report: str


@dataclass(frozen=True)
class Check:
    """How the program is compiled and started."""

    options: tuple[str, ...]
    mistakes: tuple[Mistake, ...]
    command: tuple[str, ...] = ()


class MissingTool(Exception):
    """This machine cannot run the check; the message says what to install."""


DEBUG = ("-O1", "-g", "-fno-omit-frame-pointer")

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
                "the AVX-512 dot takes a last single block for a pair",
                "kernels_avx512vnni.c",
                "return single ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)w)) :",
                "(void)single;\n    return",
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
                "engine.c",
                "    free(e->rope_sin);\n",
                "",
                "detected memory leaks",
            ),
        ),
    ),
    "tsan": Check(
        (*DEBUG, "-fsanitize=thread"),
        (
            Mistake(
                "a barrier is missing in the layer",
                "forward.c",
                "meet(r);\n    record(r, tap(r, layer, BN_TAP_KQV_OUT)",
                "record(r, tap(r, layer, BN_TAP_KQV_OUT)",
                "data race",
            ),
            Mistake(
                "a member arrives at the barrier before it reads the team's size",
                "threads.c",
                "memory_order_acq_rel) == n_active - 1",
                "memory_order_acq_rel) == team->n_active - 1",
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
                "q[i] = (int8_t)v;",
                "if (i < 128) q[i] = (int8_t)v;",
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


def run(check: Check, folder: Path, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Build the program from ``source`` below ``folder`` and run it; stdout holds all it and the check said."""
    options = ";".join(check.options)
    build(source, folder, "-DBITNET_TEST_BUILD=ON", f"-DBITNET_TEST_OPTIONS={options}", target="checks")
    return subprocess.run(
        [*check.command, folder / "checks"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


def run_broken(check: Check, mistake: Mistake, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the check on a copy of the sources with the mistake in it."""
    shutil.rmtree(folder, ignore_errors=True)  # nothing of an earlier mistake
    source = folder / "source"
    for part in ("bitnet_py/csrc", "tests/csrc"):
        shutil.copytree(ROOT / part, source / part)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    path = source / "bitnet_py" / "csrc" / mistake.file
    text = path.read_text()
    assert text.count(mistake.right) == 1, f"{mistake.name}: the source changed, adapt the mistake"
    path.write_text(text.replace(mistake.right, mistake.wrong))
    return run(check, folder / "build", source)


def main(name: str) -> int:
    """Run the check, then prove it on its mistakes; returns the exit code."""
    check, folder = CHECKS[name], ROOT / "build" / "checked" / name
    try:
        require_tools(check, folder)
    except MissingTool as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 3
    done = run(check, folder / "build")
    print(done.stdout, end="")
    if done.returncode != 0:
        return 1
    blind = 0
    for mistake in check.mistakes:
        broken = run_broken(check, mistake, folder / "broken")
        seen = broken.returncode != 0 and mistake.report in broken.stdout
        blind += not seen
        print(f"{'seen' if seen else 'NOT SEEN'}: {mistake.name}")
    return 1 if blind else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
