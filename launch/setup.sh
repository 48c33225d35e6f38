#!/usr/bin/env bash
# Installs fourdstar_jax into .venv of this checkout: `launch/setup.sh [run|dev]`.
#
#   run   what `fourdstar generate` needs
#   dev   that, training, and the tests' tools
#
# A stamp in .venv remembers what is installed, so a second call returns at once.
# PYTHON names the interpreter; otherwise 3.13 or 3.12 is looked for on the PATH and in pyenv.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
profile=${1:-run}
die() { echo "setup: $*" >&2; exit 1; }
case $profile in run|dev) ;; *) die "unknown profile '$profile': run or dev" ;; esac

suits() {  # pyenv's shims stand on the PATH for versions that do not run: ask the interpreter
  "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

make_environment() {
  local candidates=() candidate without_venv=""
  if [ -n "${PYTHON:-}" ]; then
    suits "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.12 or 3.13"
    candidates=("$PYTHON")
  else
    candidates=(python3.13 python3.12 python3 python)
    shopt -s nullglob
    candidates+=("${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[32]*/bin/python)
    shopt -u nullglob
  fi
  for candidate in "${candidates[@]}"; do
    suits "$candidate" || continue
    if ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      without_venv=${without_venv:-$candidate}
      continue
    fi
    echo "setup: making .venv with $("$candidate" --version)" >&2
    "$candidate" -m venv --clear .venv
    return
  done
  if [ -n "$without_venv" ]; then
    version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    die "$without_venv cannot make virtual environments: apt-get install python$version-venv"
  fi
  die "no Python 3.12 or 3.13 found: apt-get install python3.12-venv (or pyenv install 3.12), or set PYTHON"
}

install() {
  local environment_tools=(.venv/bin/python -m pip --quiet --disable-pip-version-check)
  echo "setup: installing into .venv (profile $profile)" >&2
  local packages=(-c requirements.txt -e .)
  [ "$profile" = dev ] && packages=(-r requirements.txt -e '.[train,heic,plots,remote,wandb]')
  if [ -x .venv/bin/uv ] || "${environment_tools[@]}" install uv; then
    # System certificates, as pip uses: networks that inspect traffic add theirs there.
    if env -u VIRTUAL_ENV UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=true \
      .venv/bin/uv pip install --quiet --python .venv/bin/python "${packages[@]}"; then
      return
    fi
    echo "setup: uv failed; trying pip" >&2
  fi
  "${environment_tools[@]}" install "${packages[@]}" ||
    die "the packages could not be installed; pip says why above"
}

stamp=.venv/.fourdstar-$profile
wanted=$(cat requirements.txt pyproject.toml launch/setup.sh | sha256sum)
if ! suits .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  make_environment
fi
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  install
  printf '%s\n' "$wanted" > "$stamp"
  [ "$profile" = dev ] && printf '%s\n' "$wanted" > .venv/.fourdstar-run
fi

if [ "$profile" = dev ] && ! .venv/bin/python -c 'import ctypes; ctypes.CDLL("libEGL.so.1")' \
  >/dev/null 2>&1; then
  die "libEGL, which draws the training images, is missing: apt-get install libegl1 libgl1-mesa-dri"
fi
