#!/usr/bin/env bash
# A video goes in, a moving 3D object comes out, with the model and the video of this package.
#   ./launch/demo.sh [--video FILE_OR_FOLDER | --image FILE] [--out DIR] [other flags of `fourdstar generate`]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
./launch/setup.sh run
case " $* " in
  *" --video"* | *" --image"*) command=generate ;;
  *) command=demo ;;
esac
exec .venv/bin/fourdstar "$command" --out out/demo --overwrite "$@"
