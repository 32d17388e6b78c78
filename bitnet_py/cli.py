"""The ``bitnet`` command and its subcommands. Exit codes: see ``main``."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from bitnet_py import cli_embed, cli_quantize, cli_score
from bitnet_py.arithmetic import GENERATIONS, Generation
from bitnet_py.bench import BenchReport, bench
from bitnet_py.chat_template import FileTemplate
from bitnet_py.config import ARCHITECTURES
from bitnet_py.convert import convert
from bitnet_py.errors import BitnetError, InputError, error_line
from bitnet_py.generate import Token, generate
from bitnet_py.gguf import GGUFFile
from bitnet_py.inspection import describe, describe_deep, print_description
from bitnet_py.integers_option import tokens_option
from bitnet_py.model import Model
from bitnet_py.override_option import override_option
from bitnet_py.program import BAD_INPUT, CONTEXT, Program
from bitnet_py.projections import PROJECTIONS
from bitnet_py.resources import default_model_path
from bitnet_py.sampler import MAX_SEED, GreedySampler, RandomSampler
from bitnet_py.special_tokens import TokenKind
from bitnet_py.template import NAMES as TEMPLATE_NAMES
from bitnet_py.template import Template, get_template
from bitnet_py.token_ids import check_ids
from bitnet_py.tokenizer import Tokenizer
from bitnet_py.weights import Weights


class Commands(Program):
    """The commands of ``bitnet``; only bugs print a traceback."""

    def explain(self, ctx: click.Context, error: Exception) -> tuple[str, int] | None:
        """Return message and exit code of the package's errors and the system's."""
        if isinstance(error, BitnetError):
            return error_line(str(error)), BAD_INPUT
        if isinstance(error, OSError):
            where = "cannot write the output" if error.filename is None else error.filename
            return error_line(f"{where}: {error.strerror or error}"), BAD_INPUT
        return None


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="bitnet-parity", prog_name="bitnet")
def main() -> None:
    """Run and inspect 1.58-bit BitNet models in GGUF files.

    \b
    Example:
      bitnet run --prompt "The capital of France is" --max-tokens 16 --greedy

    Exit codes: 0 ok, 2 usage, 4 bad input (model, prompt), 130 interrupted, 141 the reader of the
    output closed it, 143 terminated.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape, not an exception.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def model_option(function: Callable[..., None]) -> Callable[..., None]:
    """Add ``--model``, by default the model that ships with the project."""

    def resolve(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Path:
        return default_model_path() if value is None else Path(value)

    help_text = "GGUF file.  [default: the model that ships with the project]"
    return click.option("--model", "model_path", metavar="PATH", callback=resolve, help=help_text)(function)


@main.command()
@model_option
@override_option
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@tokens_option("Token ids to continue in place of a text, as they are.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Stop after this many."
)
@click.option(
    "--template",
    type=click.Choice(TEMPLATE_NAMES),
    default="raw",
    show_default=True,
    help="Chat template; auto: the file's.",
)
@click.option("--greedy", is_flag=True, help="Always take the most likely token.")
@click.option("--temperature", type=float, help="Below 1 sharpens, above 1 flattens.  [default: 0.8]")
@click.option("--top-k", type=int, help="Draw from the k most likely tokens; 0: all.  [default: 40]")
@click.option(
    "--top-p", type=float, help="Draw from the most likely tokens of this total probability.  [default: 0.95]"
)
@click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), help="Makes sampling reproducible.  [default: a new one]"
)
@click.option("--threads", "n_threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]")
@click.option(
    "--kernel", metavar="NAME", help="Force a kernel family, as BITNET_KERNEL does.  [default: the best]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def run(
    model_path: Path,
    prompt: str | None,
    tokens: tuple[int, ...] | None,
    max_tokens: int,
    template: str,
    greedy: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    n_threads: int | None,
    kernel: str | None,
    as_json: bool,
) -> None:
    """Continue a prompt; the text streams to stdout.

    The last line on stderr gives the speed of decoding and of the prompt, and a hash of the last
    logits: equal hashes mean bit-identical logits.

    \b
    Example:
      bitnet run --prompt "The capital of France is" --max-tokens 16 --greedy
      bitnet run --model m.gguf --template bitnet --prompt "What is 2+2?" --seed 1
    """
    if (prompt is None) == (tokens is None):
        raise click.UsageError("give either --prompt TEXT or --tokens ID,ID,...")
    if tokens is not None and template != "raw":
        raise click.UsageError(f"--template {template} applies to text: --tokens are fed as they are")
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in settings.items() if value is not None}
    if greedy and given:
        raise click.UsageError(f"--greedy takes no --{next(iter(given)).replace('_', '-')}")
    try:
        sampler = GreedySampler() if greedy else RandomSampler(**given)  # type: ignore[arg-type]  # click has checked each value
    except InputError as error:
        raise click.UsageError(str(error)) from error
    with Model.from_gguf(model_path, n_threads=n_threads, kernel=kernel) as model:
        _warn(model.tokenizer)
        chosen = get_template(template, model.metadata)
        if prompt is None:
            prompt_ids = list(tokens or ())
            check_ids(prompt_ids, model.config.vocab_size, model_path.name)
        else:
            prompt_ids = _prompt_ids(model.tokenizer, chosen, prompt)
        stop_ids = model.tokenizer.eos_ids
        made: list[Token] = []
        text = []
        stream = model.tokenizer.decode_stream()
        for token in generate(model, prompt_ids, max_tokens=max_tokens, sampler=sampler, stop_ids=stop_ids):
            made.append(token)
            piece = "" if token.id in stop_ids else stream.push(token.id)
            piece += stream.flush() if token.finish else ""
            text.append(piece)
            if piece and not as_json:
                click.echo(piece, nl=False)
        speed = _speed(made, len(prompt_ids))
        counters = [{"name": c.name, "calls": c.calls, "bytes": c.bytes} for c in model.counters()]
        last_logits = made[-1].all_logits()
        if as_json:
            report = {
                "model": str(model_path),
                "prompt": prompt,
                "template": None if prompt is None else template,
                "prompt_ids": prompt_ids,
                "ids": [token.id for token in made],
                "text": "".join(text),
                "finish": made[-1].finish,
                "sampling": _sampling(sampler),
                **speed,
                "logits_hash": logits_hash(last_logits),
                "kernel": model.kernel_name,
                "n_threads": model.n_threads,
                "counters": counters,
            }
            click.echo(json.dumps(report))
        else:
            click.echo()
    if not as_json and isinstance(sampler, RandomSampler) and seed is None:
        click.echo(f"seed {sampler.seed}", err=True)
    click.echo(_speed_line(speed, last_logits), err=True)


@main.command("bench")
@model_option
@override_option
@click.option(
    "--prompt-tokens", "n_prompt", type=click.IntRange(1), default=128, show_default=True, help="Prompt length."
)
@click.option(
    "--decode", "n_decode", type=click.IntRange(1), default=16, show_default=True, help="Decoded tokens."
)
@click.option("--rounds", "n_rounds", type=click.IntRange(1), default=5, show_default=True, help="Repetitions.")
@click.option("--threads", "n_threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench_command(
    model_path: Path, n_prompt: int, n_decode: int, n_rounds: int, n_threads: int | None, as_json: bool
) -> None:
    """Measure the engine by itself: prompt and decoding speed, memory, bandwidth.

    Prints medians and ranges over rounds on arbitrary tokens, after one warm-up round. To compare
    with bitnet.cpp, interleaved, use `crossval bench`.

    \b
    Example:
      bitnet bench
      bitnet bench --model m.gguf --prompt-tokens 512 --decode 32 --threads 4 --json
    """
    with Model.from_gguf(model_path, n_threads=n_threads) as model:
        report = bench(model, n_prompt=n_prompt, n_decode=n_decode, n_rounds=n_rounds)
        kernel, n_used = model.kernel_name, model.n_threads
    logits = logits_hash(report.last_logits)
    if as_json:
        facts = {"model": str(model_path), "kernel": kernel, "n_threads": n_used, "n_rounds": n_rounds}
        click.echo(json.dumps({**facts, **report.to_json(), "logits_hash": logits}))
        return
    click.echo(f"{model_path.name}, {n_used} threads, kernel {kernel}, {n_rounds} rounds, logits {logits}")
    for line in _bench_lines(report):
        click.echo(line)


@main.command()
@model_option
@override_option
@click.option("--verify", is_flag=True, help="Also scan every weight and build the tokenizer.")
@click.option("--deep", is_flag=True, help="Also read every value: codes, scales, norms, layout of the codes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(model_path: Path, verify: bool, deep: bool, as_json: bool) -> None:
    """Show a model file: configuration, metadata, tensors.

    Long arrays (the vocabulary) are shown by their length and first entries. A file that this
    engine cannot run is shown as far as possible; then the command says why and exits with 4.

    \b
    Example:
      bitnet inspect --model m.gguf --verify
      bitnet inspect --model m.gguf --deep
    """
    with GGUFFile.open(model_path) as gguf:
        description, problem = describe(gguf)
        if verify and problem is None:
            try:
                Weights.load(gguf).check_finite()
                _warn(Tokenizer.from_gguf(gguf))
                description["verified"] = True
            except BitnetError as error:
                description["verified"], problem = False, error
        if deep:
            description["deep"] = describe_deep(gguf)
        if as_json:
            click.echo(json.dumps(description, allow_nan=False))
        else:
            print_description(description)
        if problem is not None:
            raise problem


@main.command("convert")
@model_option
@click.option(
    "--projections", type=click.Choice(list(PROJECTIONS)), required=True, help="Type of the ternary matrices."
)
@click.option(
    "--arch", type=click.Choice(list(ARCHITECTURES)), help="Name of the architecture.  [default: the same]"
)
@click.option(
    "--other-activation",
    is_flag=True,
    help="Allow an --arch that means another activation: the result is another model, fit for speed only.",
)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def convert_command(
    model_path: Path, projections: str, arch: str | None, other_activation: bool, out: Path
) -> None:
    """Write a model to OUT with its ternary matrices in another type.

    bitnet.cpp reads i2_s, llama.cpp tq1_0 and tq2_0.

    llama.cpp runs models of architecture `bitnet`, which means SiLU. A model with squared ReLU
    (2B-4T, the shipped one) would be another model under that name; it is refused unless
    --other-activation is given. From i2_s, scales are rounded to float16; the command says how far.

    \b
    Example:
      bitnet convert --model m.gguf --projections tq2_0 --arch bitnet m-tq2_0.gguf
    """
    done = convert(model_path, out, PROJECTIONS[projections], arch=arch, other_activation=other_activation)
    exact = "scales unchanged" if not done.scale_error else f"scales rounded, by at most {done.scale_error:.1e}"
    click.echo(f"{out}: {done.arch}, {done.n_matrices} matrices as {projections}, {exact}", err=True)
    if done.activation is not None:
        click.echo(f"{out}: another model than {model_path.name}: its activation is {done.activation}", err=True)


@main.command()
@model_option
@override_option
@click.option(
    "--generation",
    type=click.Choice(GENERATIONS),
    default=GENERATIONS[0],
    show_default=True,
    help="Whose rules: bitnet.cpp of March 2026, or its main since July 2026.",
)
@click.option("--no-bos", is_flag=True, help="Do not add BOS and EOS, even if the model asks for them.")
@click.option("--no-special", is_flag=True, help="Treat special tokens in TEXT as plain text.")
@click.option("--ids", "ids_only", is_flag=True, help="Print the ids alone, on one line.")
@click.argument("text")
def tokenize(
    model_path: Path, generation: Generation, no_bos: bool, no_special: bool, ids_only: bool, text: str
) -> None:
    """Show the tokens of TEXT, one per line: id and text, or bytes if a token is only part of a character.

    \b
    Example:
      bitnet tokenize "Hello world"
      bitnet tokenize --model m.gguf --ids "<|begin_of_text|>Hello"
    """
    with GGUFFile.open(model_path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf, generation)
    _warn(tokenizer)
    ids = tokenizer.encode(text, add_bos=not no_bos, parse_special=not no_special)
    if ids_only:
        click.echo(" ".join(map(str, ids)))
        return
    for token_id in ids:
        click.echo(f"{token_id:>7}  {_show_bytes(tokenizer.token_bytes(token_id, skip_special=False))}")


main.add_command(cli_embed.command)
main.add_command(cli_quantize.command)
main.add_command(cli_score.command)


def logits_hash(logits: npt.NDArray[np.float32]) -> str:
    """Return the first 8 hex digits of the SHA-256 of ``logits`` as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(logits, "<f4").tobytes()).hexdigest()[:8]


def _show_bytes(data: bytes) -> str:
    try:
        return json.dumps(data.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return f"bytes {data.hex(' ').upper()}"


def _warn(tokenizer: Tokenizer) -> None:
    for warning in tokenizer.vocabulary.warnings:
        click.echo(f"warning: {warning}", err=True)


def _prompt_ids(tokenizer: Tokenizer, template: Template | FileTemplate, prompt: str) -> list[int]:
    if not (prompt.strip() if template.strip else prompt):
        raise InputError("the prompt is empty; give --prompt some text")
    vocabulary = tokenizer.vocabulary
    known = {
        text for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == TokenKind.CONTROL
    }
    missing = [token for token in template.special_tokens if token not in known]
    if missing:
        raise InputError(
            f"template {template.name!r} needs {missing[0]}, which the model lacks; use --template raw"
        )
    return tokenizer.encode(template.render(prompt))


def _sampling(sampler: GreedySampler | RandomSampler) -> dict[str, float]:
    if isinstance(sampler, GreedySampler):
        return {"temperature": 0}
    names = ("temperature", "top_k", "top_p", "seed")
    return {name: getattr(sampler, name) for name in names}


def _speed(tokens: list[Token], n_prompt: int) -> dict[str, dict[str, Any]]:
    """Return the speed of the prompt pass, which gives the first token, and of the single-token passes."""
    elapsed_s, n_decoded = sum(token.elapsed_s for token in tokens[1:]), len(tokens) - 1
    return {
        "prefill": {"n_tokens": n_prompt, "elapsed_s": tokens[0].elapsed_s},
        "decode": {
            "n_tokens": n_decoded,
            "elapsed_s": elapsed_s,
            "tok_per_s": n_decoded / elapsed_s if n_decoded else None,
            "ms_per_tok": 1000 * elapsed_s / n_decoded if n_decoded else None,
        },
    }


def _bench_lines(report: BenchReport) -> list[str]:
    figures = report.to_json()
    lines = []
    for name in ("prefill", "decode"):
        rate, n_tokens = figures[name]["tok_per_s"], figures[name]["n_tokens"]
        lines.append(
            f"{name:<8} {rate['median']:10.1f} tok/s  ({rate['min']:.1f} to {rate['max']:.1f})  {n_tokens} tokens"
        )
    peak = report.peak_resident_bytes
    lines.append(f"{'memory':<8} {'unknown' if peak is None else f'{peak / 1e6:10.1f} MB'}")
    read, machine = report.decode_bytes_per_s / 1e9, report.read_bytes_per_s / 1e9
    lines.append(
        f"{'reads':<8} {read:10.2f} GB/s of weights in decoding, {report.weight_bytes_per_token / 1e6:.2f} MB per "
        f"token; this machine reads {machine:.2f} GB/s"
    )
    return lines


def _speed_line(speed: dict[str, dict[str, Any]], logits: npt.NDArray[np.float32]) -> str:
    decode, prefill = speed["decode"], speed["prefill"]
    rate = f"{decode['tok_per_s']:.1f} tok/s  {decode['ms_per_tok']:.2f} ms/tok" if decode["n_tokens"] else "0 tok"
    prompt = f"prefill {prefill['n_tokens']} tok in {1000 * prefill['elapsed_s']:.1f} ms"
    return f"decode {rate}  {prompt}  logits {logits_hash(logits)}"
