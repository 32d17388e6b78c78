#!/usr/bin/env bash
# From a clone to the named bug, by docs/tutorial.md and nothing else, timed: clone, then run every command of the
# page in its order, in an environment that holds nothing of this one.
#   bash tools/ci/tutorial.sh [REPOSITORY]     default: the checkout that holds this script
# Ends with 1 when a command ends otherwise than the page says, or the bug is not named.
set -euo pipefail
source "$(dirname "$0")/clean_env.sh"
repository=${1:-$(cd "$(dirname "$0")/../.." && pwd)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
clean_env "$work/home" /usr/local/bin:/usr/bin:/bin
mkdir "$work/home"
begun=$SECONDS
git clone --quiet "$repository" "$work/clone"
cd "$work/clone"
# The page's sh blocks; the broken engine ends the comparison with 1, twice.
awk '/^```sh$/ {inside = 1; next} /^```$/ {inside = 0} inside' docs/tutorial.md >"$work/commands"
{
    echo 'set -euo pipefail'
    sed -E 's/^crossval layers .*/& || test $? -eq 1/' "$work/commands"
} >"$work/script"
"${clean[@]}" bash "$work/script" | tee "$work/printed"
grep -q 'WRONG  layer 1, op q_rope' "$work/printed"
grep -q 'diagnosis  candidate: interleaved pairs (RoPE)' "$work/printed"
echo "from clone to the named bug: $((SECONDS - begun)) s, $(wc -l <"$work/commands") commands; load $(cut -d' ' -f1 /proc/loadavg), $(nproc) cores"
times >"$work/times"
echo "processor time of all commands (user, system): $(tail -1 "$work/times")"
