#!/usr/bin/env bash
# A collection of GLB files to a dataset by a Slurm array, from a checkout that all nodes see:
#
#   ASSETS=/shared/glb WORK=/shared/work sbatch --array=0-63 launch/slurm/prepare.sh --image_size 256
#
# WORK is on a file system that all nodes see (NFS, Lustre). Each task does its part and then what
# others have not begun; a task that is lost costs only what it was at. Submitted again, the array does
# what is missing. Then, on one node, with the same flags (it renders what may be left):
#
#   fourdstar prepare --assets /shared/glb --work /shared/work --image_size 256 --out /shared/dataset
#SBATCH --job-name=fourdstar-prepare
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=fourdstar-prepare-%A-%a.log
set -euo pipefail
: "${ASSETS:?names the folder of GLB files, which all nodes see}"
: "${WORK:?names the folder of what is rendered, which all nodes see}"
: "${SLURM_ARRAY_TASK_ID:?is set by sbatch --array=0-N}"
cd "${SLURM_SUBMIT_DIR:?is set by sbatch, with which this script is started}"
[ -x .venv/bin/fourdstar ] || { echo "slurm: no .venv here: ./launch/setup.sh dev" >&2; exit 2; }
[ "${SLURM_ARRAY_TASK_MIN:-0}" = 0 ] || { echo "slurm: the array must begin at 0" >&2; exit 2; }
exec srun .venv/bin/fourdstar prepare --assets "$ASSETS" --work "$WORK" \
  --shard "$SLURM_ARRAY_TASK_ID/$((SLURM_ARRAY_TASK_MAX + 1))" \
  --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
