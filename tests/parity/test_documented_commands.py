"""The commands shown in documentation and docstrings are run as written, so that none becomes outdated."""

from __future__ import annotations

import glob
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import bitnet_py.cli
import crossval.cli

ROOT = Path(__file__).parents[2]
SCRIPTS = sysconfig.get_path("scripts")
SOURCES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/README.md", "tools/train/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for folder in ("examples", "bench") for path in (ROOT / folder).glob("*.py")),
]
COMMAND = re.compile(r"^ *(?:\$ )?((?:[A-Z_]+=\S+ )*(?:crossval|bitnet|python3?) [^`|]+?)(?: +#.*)?$", re.M)
NOT_RUN = {
    r"[\w-]*(?:model|m|big|llama|0\.6b)\.gguf|2b-4t": "a model of the reader's",
    r"my-[\w-]+|bitnet-cpp-trace|before[./]": "a trace of the reader's",
    r"fetch-model": "the network",
    r"record_mine|transformers": "PyTorch, and has a test of its own (tests/unit/torch)",
    r"prompts\.txt|text\.txt|mine\.jsonl|greedy\.json": "the reader's file",
    r"bitnet_cpp\.build|llama\.cpp": "a compiler, or llama.cpp",
    r"train\.|\[|\bbench\b": "a usage line, or training and measuring, which take long",
    r"tests\.|metamorphic$": "minutes to hours",
    r"-m venv": "an installation (tools/ci/tutorial.sh)",
    r"garbage": "docs/tutorial.md has a test of its own",
    r"selftest|smoke|doctor": "has tests of its own, or an exit code that depends on the machine",
}
"""Commands that need more than a checkout; only their words are checked."""
LIVE = re.compile(r"bitnet\.cpp|--engine both|crossval record")
"""Commands that need bitnet.cpp: run when it is there."""


def documented(path: Path) -> Iterator[str]:
    """Yield the commands in the fenced and indented blocks of a page, or in the docstring of a script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = text.split('"""')[1]
        blocks = [text]
    else:
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
        blocks += re.findall(r"^ {4}\S.*$", text, re.M)
    for block in blocks:
        yield from COMMAND.findall(block)


def examples(group: click.Command) -> list[str]:
    """Return the examples in the help of every command of a group."""
    assert isinstance(group, click.Group)
    helps = ((command.help or "").partition("Example")[2] for command in group.commands.values())
    return [example for text in helps for example in COMMAND.findall(text)]


HELP = ROOT / "bitnet_py/cli.py"
"""Stands for the help of ``bitnet``; that of ``crossval`` is docs/commands.md."""
COMMANDS = [(path, command) for path in SOURCES for command in documented(path)]
COMMANDS += [(HELP, command) for command in examples(bitnet_py.cli.main)]


def runs(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN)


FIRST: dict[str, Path] = {}
"""Command -> the first page that prints it, with which it is run."""
for page, printed in COMMANDS:
    FIRST.setdefault(printed, page)
RUN = {
    path: [
        command
        for command, source in FIRST.items()
        if source == path and runs(command) and not LIVE.search(command)
    ]
    for path in [*SOURCES, HELP]
}
PROGRAMS = {"crossval": crossval.cli.cli, "bitnet": bitnet_py.cli.main}
SHELL = re.compile(r"[&|;<>$`\\~]|^[A-Z_]+=")
"""What only a shell can do; globs aside, which are expanded here as it does."""


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.long
@pytest.mark.parametrize("path", [path for path in RUN if RUN[path]], ids=names)
def test_a_documented_command_works_as_it_is_printed(path, tmp_path, monkeypatch):
    """Each once; the first of every page by its program in a shell, the others in this process."""
    for name in ("examples", "models", "receipts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    for number, command in enumerate(RUN[path]):
        code, output = in_a_shell(command) if number == 0 or needs_a_shell(command) else in_this_process(command)
        assert code == 0, f"{command}\n{output}"


@pytest.mark.live
@pytest.mark.parametrize("command", [command for command in FIRST if runs(command) and LIVE.search(command)])
def test_a_documented_command_of_a_live_engine_works_as_it_is_printed(
    command, bitnet_cpp_library, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("BITNET_CPP_LIB", str(bitnet_cpp_library))
    code, output = in_a_shell(command)
    assert code == 0, output


def needs_a_shell(command: str) -> bool:
    return command.split()[0] not in PROGRAMS or SHELL.search(command) is not None


def in_a_shell(command: str) -> tuple[int, str]:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def in_this_process(command: str) -> tuple[int, str]:
    """Run it as its program would: a second for each start of Python is saved."""
    name, *words = shlex.split(command)
    expanded = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    done = CliRunner().invoke(PROGRAMS[name], expanded, prog_name=name)
    return done.exit_code, done.output


def test_commands_are_found_where_they_are_printed():
    assert len(RUN[ROOT / "examples" / "third_engine.py"]) == 2
    assert {"README.md", "docs/metamorphic.md", "docs/trace-format.md"} <= {names(path) for path, _ in COMMANDS}


def test_the_examples_of_every_help_are_among_them() -> None:
    known = {command for _, command in COMMANDS}
    assert set(examples(crossval.cli.cli)) <= known
    assert len(examples(crossval.cli.cli)) > 30
    assert len(examples(bitnet_py.cli.main)) > 5


@pytest.mark.parametrize("path", list(dict.fromkeys(path for path, _ in COMMANDS)), ids=names)
def test_the_words_of_a_documented_command_exist(path):
    commands = [command for source, command in COMMANDS if source == path and "[" not in command]
    for part in [part for command in commands for part in command.split(" && ")]:
        words = [word for word in part.split() if not re.match(r"[A-Z_]+=", word)]
        if words[0].startswith("python"):
            target = words[2] if words[1] == "-m" else words[1]
            if target in sys.stdlib_module_names:
                continue
            if f"Write `{target}`" in path.read_text(encoding="utf-8"):
                continue  # the reader does
            file = ROOT / (target.replace(".", "/") if words[1] == "-m" else target)
            assert file.is_dir() or file.exists() or file.with_suffix(".py").exists(), part
            continue
        group = PROGRAMS[words[0]]
        assert isinstance(group, click.Group)
        assert words[1] in group.commands, part
        known = {option for param in group.commands[words[1]].params for option in param.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, part
