#!/usr/bin/env bash
# Builds the wheel into dist/ and tries it: installed alone into a fresh environment, away from this
# checkout, it makes the demo's object.
#   ./launch/wheel.sh
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root=$PWD
./launch/setup.sh run
say() { printf '\n== %s\n' "$*"; }
die() { echo "wheel: $*" >&2; exit 1; }
try=$(mktemp -d)
trap 'rm -rf "$try"' EXIT

version=$(.venv/bin/python -c 'import fourdstar_jax; print(fourdstar_jax.__version__)')
wheel=dist/fourdstar_jax-$version-py3-none-any.whl

say "the wheel of version $version"
rm -f "$wheel"
.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
[ -f "$wheel" ] || die "$wheel was not made; dist/ has $(ls dist)"
.venv/bin/python - "$wheel" <<'PYTHON'
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
have = {name.removeprefix("fourdstar_jax/") for name in wheel.namelist()}
needed = {"py.typed", "models/small/model.json", "models/small/example.mp4", "configs/star.py",
          "export/viewer/page.html", "export/viewer/main.js", "text/t5_tokenizer.json.gz"}
if missing := needed - have:
    sys.exit(f"wheel: without {', '.join(sorted(missing))}")
if strangers := {name for name in wheel.namelist() if not name.startswith("fourdstar_jax")}:
    sys.exit(f"wheel: should not have {', '.join(sorted(strangers))}")
print(f"{len(have)} files, {sum(x.compress_size for x in wheel.infolist()) / 1e6:.1f} MB")
PYTHON

say "installed into a fresh environment"
.venv/bin/python -m venv "$try/venv"
"$try/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$root/$wheel"
cd "$try"  # where no checkout can be found
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
unset PYTHONPATH
[ "$(venv/bin/fourdstar --version)" = "fourdstar_jax $version" ] || die "another version is installed"
home=$(venv/bin/python -c 'import fourdstar_jax; print(fourdstar_jax.__file__)')
case $home in "$try"/*) ;; *) die "$home is not the wheel's" ;; esac
venv/bin/python -c '
from fourdstar_jax.cli import read_config
assert read_config("configs/star.py:tiny", []).stage == "star"'

say "the demo"
venv/bin/fourdstar demo --out out
venv/bin/fourdstar export out --to spz --out files
for file in out/viewer.html out/orbit.mp4 out/splats.safetensors files/spz/frame_0000.spz; do
  [ -s "$file" ] || die "the demo has not written $file"
done
cd "$root"
say "$wheel works"
