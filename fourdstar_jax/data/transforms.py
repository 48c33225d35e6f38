"""What happens to one example, in numpy: windows in time, white background, rolls of the rig."""

import functools

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from fourdstar_jax import geometry


def window(
    num_frames: int, timesteps: int, rng: np.random.Generator | None, *, stride: int = 1
) -> Int64[np.ndarray, " T"]:
    """Every `stride`-th frame of a window: from a random start, or from the first without `rng`.

    A clip shorter than the window loops (any start); a longer one is never wrapped.
    """
    if num_frames < 1 or timesteps < 1 or stride < 1:
        raise ValueError(f"{num_frames=}, {timesteps=} and {stride=} must be positive")
    reach = (timesteps - 1) * stride + 1
    starts = num_frames if num_frames < reach else num_frames - reach + 1
    start = 0 if rng is None else int(rng.integers(starts))
    return (start + stride * np.arange(timesteps)) % num_frames


def on_white(
    rgba: UInt8[np.ndarray, "*b h w 4"],
) -> tuple[Float32[np.ndarray, "*b h w 3"], Float32[np.ndarray, "*b h w 1"]]:
    """Images in [0, 1] over white, and masks."""
    scaled = rgba.astype(np.float32) / 255
    alpha = scaled[..., 3:]
    return scaled[..., :3] * alpha + (1 - alpha), alpha


@functools.cache
def _front(radius: float) -> Float32[np.ndarray, "4 4"]:
    """The first camera of a rig."""
    return np.asarray(geometry.orbit_cameras([0.0], radius=radius, width=1, height=1).viewmats[0])


def input_view_to_front(
    viewmats: Float32[np.ndarray, "V 4 4"],
    others: Float32[np.ndarray, "E 4 4"],
    view: int,
    *,
    radius: float = geometry.RADIUS,
) -> tuple[Float32[np.ndarray, "V 4 4"], Float32[np.ndarray, "E 4 4"]]:
    """Makes `view` the first of its rig, the rest after it in a ring, and moves the world.

    In the new world the first camera stands at [0, 0, radius] and looks at the origin; `others`
    move along. Images are to be rolled by `-view` along their view axis.
    """
    world = np.linalg.inv(viewmats[view].astype(np.float64)) @ _front(radius)
    rolled = np.roll(viewmats, -view, axis=0)
    return (rolled @ world).astype(np.float32), (others @ world).astype(np.float32)
