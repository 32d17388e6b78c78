"""Where the shipped model is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from bitnet_py import resources
from bitnet_py.resources import default_model_path


def test_default_model_is_found_in_the_checkout() -> None:
    assert default_model_path() == Path(__file__).parents[3] / "models" / "bitnet-qa.gguf"


def test_default_model_is_found_in_an_installed_package(tmp_path: Path) -> None:
    """Laid out as the wheel installs it; in another interpreter, so that this checkout is not used."""
    source = Path(resources.__file__).parent
    (tmp_path / "bitnet_py").mkdir()
    for name in ("errors.py", "resources.py"):
        shutil.copy(source / name, tmp_path / "bitnet_py")
    model = tmp_path / "crossval" / "_data" / "models" / "bitnet-qa.gguf"
    model.parent.mkdir(parents=True)
    (tmp_path / "crossval" / "__init__.py").write_text("raise RuntimeError('must not be imported')")

    code = "\n".join(
        (
            "import sys",
            f"sys.path.insert(0, {str(tmp_path)!r})",
            "from bitnet_py import resources",
            "try: print(resources.default_model_path())",
            "except resources.ModelError as error: print(error)",
        )
    )

    def find() -> str:
        command = [sys.executable, "-S", "-E", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.stdout.strip() or done.stderr

    missing = find()
    assert str(model) in missing
    assert "expected the shipped model at" in missing
    model.touch()
    assert find() == str(model)
