#!/usr/bin/env bash
# Installs what the tests need, then runs the linter and the tests, a file per core at a time. Arguments go to pytest:
# ./launch/test.sh -k plan, ./launch/test.sh -n 0 (one after the other)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_venv
if "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
  # pip first: it honours local wheel folders (a CPU build of torch), which uv does not read. Elsewhere the parity tests skip.
  "$VENV_PYTHON" -c 'import torch' 2>/dev/null ||
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
fi
ensure_installed "[test]"

cd "$ROOT"
say "Linter"
"$VENV_DIR/bin/ruff" check .
say "Tests"
CORES="$(nproc)"
exec "$VENV_PYTHON" -m pytest -q -n "$((CORES < 8 ? CORES : 8))" --dist loadfile "$@"
