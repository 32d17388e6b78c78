#!/usr/bin/env bash
# Compare an engine with bitnet.cpp, hold the receipts to a policy, and leave pages that people can read.
# Used by action.yml, and by any other CI system: docs/ci.md. Settings are environment variables:
#   PARITY_MODEL      GGUF file; empty: the model that ships with crossval
#   PARITY_PROMPT     text for `crossval layers`
#   PARITY_CANDIDATE  engine under test, default bitnet_py
#   PARITY_REFERENCE  default auto: live bitnet.cpp where it is built, else a recording
#   PARITY_STEPS      greedy steps, default 32; 0 skips `crossval greedy`, as for a trace
#   PARITY_GATE       further options of `crossval gate`, separated by spaces
#   PARITY_OUT        folder for receipts and pages, default parity
# Ends with the exit code of the first command that did not end well; what comes after it still runs.
set -uo pipefail
prompt=${PARITY_PROMPT:-What is 2+2?}
steps=${PARITY_STEPS:-32}
out=${PARITY_OUT:-parity}
read -r -a gate_options <<<"${PARITY_GATE:-}"
engines=(--candidate "${PARITY_CANDIDATE:-bitnet_py}" --reference "${PARITY_REFERENCE:-auto}")
[[ -n ${PARITY_MODEL:-} ]] && engines+=(--model "$PARITY_MODEL")
mkdir -p "$out"
code=0

run() {
    "$@"
    local ended=$?
    ((code == 0)) && code=$ended
    return 0
}

run crossval layers --prompt "$prompt" "${engines[@]}" --receipt "$out/layers.json"
((steps > 0)) && run crossval greedy --prompt "$prompt" --steps "$steps" "${engines[@]}" --receipt "$out/greedy.json"
shopt -s nullglob
receipts=("$out"/*.json)
if ((${#receipts[@]})); then
    run crossval gate "${receipts[@]}" "${gate_options[@]}" \
        --junit "$out/junit.xml" --markdown "$out/summary.md" --badge "$out/badge.txt" ${GITHUB_ACTIONS:+--annotations}
    run crossval report "${receipts[@]}" --html "$out/report.html"
fi
if [[ -n ${GITHUB_STEP_SUMMARY:-} && -f $out/summary.md ]]; then cat "$out/summary.md" >>"$GITHUB_STEP_SUMMARY"; fi
exit "$code"
