"""Clips as sequences of frames: sampling in time, the box of the whole clip, how much it moves."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from fourdstar_jax.data.gltf import Asset, Clip, MalformedAsset
from fourdstar_jax.geometry import OBJECT_SIDE

MIN_MOTION = 0.01  # of the normalised unit (GVFDiffusion's filter, arXiv 2507.23785)
BOX_FPS = 24.0
MAX_BOX_SAMPLES = 128


class Sequence(NamedTuple):
    """F frames of a clip at `frame / fps` seconds after its first key, normalised."""

    positions: Float32[np.ndarray, "F P 3"]
    normals: Float32[np.ndarray, "F P 3"]
    motion: float  # largest over the frames: mean distance of the vertices from frame 0


def num_frames(clip: Clip, fps: float, max_frames: int) -> int:
    """Frames at 0, 1/fps, ... strictly before the clip's end, at least one.

    The end is left out because the last key of a cycle repeats the first: frame F is frame 0.
    """
    return max(1, min(max_frames, int(np.ceil(clip.duration_s * fps - 1e-6))))


def sample_clip(asset: Asset, clip: Clip, *, fps: float, max_frames: int) -> Sequence:
    """Poses a clip and normalises it by the bounding box over the whole clip, centred.

    Raises `MalformedAsset` when the box has no size or a pose is not finite.
    """
    F = num_frames(clip, fps, max_frames)
    samples = min(MAX_BOX_SAMPLES, int(np.ceil(clip.duration_s * BOX_FPS)) + 1)
    box_times = np.linspace(0, clip.duration_s, max(samples, 2))
    whole = asset.pose(clip.index, box_times, normals=False).positions
    posed = asset.pose(clip.index, np.arange(F) / fps)
    assert posed.normals is not None
    low = np.minimum(whole.min((0, 1)), posed.positions.min((0, 1)))
    high = np.maximum(whole.max((0, 1)), posed.positions.max((0, 1)))
    side = float((high - low).max())
    if not np.isfinite(side) or side <= 0:
        raise MalformedAsset(f"clip {clip.name!r} has a bounding box of side {side}")
    positions = ((posed.positions - (low + high) / 2) * (OBJECT_SIDE / side)).astype(np.float32)
    motion = np.linalg.norm(positions - positions[:1], axis=-1).mean(axis=1).max()
    return Sequence(positions, posed.normals, float(motion))
