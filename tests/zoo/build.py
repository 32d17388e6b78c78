"""One build of the engine with all C faults in it, of which at most one is switched on at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitnet_py.taps import LAYER_TAPS, MODEL_TAPS
from tests.support import native_build
from tests.support.native_build import ROOT
from tests.zoo.fault import EngineFault
from tests.zoo.sites import ALWAYS, DAMAGEABLE, PLACES, SITES, Site

CSRC = ROOT / "bitnet_py" / "csrc"
ZOO_CSRC = Path(__file__).parent / "csrc"
BUILDS = ROOT / "build" / "zoo"
FAULTY_FILES = ("forward.c", "attention.c", "head.c")
_BETWEEN_FILES = "/* next file */\n"
_INCLUDES = '#include "wrong.h"\n#include "zoo.h"\n'
_RECORD = re.compile(
    r"bn_record(?:\(r, layer, BN_TAP_(?P<layer_tap>\w+)|_model\(r, BN_TAP_(?P<model_tap>\w+)), "
    r"(?P<data>[^,]+), (?P<rows>.+) \* (?P<width>[\w>.-]+)\);"
)


def identifier(fault: EngineFault) -> str:
    """Return the fault's name in C."""
    return "F_" + fault.name.upper().replace("-", "_")


def tap_constant(tap: str) -> str:
    """Return the tap's constant in C."""
    return f"{'ZOO' if tap in MODEL_TAPS else 'BN'}_TAP_{tap.upper()}"


def faults_header(faults: Sequence[EngineFault]) -> str:
    """Return ``zoo_faults.h``."""
    names = ", ".join(f'"{fault.name}"' for fault in faults)
    taps = ", ".join(f'"{tap}"' for tap in (*LAYER_TAPS, *MODEL_TAPS))
    constants = ", ".join(identifier(fault) for fault in faults)
    return (
        f"enum {{ {constants}, ZOO_FAULTS, ZOO_NO_FAULT = -1 }};\n"
        f"#define ZOO_FAULT_NAMES {names}\n#define ZOO_TAP_NAMES {taps}\n"
    )


def faulty_sources(sources: Mapping[str, str], faults: Sequence[EngineFault]) -> dict[str, str]:
    """Return the ``FAULTY_FILES`` with every fault in them."""
    source = _BETWEEN_FILES.join(sources[name] for name in FAULTY_FILES)
    changes: list[tuple[int, int, str]] = []
    for text, layer, tap in PLACES:
        at = _find(source, text)
        changes.append((at, at, f"zoo_enter(r->pass, {layer or 'ZOO_MODEL_WIDE'}, {tap_constant(tap)});\n    "))
    for text, code in ALWAYS:
        at = _find(source, text)
        changes.append((at, at, code))
    for name, site in SITES.items():
        wrong = [(identifier(fault), fault.edits[name]) for fault in faults if name in fault.edits]
        if site.kind != "function" and wrong:
            at = _find(source, site.text)
            changes.append((at, at + len(site.text), _take_place(site, wrong)))
    for match in _RECORD.finditer(source):
        tap = (match["layer_tap"] or match["model_tap"]).lower()
        if tap in DAMAGEABLE:
            layer = "layer" if match["layer_tap"] else "ZOO_MODEL_WIDE"
            arguments = ["r", layer, tap_constant(tap), match["data"], match["rows"], match["width"]]
            changes.append((match.start(), match.start(), f"zoo_damage({', '.join(arguments)});\n    "))
    damaged = {m["layer_tap"] or m["model_tap"] for m in _RECORD.finditer(source)}
    missing = {tap.upper() for tap in DAMAGEABLE} - damaged
    assert not missing, f"forward.c changed: nothing records {sorted(missing)} in the usual way"
    damage = [(identifier(fault), fault.edits["damage"]) for fault in faults if "damage" in fault.edits]
    head = _find(source, "/* ---- operations on one row")
    changes.append((head, head, _damage_function(damage)))
    for at in (0, *(match.end() for match in re.finditer(re.escape(_BETWEEN_FILES), source))):
        changes.append((at, at, _INCLUDES))
    return dict(zip(FAULTY_FILES, _splice(source, changes).split(_BETWEEN_FILES), strict=True))


def _find(source: str, text: str) -> int:
    assert source.count(text) == 1, (
        f"the sources changed: expected once, found {source.count(text)} times: {text!r}"
    )
    return source.index(text)


def _take_place(site: Site, wrong: Sequence[tuple[str, str]]) -> str:
    if site.kind == "expression":
        return "(" + "".join(f"bn_fault({name}) ? ({code}) : " for name, code in wrong) + f"({site.text}))"
    branches = [f"if (bn_fault({name})) {{ {code} }}" for name, code in wrong]
    if site.kind == "statement":
        return "{ " + " else ".join([*branches, f"{{ {site.text} }}"]) + " }"
    added = "\n".join(f"    {branch}" for branch in branches) + "\n"
    return site.text + added if site.kind == "after" else added + site.text


def _damage_function(wrong: Sequence[tuple[str, str]]) -> str:
    branches = "\n".join(f"    if (bn_fault({name})) {{ {code} }}" for name, code in wrong)
    return (
        "static void zoo_damage(const bn_run *r, int32_t layer, int32_t op, float *y, int64_t rows, int64_t n) {\n"
        f"    zoo_enter(r->pass, layer, op);\n{branches}\n}}\n\n"
    )


def _splice(source: str, changes: list[tuple[int, int, str]]) -> str:
    parts, at = [], 0
    for start, end, text in sorted(changes, key=lambda change: (change[0], change[1])):
        assert start >= at, f"two sites overlap at {source[start : start + 60]!r}"
        parts += [source[at:start], text]
        at = end
    return "".join([*parts, source[at:]])


def build(faults: Sequence[EngineFault]) -> Path:
    """Build the library, unless these sources were built before; returns its path."""
    sources = {path.name: path.read_text() for path in sorted([*CSRC.iterdir(), *ZOO_CSRC.iterdir()])}
    sources |= faulty_sources(sources, faults)
    sources["zoo_faults.h"] = faults_header(faults)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    added = "${src}/engine.c"
    assert cmake.count(added) == 1, "CMakeLists.txt changed: adapt the zoo's build"
    cmake = cmake.replace(added, f"{added} ${{src}}/zoo.c").replace("-O3", "-O1")
    digest = hashlib.sha256("\0".join([cmake, *sources, *sources.values()]).encode()).hexdigest()[:16]
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test workers, one build
        library = BUILDS / digest / native_build.LIBRARY
        if not library.exists():
            for old in BUILDS.glob("*/"):
                shutil.rmtree(old)
            _compile(BUILDS / digest, cmake, sources)
    return library


def _compile(folder: Path, cmake: str, sources: dict[str, str]) -> None:
    csrc = folder / "source" / "bitnet_py" / "csrc"
    csrc.mkdir(parents=True)
    (folder / "source" / "CMakeLists.txt").write_text(cmake)
    for name, text in sources.items():
        (csrc / name).write_text(text)
    native_build.build(folder / "source", folder / "build")
    os.replace(folder / "build" / native_build.LIBRARY, folder / native_build.LIBRARY)
