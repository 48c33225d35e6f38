#!/usr/bin/env bash
# Makes a model of size `tiny` from a folder of animated GLB files: ./launch/tiny.sh ASSETS [OUT]
#
# On two CPU cores about half an hour after the rendering, which takes 20 to 40 minutes for 360 files.
# OUT (default runs/tiny) holds data, tokens and a run a stage; the model is OUT/star/bundle. A run that
# was cut goes on where it was: call the same line again. STEPS=20 makes each training that short, to
# try the line; LICENCE="" takes files of any licence.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -ge 1 ] || { echo "usage: ./launch/tiny.sh ASSETS [OUT]" >&2; exit 2; }
[ -d "$1" ] || { echo "tiny: $1 is not a folder" >&2; exit 2; }
assets=$1 out=${2:-runs/tiny} licence=${LICENCE-CC0}
"$root/launch/setup.sh" dev
fourdstar=$root/.venv/bin/fourdstar
short=(${STEPS:+"--config.steps=$STEPS"})
say() { printf '\n== %s\n' "$*"; }

say "1 of 6: the clips of every file as pictures from four sides (20 to 40 minutes)"
[ -e "$out/data/manifest.json" ] ||
  "$fourdstar" prepare --assets "$assets" --out "$out/data" --max_frames 8 --depth \
    ${licence:+--licence "$licence"}

say "2 of 6: the tokenizer, pictures to tokens and back (4,000 steps, about 12 minutes)"
"$fourdstar" train --config=configs/tokenizer.py:tiny --workdir="$out/tokenizer" \
  --config.data.dir="$out/data" "${short[@]}"

say "3 of 6: the 4D VQ-VAE, tokens to Gaussians (1,500 steps, about 8 minutes)"
"$fourdstar" train --config=configs/vqvae.py:tiny --workdir="$out/vqvae" \
  --config.data.dir="$out/data" --config.bundle="$out/tokenizer/bundle" "${short[@]}"

say "4 of 6: the dataset as tokens (a minute)"
[ -e "$out/tokens/spec.json" ] ||
  "$fourdstar" tokenize --data "$out/data" --bundle "$out/vqvae/bundle" --out "$out/tokens"

say "5 of 6: STAR, video to tokens (1,500 steps, about 13 minutes)"
"$fourdstar" train --config=configs/star.py:tiny --workdir="$out/star" \
  --config.data.dir="$out/tokens" --config.bundle="$out/vqvae/bundle" "${short[@]}"

if grep -q unseen_clip "$out/data/manifest.json"; then
  say "6 of 6: how it does on clips that it has not seen (some minutes)"
  "$fourdstar" evaluate --model "$out/star/bundle" --data "$out/data" --out "$out/unseen_clip.json"
else
  say "6 of 6: nothing to evaluate on, none of these files is in the split of unseen clips"
fi
say "the model: $out/star/bundle"
