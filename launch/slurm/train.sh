#!/usr/bin/env bash
# One training over the GPUs of a Slurm job, from a checkout on a file system that all nodes see:
#
#   CONFIG=configs/star.py:paper WORKDIR=/shared/runs/star \
#     sbatch --nodes=2 launch/slurm/train.sh --config.data.dir=/shared/tokens
#
# One task a GPU. Near the end of its time, or when it is preempted, the run saves, and the job goes
# back into the queue; so it does when a node is lost. Change the lines below to what your site has.
#SBATCH --job-name=fourdstar
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fourdstar-%j.log
set -euo pipefail
: "${CONFIG:?names the config, such as configs/star.py:paper}"
: "${WORKDIR:?names the folder of the run, which all nodes see}"
cd "${SLURM_SUBMIT_DIR:?is set by sbatch, with which this script is started}"
[ -x .venv/bin/fourdstar ] || {
  echo "slurm: no .venv here: ./launch/setup.sh dev && .venv/bin/python -m pip install -e '.[cuda]'" >&2
  exit 2
}
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}  # NVLink multicast hangs where it is not set up

code=0
srun --kill-on-bad-exit=1 .venv/bin/fourdstar train --config="$CONFIG" --workdir="$WORKDIR" "$@" || code=$?
case $code in
  70|75|143) echo "slurm: exit code $code: back into the queue" >&2; scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
