#!/usr/bin/env bash
# What has to hold before a release, in order; stops at the first thing that does not.
#   ./launch/release.sh            all of it: an hour, for the slow tests
#   ./launch/release.sh --quick    without the tests
#
# The version stands in fourdstar_jax/__init__.py alone. Its section of CHANGELOG.md is begun by
# renaming "Unreleased", under a new and empty one.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
case ${1:-} in ''|--quick) quick=${1:-} ;; *) echo "usage: ./launch/release.sh [--quick]" >&2; exit 2 ;; esac
say() { printf '\n== %s\n' "$*"; }
die() { echo "release: $*" >&2; exit 1; }

say "1 of 5: nothing is left to commit, and the version is new"
changed=$(git status --porcelain)
[ -z "$changed" ] || die "not committed: $(printf '%s' "$changed" | head -3 | tr '\n' ' ')"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' fourdstar_jax/__init__.py)
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || die "version '$version' of fourdstar_jax/__init__.py is not X.Y.Z"
[ -z "$(git tag --list "v$version")" ] || die "the tag v$version is there already: raise the version"

say "2 of 5: the changelog tells of $version"
[ "$(grep -c "^## $version - 20[0-9][0-9]-[01][0-9]-[0-3][0-9]$" CHANGELOG.md)" = 1 ] ||
  die "CHANGELOG.md has no section '## $version - YYYY-MM-DD'"
unreleased=$(sed -n '/^## Unreleased$/,/^## [0-9]/p' CHANGELOG.md | grep -cv '^\(##.*\|\)$' || true)
[ "$unreleased" = 0 ] || die "CHANGELOG.md still has $unreleased lines under Unreleased"

say "3 of 5: format, types, documents made from other files"
./launch/setup.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/pyright
.venv/bin/python docs/make.py --check

say "4 of 5: the tests"
if [ -z "$quick" ]; then ./launch/test.sh --slow; else echo "left out"; fi

say "5 of 5: the wheel"
./launch/wheel.sh

say "left to do by hand"
cat <<TEXT
  - look at the demo's viewer.html in a browser, and at docs/images
  - pyproject.toml, [project.urls]: has the address of the repository that is being published
  - run the tests marked gpu (and tpu) on such a machine
  - git tag v$version, push it, and upload dist/fourdstar_jax-$version-py3-none-any.whl
TEXT
