import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_py import cli
from bitnet_py.generate import Token
from bitnet_py.gguf import GGUFFile
from bitnet_py.model import Model
from bitnet_py.synth_vocab import BOS, EOT
from bitnet_py.tokenizer import Tokenizer
from tests.support.gguf_bytes import string

SPEED_LINE = re.compile(
    r"decode (0 tok|\d+\.\d tok/s  \d+\.\d\d ms/tok)  prefill (\d+) tok in \d+\.\d ms  logits ([0-9a-f]{8})"
)


@pytest.fixture(scope="module")
def model_path(make_model):
    return make_model()


def bitnet(*args):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def run(model_path, *args, prompt="the old river", n=8):
    return bitnet("run", "--model", model_path, "--threads", 1, "--prompt", prompt, "--max-tokens", n, *args)


def command(model_path):
    """A real process; 200 tokens, so that output fails while it is written and not only at exit."""
    options = ["--greedy", "--threads", "1", "--prompt", "a", "--max-tokens", "200"]
    return [sys.executable, "-m", "bitnet_py", "run", "--model", str(model_path), *options]


def fixed_tokens(ids, finish):
    """Stand in for ``generate``: a model that gives ``ids``."""

    def generate(model, *_args, **_kwargs):
        for n, token_id in enumerate(ids, 1):
            logits = np.zeros(model.config.vocab_size, np.float32)
            yield Token(token_id, lambda logits=logits: logits, 0.001, finish if n == len(ids) else None)

    return generate


def assert_one_clear_line(result, exit_code, message):
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", result.stderr), result.stderr


class TestRun:
    def test_text_on_stdout_and_speed_on_the_last_stderr_line(self, model_path):
        result = run(model_path, "--greedy")
        assert result.exit_code == 0
        assert result.stdout.endswith("\n")
        match = SPEED_LINE.fullmatch(result.stderr.splitlines()[-1])
        assert match
        with Model.from_gguf(model_path, n_threads=1) as model:
            ids = model.tokenizer.encode("the old river")
            assert int(match[2]) == len(ids)
            cache, made = model.new_cache(), []
            logits = model.forward(ids, cache).logits[-1]
            for _ in range(8):
                last = logits
                made.append(int(last.argmax()))
                if made[-1] in model.tokenizer.eos_ids:
                    break
                logits = model.forward(made[-1:], cache).logits[-1]
            assert result.stdout == model.tokenizer.decode(made) + "\n"
            assert match[3] == cli.logits_hash(last)

    def test_json_is_one_object_and_nothing_else(self, model_path):
        result = run(model_path, "--greedy", "--json")
        report = json.loads(result.stdout)
        assert result.exit_code == 0
        assert report["text"] + "\n" == run(model_path, "--greedy").stdout
        assert report["prompt_ids"] == Tokenizer.from_gguf(GGUFFile.open(model_path)).encode("the old river")
        assert report["prefill"]["n_tokens"] == len(report["prompt_ids"])
        assert report["decode"]["n_tokens"] == len(report["ids"]) - 1
        assert report["finish"] in ("stop", "max_tokens")
        assert report["sampling"] == {"temperature": 0}
        assert sum(counter["calls"] for counter in report["counters"] if counter["name"].startswith("i2s_")) > 0
        assert report["logits_hash"] == SPEED_LINE.fullmatch(result.stderr.splitlines()[-1])[3]

    def test_one_token_has_no_decode_speed(self, model_path):
        result = run(model_path, "--greedy", "--json", n=1)
        assert json.loads(result.stdout)["decode"]["tok_per_s"] is None
        assert result.stderr.startswith("decode 0 tok  prefill")

    def test_seed_repeats_and_an_unnamed_seed_is_told(self, model_path):
        first = run(model_path, n=20)
        seed = re.match(r"seed (\d+)\n", first.stderr)[1]
        assert run(model_path, "--seed", seed, n=20).stdout == first.stdout
        assert {run(model_path, "--seed", s, "--temperature", 2, n=20).stdout for s in range(3)} != {first.stdout}

    def test_sampling_options_reach_the_sampler(self, model_path):
        options = ("--temperature", 1.5, "--top-k", 7, "--top-p", 0.5, "--seed", 3)
        report = json.loads(run(model_path, "--json", *options).stdout)
        assert report["sampling"] == {"temperature": 1.5, "top_k": 7, "top_p": 0.5, "seed": 3}

    def test_template_wraps_the_prompt(self, model_path):
        report = json.loads(run(model_path, "--json", "--template", "bitnet", prompt=" Hi ").stdout)
        text = Tokenizer.from_gguf(GGUFFile.open(model_path)).decode(report["prompt_ids"], skip_special=False)
        assert text == f"{BOS}User: Hi{EOT}Assistant: "

    def test_kernel_is_forced(self, model_path):
        plain, scalar = (
            json.loads(run(model_path, "--greedy", "--json", *k).stdout) for k in ((), ("--kernel", "scalar"))
        )
        assert scalar["kernel"] == "scalar"
        assert scalar["logits_hash"] == plain["logits_hash"]

    def test_default_model_is_the_shipped_one(self, shipped_model):
        result = bitnet("run", "--prompt", "x", "--max-tokens", 1, "--threads", 1, "--json")
        assert json.loads(result.stdout)["model"] == str(shipped_model)

    @pytest.mark.parametrize(
        ("prompt", "args", "message"),
        [
            pytest.param("", (), "the prompt is empty", id="empty"),
            pytest.param("  \n", ("--template", "bitnet"), "the prompt is empty", id="empty in a template"),
            pytest.param("a b " * 3000, (), r"the prompt has \d+ tokens, the model's context \d+", id="too long"),
            pytest.param("a\udcff", (), "not valid Unicode", id="not Unicode"),
            pytest.param("a", ("--kernel", "nope"), "unknown kernel 'nope'", id="unknown kernel"),
        ],
    )
    def test_what_cannot_be_run(self, model_path, prompt, args, message):
        assert_one_clear_line(run(model_path, *args, prompt=prompt), 4, message)

    def test_template_whose_tokens_the_model_lacks(self, model_path, tmp_path):
        path = tmp_path / "m.gguf"
        path.write_bytes(model_path.read_bytes().replace(EOT.encode(), b"<|eot_xx|>"))
        result = run(path, "--template", "bitnet")
        assert_one_clear_line(result, 4, re.escape("template 'bitnet' needs <|eot_id|>, which the model lacks"))

    @pytest.mark.parametrize("size", [None, -5000], ids=["missing", "truncated"])
    def test_unreadable_model(self, model_path, tmp_path, size):
        path = tmp_path / "m.gguf"
        if size is not None:
            path.write_bytes(model_path.read_bytes()[:size])
        assert_one_clear_line(run(path), 4, "m.gguf")

    @pytest.mark.parametrize(
        "words",
        [
            "--max-tokens 0",
            "--max-tokens x",
            "--threads 0",
            "--template vicuna",
            "--greedy --seed 1",
            "--temperature 0",
            "--temperature nan",
            "--top-k -1",
            "--top-p 1.5",
            "--seed -1",
            "--nope",
            "extra",
        ],
    )
    def test_usage_errors(self, model_path, words):
        result = run(model_path, *words.split())
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert "Usage: " in result.stderr

    def test_interrupt_exits_130_and_keeps_what_was_printed(self, model_path, monkeypatch):
        def interrupted(*args, **kwargs):
            yield next(generate(*args, **kwargs))
            raise KeyboardInterrupt

        generate = cli.generate
        monkeypatch.setattr(cli, "generate", interrupted)
        result = run(model_path, "--greedy")
        assert result.exit_code == 130
        assert "Traceback" not in result.output

    def test_character_cut_off_at_the_end_shows_as_replacement(self, model_path, monkeypatch):
        texts = Tokenizer.from_gguf(GGUFFile.open(model_path)).vocabulary.tokens
        monkeypatch.setattr(cli, "generate", fixed_tokens([texts.index("b"), texts.index("Ã")], "max_tokens"))
        assert run(model_path, "--greedy").stdout == "b\ufffd\n"
        assert json.loads(run(model_path, "--greedy", "--json").stdout)["text"] == "b\ufffd"

    def test_stop_token_is_not_text_even_where_it_is_an_ordinary_token(self, model_path, tmp_path, monkeypatch):
        texts = Tokenizer.from_gguf(GGUFFile.open(model_path)).vocabulary.tokens
        eos = texts.index("a")
        key = b"tokenizer.ggml.eos_token_id" + struct.pack("<I", 4)
        data = model_path.read_bytes()
        at = data.index(key) + len(key)
        path = tmp_path / "m.gguf"
        path.write_bytes(data[:at] + struct.pack("<I", eos) + data[at + 4 :])
        monkeypatch.setattr(cli, "generate", fixed_tokens([texts.index("b"), eos], "stop"))
        assert run(path, "--greedy").stdout == "b\n"
        assert json.loads(run(path, "--greedy", "--json").stdout)["ids"] == [texts.index("b"), eos]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
    def test_full_disk_is_one_clear_line(self, model_path):
        with open("/dev/full", "w") as full:
            process = subprocess.run(command(model_path), stdout=full, stderr=subprocess.PIPE, text=True)
        assert process.returncode == 4
        assert re.fullmatch(r"error: .*No space left on device\n", process.stderr)

    def test_closed_pipe_is_quiet(self, model_path):
        process = subprocess.Popen(command(model_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


class TestInspect:
    def test_json_describes_the_file(self, model_path):
        result = bitnet("inspect", "--model", model_path, "--json", "--verify")
        report = json.loads(result.stdout)
        assert result.exit_code == 0
        assert report["config"]["n_layers"] == 2
        assert report["size_bytes"] == model_path.stat().st_size
        assert report["verified"] is True
        with GGUFFile.open(model_path) as gguf:
            assert [tensor["name"] for tensor in report["tensors"]] == list(gguf.tensors)
            assert set(report["metadata"]) == set(gguf.metadata)
            assert report["metadata"]["tokenizer.ggml.tokens"]["length"] == len(
                gguf.metadata["tokenizer.ggml.tokens"]
            )

    def test_table_names_every_tensor_and_key(self, model_path):
        output = bitnet("inspect", "--model", model_path).stdout
        with GGUFFile.open(model_path) as gguf:
            for name in (*gguf.tensors, *gguf.metadata):
                assert f"  {name} " in output

    def test_unusable_configuration_is_shown_then_refused(self, model_path, tmp_path):
        path = tmp_path / "m.gguf"
        path.write_bytes(model_path.read_bytes().replace(b"bitnet-b1.58", b"bitnet-b9.99"))
        result = bitnet("inspect", "--model", path, "--json")
        assert result.exit_code == 4
        assert json.loads(result.stdout)["config"] is None
        assert re.fullmatch(r"error: .*bitnet-b9\.99.*\n", result.stderr)

    def test_verify_finds_a_nan_that_inspect_alone_does_not(self, model_path, tmp_path):
        path = tmp_path / "m.gguf"
        shutil.copy(model_path, path)
        with GGUFFile.open(path) as gguf:
            offset = gguf.tensors["token_embd.weight"].offset
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(np.float16(np.nan).tobytes())
        assert bitnet("inspect", "--model", path).exit_code == 0
        result = bitnet("inspect", "--model", path, "--verify", "--json")
        assert result.exit_code == 4
        assert json.loads(result.stdout)["verified"] is False
        assert re.fullmatch(r"error: .*token_embd\.weight.*\n", result.stderr)

    def test_text_from_the_file_cannot_steer_the_terminal(self, model_path, tmp_path):
        name = GGUFFile.open(model_path).metadata["general.name"].encode()
        path = tmp_path / "m.gguf"
        damaged = model_path.read_bytes().replace(name, b"\x1b[2J" + name[4:])
        path.write_bytes(damaged.replace(b"general.file_type", b"general.file\x1b[2J\x00"))
        result = bitnet("inspect", "--model", path)
        assert result.exit_code == 0
        assert not set(result.stdout) & {"\x1b", "\x00"}
        assert result.stdout.count("\\u001b[2J") == 2

    def test_missing_model(self, tmp_path):
        assert_one_clear_line(bitnet("inspect", "--model", tmp_path / "no.gguf"), 4, "no.gguf")


class TestVocabularyThatIsNotUTF8:
    """It is decoded when a command needs it: those commands reject it, commands that need only tensors do not."""

    @pytest.fixture(params=["tokenizer.ggml.tokens", "tokenizer.ggml.merges"])
    def damaged(self, request, model_path, tmp_path):
        path = tmp_path / "m.gguf"
        with GGUFFile.open(model_path) as gguf:
            old = b"".join(map(string, gguf.metadata[request.param][20:30]))
        data = model_path.read_bytes()
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, old[:8] + b"\xff" + old[9:]))
        return (
            path,
            rf"m\.gguf: key '{request.param}', string 20 \(byte \d+\): expected UTF-8, found invalid start",
        )

    @pytest.mark.parametrize("command", ["run --greedy --prompt a", "tokenize a"])
    def test_commands_that_need_it(self, damaged, command):
        path, message = damaged
        name, *options = command.split()
        assert_one_clear_line(bitnet(name, "--model", path, *options), 4, message)

    def test_inspect_refuses_what_it_has_to_show(self, damaged):
        path, message = damaged
        assert bitnet("inspect", "--model", path).exit_code == 0  # four tokens of hundreds
        result = bitnet("inspect", "--model", path, "--verify", "--json")
        assert result.exit_code == 4
        assert json.loads(result.stdout)["verified"] is False
        assert re.fullmatch(rf"error: .*{message}.*\n", result.stderr)

    def test_inspect_of_a_damaged_first_token(self, model_path, tmp_path):
        path = tmp_path / "m.gguf"
        with GGUFFile.open(model_path) as gguf:
            old = b"".join(map(string, gguf.metadata["tokenizer.ggml.tokens"][:5]))
        path.write_bytes(model_path.read_bytes().replace(old, old[:8] + b"\xff" + old[9:]))
        assert_one_clear_line(bitnet("inspect", "--model", path), 4, r"key 'tokenizer\.ggml\.tokens', string 0 ")

    def test_commands_that_do_not(self, damaged):
        options = ("--prompt-tokens", 4, "--decode", 1, "--rounds", 1, "--threads", 1, "--json")
        assert bitnet("bench", "--model", damaged[0], *options).exit_code == 0


class TestTokenize:
    def test_ids(self, model_path):
        tokenizer = Tokenizer.from_gguf(GGUFFile.open(model_path))
        text = f"the {EOT}é"
        for options, settings in (
            ((), {}),
            (("--no-bos",), {"add_bos": False}),
            (("--no-special",), {"parse_special": False}),
        ):
            result = bitnet("tokenize", "--model", model_path, "--ids", *options, text)
            assert [int(i) for i in result.stdout.split()] == tokenizer.encode(text, **settings)

    def test_one_line_per_token(self, model_path):
        result = bitnet("tokenize", "--model", model_path, "--no-bos", "a\n中")
        pieces = [line.split(maxsplit=1)[1] for line in result.stdout.splitlines()]
        assert pieces == ['"a"', '"\\n"', "bytes E4", "bytes B8", "bytes AD"]

    def test_dash_dash_lets_text_start_with_a_dash(self, model_path):
        assert bitnet("tokenize", "--model", model_path, "--", "--ids").exit_code == 0

    def test_model_without_a_tokenizer(self, model_path, tmp_path):
        path = tmp_path / "m.gguf"
        path.write_bytes(model_path.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.xerges"))
        result = bitnet("tokenize", "--model", path, "x")
        assert_one_clear_line(result, 4, re.escape("the model has no tokenizer.ggml.merges"))


class TestHelp:
    def commands(self):
        names = {"run", "bench", "embed", "inspect", "convert", "quantize", "score", "tokenize"}
        assert set(cli.main.commands) == names
        return {"bitnet": cli.main, **cli.main.commands}

    def test_every_command_has_help_with_an_example_that_parses(self):
        for name, command in self.commands().items():
            assert command.help, name
            example = command.help.partition("Example:\n")[2]
            assert example, f"{name}: no example"
            lines = [line.strip() for line in example.split("\n\n")[0].splitlines() if line.strip()]
            assert lines, name
            for line in lines:
                self.parse(line)

    def parse(self, line):
        program, subcommand, *args = shlex.split(line)
        assert program == "bitnet"
        command = cli.main.commands[subcommand]
        command.make_context(subcommand, args)

    def test_every_option_has_help(self):
        for name, command in self.commands().items():
            for parameter in command.params:
                assert isinstance(parameter, click.Argument) or parameter.help, f"{name} {parameter.name}"

    @pytest.mark.parametrize("args", [["--help"], ["-h"], ["run", "--help"]])
    def test_help_exits_0(self, args):
        result = bitnet(*args)
        assert result.exit_code == 0
        assert "Example:" in result.stdout
