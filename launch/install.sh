#!/usr/bin/env bash
# Installs archscale into .venv of this checkout, with pinned versions: `launch/install.sh [dev|deepspeed]`. Of these
# `deepspeed` adds the DeepSpeed engine, `dev` that and what the tests need. Does nothing when .venv already holds them. PYTHON chooses the interpreter of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "install: $*" >&2; exit 2; }

files=(launch/requirements.txt)
case "${1:-}" in
  "") extra="" ;;
  deepspeed) extra="[deepspeed]"; files+=(launch/requirements-deepspeed.txt) ;;
  dev) extra="[dev,deepspeed]"; files+=(launch/requirements-deepspeed.txt launch/requirements-dev.txt) ;;
  *) fail "unknown argument '$1': use no argument, 'deepspeed' or 'dev'" ;;
esac

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
    is_new_enough "$python" && break
    python=""
  done
  [ -n "$python" ] || fail "no Python 3.11 or newer (${PYTHON:-python3}): install one, or set PYTHON to its path"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no ensurepip: install its venv package (Debian, Ubuntu: apt-get install python3-venv)"
  echo "install: creating .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

hash=$(.venv/bin/python - pyproject.toml "${files[@]}" <<'PY'
import hashlib, sys
digest = hashlib.sha256(sys.version.encode())
for name in sys.argv[1:]:
    digest.update(open(name, "rb").read())
print(digest.hexdigest())
PY
)
stamp=".venv/.installed${1:+-$1}"
if [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then exit 0; fi

began=$SECONDS
pip=(.venv/bin/python -m pip --disable-pip-version-check -q)
rm -f "$stamp"
echo "install: archscale$extra with $(grep -h '^torch==' launch/requirements.txt) and pinned dependencies into .venv"
"${pip[@]}" install -c launch/requirements.txt "$(grep -h '^torch==' launch/requirements.txt)"
# DeepSpeed's set-up imports torch, so it is built beside it and before the rest; its kernels are left to be built on use.
if [ -n "$extra" ]; then
  "${pip[@]}" install --requirement=launch/requirements.txt
  DS_BUILD_OPS=0 "${pip[@]}" install --no-build-isolation --requirement=launch/requirements-deepspeed.txt
fi
"${pip[@]}" install "${files[@]/#/--requirement=}" -e ".$extra"
echo "$hash" > "$stamp"
echo "install: done in $((SECONDS - began)) s"
