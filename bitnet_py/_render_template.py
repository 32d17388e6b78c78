"""Render a chat template: a program of its own, so that a template from a file can be stopped, whatever it does.

Reads a JSON object (``source``, ``variables``, ``cpu_s``, ``memory_bytes``) from stdin, writes one to stdout:
``text``, or ``error`` in one line. The template sees nothing but the variables: it runs in jinja2's sandbox, with
trimmed blocks and the functions that Hugging Face gives templates.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def main() -> None:
    """Render what stdin asks for."""
    asked = json.load(sys.stdin)
    for limit, value in ((resource.RLIMIT_CPU, asked["cpu_s"]), (resource.RLIMIT_AS, asked["memory_bytes"])):
        resource.setrlimit(limit, (value, value))
    try:
        answer = {"text": render(asked["source"], asked["variables"])}
    except Exception as error:  # whatever a template from a file can do
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    json.dump(answer, sys.stdout)


def render(source: str, variables: dict[str, Any]) -> str:
    """Return the text that a template makes of its variables."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source).render(**variables)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
