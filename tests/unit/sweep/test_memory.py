"""What a cell takes is known before it starts."""

from __future__ import annotations

from pathlib import Path

from crossval.sweep import memory


def test_a_cell_that_cannot_fit_is_refused_before_anything_runs(sweep, asked, tmp_path: Path) -> None:
    done = sweep("--memory", "0.1")
    assert done.exit_code == 4
    assert "takes up to" in done.stderr
    assert not asked
    assert not (tmp_path / "out").exists()


def test_memory_grows_with_the_model_and_the_prompt(model_path: Path, five_layers: Path) -> None:
    small = memory.needed_bytes(model_path, "a", 4)
    assert memory.PROCESS_BYTES < small < memory.needed_bytes(model_path, "a" * 500, 4)
    assert small < memory.needed_bytes(five_layers, "a", 4)
    assert 0 < memory.available_bytes() < 1 << 50


def test_the_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "max").write_text("5000000\n")
    (tmp_path / "used").write_text("1000000\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", ((str(tmp_path / "max"), str(tmp_path / "used")),))
    assert memory.available_bytes() == 4_000_000
    (tmp_path / "max").write_text("max\n")
    assert memory.available_bytes() > 4_000_000
