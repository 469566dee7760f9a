#!/usr/bin/env bash
# Checks the style and runs every test of every part, from any directory:
#
#     bash test_all.sh                   everything
#     bash test_all.sh -k ppo part_8     with pytest's own options
#
# It uses the active environment, or else .venv in this folder, or else python3. If a package of
# requirements.txt is missing there, it installs it. The last line says "N passed, M failed".
set -u
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2

# The tests are small, so one thread for each of two processes is fastest (pytest-xdist; a file's
# tests stay together, because they share what is slow to make).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MPLBACKEND=Agg

stop() {
    echo "error: $1" >&2
    exit 2
}

# Can every package of requirements.txt be imported, and is its version in the range given there?
ready() {
    "$1" - <<'PY'
import re
import sys
from importlib import metadata, util


def numbers(version):
    """ "2.13.0+cpu" -> [2, 13, 0] """
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])]


def satisfies(version, operator, limit):
    version, limit = numbers(version), numbers(limit)
    return {"==": version == limit, ">=": version >= limit, "<": version < limit}[operator]


missing = []
for name, conditions in re.findall(r"^([\w-]+)(.*)", open("requirements.txt").read(), re.M):
    if not util.find_spec(name):
        missing.append(name)
        continue
    version = metadata.version(name)
    for operator, limit in re.findall(r"(==|>=|<)([\w.]+)", conditions):
        if not satisfies(version, operator, limit):
            missing.append(f"{name} {operator}{limit}")
if missing:
    print("missing:", ", ".join(missing))
sys.exit(len(missing) > 0)
PY
}

# Does this python belong to the system, or has it no pip? Then pip would refuse to install into it.
managed_by_system() {
    "$1" - <<'PY'
import os
import sys
import sysconfig
from importlib import util

mark = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
is_virtual = sys.prefix != sys.base_prefix
is_managed = os.path.exists(mark) and not is_virtual
has_pip = util.find_spec("pip") is not None
sys.exit(0 if is_managed or not has_pip else 1)
PY
}

# Which python?
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    python=python
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi
command -v "$python" >/dev/null || stop "there is no $python here; install Python 3.10 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    stop "$("$python" --version) is too old; Python 3.10 or newer is needed"

# Install what is missing.
if ! ready "$python"; then
    if managed_by_system "$python"; then
        echo "pip must not change $python, so this makes .venv"
        "$python" -m venv .venv ||
            stop "python3 -m venv failed; install python3-venv, or activate an environment"
        python=.venv/bin/python
    fi
    echo "installing requirements.txt ..."
    "$python" -m pip install --quiet -r requirements.txt ||
        stop "pip could not install requirements.txt"
fi

# The style first, because it takes a second. Each of the two checks counts as one test if it fails.
style_failures=0
if ! "$python" -m ruff format --check --quiet --no-cache .; then
    echo "FAILED: the files above are not formatted. Run: $python -m ruff format ."
    style_failures=$((style_failures + 1))
fi
if ! "$python" -m ruff check --quiet --no-cache --output-format=concise .; then
    echo "FAILED: ruff check has found the errors above. See them again: $python -m ruff check ."
    style_failures=$((style_failures + 1))
fi

# Then the tests.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$python" -m pytest -n 2 --dist loadfile -p no:cacheprovider --color=no "$@" 2>&1 | tee "$log"
code=${PIPESTATUS[0]}

# pytest's last line is its summary: "2 failed, 890 passed, 1 error in 200.1s".
count() {
    tail -n 1 "$log" | grep -oE "[0-9]+ $1" | grep -oE '[0-9]+' || echo 0
}
passed=$(count passed)
failed=$(($(count failed) + $(count error)))

# A run that was killed or found no test has no summary, and it has not passed.
if [ "$code" -ne 0 ] && [ "$failed" -eq 0 ]; then
    failed=1
fi
if [ "$style_failures" -gt 0 ]; then
    failed=$((failed + style_failures))
    [ "$code" -ne 0 ] || code=1
    echo "$style_failures of the failures are about the style: see the lines above the tests"
fi
echo "$passed passed, $failed failed"
exit "$code"
