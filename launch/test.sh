#!/usr/bin/env bash
# Sets everything up, then lint, format, types and all tests that this machine can run; a skipped test says why.
#   bash launch/test.sh [pytest options]     (-n 0: one test after another)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
.venv/bin/python launch/prepare_demo.py runs/assets
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered --durations=10 "$@"
