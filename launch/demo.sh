#!/usr/bin/env bash
# A video goes in, a moving 3D object comes out, with the model and the video of this package.
#   ./launch/demo.sh [--video FILE_OR_FOLDER | --image FILE] [--out DIR] [other flags of `fourdstar generate`]
# It may be called from any folder: paths are as seen from there.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh" run
case " $* " in
  *" --video"* | *" --image"*) command=generate ;;
  *) command=demo ;;
esac
exec "$root/.venv/bin/fourdstar" "$command" --out out/demo --overwrite "$@"
