#!/usr/bin/env bash
# Trains what the paper's Tables 3 and 4 compare at size `small`, and makes them: ./launch/tables.sh LPIPS WEIGHTS [OUT]
#
# After small.sh, whose OUT it reads (data, videos, tokenizer, vqvae): 4D VQ-VAEs with and without STOP, and STAR
# with each state, each by every one of SEEDS (default "0 1"), all of the same steps. WEIGHTS is the folder of the
# measuring networks (docs/WEIGHTS.md). By two seeds 4 trainings of 25 minutes and 12 of an hour on one H200, from
# measured steps; with 2,000 and 1,000 steps all took 17 minutes on two (docs/RESULTS.md). GPUS="0 1" spreads them
# over two, EACH=3 has so many on each at once (a small model does not fill one), each with a third of its memory
# or XLA_PYTHON_CLIENT_MEM_FRACTION. TABLES=4 makes that alone, ROWS="ours baseline" trains only these of it;
# VQVAE and STAR are more options of the trainings, such as STAR="--config.steps=1000"; METRICS are those of the
# tables, if not all, on the dataset TEST, if not OUT/data. Called again it goes on; all is in OUT/tables.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { echo "usage: ./launch/tables.sh LPIPS WEIGHTS [OUT]" >&2; exit 2; }
lpips=$1 weights=$2 out=${3:-runs/small} seeds=${SEEDS:-0 1} tables=${TABLES:-3 4}
read -ra gpus <<< "${GPUS:-0}"
each=${EACH:-1}
[ -f "$lpips" ] || { echo "tables: $lpips is not there: docs/WEIGHTS.md says how to make it" >&2; exit 2; }
[ -d "$weights" ] || { echo "tables: $weights is not a folder" >&2; exit 2; }
for part in data/manifest.json videos/manifest.json tokenizer/bundle vqvae/bundle; do
  [ -e "$out/$part" ] || { echo "tables: $out/$part is not there: ./launch/small.sh makes it" >&2; exit 2; }
done
fourdstar=.venv/bin/fourdstar
mkdir -p "$out/tables"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-$(awk "BEGIN { print 0.9 / $each }")}

declare -A name_of gpu_of  # by process
trap 'kill $(jobs -rp) 2> /dev/null; wait; exit 130' INT TERM  # trainings save first
start() {  # NAME COMMAND ...: in the background, on the GPU with least to do, as soon as one has room
  local gpu="" candidate pid count least
  while [ -z "$gpu" ]; do
    least=$each
    for candidate in "${gpus[@]}"; do
      count=0
      for pid in $(jobs -rp); do [ "${gpu_of[$pid]}" != "$candidate" ] || count=$((count + 1)); done
      [ "$count" -ge "$least" ] || { least=$count gpu=$candidate; }
    done
    [ -n "$gpu" ] || sleep 1
  done
  echo "== $1: $out/tables/$1.log"
  CUDA_VISIBLE_DEVICES=$gpu "${@:2}" >> "$out/tables/$1.log" 2>&1 &
  name_of[$!]=$1 gpu_of[$!]=$gpu
}
finish() {  # all of them; ends the script if one failed
  local pid failed=0
  for pid in "${!name_of[@]}"; do
    wait "$pid" || { echo "tables: ${name_of[$pid]} failed, see $out/tables/${name_of[$pid]}.log" >&2; failed=1; }
  done
  [ "$failed" = 0 ] || exit 1
  name_of=() gpu_of=()
}
train() {  # CONFIG RUN DATA BUNDLE [OPTION ...]
  start "$2" $fourdstar train --config="configs/$1" --workdir="$out/tables/$2" --config.data.dir="$out/$3" \
    --config.bundle="$4" --config.lpips="$lpips" "${@:5}"
}
table() {  # NAME OUT ROW=BUNDLE ...
  for split in unseen_clip unseen_object; do
    start "$2_$split" $fourdstar evaluate --table "configs/tables/$1.py" --protocol fourdstar-open-v2 \
      --data "${TEST:-$out/data}" --split "$split" --weights "$weights" --out "$out/tables/$2_$split" --rows "${@:3}" \
      ${METRICS:+--metrics $METRICS}
  done
}

stops=() states=()
for seed in $seeds; do
  for stop in $([[ $tables == *3* ]] && echo with without); do
    offsets=$([ "$stop" = with ] && echo True || echo False)
    # shellcheck disable=SC2086
    train vqvae.py:small "vqvae_${stop}_$seed" data "$out/tokenizer/bundle" \
      --config.model.offsets="$offsets" --config.seed="$seed" ${VQVAE:-}
    stops+=("$stop=$out/tables/vqvae_${stop}_$seed/bundle")
  done
done
for seed in $seeds; do
  for row in $([[ $tables == *4* ]] && echo "${ROWS:-ours slots baseline explicit average merging}"); do
    # shellcheck disable=SC2086
    train "star.py:small$([ "$row" = ours ] || echo ",$row")" "star_${row}_$seed" videos "$out/vqvae/bundle" \
      --config.seed="$seed" ${STAR:-}
    states+=("$row=$out/tables/star_${row}_$seed/bundle")
  done
done
finish
[ ${#stops[@]} = 0 ] || table stop table3 "${stops[@]}"
[ ${#states[@]} = 0 ] || table state table4 "${states[@]}"
finish
echo "the tables: $(echo "$out"/tables/table*_*/table.md)"
