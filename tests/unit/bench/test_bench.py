"""Benchmarks: the streaming read, figures, ratios and verdicts, our engine in its own process, `bitnet bench`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_py import _native, cli
from bitnet_py.bench import BandwidthProbe, bench, peak_resident_bytes, random_ids, spread, weight_reads
from bitnet_py.errors import InputError, NativeError
from bitnet_py.model import KernelCount
from crossval.bench import figures
from crossval.bench.engine import BitnetPyProcess
from crossval.bench.measures import MEASURES, Sample
from crossval.bench.search import Setting
from crossval.bench.tally import Tally
from crossval.child.client import decode_records
from crossval.child.protocol import Frame
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.errors import BadInputError, CrossvalError, EngineCrashError
from crossval.passes import Numerics
from tests.support import receipt_samples as samples

PREFILL, DECODE, GREEDY, FIRST, MEMORY = MEASURES


class TestRead:
    @pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
    @pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 4099])
    def test_every_word_is_read_once(self, n, n_threads):
        words = np.random.default_rng(n).integers(0, 2**64, n, np.uint64)
        assert _native.probe_bandwidth(words, n_threads) == sum(words.tolist()) % 2**64
        assert _native.probe_bandwidth(words, n_threads, n_passes=3) == 3 * sum(words.tolist()) % 2**64

    @pytest.mark.parametrize(("n", "n_threads"), [(0, 1), (8, 0), (8, -1), (8, 1025)])
    def test_what_cannot_be_read_is_an_error(self, n, n_threads):
        with pytest.raises(NativeError, match="between 1 and 1024 threads"):
            _native.probe_bandwidth(np.ones(n, np.uint64), n_threads)

    def test_a_read_takes_time(self):
        test = BandwidthProbe(2, buffer_bytes=1 << 20)
        assert test.n_bytes == 4 << 20
        assert test.seconds() > 0


def test_random_ids_are_the_same_everywhere():
    assert random_ids(0, 6, 1000) == [844, 757, 420, 258, 511, 404]  # of Python's Mersenne twister
    assert random_ids(0, 3, 1000) == random_ids(0, 6, 1000)[:3]
    assert random_ids(1, 6, 1000) != random_ids(0, 6, 1000)


def test_spread():
    assert spread([]) is None
    assert dataclasses.astuple(spread([3.0, 1.0, 2.0, 10.0])) == (2.5, 1.0, 10.0)


def test_peak_memory_is_that_of_the_process():
    held = np.ones(64 << 20, np.uint8)
    assert peak_resident_bytes() > held.nbytes
    assert peak_resident_bytes(os.getpid()) == pytest.approx(peak_resident_bytes(), rel=0.1)
    assert peak_resident_bytes(2**22 + 1) is None  # beyond the largest process id


def counted(operation: str, calls: int, n_bytes: int, *, weights: bool = True) -> KernelCount:
    quantized = operation.startswith("i2s")
    return KernelCount(f"{operation}_avx2", calls, n_bytes, operation, "avx2", quantized, weights)


def test_the_cache_is_no_weight():
    before = [counted("i2s_gemv", 1, 100), counted("attention", 1, 7, weights=False)]
    after = [
        counted("i2s_gemv", 3, 160),
        counted("attention", 2, 9, weights=False),
        counted("rope", 2, 0, weights=False),
        counted("head_f16", 1, 5),
    ]
    assert weight_reads(before, after) == {"i2s_gemv_avx2": 60, "head_f16_avx2": 5}


class TestFigures:
    def test_speeds_ratios_and_medians(self):
        findings = samples.bench_findings()
        (pair,) = findings.pairs
        raw = pair.taken["prefill"].raw
        assert figures.figures(PREFILL, findings.work, raw["candidate"]) == [10.0, 12.5, 5 / 0.45]
        assert figures.ratios(PREFILL, pair) == [2.0, 0.6 / 0.4, 0.9 / 0.45]
        memory = pair.taken["peak_memory"].raw["candidate"]
        assert figures.figures(MEMORY, findings.work, memory) == [50e6] * 3
        assert figures.ratios(MEMORY, pair) == [1.2] * 3

    def test_what_was_read(self):
        findings = samples.bench_findings()
        taken = findings.pairs[0].taken["decode"]
        per_token = samples.ternary_bytes(samples.SHAPE) + 2 * 300 * 128
        assert figures.bytes_per_token(DECODE, findings.work, taken) == per_token
        assert figures.read_rates(DECODE, findings.work, taken)[0] == per_token * 2 / 0.1
        assert figures.bytes_per_token(PREFILL, findings.work, findings.pairs[0].taken["prefill"]) is None
        assert figures.read_rates(PREFILL, findings.work, findings.pairs[0].taken["prefill"]) == []

    def test_passes_of_the_warm_up_are_compared(self):
        work = samples.BENCH_WORK
        assert [measure.n_values(work) for measure in MEASURES] == [3, 3, 3, 3, 3]
        assert [measure.n_compared(work, "same") for measure in MEASURES] == [4, 8, 8, 3, 0]

    def test_a_choice_is_compared_only_between_equal_arithmetics(self):
        work = samples.BENCH_WORK
        assert [measure.n_compared(work, "independent") for measure in MEASURES] == [4, 8, 0, 3, 0]

    @pytest.mark.parametrize(
        ("changes", "verdict"),
        [
            ({}, "pass"),
            ({"min_ratios": {"prefill": 2.0, "decode": 1.8, "greedy": None}}, "pass"),
            ({"min_ratios": {"prefill": 2.001, "decode": None, "greedy": None}}, "fail"),
            ({"min_ratios": {"prefill": None, "decode": 3.0, "greedy": None}}, "fail"),
            ({"unequal": {"decode": 1}}, "fail"),
            ({"unequal": {"first_token": 1}}, "fail"),
            ({"raw": {"prefill": ((0.5, 0.4), (1.0, 0.6, 0.9))}}, "incomplete"),
            ({"raw": {"peak_memory": ((), ())}}, "incomplete"),
            ({"read_s": ()}, "incomplete"),
            # what differs is worse than what is missing; a ratio of what is missing says nothing
            ({"raw": {"peak_memory": ((), ())}, "unequal": {"prefill": 4}}, "fail"),
            # a measure that makes no ratio is a result, and no answer to a demand
            ({"raw": {"decode": ((0.1,) * 3, (2.0,) * 3)}}, "pass"),
            (
                {
                    "raw": {"decode": ((0.1,) * 3, (2.0,) * 3)},
                    "min_ratios": {"prefill": None, "decode": 1.0, "greedy": None},
                },
                "incomplete",
            ),
            (
                {"raw": {"peak_memory": ((), ())}, "min_ratios": {"prefill": 9.0, "decode": None, "greedy": None}},
                "incomplete",
            ),
        ],
    )
    def test_verdict(self, changes, verdict):
        assert figures.decide(samples.bench_findings(**changes)) == verdict

    def test_nothing_compared_is_incomplete(self):
        findings = samples.bench_findings()
        (pair,) = findings.pairs
        taken = {name: dataclasses.replace(t, n_compared=0, n_equal=0) for name, t in pair.taken.items()}
        nothing = dataclasses.replace(findings, pairs=(dataclasses.replace(pair, taken=taken),))
        assert figures.decide(nothing) == "incomplete"

    def test_what_was_missed_is_named(self):
        findings = samples.bench_findings(min_ratios={"prefill": 2.5, "decode": 1.0, "greedy": None})
        assert figures.missed(findings) == ["prefill: ratio 2.000, 2.5 required"]
        assert figures.unshown(findings) == []

    def test_every_reference_counts(self):
        slow = samples.bench_further(raw={"prefill": ((0.5,) * 3, (0.7,) * 3)})
        findings = samples.bench_findings(
            pairs=(samples.bench_pair(), slow), min_ratios={"prefill": 1.5, "decode": None, "greedy": None}
        )
        assert figures.decide(findings) == "fail"
        assert figures.missed(findings) == ["prefill beside reference 2: ratio 1.400, 1.5 required"]
        unequal = samples.bench_findings(
            pairs=(samples.bench_pair(), samples.bench_further(unequal={"decode": 1}))
        )
        assert figures.decide(unequal) == "fail"

    def test_logits_within_bounds_agree(self):
        pair = samples.bench_pair(unequal={"decode": 3})
        taken = {**pair.taken, "decode": dataclasses.replace(pair.taken["decode"], n_within=3)}
        findings = samples.bench_findings(pairs=(dataclasses.replace(pair, taken=taken),))
        assert figures.decide(findings) == "pass"


class TestFlags:
    """In the samples prompts and decoding run with two threads, greedy decoding with one."""

    def flags(self, measure, *, side="reference", **raw):
        return figures.flags(measure, samples.bench_pair(raw=raw), side)

    def test_steady_values_have_none(self):
        pair = samples.bench_pair()
        assert [figures.flags(m, pair, side) for m in MEASURES for side in ("candidate", "reference")] == [[]] * 10

    def test_two_speeds(self):
        stacked = (0.2, 2.0, 0.21, 2.1, 0.2)
        assert self.flags(DECODE, decode=((0.1,) * 5, stacked)) == ["two_speeds", "below_one_thread"]
        assert self.flags(GREEDY, greedy=((0.1,) * 5, stacked)) == ["two_speeds"]
        assert self.flags(DECODE, side="candidate", decode=((0.1,) * 5, stacked)) == []
        pair = samples.bench_pair(raw={"decode": ((0.1,) * 5, stacked)})
        assert figures.ratios(DECODE, pair) == []
        assert figures.median_ratio(DECODE, pair) is None

    def test_slower_than_a_single_thread(self):
        alone = samples.bench_search(factor=2.0).one_thread("decode")
        assert max(alone) == 0.3 * 2 * 1.02
        assert self.flags(DECODE, decode=((0.1,) * 3, (0.5, 0.61, 0.55))) == []
        assert self.flags(DECODE, decode=((0.1,) * 3, (0.5, 0.62, 0.55))) == ["below_one_thread"]
        # greedy decoding ran with one thread: other threads cannot be to blame
        assert samples.bench_search().chosen("greedy") == Setting(1)
        assert self.flags(GREEDY, greedy=((0.1,) * 3, (9.0, 9.1, 9.2))) == []

    def test_what_is_taken_once_per_process_has_none(self):
        assert self.flags(FIRST, first_token=((0.1,) * 5, (0.2, 2.0, 0.21, 2.1, 0.2))) == []

    def test_older_receipts_have_none(self):
        pair = samples.bench_pair(raw={"decode": ((0.1,) * 5, (0.2, 2.0, 0.21, 2.1, 0.2))}, search=None)
        assert figures.flags(DECODE, pair, "reference") == []
        assert len(figures.ratios(DECODE, pair)) == 5


class TestTally:
    def add(self, ours, theirs, counted=True, measure=DECODE, policy="same"):
        tally = Tally(measure, policy, n_layers=4)
        ours = Sample(1.0, ours, {"i2s_gemv_avx2": 5})
        tally.add({"candidate": ours, "reference": Sample(2.0, theirs)}, counted=counted)
        return tally.taken()

    def test_equal_bits_only(self):
        one, zero = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
        taken = self.add((one, zero, one), (one.copy(), -zero, np.nextafter(one, np.float32(2))))
        assert (taken.n_compared, taken.n_equal) == (3, 1)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_not_finite_is_not_equal(self, bad):
        logits = np.full((1, 4), bad, np.float32)
        taken = self.add((logits,), (logits.copy(),))
        assert (taken.n_compared, taken.n_equal) == (1, 0)

    def test_another_shape_or_type_is_not_equal(self):
        logits = np.zeros((1, 4), np.float32)
        assert self.add((logits,), (logits.reshape(2, 2),)).n_equal == 0
        assert self.add((logits,), (logits.astype(np.int32),)).n_equal == 0

    def test_a_pass_that_only_one_engine_made_is_not_compared(self):
        logits = np.zeros((1, 4), np.float32)
        assert self.add((logits, logits), (logits,)).n_compared == 1

    @pytest.mark.parametrize("raw", [None, 0.0])
    def test_what_took_nothing_was_not_measured(self, raw):
        tally = Tally(DECODE, "same", n_layers=4)
        tally.add({"candidate": Sample(raw), "reference": Sample(2.0)}, counted=True)
        assert tally.taken().raw == {"candidate": (), "reference": (2.0,)}

    def test_engines_that_round_differently_agree_within_bounds(self):
        logits = np.random.default_rng(0).normal(size=(1, 500)).astype(np.float32)
        near, far = logits * np.float32(1.001), logits[:, ::-1].copy()
        both = (logits, near, far, np.full_like(logits, np.nan))
        taken = self.add((logits,) * 4, both, policy="independent")
        assert (taken.n_compared, taken.n_equal, taken.n_within) == (4, 1, 1)
        assert self.add((logits,) * 4, both).n_within == 0

    def test_their_choices_are_not_compared(self):
        chosen = np.array([3.0, 0.5])
        assert self.add((chosen,), (chosen,), measure=GREEDY, policy="independent").n_compared == 0
        assert self.add((chosen,), (chosen,), measure=GREEDY).n_equal == 1

    def test_the_warm_up_is_compared_and_not_counted(self):
        logits = np.zeros((1, 4), np.float32)
        taken = self.add((logits,), (logits,), counted=False)
        assert (taken.n_compared, taken.n_equal, taken.reads) == (1, 1, {})
        assert taken.raw == {"candidate": (), "reference": ()}


class TestProcess:
    @pytest.fixture
    def path(self, make_model):
        return make_model()

    def test_the_same_as_in_this_process(self, path):
        ids, following = [3, 5, 7], [11, 13]
        with BitnetPyProcess(path, n_threads=1, numerics=Numerics(16, True), kernel="scalar") as engine:
            with BitnetPyRunner(path, n_threads=1, numerics=Numerics(16, True), kernel="scalar") as own:
                assert engine.identity == own.identity
                for _ in range(2):
                    engine.reset()
                    own.reset()
                    records = [engine.eval(ids, ("result_output",)), *engine.eval_each(following)]
                    for part, record in zip(([ids, [11], [13]]), records, strict=True):
                        expected = own.eval(part, ("result_output",))
                        assert record.plan == expected.plan
                        assert record.elapsed_s > 0
                        array = record.taps["result_output"].array
                        assert array.tobytes() == expected.taps["result_output"].array.tobytes()
                assert engine.counters() == own.counters()
            assert engine.pid != os.getpid()
            assert peak_resident_bytes(engine.pid) > 1 << 20

    def test_the_reference_s_graph_is_followed_where_asked(self, path):
        main = Numerics(8, False, generation="main")
        logits = []
        for follow in (False, True):
            with BitnetPyProcess(path, n_threads=1, numerics=main, follow_reference_graph=follow) as engine:
                found = engine.eval([3, 5, 7], ("result_output",)).taps["result_output"].array
            with BitnetPyRunner(path, n_threads=1, numerics=main, follow_reference_graph=follow) as own:
                assert (
                    own.eval([3, 5, 7], ("result_output",)).taps["result_output"].array.tobytes()
                    == found.tobytes()
                )
            logits.append(found.tobytes())
        assert logits[0] != logits[1]

    def test_bad_tokens_are_bad_input(self, path):
        with BitnetPyProcess(path, n_threads=1, numerics=Numerics()) as engine:
            with pytest.raises(BadInputError, match="outside the vocabulary"):
                engine.eval([300], ("result_output",))
            with pytest.raises(BadInputError, match="empty"):
                engine.eval([], ("result_output",))
            assert engine.eval([1], ("result_output",)).taps["result_output"].array.shape == (1, 300)

    def test_an_unusable_model_is_bad_input(self, tmp_path):
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        with pytest.raises(BadInputError, match=r"m\.gguf"):
            BitnetPyProcess(tmp_path / "m.gguf", n_threads=1, numerics=Numerics()).__enter__()

    def test_a_process_that_dies_is_a_crash(self, path):
        with BitnetPyProcess(path, n_threads=1, numerics=Numerics()) as engine:
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(EngineCrashError, match=r"bitnet_py .*SIGKILL"):
                engine.eval([1], ("result_output",))

    def test_closed(self, path):
        with pytest.raises(CrossvalError, match="not running"):
            BitnetPyProcess(path, n_threads=1, numerics=Numerics()).reset()

    @pytest.mark.parametrize("header", [{}, {"elapsed_s": [0.1]}, {"elapsed_s": 0.2}, {"elapsed_s": [0.1] * 3}])
    def test_an_answer_with_too_little_is_a_crash(self, header):
        with pytest.raises(EngineCrashError, match="2 passes"):
            decode_records([1, 2], 0, Frame(header, {"result_output": np.zeros((2, 3), np.float32)}))


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(cli.main, ["bench", *map(str, arguments)])

    def test_json(self, make_model):
        result = self.run(
            "--model", make_model(), "--prompt-tokens", 9, "--decode", 3, "--rounds", 2, "--threads", 1, "--json"
        )
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        for name, n_tokens in (("prefill", 9), ("decode", 3)):
            assert report[name]["n_tokens"] == n_tokens
            assert len(report[name]["elapsed_s"]) == 2
            rates = [n_tokens / elapsed for elapsed in report[name]["elapsed_s"]]
            assert report[name]["tok_per_s"] == dataclasses.asdict(spread(rates))
        norms = 2 * 4 * (128 * 3 + 256) + 4 * 128
        assert report["weight_bytes_per_token"] == samples.ternary_bytes(samples.SHAPE) + 2 * 300 * 128 + norms
        assert report["peak_resident_bytes"] > 0
        assert report["read_bytes_per_s"] > 0

    def test_table(self, make_model):
        result = self.run("--model", make_model(), "--prompt-tokens", 4, "--decode", 1, "--rounds", 1)
        assert result.exit_code == 0, result.output
        assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [
            "prefill", "decode", "memory", "reads",
        ]  # fmt: skip
        assert result.stderr == ""

    @pytest.mark.parametrize("arguments", [["--rounds", 0], ["--decode", 0], ["--prompt-tokens", "x"], ["more"]])
    def test_usage(self, arguments):
        assert self.run(*arguments).exit_code == 2

    def test_too_long_and_missing(self, make_model, tmp_path):
        for arguments in (["--model", make_model(), "--prompt-tokens", 10**6], ["--model", tmp_path / "no.gguf"]):
            result = self.run(*arguments)
            assert result.exit_code == 4
            assert result.stderr.startswith("error: ")
            assert len(result.stderr.splitlines()) == 1

    def test_nothing_to_measure(self, tiny_model):
        with pytest.raises(InputError, match="at least one"):
            bench(tiny_model, n_prompt=1, n_decode=0, n_rounds=1)
