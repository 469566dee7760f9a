#!/usr/bin/env bash
# Every test of every part, from any directory: bash test_all.sh [pytest's options, e.g. -k ppo]
# Uses the active environment, else .venv here, else python3; installs requirements.txt into it if something is missing.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2

# One process, one thread: the tests are small, and some of them start two processes of their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MPLBACKEND=Agg

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then python=python
elif [ -x .venv/bin/python ]; then python=.venv/bin/python
else python=python3
fi

stop() { echo "error: $1" >&2; exit 2; }

# Is everything that requirements.txt names importable, and torch the pinned version?
ready() {
    "$1" - <<'PY'
import re, sys
from importlib import metadata, util

wanted = re.findall(r"^([\w-]+)(?:==([\w.]+))?", open("requirements.txt").read(), re.M)
missing = [n for n, v in wanted if not util.find_spec(n) or v and metadata.version(n).split("+")[0] != v]
if missing:
    print("missing or of another version:", ", ".join(missing))
sys.exit(bool(missing))
PY
}

# A system python that belongs to the distribution, or one without pip: pip would refuse, so we bring our own.
managed() {
    "$1" - <<'PY'
import os, sys, sysconfig
from importlib import util

mark = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
sys.exit(not (sys.prefix == sys.base_prefix and os.path.exists(mark) or not util.find_spec("pip")))
PY
}

command -v "$python" >/dev/null || stop "there is no $python here; install Python 3.10 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "$("$python" --version) is too old, 3.10 is needed"
if ! ready "$python"; then
    if managed "$python"; then
        echo "making .venv: $python is not for pip to change"
        "$python" -m venv .venv || stop "python3 -m venv failed; install python3-venv, or activate an environment"
        python=.venv/bin/python
    fi
    echo "installing requirements.txt ..."
    "$python" -m pip install --quiet -r requirements.txt || stop "pip could not install requirements.txt"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$python" -m pytest -p no:cacheprovider --color=no "$@" 2>&1 | tee "$log"
code=${PIPESTATUS[0]}

count() { tail -n 1 "$log" | grep -oE "[0-9]+ $1" | grep -oE '[0-9]+' || echo 0; }
passed=$(count passed)
failed=$(($(count failed) + $(count error)))
# A run that was killed, or that found no test, has no summary and has not passed.
[ "$code" -ne 0 ] && [ "$failed" -eq 0 ] && failed=1
echo "$passed passed, $failed failed"
exit "$code"
