#!/usr/bin/env bash
# Trains what the paper's Tables 3 and 4 compare at size `small`, and makes them: ./launch/tables.sh LPIPS WEIGHTS [OUT]
#
# After small.sh, whose OUT it reads (data, videos, tokenizer, vqvae): 4D VQ-VAEs with and without STOP, and
# STAR with each state, each by every one of SEEDS (default "0 1"), all of the same steps (STEPS: other ones).
# WEIGHTS is the folder of the measuring networks (docs/WEIGHTS.md). By two seeds 4 trainings of 25 minutes and
# 10 of an hour on one H200, from measured steps: it was not run. ROWS="ours baseline" trains only these of Table 4.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { echo "usage: ./launch/tables.sh LPIPS WEIGHTS [OUT]" >&2; exit 2; }
lpips=$1 weights=$2 out=${3:-runs/small} seeds=${SEEDS:-0 1}
[ -f "$lpips" ] || { echo "tables: $lpips is not there: docs/WEIGHTS.md says how to make it" >&2; exit 2; }
[ -d "$weights" ] || { echo "tables: $weights is not a folder" >&2; exit 2; }
for part in data/manifest.json videos/manifest.json tokenizer/bundle vqvae/bundle; do
  [ -e "$out/$part" ] || { echo "tables: $out/$part is not there: ./launch/small.sh makes it" >&2; exit 2; }
done
fourdstar=.venv/bin/fourdstar
train() {  # CONFIG RUN DATA BUNDLE [OPTION ...]
  printf '\n== %s\n' "$2"
  $fourdstar train --config="configs/$1" --workdir="$out/tables/$2" --config.data.dir="$out/$3" \
    --config.bundle="$4" --config.lpips="$lpips" ${STEPS:+"--config.steps=$STEPS"} "${@:5}"
}
table() {  # NAME OUT ROW=BUNDLE ...
  for split in unseen_clip unseen_object; do
    $fourdstar evaluate --table "configs/tables/$1.py" --protocol fourdstar-open-v2 --data "$out/data" \
      --split "$split" --weights "$weights" --out "$out/tables/$2_$split" --rows "${@:3}"
  done
}

rows=()
for seed in $seeds; do
  for stop in with without; do
    offsets=$([ $stop = with ] && echo True || echo False)
    train vqvae.py:small "vqvae_${stop}_$seed" data "$out/tokenizer/bundle" \
      --config.model.offsets="$offsets" --config.seed="$seed"
    rows+=("$stop=$out/tables/vqvae_${stop}_$seed/bundle")
  done
done
table stop table3 "${rows[@]}"

rows=()
for seed in $seeds; do
  for row in ${ROWS:-ours baseline explicit average merging}; do
    config=star.py:small$([ "$row" = ours ] || echo ",$row")
    train "$config" "star_${row}_$seed" videos "$out/vqvae/bundle" --config.seed="$seed"
    rows+=("$row=$out/tables/star_${row}_$seed/bundle")
  done
done
table state table4 "${rows[@]}"
