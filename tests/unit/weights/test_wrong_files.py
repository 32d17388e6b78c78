"""Ways in which a model file is wrong: each is found in the right tensors and named, and nothing else is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

import crossval
from bitnet_py.config import ARCHITECTURES
from bitnet_py.convert import convert
from bitnet_py.projections import PROJECTIONS
from bitnet_py.quantize import quantize
from crossval.receipts.file import Receipt
from crossval.weights import judge
from crossval.weights.judge import UNDETERMINED
from crossval.weights.run import examine_file
from tests.support.checkpoints import MATRICES, Small, from_bfloat16, to_bfloat16
from tests.support.edited_gguf import PLACES, EditedGGUF

HEALTHY = {
    "bfloat16": Small(),
    "float32": Small(dtype="F32", seed=1),
    "float16, 1bitLLM": Small("large", dtype="F16", seed=2),
    "packed, multiplied": Small(packed="autobitlinear", seed=3),
    "packed, divided": Small(packed="bitlinear", seed=4),
    "separate head": Small(tied=False, seed=5),
}
Q0, K1, UP0, GATE0, DOWN1 = (
    f"blk.{name}.weight" for name in ("0.attn_q", "1.attn_k", "0.ffn_up", "0.ffn_gate", "1.ffn_down")
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Every healthy checkpoint, and the file that ``quantize`` makes of it."""
    found = {}
    for name, small in HEALTHY.items():
        folder = small.write(tmp_path_factory.mktemp("checkpoint"))
        quantize(folder, folder / "model.gguf")
        found[name] = folder, folder / "model.gguf"
    return found


@pytest.fixture
def edited(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> Callable[[str], tuple[Path, EditedGGUF]]:
    def copy(name: str = "bfloat16") -> tuple[Path, EditedGGUF]:
        folder, file = made[name]
        return folder, EditedGGUF(Path(shutil.copy(file, tmp_path / "edited.gguf")))

    return copy


Edited = Callable[..., tuple[Path, EditedGGUF]]


def found_in(file: Path, checkpoint: Path) -> set[tuple[str, str, str]]:
    """Return subject, aspect and cause of every finding; the verdict must say the same."""
    result = examine_file(file, checkpoint, lambda *_: None)
    found = judge.findings(result)
    assert judge.verdict(result) == ("fail" if any(one.level == "wrong" for one in found) else "pass")
    return {(one.subject, one.aspect, one.cause) for one in found}


def each(names: Iterable[str], aspect: str, cause: str) -> set[tuple[str, str, str]]:
    return {(name, aspect, cause) for name in names}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_file_made_of_its_checkpoint_has_no_findings(made: dict[str, tuple[Path, Path]], name: str) -> None:
    folder, file = made[name]
    receipt = crossval.check_weights(file, against=folder)
    assert (receipt.verdict, receipt["results"]["findings"]) == ("pass", [])
    assert receipt["parity"]["exact_match_rate"] == 1.0
    assert receipt["coverage"]["required"] == receipt["coverage"]["compared"] > 40


def test_no_healthy_file_has_findings_whatever_its_seed(tmp_path: Path) -> None:
    kinds = [{}, {"dtype": "F32"}, {"dtype": "F16"}, {"packed": "autobitlinear"}, {"packed": "bitlinear"}]
    for seed in range(12):
        small = Small(
            "large" if seed % 3 == 0 else "2b-4t", seed=seed, n_layers=1, dim=128, hidden=128, tied=seed % 2 == 0,
            **kinds[seed % len(kinds)],
        )  # fmt: skip
        folder = small.write(tmp_path / str(seed), shards=1 + seed % 3)
        quantize(folder, folder / "m.gguf")
        assert found_in(folder / "m.gguf", folder) == set(), seed


@pytest.mark.parametrize("layout", [name for name in PLACES if name != "i2_s"])
def test_codes_packed_in_another_layout(edited: Edited, layout: str) -> None:
    folder, file = edited()
    for name in file.matrices():
        file.put_codes(name, file.codes(name), layout)
    assert found_in(file.save(), folder) == each(file.matrices(), "codes", layout)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("signs flipped", (2, 1, 0)),
        ("code 0 is 0", (2, 0, 1)),
        ("code 0 is +1", (1, 2, 0)),
        ("code 0 and 1 exchanged", (1, 0, 2)),
        ("code 1 and 2 exchanged", (0, 2, 1)),
        ("two's complement", (3, 0, 1)),
    ],
)
def test_another_table_of_codes(edited: Edited, name: str, table: tuple[int, ...]) -> None:
    folder, file = edited()
    for matrix in (Q0, DOWN1):
        file.put_codes(matrix, np.array(table)[file.codes(matrix)])
    assert found_in(file.save(), folder) == each((Q0, DOWN1), "codes", name)


def test_two_deviations_are_named_together(edited: Edited) -> None:
    folder, file = edited()
    file.put_codes(Q0, 2 - file.codes(Q0), "sequential")
    file.put_codes(UP0, file.codes(GATE0), "blocks of 64")
    assert found_in(file.save(), folder) >= {
        (Q0, "codes", "sequential, signs flipped"),
        (UP0, "codes", f"blocks of 64, holds {GATE0}"),
    }


@pytest.mark.parametrize("name", ["bfloat16", "float16, 1bitLLM", "packed, divided"])
@pytest.mark.parametrize(
    ("cause", "change"),
    [
        ("inverted", lambda scale: 1 / scale),
        ("one", lambda scale: np.float32(1)),
        ("squared", lambda scale: scale * scale),
        ("negative", lambda scale: -scale),
    ],
)
def test_a_wrong_scale(edited: Edited, name: str, cause: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    folder, file = edited(name)
    for matrix in file.matrices():
        file.scale(matrix)[:] = change(file.scale(matrix))
    assert found_in(file.save(), folder) == each(file.matrices(), "scale", cause)


def test_a_scale_slightly_off_is_wrong_but_not_named(edited: Edited) -> None:
    folder, file = edited()
    file.scale(Q0)[:] *= np.float32(1 + 1e-4)
    file.scale(K1)[:] *= np.float32(0.5)
    assert found_in(file.save(), folder) == each((Q0, K1), "scale", UNDETERMINED)


def test_the_last_bits_of_a_scale_are_the_order_of_the_sum(edited: Edited) -> None:
    folder, file = edited()
    for matrix in file.matrices():
        file.scale(matrix).view("<u4")[:] += 8
    assert found_in(file.save(), folder) == set()


def test_a_scale_of_another_matrix(edited: Edited) -> None:
    folder, file = edited()
    file.scale(Q0)[:] = file.scale(K1)
    assert found_in(file.save(), folder) == {(Q0, "scale", f"of {K1}")}


def test_a_coarse_scale_that_may_be_anothers_by_chance_is_not_named(edited: Edited) -> None:
    folder, file = edited("packed, multiplied")
    file.scale(Q0)[:] = file.scale(K1)
    assert found_in(file.save(), folder) == {(Q0, "scale", UNDETERMINED)}


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_a_scale_in_bfloat16_is_right_only_where_the_weights_are(edited: Edited, name: str) -> None:
    folder, file = edited(name)
    for matrix in file.matrices():
        file.scale(matrix)[:] = from_bfloat16(to_bfloat16(file.scale(matrix)))
    found = found_in(file.save(), folder)
    if name == "bfloat16":
        assert found == set()
        return
    assert {one[0] for one in found} == set(file.matrices())
    causes = [one[2] for one in found]
    both = [  # the value is the same in float16, and which rounding gave it cannot be told
        matrix for matrix in file.matrices() if np.float16(true_scale(matrix)) == file.scale(matrix)
    ]
    assert causes.count("rounded to 16 bits") == len(both) < 4
    assert causes.count("rounded to bfloat16") == len(causes) - len(both)


def true_scale(matrix: str) -> float:
    """The absmean of a matrix of the float32 checkpoint."""
    layer, name = matrix.split(".")[1:3]
    (own,) = [there for there, target in MATRICES.items() if target == name]
    return float(np.abs(HEALTHY["float32"].values(f"model.layers.{layer}.{own}.weight")).mean(dtype=np.float64))


def test_a_scale_that_is_no_number(edited: Edited) -> None:
    folder, file = edited()
    file.scale(Q0)[:] = np.nan
    assert found_in(file.save(), folder) == {(Q0, "scale", "not finite")}


@pytest.mark.parametrize(
    ("cause", "change"),
    [
        ("plus one", lambda norm: norm + 1),
        ("minus one", lambda norm: norm - 1),
        ("negative", lambda norm: -norm),
        ("all ones", lambda norm: np.ones_like(norm)),
    ],
)
def test_wrong_norms(edited: Edited, cause: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    folder, file = edited()
    norms = [name for name in file.infos if "norm" in name]
    for name in norms:
        file.norm(name)[:] = change(file.norm(name))
    assert found_in(file.save(), folder) == each(norms, "values", cause)


def test_norms_rounded_or_of_another_place(edited: Edited) -> None:
    folder, file = edited("float32")
    first, second, third = "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.1.ffn_norm.weight"
    file.norm(first)[:] = from_bfloat16(to_bfloat16(file.norm(first)))
    file.norm(second)[:] = file.norm(third)
    file.norm(third)[5] = 7
    assert found_in(file.save(), folder) == {
        (first, "values", "in bfloat16"),
        (second, "values", f"holds {third}"),
        (third, "values", UNDETERMINED),
    }


def test_gate_and_up_swapped_with_their_scales(edited: Edited) -> None:
    folder, file = edited()
    gate, up = file.data(GATE0).copy(), file.data(UP0).copy()
    file.data(GATE0)[:], file.data(UP0)[:] = up, gate
    assert found_in(file.save(), folder) == {
        (GATE0, "codes", f"holds {UP0}"),
        (UP0, "codes", f"holds {GATE0}"),
    }


def test_codes_of_another_matrix_with_the_own_scale_are_two_findings(edited: Edited) -> None:
    folder, file = edited()
    file.put_codes(GATE0, file.codes(UP0))
    assert {one[1:] for one in found_in(file.save(), folder)} == {
        ("codes", f"holds {UP0}"),
        ("scale", f"of {GATE0}"),
    }


def test_transposed(edited: Edited) -> None:
    folder, file = edited()
    for name in (Q0, UP0):
        rows, cols = file.infos[name].shape
        file.put_codes(name, np.ascontiguousarray(file.codes(name).T).reshape(rows, cols))
    assert found_in(file.save(), folder) == each((Q0, UP0), "codes", "transposed")


@pytest.mark.parametrize("moved", [False, True])
def test_a_stated_shape_with_rows_and_columns_exchanged(edited: Edited, moved: bool) -> None:
    folder, file = edited()
    if moved:
        rows, cols = file.infos[UP0].shape
        file.put_codes(UP0, np.ascontiguousarray(file.codes(UP0).T).reshape(rows, cols))
    start = bytes(file.bytes).index(UP0.encode()) + len(UP0) + 4
    dims = file.bytes[start : start + 16].view("<u8")
    dims[:] = dims[::-1].copy()
    assert found_in(file.save(), folder) == {(UP0, "shape", "transposed" if moved else "shape exchanged")}


def test_rows_permuted_where_the_architecture_rotates_halves(edited: Edited) -> None:
    folder, file = edited()
    rows = file.codes(Q0)
    order = np.arange(256).reshape(2, 2, 64).swapaxes(1, 2).reshape(-1)
    file.put_codes(Q0, rows[order])
    assert found_in(file.save(), folder) == {(Q0, "codes", "rows permuted")}


def test_single_codes_that_differ_are_found_and_not_named(edited: Edited) -> None:
    folder, file = edited()
    codes = file.codes(DOWN1)
    codes[3, 7] = (codes[3, 7] + 1) % 3
    file.put_codes(DOWN1, codes)
    codes = file.codes(K1)
    codes[0, 0] = 3
    file.put_codes(K1, codes)
    assert found_in(file.save(), folder) == {
        (DOWN1, "codes", UNDETERMINED),
        (K1, "codes", UNDETERMINED),
        (K1, "codes", "code 3"),
    }


@pytest.mark.parametrize(
    ("cause", "codes_of"),
    [
        ("truncated", lambda w, m: np.clip(np.trunc(w / m), -1, 1)),
        ("absmean in bfloat16", lambda w, m: np.clip(np.rint(w / from_bfloat16(to_bfloat16(m))), -1, 1)),
    ],
)
def test_other_quantisers(
    edited: Edited, cause: str, codes_of: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    folder, file = edited("float32")
    values = HEALTHY["float32"].values("model.layers.0.self_attn.q_proj.weight")
    file.put_codes(Q0, (codes_of(values, np.array([np.abs(values).mean()])) + 1).astype(np.uint8))
    assert found_in(file.save(), folder) == {(Q0, "codes", cause)}


def test_float_masters_given_to_llama_quantize(edited: Edited) -> None:
    folder, file = edited("float32")
    values = HEALTHY["float32"].values("model.layers.0.self_attn.q_proj.weight")
    file.put_codes(Q0, np.where(np.abs(values) < 1e-6, 1, np.sign(values) + 1).astype(np.uint8))
    file.scale(Q0)[:] = np.abs(values).max()
    assert found_in(file.save(), folder) == {(Q0, "codes", "signs"), (Q0, "scale", "largest weight")}


def test_a_code_at_a_rounding_tie_may_be_either(tmp_path: Path) -> None:
    small = Small(dtype="F32", n_layers=1, dim=128, hidden=128)
    name = "model.layers.0.mlp.up_proj.weight"
    values = small.values(name)
    values[5, 7] = 0
    values[5, 7] = (
        np.abs(values).sum(dtype=np.float64) / (values.size - 0.5) / 2
    )  # half of the absmean with itself
    folder = small.write(tmp_path)
    quantize(folder, folder / "m.gguf")
    file = EditedGGUF(folder / "m.gguf")
    codes = file.codes(UP0)
    assert codes[5, 7] in (1, 2)
    codes[5, 7] = 3 - codes[5, 7]
    file.put_codes(UP0, codes)
    assert found_in(file.save(), folder) == set()
    receipt = crossval.check_weights(file.path, against=folder)
    (row,) = [one for one in receipt["results"]["rows"] if one["name"] == UP0]
    assert (row["compared"]["n_different"], row["compared"]["n_at_ties"]) == (1, 1)
    codes[6, 7] = (codes[6, 7] + 1) % 3
    file.put_codes(UP0, codes)
    assert found_in(file.save(), folder) == {(UP0, "codes", UNDETERMINED)}


def changed(folder: Path, tmp_path: Path, small: Small) -> set[tuple[str, str, str]]:
    """Compare the file of a changed checkpoint with the checkpoint in ``folder``."""
    other = small.write(tmp_path / "other")
    quantize(other, other / "m.gguf")
    return found_in(other / "m.gguf", folder)


def test_a_head_that_is_tied_or_separate(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    tied, separate = made["bfloat16"][0], made["separate head"][0]
    small = Small(seed=5)
    assert changed(separate, tmp_path, small) == {("output.weight", "presence", "tied head")}
    small = Small(seed=0, tied=False)
    small.tensors["lm_head.weight"] = small.tensors["model.embed_tokens.weight"]
    assert changed(tied, tmp_path, small) == {("output.weight", "presence", "separate head")}


def test_a_head_that_is_a_copy_of_the_embedding(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    small = Small(seed=5, tied=False)
    small.tensors["lm_head.weight"] = small.tensors["model.embed_tokens.weight"]
    assert changed(made["separate head"][0], tmp_path, small) == {
        ("output.weight", "values", "holds token_embd.weight")
    }


@pytest.mark.parametrize(
    ("config", "key", "cause"),
    [
        ({"rope_theta": 10000.0}, "bitnet-b1.58.rope.freq_base", "differs"),
        ({"rms_norm_eps": 1e-6}, "bitnet-b1.58.attention.layer_norm_rms_epsilon", "differs"),
        ({"max_position_embeddings": 4096}, "bitnet-b1.58.context_length", "differs"),
        ({"hidden_act": "silu"}, "general.architecture", "differs"),
    ],
)
def test_a_header_that_is_not_the_configuration(
    made: dict[str, tuple[Path, Path]], tmp_path: Path, config: dict[str, object], key: str, cause: str
) -> None:
    small = Small()
    small.config |= config
    assert changed(made["bfloat16"][0], tmp_path, small) == {(key, "key", cause)}


@pytest.mark.parametrize(("base", "right"), [(10000.0, True), (500000.0, False)])
def test_a_key_that_is_missing_counts_as_its_default(tmp_path: Path, base: float, right: bool) -> None:
    small = Small(n_layers=1, dim=128, hidden=128)
    small.config["rope_theta"] = base
    folder = small.write(tmp_path)
    quantize(folder, folder / "m.gguf")
    whole = (folder / "m.gguf").read_bytes()
    assert whole.count(b"rope.freq_base") == 1
    (folder / "m.gguf").write_bytes(whole.replace(b"rope.freq_base", b"rope.freq_bxse"))
    expected = set() if right else {("bitnet-b1.58.rope.freq_base", "key", "differs")}
    assert found_in(folder / "m.gguf", folder) == expected


def test_missing_and_other_tokenizer_keys(edited: Edited) -> None:
    folder, file = edited()
    whole = file.bytes.tobytes()
    for old, new in ((b"tokenizer.ggml.pre", b"tokenizer.ggml.xre"), (b"tokenizer.chat_template", b"x" * 23)):
        assert whole.count(old) == 1
        whole = whole.replace(old, new)
    file.path.write_bytes(whole)
    assert found_in(file.path, folder) == {
        ("tokenizer.ggml.pre", "key", "missing"),
        ("tokenizer.chat_template", "key", "missing"),
    }


def test_other_tokens(edited: Edited) -> None:
    folder, file = edited()
    whole = file.bytes.tobytes()
    old = b"<|eot_id|>"
    file.path.write_bytes(whole.replace(old, b"<|xxx_id|>", 1))
    assert found_in(file.path, folder) == {("tokenizer.ggml.tokens", "key", "differs")}


def repacked(shipped: Path, target: Path, layout: str) -> Receipt:
    file = EditedGGUF(Path(shutil.copy(shipped, target)))
    for name in file.matrices():
        file.put_codes(name, file.codes(name), layout)
    return crossval.check_weights(file.save())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "llama" not in ARCHITECTURES:
        pytest.skip("the engine does not run architecture llama")
    folder = Small("llama", seed=6, tied=False, n_layers=1).write(tmp_path_factory.mktemp("llama"))
    quantize(folder, folder / "m.gguf")
    return folder


@pytest.mark.parametrize(("cause", "again"), [("rows not permuted", -1), ("rows permuted twice", 1), (None, 0)])
def test_rows_of_q_and_k_where_the_architecture_rotates_neighbours(
    llama: Path, tmp_path: Path, cause: str | None, again: int
) -> None:
    file = EditedGGUF(Path(shutil.copy(llama / "m.gguf", tmp_path / "m.gguf")))
    names = ("blk.0.attn_q.weight", "blk.0.attn_k.weight")
    for name, heads in zip(names, (2, 1), strict=True):
        rows = np.arange(heads * 128)
        once = rows.reshape(heads, 2, 64).swapaxes(1, 2).reshape(-1)  # new row -> old row
        order = {1: once, -1: np.argsort(once), 0: rows}[again]
        file.put_codes(name, file.codes(name)[order])
    assert found_in(file.save(), llama) == (set() if cause is None else each(names, "codes", cause))


SHIPPED = Path(__file__).resolve().parents[3] / "models" / "bitnet-qa.gguf"


@pytest.mark.parametrize("layout", PLACES)
def test_a_trained_file_shows_its_layout_by_itself(tmp_path: Path, layout: str) -> None:
    receipt = repacked(SHIPPED, tmp_path / "m.gguf", layout)
    shown = "four rows in a byte" if layout.startswith("four") else layout
    assert receipt["results"]["layout"]["established"] == shown
    wrong = [(one["aspect"], one["cause"]) for one in receipt["results"]["findings"]]
    assert wrong == ([] if layout == "i2_s" else [("layout", shown)])
    assert receipt.verdict == ("incomplete" if layout == "i2_s" else "fail")


def test_random_weights_show_no_layout(made: dict[str, tuple[Path, Path]]) -> None:
    for _, file in made.values():
        receipt = crossval.check_weights(file)
        assert receipt["results"]["layout"]["established"] is None
        assert (receipt.verdict, receipt["results"]["findings"]) == ("incomplete", [])


@pytest.mark.parametrize("projections", ["tq1_0", "tq2_0", "f16", "f32"])
def test_matrices_in_other_types(made: dict[str, tuple[Path, Path]], tmp_path: Path, projections: str) -> None:
    small = Small(dtype="F32", n_layers=1, dim=256, hidden=256)
    folder = small.write(tmp_path)
    quantize(folder, folder / "m.gguf")
    convert(folder / "m.gguf", tmp_path / "other.gguf", PROJECTIONS[projections])
    assert found_in(tmp_path / "other.gguf", folder) == set()
    file = EditedGGUF(folder / "m.gguf")
    file.put_codes(UP0, 2 - file.codes(UP0))
    file.scale(Q0)[:] = 1 / file.scale(Q0)
    convert(file.save(), tmp_path / "other.gguf", PROJECTIONS[projections])
    assert found_in(tmp_path / "other.gguf", folder) == {
        (UP0, "codes", "signs flipped"),
        (Q0, "scale", "inverted"),
    }


def test_an_embedding_in_bfloat16_or_in_a_type_that_is_not_compared(edited: Edited) -> None:
    folder, file = edited("float32")
    table = "token_embd.weight"
    start = bytes(file.bytes).index(table.encode()) + len(table) + 4 + 16  # name | u32 dimensions | two u64 | type
    kind = file.bytes[start : start + 4].view("<u4")
    assert kind[0] == 1
    kind[0] = 30  # BF16, of the same size
    file.data(table).view("<u2")[:] = to_bfloat16(HEALTHY["float32"].values("model.embed_tokens.weight")).reshape(
        -1
    )
    assert found_in(file.save(), folder) == set()
    file.data(table).view("<u2")[77] ^= 1
    assert found_in(file.save(), folder) == {(table, "values", UNDETERMINED)}
    kind[0] = 3  # Q4_1, smaller
    receipt = crossval.check_weights(file.save(), against=folder)
    assert (receipt.verdict, receipt["coverage"]["required"] - receipt["coverage"]["compared"]) == ("fail", 1)
    (row,) = [one for one in receipt["results"]["rows"] if one["name"] == table]
    assert row["skipped"] == "values of type Q4_1 are not compared"
    assert [one["aspect"] for one in receipt["results"]["findings"]] == ["size"]
