"""Write ``docs/commands.md`` from the commands themselves (``python -m crossval.cli.docs > docs/commands.md``)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import click

from crossval.cli import cli

HEADER = """# Commands of crossval

Generated from the commands' own help; do not edit. Regenerate with
`python -m crossval.cli.docs > docs/commands.md`.
"""


def commands_markdown() -> str:
    """Return the page: the group's help, then every command's, in the order of the group.

    Built from names, options and docstrings, not from click's layout, which changes between its
    versions.
    """
    sections = [("crossval", cli), *((f"crossval {name}", command) for name, command in cli.commands.items())]
    return "\n".join([HEADER, *("\n".join(_section(title, command)) for title, command in sections)])


def _section(title: str, command: click.Command) -> Iterator[str]:
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    options = [param for param in command.params if isinstance(param, click.Option)]
    usage = [title, *("[OPTIONS]" for _ in options[:1]), *map(_argument, arguments)]
    if isinstance(command, click.Group):
        usage.append("COMMAND ...")
    yield f"## {title}\n"
    yield f"```\n{' '.join(usage)}\n```\n"
    yield _description(command) + "\n"
    if options:
        yield "| option | meaning |\n|---|---|"
        yield from (_option(option) for option in options)
        yield ""
    if isinstance(command, click.Group):
        yield "| command | does |\n|---|---|"
        yield from (f"| `{name}` | {_first_line(one)} |" for name, one in command.commands.items())
        yield ""


def _argument(param: click.Argument) -> str:
    return param.metavar or (param.name or "").upper()


def _option(option: click.Option) -> str:
    value = "" if option.is_flag else f" {_value(option)}"
    words = [option.help or ""]
    if option.required:
        words.append("Required.")
    if option.show_default:
        words.append(f"Default: `{option.default}`.")
    if option.show_envvar and option.envvar:
        words.append(f"Environment: `{option.envvar}`.")
    name = f"{', '.join(option.opts)}{'/'.join(['', *option.secondary_opts])}{value}".replace("|", "\\|")
    return f"| `{name}` | {' '.join(words).strip()} |"


def _value(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(option.type.choices)
    return "N" if isinstance(option.type, click.types.IntParamType) else "VALUE"


def _description(command: click.Command) -> str:
    """Return the docstring; paragraphs that click must not wrap become code blocks."""
    paragraphs = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        head, mark, body = paragraph.partition("\b\n")
        if mark and body.startswith("Example:"):
            lines = inspect.cleandoc("\n".join(body.splitlines()[1:]))
            paragraphs.append(f"{head}Example:\n\n```\n{lines}\n```")
        else:
            paragraphs.append(head + body)
    return "\n\n".join(paragraphs)


def _first_line(command: click.Command) -> str:
    return (command.help or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.stdout.write(commands_markdown())
