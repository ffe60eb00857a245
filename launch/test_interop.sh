#!/usr/bin/env bash
# Tests exports and imports with the real sae_lens and dictionary_learning, in .venv-interop; a missing package is a failure.
#   bash launch/test_interop.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
stamp=.venv-interop/.gsae-installed
wanted=$(cat constraints.txt constraints-interop.txt launch/test_interop.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "test_interop: installing into .venv-interop"
  rm -rf .venv-interop
  .venv/bin/python -m venv .venv-interop
  # It sees the packages of .venv, gsae and torch among them, and adds the other libraries.
  packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
  echo "import site; site.addsitedir('$(packages .venv)')" >"$(packages .venv-interop)/gsae-venv.pth"
  .venv-interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-interop.txt
  echo "$wanted" >"$stamp"
fi
.venv-interop/bin/python -c 'import dictionary_learning, sae_lens'
.venv-interop/bin/python -m pytest tests/interop "$@"
