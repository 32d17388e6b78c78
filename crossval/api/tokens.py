"""Two tokenizers compared on a corpus."""

from __future__ import annotations

from pathlib import Path

from bitnet_py.gguf import GGUFFile
from bitnet_py.resources import default_model_path
from bitnet_py.tokenizer import Tokenizer
from crossval.api.request import Say, silent
from crossval.engines.model_file import check_vocabulary
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import EngineIdentity, tokenizer_rules
from crossval.receipts.file import Receipt
from crossval.receipts.kind import RunFacts, build, build_unavailable
from crossval.receipts.party import Compute, Party, rules_between, same_engine
from crossval.terms import SIDES, Progress, Side
from crossval.tokens import party
from crossval.tokens.compare import TokensResult, compare
from crossval.tokens.corpus import Corpus, of_file, shipped
from crossval.tokens.receipt import TOKENS, agree

SAME_NOTE = "candidate and reference have {}: that they agree shows only that one tokenizer gives the same twice"


def compare_tokens(
    model: str | Path | None = None,
    *,
    candidate: str = "bitnet_py",
    reference: str = "bitnet.cpp",
    corpus: str | Path | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> Receipt:
    """Compare the token ids of two tokenizers over one model file's vocabulary, text by text.

    ``candidate``, ``reference``: ``bitnet_py``, ``bitnet.cpp[:PATH]``, ``llama.cpp[:PATH]`` or
    ``tiktoken:PATH``; ours follows the generation of the library on the other side. ``corpus``: a
    file, each line a text; None: the one that ships with crossval. Of the model file nothing but
    its vocabulary is read.

    Raises:
        BadInputError, ModelError, TokenizerError: an unusable vocabulary, corpus or word.
        UnavailableError, EngineCrashError: from the engines.
    """
    words = {side: party.find(text, side) for side, text in zip(SIDES, (candidate, reference), strict=True)}
    path = default_model_path() if model is None else Path(model)
    texts = _read_corpus(corpus)
    checked = check_vocabulary(path)
    for warning in checked.warnings:
        say(f"warning: {warning}")
    unknown = {side: Party("unused", EngineIdentity(word.name)) for side, word in words.items()}
    settings = {str(side): word.plain for side, word in words.items()}

    def facts(parties: dict[Side, Party], result: TokensResult | None) -> RunFacts:
        why = None if result is None else same_engine(*(parties[side].to_json() for side in SIDES))
        return RunFacts(
            model=checked.facts,
            tokenizer={
                **checked.tokenizer,
                "engines_agree": None if result is None else agree(result),
                "rules": rules_between(parties),
            },
            text=None,
            template=None,
            token_ids=(),
            candidate=parties["candidate"],
            reference=parties["reference"],
            compute=Compute("none"),
            settings=settings,
            notes=[*checked.notes, *([] if why is None else [SAME_NOTE.format(why)])],
        )

    # Libraries first: they say by whose rules ours has to read.
    order = sorted(SIDES, key=lambda side: not party.is_live_library(words[side]))
    opened: dict[Side, party.TokenizerParty] = {}
    rules = tokenizer_rules({})
    try:
        for side in order:
            try:
                opened[side] = party.open_party(words[side], path, rules).__enter__()
            except UnavailableError as error:
                missing = Party("unavailable", EngineIdentity(words[side].name), note=str(error))
                error.receipt = build_unavailable(TOKENS, facts({**unknown, side: missing}, None))
                raise
            rules = tokenizer_rules({one: found.identity.numerics for one, found in opened.items()})
        with GGUFFile.open(path) as gguf:
            tokenizer = Tokenizer.from_gguf(gguf, rules)
        result = compare(opened, tokenizer, texts, progress)
        parties = {side: Party("live", opened[side].identity) for side in SIDES}
        return build(TOKENS, result, facts(parties, result))
    finally:
        for one in opened.values():
            one.__exit__(None, None, None)


def _read_corpus(path: str | Path | None) -> Corpus:
    if path is None:
        return shipped()
    try:
        corpus = of_file(Path(path).name, Path(path).read_bytes())
    except OSError as error:
        raise BadInputError(f"cannot read the corpus {path}: {error.strerror or error}") from error
    if not corpus.texts:
        raise BadInputError(f"the corpus {path} holds no text: comparing nothing shows nothing")
    return corpus
