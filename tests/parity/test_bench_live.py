"""``crossval bench`` with the real bitnet.cpp."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.cli import cli
from crossval.errors import BadInputError
from crossval.receipts import file as receipt

LOGITS = ("result_output",)


@pytest.mark.live
def test_both_engines_are_measured_and_compute_the_same(five_layers, bitnet_cpp_library, tmp_path, monkeypatch):
    monkeypatch.setenv("BITNET_CPP_LIB", str(bitnet_cpp_library))
    path = tmp_path / "r.json"
    words = ["--prompt-tokens", "20", "--decode", "3", "--rounds", "2", "--threads", "2", "--receipt", str(path)]
    result = CliRunner().invoke(cli, ["bench", "--model", str(five_layers), *words])
    assert result.exit_code == 0, result.output
    made = receipt.read(path)
    assert made["reference"]["name"] == "bitnet.cpp"
    assert made["parity"] == {
        "cosine_similarity": None,
        "exact_match_rate": 1.0,
        "logits_exact_match_rate": None,
        "cpp_available": True,
        "status": "pass",
    }
    assert made["coverage"]["compared"] == 3 * (1 + 3 + 3) + 3
    gated = CliRunner().invoke(cli, ["gate", str(path), "--require-live", "--require-bitwise"])
    assert gated.exit_code == 0, gated.output


@pytest.mark.live
def test_decoding_in_one_request_gives_what_single_passes_give(five_layers, bitnet_cpp_library):
    prompt, following = list(range(40, 60)), [7, 8, 9]
    with BitnetCppRunner(five_layers, library=bitnet_cpp_library, n_ctx=64) as runner:
        assert runner.pid > 0
        runner.eval(prompt, LOGITS)
        single = [runner.eval([token], LOGITS) for token in following]
        runner.reset()
        runner.eval(prompt, LOGITS)
        together = runner.eval_each(following)
        assert [record.plan for record in together] == [record.plan for record in single]
        for one, other in zip(single, together, strict=True):
            assert one.taps["result_output"].array.tobytes() == other.taps["result_output"].array.tobytes()
            assert other.elapsed_s > 0
        with pytest.raises(BadInputError, match="do not fit"):
            runner.eval_each([1] * 64)
        with pytest.raises(BadInputError, match="outside the vocabulary"):
            runner.eval_each([1, 10**6])
        assert runner.eval([1], LOGITS).plan.start == 23  # nothing of these was run
