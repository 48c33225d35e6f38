#!/usr/bin/env bash
# Trains the model of size `small` from a folder of animated GLB files: ./launch/small.sh ASSETS LPIPS [OUT]
#
# For one GPU with 80 GB or two; LPIPS is the file of docs/WEIGHTS.md (`fourdstar convert lpips`). OUT (default
# runs/small) holds data and a run a stage; the model is OUT/star/bundle. A run that was cut goes on where it
# was: call the same line again, here or, with OUT copied, on another machine. STEPS=20 makes each training
# that short, to try the line; LICENCE="" takes files of any licence. The times are those of steps measured on
# one H200 times their number: the whole was not run in one piece yet.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { echo "usage: ./launch/small.sh ASSETS LPIPS [OUT]" >&2; exit 2; }
[ -d "$1" ] || { echo "small: $1 is not a folder" >&2; exit 2; }
[ -f "$2" ] || { echo "small: $2 is not there: docs/WEIGHTS.md says how to make it" >&2; exit 2; }
assets=$1 lpips=$2 out=${3:-runs/small} licence=${LICENCE-CC0}
./launch/setup.sh dev
fourdstar=.venv/bin/fourdstar
short=("--config.lpips=$lpips" ${STEPS:+"--config.steps=$STEPS"})
.venv/bin/python -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")' || {
  echo "small: no GPU here that JAX sees: .venv/bin/python -m pip install -e '.[cuda]'" >&2; exit 2; }
say() { printf '\n== %s\n' "$*"; }

say "1 of 5: the clips of every file as pictures from eight sides (363 files: 2 minutes to render on 64 cores)"
[ -e "$out/data/manifest.json" ] ||
  $fourdstar prepare --assets "$assets" --out "$out/data" --image_size 128 --max_frames 16 \
    --extra_views 4 --depth ${licence:+--licence "$licence"}

say "2 of 5: the tokenizer, pictures to tokens and back"
$fourdstar train --config=configs/tokenizer.py:small --workdir="$out/tokenizer" \
  --config.data.dir="$out/data" "${short[@]}"

say "3 of 5: the 4D VQ-VAE, tokens to Gaussians (24,000 steps, 25 minutes)"
$fourdstar train --config=configs/vqvae.py:small --workdir="$out/vqvae" \
  --config.data.dir="$out/data" --config.bundle="$out/tokenizer/bundle" "${short[@]}"

say "4 of 5: STAR, video to tokens (12,000 steps, about an hour)"
$fourdstar train --config=configs/star.py:small --workdir="$out/star" \
  --config.data.dir="$out/data" --config.bundle="$out/vqvae/bundle" "${short[@]}"

if grep -q unseen_clip "$out/data/manifest.json"; then
  say "5 of 5: how it does on clips that it has not seen (some minutes)"
  $fourdstar evaluate --model "$out/star/bundle" --data "$out/data" --out "$out/unseen_clip.json"
else
  say "5 of 5: nothing to evaluate on, none of these files is in the split of unseen clips"
fi
say "the model: $out/star/bundle"
