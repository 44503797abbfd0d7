#!/usr/bin/env bash
# Installs what is missing, then runs every check. Arguments go to pytest: `launch/test.sh -k optim -x`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh dev
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy archscale
# Half of the tests keep one core busy alone; others are several processes themselves, hence few at a time, with a
# thread each: more of them wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec pytest -n logical --maxprocesses 4 --dist worksteal --durations=10 "$@"
