"""docs/your-engine.md, followed from an empty directory: engines in C, Rust, Go, right and deliberately wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import crossval
from bitnet_py.gguf import GGUFFile
from bitnet_py.quants import unpack_i2_s
from crossval.traces.read import Trace
from tests.support.strangers import run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your-engine.md").read_text(encoding="utf-8")
SCRIPTS = sysconfig.get_path("scripts")
PROMPT = "What is 2+2?"
COMPILERS = {"c": "cc", "rust": "cargo", "go": "go"}
TAPS = {"silu": "ffn_act", "interleaved-rope": "q_rope", "no-attn-sub-norm": "attn_sub_norm"}
CAUSES = {"silu": "SiLU", "interleaved-rope": "interleaved pairs", "no-attn-sub-norm": "norm skipped"}
MISTAKES = [
    ("c", "silu", 0),
    ("c", "interleaved-rope", 1),
    ("c", "no-attn-sub-norm", 3),
    ("rust", "no-attn-sub-norm", 2),
    ("rust", "silu", 3),
    ("go", "interleaved-rope", 0),
    ("go", "silu", 1),
]


def commands(mark: str) -> str:
    """Return the commands of the page below a mark."""
    found = re.search(rf"<!-- {mark} -->\n```sh\n(.*?)```", PAGE, re.S)
    assert found is not None, mark
    return found.group(1)


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run commands of the page after those of its beginning; the checkout is this one."""
    first = re.search(r"```sh\nexport PARITY=[^\n]*\n(.*?)```", PAGE, re.S)
    assert first is not None
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "PARITY": str(ROOT)}
    command = ["bash", "-euc", first.group(1) + script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@dataclass(frozen=True)
class Followed:
    """A directory in which a section of the page was followed."""

    folder: Path
    output: str

    def judged(self, golden: Path, *options: str) -> dict:
        """Let the engine record under other options; return the receipt of its comparison with the golden."""
        trace, receipt = self.folder / "judged", self.folder / "receipt.json"
        shutil.rmtree(trace, ignore_errors=True)
        ids = json.loads((golden / "trace.json").read_text())["prompt"]["token_ids"]
        model = str(ROOT / "models" / "bitnet-qa.gguf")
        command = [str(self.folder / "engine"), model, str(trace), ",".join(map(str, ids)), *options]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        run("layers", "--prompt", PROMPT, "--candidate", trace, "--reference", golden, "--receipt", receipt)
        return crossval.open_receipt(receipt)


_followed: dict[str, Followed] = {}


@pytest.fixture
def followed(request, tmp_path_factory) -> Followed:
    """The section of a language, followed once; skipped without its compiler."""
    language = request.param
    if shutil.which(COMPILERS[language]) is None:
        pytest.skip(f"{COMPILERS[language]} is missing, which compiles this engine")
    if language not in _followed:
        folder = tmp_path_factory.mktemp(language)
        done = shell(commands(f"follow: {language}"), folder)
        assert done.returncode == 0, done.stdout + done.stderr
        _followed[language] = Followed(folder, done.stdout)
    return _followed[language]


@pytest.mark.long
@pytest.mark.parametrize("followed", COMPILERS, indirect=True)
def test_the_page_leads_from_an_empty_directory_to_parity(followed):
    assert "415 of 415 operations within their bounds" in followed.output
    assert re.search(r"^PARITY  \w+ engine against bitnet.cpp", followed.output, re.M)
    assert json.loads((followed.folder / "my-trace" / "trace.json").read_text())["passes"][4]["kind"] == "decode"


@pytest.mark.parametrize(("followed", "mistake", "layer"), MISTAKES, indirect=["followed"])
def test_a_mistake_is_found_where_it_was_made(followed, golden, mistake, layer):
    receipt = followed.judged(golden, "--mistake", mistake, "--layer", str(layer))
    assert receipt["verdict"] == "candidate_defect"
    assert receipt["audit"]["candidate"]["first_guilty"]["tap"] == f"blk.{layer}.{TAPS[mistake]}"
    assert receipt["diagnosis"][0]["name"] == CAUSES[mistake]


@pytest.mark.parametrize("followed", ["c"], indirect=True)
def test_the_broken_engine_of_the_page_is_found_as_the_page_says(followed):
    done = shell(commands("broken: c"), followed.folder)
    assert done.returncode == 1, done.stdout + done.stderr
    shown = re.search(r"^    (candidate  C engine .*); …$", PAGE, re.M)
    assert shown is not None
    assert shown.group(1) in done.stdout
    assert "SiLU instead of squared ReLU" in done.stdout


@pytest.mark.parametrize("followed", ["c"], indirect=True)
def test_a_quantiser_that_truncates_is_named_and_a_prompt_alone_is_enough(followed, golden):
    receipt = followed.judged(golden, "--mistake", "truncating-quantiser", "--layer", "2", "--decode", "0")
    assert receipt["audit"]["candidate"]["first_guilty"]["tap"] == "blk.2.q"
    assert receipt["diagnosis"][0]["name"] == "truncation"


@pytest.mark.parametrize("followed", COMPILERS, indirect=True)
def test_two_versions_of_an_engine_are_compared(followed, golden, tmp_path):
    followed.judged(golden)
    shutil.copytree(followed.folder / "judged", tmp_path / "before")
    followed.judged(golden, "--mistake", "interleaved-rope", "--layer", "2", "--decode", "1")
    found = crossval.changed_ops(tmp_path / "before", followed.folder / "judged")
    assert (found.first.pass_index, found.first.tap) == (0, "blk.2.q_rope")
    assert (found.n_passes, found.held) == (2, (5, 2))
    before, after = crossval.environments(tmp_path / "before", followed.folder / "judged")
    assert before == after
    assert before["engine"]["version"].startswith("0.1")


@pytest.mark.parametrize("followed", COMPILERS, indirect=True)
def test_digests_of_files_of_any_size(followed, tmp_path):
    """Around the sizes at which SHA-256 needs another block: what follows a model's tensors is not read."""
    model = (ROOT / "models" / "bitnet-qa.gguf").read_bytes()
    for rest in (0, 1, 55, 56, 63):
        padded, trace = tmp_path / f"{rest}.gguf", tmp_path / f"{rest}"
        padded.write_bytes(model + bytes(-len(model) % 64 + rest))
        command = [str(followed.folder / "engine"), str(padded), str(trace), "7", "--decode", "0"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        digest = hashlib.sha256(padded.read_bytes()).hexdigest()
        assert json.loads((trace / "trace.json").read_text())["model"]["sha256"] == digest
        Trace.open(trace).verify()


@pytest.fixture(scope="module")
def misused(tmp_path_factory) -> Path:
    """A program that calls the C writer in any order, under sanitizers."""
    if shutil.which("cc") is None:
        pytest.skip("cc is missing, which compiles this program")
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path_factory.mktemp("misused") / "program"
    linked = subprocess.run(
        ["cc", *options, "-o", program, "-x", "c", "-"], input=b"int main(void) { return 0; }", capture_output=True
    )
    if linked.returncode:
        pytest.skip("cc has no sanitizers, under which this program runs")
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-g"]
    source = ROOT / "tests" / "csrc" / "misused_trace_writer.c"
    subprocess.run(["cc", *strict, *options, f"-I{ROOT / 'examples'}", "-o", program, source], check=True)
    return program


MISUSE = {
    "dobtec": "model.sha256 is not set",
    "onbtec": "has no tokens",
    "obtbec": "begins inside another",
    "otbtec": "outside a pass",
    "obzec": "a tap is empty",
    "obxec": "outside a pass or beyond it",
    "oblec": "no room for so many taps",
    "obtesc": "a fact is stated after",
    "oebtec": "or did not begin",
    "obebtec": "has no taps",
    "oc": "before the first",
    "obtc": "closed inside a pass",
    "obtebtc": "closed inside a pass",
    "obtefbtec": "is the disk full?",
    "obteFc": "is the disk full?",
}
"""Calls of the C writer by their letters in the program -> its error; what follows the misuse is right."""


@pytest.mark.parametrize("calls", MISUSE)
def test_a_misused_writer_says_so_at_the_end_and_writes_no_trace(misused, tmp_path, calls):
    done = subprocess.run([misused, tmp_path / "trace", calls], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert MISUSE[calls] in done.stdout
    n_passes = calls.startswith("obte")
    assert [path.name for path in tmp_path.glob("trace/*[ns]")] == ["pass-0000.safetensors"] * n_passes


def test_names_facts_and_rows_reach_the_reader_and_a_finished_trace_stays(misused, tmp_path):
    trace = tmp_path / "trace"
    for calls, error in (("obtrebtecc", "before the first"), ("obtec", "the directory exists")):
        done = subprocess.run([misused, trace, calls], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert error in done.stdout
        found = Trace.open(trace)
        found.verify()
        assert (found.info.engine.name, found.info.engine.flags) == ('a "quoted" \\ name ä', '-DX="y"')
        assert [[*one.taps] for one in found.info.passes] == [["inp_embd", "result_norm"], ["inp_embd"]]
        assert {path.read_bytes()[8:9] for path in trace.glob("*.safetensors")} == {b"{"}  # as the format wants it
        assert found.info.passes[0].taps["result_norm"].rows == (1,)
        np.testing.assert_array_equal(found.taps(0)["result_norm"].array, [[1, 2, 3, 4]])


def test_the_c_writer_is_cpp_as_well():
    if shutil.which("c++") is None:
        pytest.skip("c++ is missing, which compiles the header here")
    header = ROOT / "examples" / "trace_writer.h"
    strict = ["-std=c++11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run(["c++", *strict, "-include", header, "-x", "c++", os.devnull], check=True)


@pytest.mark.parametrize(
    ("files", "at_most"),
    [
        (["trace_writer.h"], 255),
        (["rust-trace-writer/src/lib.rs", "rust-trace-writer/src/sha256.rs"], 210),
        (["go-trace-writer/trace_writer.go"], 155),
    ],
    ids=COMPILERS,
)
def test_the_writers_stay_small(files, at_most):
    """Their lines, comments included; SHA-256 is half a hundred of them in C and in Rust."""
    assert sum(len((ROOT / "examples" / name).read_text().splitlines()) for name in files) <= at_most


BAD_INPUT = [
    (["nowhere.gguf", "t", "1"], "nowhere.gguf"),
    (["{page}", "t", "1"], "not a GGUF file"),
    (["{cut}", "t", "1"], "ends too early"),
    (["{model}", "t", "1024"], "outside the vocabulary"),
    (["{model}", "t", "1", "--mistake", "sil"], "unknown mistake"),
    (["{model}", ".", "1"], ""),
]


@pytest.mark.parametrize("followed", COMPILERS, indirect=True)
@pytest.mark.parametrize(("arguments", "why"), BAD_INPUT, ids=[why or "exists" for _, why in BAD_INPUT])
def test_bad_input_is_one_line_and_leaves_no_trace(followed, tmp_path, arguments, why):
    model = ROOT / "models" / "bitnet-qa.gguf"
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:60_000])
    files = {"page": ROOT / "README.md", "cut": tmp_path / "cut.gguf", "model": model}
    command = [str(followed.folder / "engine"), *(word.format(**files) for word in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 4)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert why in done.stderr or "No such file" in done.stderr
    assert not list(tmp_path.rglob("trace.json"))


def test_the_reader_of_the_page_reads_every_ternary_matrix(shipped_model):
    found = re.search(r"<!-- i2_s -->\n```python\n(.*?)```", PAGE, re.S)
    assert found is not None
    scope: dict = {}
    exec(found.group(1), scope)
    reader = scope["Reader"](shipped_model)
    with GGUFFile.open(shipped_model) as file:
        infos = {name: info for name, info in file.tensors.items() if info.type.name == "I2_S"}
        assert reader.ternary.keys() == infos.keys()
        assert len(infos) == 28
        assert {one.name for one in reader.tensors} == file.tensors.keys() - infos.keys()
        for name, info in infos.items():
            rows, cols = info.shape
            raw = np.frombuffer(shipped_model.read_bytes(), np.uint8, info.size_bytes, info.offset)
            scale = raw[rows * cols // 4 :][:4].view("<f4")
            np.testing.assert_array_equal(reader.ternary[name], unpack_i2_s(raw, rows, cols) * scale)
