"""The option ``--override KEY=VALUE`` of the command lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from bitnet_py.overrides import overriding


def override_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--override`` to a command; it is in force until the command ends."""

    def enter(ctx: click.Context, _param: click.Parameter, given: Sequence[str]) -> None:
        values = {}
        for text in given:
            key, equals, value = text.partition("=")
            if not equals or not key.strip():
                raise click.BadParameter(f"{text!r}: expected KEY=VALUE, such as tokenizer.ggml.pre=llama-bpe")
            values[key.strip()] = value
        ctx.with_resource(overriding(values))

    return click.option(
        "--override",
        multiple=True,
        metavar="KEY=VALUE",
        expose_value=False,
        callback=enter,
        help="Use this value for a metadata key instead of the file's, in every engine. May be repeated.",
    )(function)
