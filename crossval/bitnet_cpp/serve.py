"""The child process that runs bitnet.cpp, and the commands it answers for ``BitnetCppRunner``.

``crossval.bitnet_cpp.limits`` starts it; ``crossval.child.serve`` describes requests and answers.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from crossval.bitnet_cpp.engine import Engine, RefusedError
from crossval.child.confine import CONFINED_VARIABLE
from crossval.child.protocol import Frame, joined, split
from crossval.child.serve import serve
from crossval.errors import BadInputError, UnavailableError


def main(argv: list[str]) -> None:
    """Serve requests until the pipe closes.

    ``argv``: descriptors of requests, responses and lifeline, and the stack size in force, in bytes.
    """
    *fds, stack_bytes = map(int, argv)
    engine = Engine(stack_bytes)
    kinds = ((BadInputError, "bad_input"), (UnavailableError, "unavailable"), (RefusedError, "refused"))
    serve(fds, lambda request: handle(engine, request), kinds)
    # Skip the destructors of a library that may be in a broken state.
    os._exit(0)


def handle(engine: Engine, request: Frame) -> tuple[Any, dict[str, Any]]:
    """Return result and arrays of one request.

    Raises:
        BadInputError, UnavailableError, RefusedError: from the engine.
        ValueError: an unknown command.
    """
    header = request.header
    command = header.get("command")
    if command == "open":
        return {**engine.open(header["library"]), "confined": os.environ.get(CONFINED_VARIABLE, "")}, {}
    if command == "load":
        wanted = {key: header[key] for key in ("n_ctx", "n_ubatch", "n_threads", "flash_attention", "input_norms")}
        return engine.load(header["model"], header["overrides"], **wanted), {}
    if command == "load_vocabulary":
        return engine.load_vocabulary(header["model"], header["overrides"]), {}
    if command == "tokenize":
        # Any bytes: they need not be UTF-8.
        texts = split(request.arrays["text"], request.arrays["n_bytes"])
        options = {name: header[name] for name in ("add_bos", "parse_special")}
        tokenize = engine.tokenize_guarded if header.get("guarded") else engine.tokenize
        found = [tokenize(text, **options) for text in texts]
        ended = {index: one for index, one in enumerate(found) if isinstance(one, str)}
        lists = [[] if isinstance(one, str) else one for one in found]
        ids = np.array([token for one in lists for token in one], np.int32)
        counts = np.array([len(one) for one in lists], np.int32)
        return {"ended": ended}, {"token_ids": ids, "n_ids": counts}
    if command == "apply_template":
        return {"text": engine.apply_template(header["template"], header["messages"])}, {}
    if command == "pieces":
        return {}, joined(engine.pieces(special=header["special"]))
    if command == "reset":
        engine.reset()
        return {}, {}
    if command == "eval_each":
        passes = [engine.eval([token], ()) for token in request.arrays["token_ids"].tolist()]
        logits = np.concatenate([one.logits for one in passes])
        return {"elapsed_s": [one.elapsed_s for one in passes]}, {"result_output": logits}
    if command == "eval":
        done = engine.eval(request.arrays["token_ids"].tolist(), header["select"])
        rows = {name: tap.rows for name, tap in done.taps.items() if tap.rows is not None}
        arrays = {name: tap.array for name, tap in done.taps.items()}
        return {"elapsed_s": done.elapsed_s, "rows": rows}, {**arrays, "result_output": done.logits}
    raise ValueError(f"unknown command {command!r}")
