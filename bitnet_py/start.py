"""How the command lines start: Ctrl-C ends them without a traceback even while their modules are being imported.

Imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
import signal


def run(module: str, name: str) -> None:
    """Import a module and call its ``main`` as the program ``name``; until then Ctrl-C just ends the process.

    Who has SIGINT ignored (``nohup``, a job in the background of a script) keeps it ignored.
    """
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    program = importlib.import_module(module)
    if raises:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    program.main(prog_name=name)
