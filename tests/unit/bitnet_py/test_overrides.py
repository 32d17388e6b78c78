import click
import pytest
from click.testing import CliRunner

from bitnet_py import overrides
from bitnet_py.errors import ModelError
from bitnet_py.gguf import GGUFFile
from bitnet_py.override_option import override_option
from bitnet_py.tokenizer import Tokenizer

FILE = {"text": "a", "flag": True, "count": 7, "ratio": 0.5, "list": [1]}


def test_a_value_has_the_type_that_the_file_has_or_that_it_looks_like():
    given = {"text": "12", "flag": "False", "count": "8", "ratio": "3", "new": "llama-bpe", "on": "true", "n": "4"}
    with overrides.overriding(given):
        found = overrides.applied(FILE)
        assert len(overrides.notes()) == len(given)
    assert {key: found[key] for key in given} == {
        "text": "12",
        "flag": False,
        "count": 8,
        "ratio": 3.0,
        "new": "llama-bpe",
        "on": True,
        "n": 4,
    }
    assert found["list"] == [1]
    assert type(found["ratio"]) is float
    assert overrides.applied(FILE) is FILE
    assert not overrides.notes()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("flag", "yes", "expected bool, as the file has it"),
        ("count", "1.5", "expected int, as the file has it"),
        ("ratio", "x", "expected float, as the file has it"),
        ("list", "1", "the file has an array there"),
    ],
)
def test_a_value_of_another_type_is_refused(key, value, message):
    with overrides.overriding({key: value}), pytest.raises(ModelError, match=message):
        overrides.applied(FILE)


def test_values_are_in_force_until_the_command_ends(make_model):
    model = make_model(pre="none")

    @click.command()
    @override_option
    def command():
        with GGUFFile.open(model) as gguf:
            click.echo(Tokenizer.from_gguf(gguf).pre)

    run = CliRunner().invoke
    assert run(command, ["--override", "tokenizer.ggml.pre=gpt-2"]).output == "gpt-2\n"
    assert run(command, []).output == "default\n"
    result = run(command, ["--override", "tokenizer.ggml.pre"])
    assert result.exit_code == 2
    assert "expected KEY=VALUE" in result.output
