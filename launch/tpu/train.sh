#!/usr/bin/env bash
# One training on all workers of a TPU VM or pod slice that exists:
#
#   NAME=my-v5p ZONE=us-east5-a CONFIG=configs/star.py:paper WORKDIR=/mnt/bucket/runs/star \
#     launch/tpu/train.sh --config.data.dir=/mnt/bucket/tokens
#
# Copies this checkout's last commit to every worker, installs it there and starts the same command
# on each; DATA and WORKDIR must be a folder that all workers see, such as a mounted bucket. Called
# again after a preemption it goes on from the last checkpoint.
set -euo pipefail
: "${NAME:?names the TPU}" "${ZONE:?names its zone}"
: "${CONFIG:?names the config, such as configs/star.py:paper}"
: "${WORKDIR:?names the folder of the run, which all workers see}"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
for tool in gcloud git; do
  command -v "$tool" >/dev/null || { echo "tpu: $tool is missing" >&2; exit 2; }
done

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --prefix=fourdstar/ HEAD -o "$archive"
gcloud compute tpus tpu-vm scp "$archive" "$NAME:fourdstar.tar.gz" --zone="$ZONE" --worker=all
everywhere "mkdir -p fourdstar && tar xzf fourdstar.tar.gz && cd fourdstar && ./launch/setup.sh dev \
  && .venv/bin/python -m pip install --quiet -e '.[tpu]'"
everywhere "cd fourdstar && .venv/bin/fourdstar train $(printf '%q ' "--config=$CONFIG" "--workdir=$WORKDIR" "$@")"
