"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bitnet_py.resources import default_model_path

F = TypeVar("F", bound=Callable[..., Any])


def model_option(function: F) -> F:
    """Add ``--model``."""
    return click.option(
        "--model",
        "model_path",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="GGUF model both engines run. Default: the model that ships with crossval.",
    )(function)


def output_options(function: F) -> F:
    """Add ``--receipt`` and ``--json``."""
    function = click.option(
        "--json", "as_json", is_flag=True, help="Print the receipt as JSON on stdout, and nothing else there."
    )(function)
    return click.option(
        "--receipt",
        "receipt_path",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Write the receipt to this file.",
    )(function)


def compare_options(function: F) -> F:
    """Add everything that the commands share which run or replay a candidate and a reference."""
    function = output_options(function)
    function = click.option(
        "--template",
        type=click.Choice(template_names()),
        default="raw",
        show_default=True,
        help="Chat template the prompt is put into.",
    )(function)
    function = click.option(
        "--threads",
        "n_threads",
        type=click.IntRange(1, 1024),
        metavar="N",
        help="Threads of each engine. Default: each engine's own.",
    )(function)
    function = click.option(
        "--candidate",
        default="bitnet_py",
        show_default=True,
        metavar="bitnet_py|spec|DIR",
        help="Engine under test: ours, the float64 specification, or a trace directory of any engine.",
    )(function)
    function = click.option(
        "--reference",
        default="auto",
        show_default=True,
        metavar="auto|bitnet.cpp|spec|DIR",
        help="auto: live bitnet.cpp when it is built, else its recorded trace of this model and prompt.",
    )(function)
    return model_option(function)


def decode_option(function: F) -> F:
    """Add ``--decode`` of the commands that run a prompt."""
    return click.option(
        "--decode",
        "n_decode",
        type=click.IntRange(0, 100_000),
        metavar="N",
        help="Tokens to decode after the prompt. Default: 4, or what a recorded trace holds when that is less.",
    )(function)


def repro_option(function: F) -> F:
    """Add ``--repro``."""
    return click.option(
        "--repro",
        "repro_dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Write the first guilty operation there: its inputs, and a script that needs NumPy only. When both "
        "engines are guilty, the reference's goes to DIR/reference.",
    )(function)


def floors_option(function: F) -> F:
    """Add ``--floors``."""
    return click.option(
        "--floors",
        is_flag=True,
        help="Measure how far the live reference is from itself on this prompt (at once or token by token, 1 and "
        "2 threads, with and without capture) and give differences in multiples of that.",
    )(function)


def causal_option(function: F) -> F:
    """Add ``--causal``."""
    return click.option(
        "--causal",
        is_flag=True,
        help="Show which layer's error matters for the logits: both engines' states after each layer are "
        "continued by the specification. Takes time with the square of the number of layers.",
    )(function)


def template_names() -> list[str]:
    """Return the names of the chat templates."""
    from bitnet_py import template

    return sorted(template.TEMPLATES)


def model_or_default(path: Path | None) -> Path:
    """Return the model asked for, or the one that ships with the project (``ModelError`` when it is missing)."""
    return default_model_path() if path is None else path
