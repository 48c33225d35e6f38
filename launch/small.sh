#!/usr/bin/env bash
# Trains the model of size `small` from a folder of animated GLB files: ./launch/small.sh ASSETS LPIPS [OUT]
#
# For one GPU with 80 GB or two, and 64 GB of memory; LPIPS is the file of docs/WEIGHTS.md (`fourdstar convert
# lpips`). OUT (default runs/small) holds data and a run a stage; the model is OUT/star/bundle. A run that was
# cut goes on where it was: call the same line again, here or, with OUT copied, on another machine. Gates come
# before the long trainings: what they ask for does not hold, it stops (GATES=0 goes on without them). STEPS=20
# makes each training that short and leaves the gates out, to try the line; LICENCE="" takes files of any
# licence. The times are those of steps and pictures measured on one H200 and 64 cores times their number: the
# whole was not run in one piece yet, the gates not on a GPU. launch/tables.sh trains what Tables 3 and 4 compare.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { echo "usage: ./launch/small.sh ASSETS LPIPS [OUT]" >&2; exit 2; }
[ -d "$1" ] || { echo "small: $1 is not a folder" >&2; exit 2; }
[ -f "$2" ] || { echo "small: $2 is not there: docs/WEIGHTS.md says how to make it" >&2; exit 2; }
assets=$1 lpips=$2 out=${3:-runs/small} licence=${LICENCE-CC0}
./launch/setup.sh dev
fourdstar=.venv/bin/fourdstar
short=("--config.lpips=$lpips" ${STEPS:+"--config.steps=$STEPS"})
gates=${GATES-${STEPS:+0}}
.venv/bin/python -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")' || {
  echo "small: no GPU here that JAX sees: .venv/bin/python -m pip install -e '.[cuda]'" >&2; exit 2; }
say() { printf '\n== %s\n' "$*"; }
prepare=("$fourdstar" prepare --assets "$assets" --image_size 128 ${licence:+--licence "$licence"})

if [ "$gates" != 0 ]; then
  say "gate 1 of 2: gradients are finite, STAR looks up what it is shown, int8 hardly changes a model (3 minutes)"
  JAX_PLATFORMS=cuda,cpu .venv/bin/python -m pytest -q tests/star/overfit_test.py tests/star/gates_test.py \
    tests/star/container_test.py::test_gradients_in_half_precision_are_finite \
    tests/bundle_test.py::test_int8_hardly_changes_a_trained_model
fi

# In the memory of a device: 32 GiB for tokenizer and 4D VQ-VAE, 25 GiB for STAR, which reads no extra views.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
say "1 of 6: each clip of training from two sides, in six views (363 files: 2 minutes on 64 cores)"
[ -e "$out/data/manifest.json" ] ||
  "${prepare[@]}" --out "$out/data" --max_frames 12 --rigs 2 --extra_views 2 --depth

say "2 of 6: for STAR, from four sides, longer, in the rig's views (3 minutes)"
[ -e "$out/videos/manifest.json" ] ||
  "${prepare[@]}" --out "$out/videos" --max_frames 24 --rigs 4 --extra_views 0 --no-flow --splits train unseen_clip

say "3 of 6: the tokenizer, pictures to tokens and back"
$fourdstar train --config=configs/tokenizer.py:small --workdir="$out/tokenizer" \
  --config.data.dir="$out/data" "${short[@]}"

say "4 of 6: the 4D VQ-VAE, tokens to Gaussians (24,000 steps, 25 minutes)"
$fourdstar train --config=configs/vqvae.py:small --workdir="$out/vqvae" \
  --config.data.dir="$out/data" --config.bundle="$out/tokenizer/bundle" "${short[@]}"

if [ "$gates" != 0 ]; then
  say "gate 2 of 2: STAR learns a few clips by heart, and never waits for data (about 5 minutes)"
  [ -e "$out/gate/data/manifest.json" ] ||
    "${prepare[@]}" --out "$out/gate/data" --limit 4 --max_frames 8 --extra_views 0 --splits train
  $fourdstar train --config=configs/star.py:small --workdir="$out/gate/star" --config.data.dir="$out/gate/data" \
    --config.bundle="$out/vqvae/bundle" --config.lpips="$lpips" --config.steps=1500 --config.batch_size=32 \
    --config.data.buckets='()' --config.data.max_stride=1 --config.augment.mirror=0.0 --config.augment.colour=0.0 \
    --config.augment.reverse=0.0 --config.augment.frozen=0.0
  $fourdstar evaluate --model "$out/gate/star/bundle" --data "$out/gate/data" --split train --clips 30 \
    --out "$out/gate/train.json" > /dev/null
  .venv/bin/python - "$out/gate" <<'PYTHON'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
found = json.loads((folder / "train.json").read_text())["samples"]
rows = [json.loads(row) for row in (folder / "star/metrics.jsonl").read_text().splitlines()]
waits = [row["train/data_wait"] for row in rows if "train/data_wait" in row][-1]
# Samples that all are the truth have no choices left to keep: then there is no propagation to measure.
right, kept = found["accuracy"], found.get("propagation", 0.0)
print(f"right codes {right:.2f}, propagation {kept:.2f} (one of them above 0.8); waits {waits:.0%} (below 10 %)")
if not (max(right, kept) > 0.8 and waits < 0.1):
    sys.exit("small: the gate does not hold; GATES=0 goes on all the same")
PYTHON
fi

say "5 of 6: STAR, video to tokens (12,000 steps, about an hour)"
$fourdstar train --config=configs/star.py:small --workdir="$out/star" \
  --config.data.dir="$out/videos" --config.bundle="$out/vqvae/bundle" "${short[@]}"

say "6 of 6: how it does on clips and objects that it has not seen (some minutes)"
for split in unseen_clip unseen_object; do
  if grep -q "\"$split\"" "$out/data/manifest.json"; then
    $fourdstar evaluate --model "$out/star/bundle" --data "$out/data" --split "$split" --out "$out/$split.json"
  else
    say "none of these files is in the split $split"
  fi
done
say "the model: $out/star/bundle"
