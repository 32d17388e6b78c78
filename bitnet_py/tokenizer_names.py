"""The name that bitnet.cpp's converter gives a byte-level tokenizer, told by the ids of one text.

Facts from ``Model.get_vocab_base_pre`` (utils/convert-hf-to-gguf-bitnet.py, the same in both
generations): the text, and the sha256 over its ids, written as Python prints a list, of each
tokenizer that is known. So a name is given to a vocabulary, not to a rule: a tokenizer with the
same rule and other tokens has none.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tokenizers import Tokenizer

from bitnet_py.errors import TokenizerError, raised_by_library

TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (multiple emojis concatenated) \u2705 "
    "\U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785\U0001f601 "
    "?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= "
    "\u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
NAMES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "8aeee3860c56296a157a1fe2fad249ec40aa59b1bb5709f4ade11c4e6fe652ed": "falcon",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "a6b57017d60e6edb4d88ecc2845188e0eb333a70357e45dcc9b53964a73bbae6": "falcon_e",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "mpt",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "9c2227e4dd922002fb81bde4fc02b0483ca4f12911410dee2255e4987644e3f8": "command-r",
}
"""sha256 -> ``tokenizer.ggml.pre``; without tokenizers whose rule this package does not have."""


def ids_of_text(path: Path) -> list[int]:
    """Return the ids that a ``tokenizer.json`` gives the text, with what its post-processor adds.

    Raises:
        TokenizerError: the ``tokenizers`` package cannot read the file.
    """
    try:
        return list(Tokenizer.from_file(str(path)).encode(TEXT).ids)
    except BaseException as error:
        if not raised_by_library(error):
            raise
        raise TokenizerError(f"{path}: not a tokenizer.json that can be read: {error}") from None


def name_of(ids: list[int]) -> str | None:
    """Return the converter's name for a tokenizer that gives the text these ids; None for one it does not know."""
    return NAMES.get(hashlib.sha256(str(ids).encode()).hexdigest())
