#!/usr/bin/env bash
# Installs what the tests need and runs them: ./launch/test.sh [--slow] [pytest's arguments]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
./launch/setup.sh dev
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# A worker that crashes ends the run: started anew, it may wait for ever.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"
