#!/usr/bin/env bash
# A video goes in, a moving 3D object comes out, with the model and the video of this package.
#   ./launch/demo.sh [--video FILE_OR_FOLDER] [--out DIR] [other flags of `fourdstar generate`]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
./launch/setup.sh run
video=fourdstar_jax/models/tiny/example.mp4
defaults=(--out out/demo --overwrite)
case " $* " in
  *" --video"*) ;;
  # The example has the training images' framing already.
  *) defaults+=(--video "$video" --fit none) ;;
esac
exec .venv/bin/fourdstar generate "${defaults[@]}" "$@"
