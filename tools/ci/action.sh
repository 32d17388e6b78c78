#!/usr/bin/env bash
# The `run:` steps of action.yml, from a clean clone, in an environment like a container's: no .venv, another home,
# no variable of this one.
#   bash tools/ci/action.sh [REPOSITORY]     default: the checkout that holds this script
# The steps are read from action.yml; what `uses:` names is left out, and inputs have their defaults.
set -euo pipefail
source "$(dirname "$0")/clean_env.sh"
repository=${1:-$(cd "$(dirname "$0")/../.." && pwd)}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/home" "$work/workspace"
git clone --quiet "$repository" "$work/action"
"$python" -m venv "$work/python" # what actions/setup-python gives
clean_env "$work/home" "$work/python/bin:/usr/local/bin:/usr/bin:/bin" GITHUB_ACTIONS=true \
    GITHUB_ACTION_PATH="$work/action" GITHUB_WORKSPACE="$work/workspace" GITHUB_STEP_SUMMARY="$work/summary.md" \
    RUNNER_TEMP="$work/temp"
cd "$work/workspace"
grep -E '^      run: ' "$work/action/action.yml" | sed 's/^      run: //' >"$work/steps"
while read -r step; do
    [[ $step == *bitnet_cpp.build* ]] && continue # only with the input build-bitnet-cpp
    echo "step: $step"
    "${clean[@]}" bash -e -o pipefail -c "$step" </dev/null
done <"$work/steps"
for file in layers.json greedy.json report.html junit.xml summary.md badge.txt; do
    [[ -s parity/$file ]] || { echo "error: parity/$file was not written" >&2; exit 1; }
done
cmp parity/summary.md "$work/summary.md"
echo "the action's steps ran: $(ls parity | tr '\n' ' ')"
