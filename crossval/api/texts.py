"""The text that an engine printed, judged without running the engine."""

from __future__ import annotations

from pathlib import Path

from bitnet_py.errors import InputError
from crossval.api.request import Request
from crossval.engines.session import check_prompt
from crossval.errors import BadInputError
from crossval.examine.layers_receipt import LAYERS
from crossval.texts.finding import TextFinding, judge, without_prompt
from crossval.texts.right import right_text

MAX_TEXT_BYTES = 1 << 20


def explain_text(
    text: str | bytes, prompt: str, model: str | Path | None = None, *, template: str = "raw"
) -> TextFinding:
    """Say what the text of an engine looks like, and which faults make engines print such texts (docs/triage.md).

    ``text``: what the engine printed after the prompt, greedily; bytes that are not UTF-8 become
    U+FFFD, which is a sign in itself. ``model``: a GGUF file, whose right continuation is computed
    and compared; None: the text alone is judged. ``template``: what the prompt was put into.

    Raises:
        BadInputError, ModelError: the prompt, the text or the model is unusable.
    """
    check_prompt(prompt)
    if len(text) > MAX_TEXT_BYTES:
        raise BadInputError(f"the text has more than {MAX_TEXT_BYTES} bytes; give its beginning")
    printed = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    right = None
    if model is not None:
        request = Request(LAYERS, model, template=template)
        checked = request.load_model()
        body, _ = without_prompt(printed, prompt)
        try:
            right = right_text(checked.path, request.render(prompt), body)
        except InputError as error:
            raise BadInputError(str(error)) from error
    given = None if model is None else str(model)
    return judge(printed, prompt, right, model=given, template=template)
