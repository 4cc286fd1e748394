#!/usr/bin/env bash
# Checks frameworks on the real environment, each in a virtual environment of its own, and prints the rows of the table
# in docs/frameworks.md.
#
#     tests/interop/run.sh sb3          one framework: sb3, rllib, tianshou, agilerl, torchrl or benchmarl
#     tests/interop/run.sh all
#
# Fails if a framework does not train in mode noop. What happens in mode terminate is only reported.
#
# INTEROP_VENVS    folder for the virtual environments, about 7 GB each with the GPU build of torch; .venv/interop
# INTEROP_PYTHON   interpreter to make them with; python3
# INTEROP_SECONDS  limit for one check; 3600
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venvs=${INTEROP_VENVS:-$root/.venv/interop}
failed=0

check() {
    local name=$1 venv=$venvs/$1 mode log
    if [ ! -f "$here/requirements/$name.txt" ]; then
        echo "run.sh: expected the name of a file in tests/interop/requirements or all, got $name" >&2
        exit 2
    fi
    [ -x "$venv/bin/python" ] || "${INTEROP_PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet -r "$here/requirements/$name.txt" -e "$root"
    for mode in noop terminate; do
        log=$venv/$mode.log
        if (cd "$venv" && timeout "${INTEROP_SECONDS:-3600}" bin/python "$here/check.py" "$name" "$mode") >"$log" 2>&1; then
            grep '^| ' "$log" | tail -n 1
        else
            grep '^| ' "$log" | tail -n 1 || echo "| $name | $mode | stopped without a result, see $log |"
            [ "$mode" = terminate ] || failed=1
        fi
    done
}

if [ $# -ne 1 ]; then
    echo "usage: tests/interop/run.sh NAME | all" >&2
    exit 2
elif [ "$1" = all ]; then
    for file in "$here"/requirements/*.txt; do check "$(basename "$file" .txt)"; done
else
    check "$1"
fi
exit $failed
