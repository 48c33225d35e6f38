"""Flow, steadiness along it, jitter of tracks, and whether views agree on a point's colour."""

import functools

import jax
import numpy as np
from jaxtyping import Bool, Float

from fourdstar_jax.data.batching import in_batches
from fourdstar_jax.evaluate.device import ALONE
from fourdstar_jax.evaluate.protocols import SEEN
from fourdstar_jax.types import Cameras, Gaussians
from fourdstar_jax.vqvae import losses

STEADY = 0.1  # of the truth's own colour along its flow: above, the point was covered or lit anew
FLOW_BATCH = 4  # timesteps


def warping_error(
    images: Float[np.ndarray, "T h w 3"],
    truth: Float[np.ndarray, "T h w 3"],
    masks: Bool[np.ndarray, "T h w"],
    flow: Float[np.ndarray, "_ h w 2"],
) -> float:
    """Mean |p(t) - p(t+1) at x + flow| over the object's pixels that stay to be seen.

    Pictures are in [0, 1], the flow in pixels to the next frame. A pixel counts if its target lies
    inside the next frame's mask and the truth's own colour changes by less than STEADY along the
    way. Raises ValueError if none does.
    """
    height, width = masks.shape[1:]
    y, x = np.mgrid[0:height, 0:width]
    total, count = 0.0, 0
    for f in range(len(images) - 1):
        places = np.stack([y + flow[f, ..., 1], x + flow[f, ..., 0]])
        within = masks[f] & (np.abs(at(masks[f + 1].astype(np.float32), places)) > 0.99)
        own = np.abs(truth[f] - at(truth[f + 1], places)).max(axis=-1)
        seen = within & (own < STEADY)
        error = np.abs(images[f] - at(images[f + 1], places)).mean(axis=-1)
        total, count = total + float(error[seen].sum()), count + int(seen.sum())
    if not count:
        raise ValueError("no pixel of the object can be followed by the flow")
    return total / count


def at(picture: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Bilinear values at (row, column) places, which count from pixel centres; 0 outside."""
    low = np.floor(places).astype(np.int64)
    share = places - low
    out = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            rows, columns = low[0] + dy, low[1] + dx
            inside = (rows >= 0) & (rows < picture.shape[0])
            inside &= (columns >= 0) & (columns < picture.shape[1])
            weight = (share[0] if dy else 1 - share[0]) * (share[1] if dx else 1 - share[1])
            weight = np.where(inside, weight, 0)
            value = picture[
                rows.clip(0, picture.shape[0] - 1), columns.clip(0, picture.shape[1] - 1)
            ]
            out = out + (weight[..., None] if picture.ndim == 3 else weight) * value
    return np.asarray(out)


def rendered_flow(
    gaussians: Gaussians, cameras: Cameras, *, width: int, height: int
) -> Float[np.ndarray, "P h w 2"]:
    """Motion of the Gaussians `[T, G, ...]` in one camera, pixels to the next of the T frames.

    Zero where less than half of the pixel is covered.
    """
    pairs = [np.stack([np.asarray(x)[:-1], np.asarray(x)[1:]], axis=1) for x in gaussians]
    draw = functools.partial(_flow, cameras=cameras, width=width, height=height)
    with ALONE:
        return in_batches(draw, pairs, FLOW_BATCH)


@functools.partial(jax.jit, static_argnames=("width", "height"))
def _flow(*pairs, cameras: Cameras, width: int, height: int):
    cameras = jax.tree.map(lambda x: jax.numpy.broadcast_to(x, (len(pairs[0]), *x.shape)), cameras)
    flow, weight = losses.splatted_flow(Gaussians(*pairs), cameras, width=width, height=height)
    return (flow * (weight > 0.5))[:, 0, 0]


def flow_error(
    flow: Float[np.ndarray, "P h w 2"],
    truth: Float[np.ndarray, "P h w 2"],
    masks: Bool[np.ndarray, "P h w"],
) -> float:
    """Mean length of flow - truth inside the masks, pixels. Raises ValueError if they are empty."""
    if not masks.any():
        raise ValueError("the truth's mask is empty in every frame")
    return float(np.linalg.norm(flow - truth, axis=-1)[masks].mean())


def jitter(means: Float[np.ndarray, "T G 3"], opacities: Float[np.ndarray, "T G"]) -> float:
    """Mean |x(t-1) - 2 x(t) + x(t+1)| of the tracks, scene units.

    A track weighs as the least of its three opacities. Raises ValueError for fewer than 3 frames
    and where nothing is opaque.
    """
    if len(means) < 3:
        raise ValueError(f"{len(means)} frames: how a track jitters is told by 3 or more")
    bends = np.linalg.norm(means[:-2] - 2 * means[1:-1] + means[2:], axis=-1)
    weights = np.minimum(np.minimum(opacities[:-2], opacities[1:-1]), opacities[2:])
    if not weights.sum() > 0:
        raise ValueError("no Gaussian is opaque in 3 frames in a row")
    return float((weights * bends).sum() / weights.sum())


def reprojection_error(
    pictures: Float[np.ndarray, "V h w 3"],
    depths: Float[np.ndarray, "V h w"],
    cameras: Cameras,
    points: Float[np.ndarray, "n 3"],
    weights: Float[np.ndarray, " n"] | None = None,
) -> tuple[float, float]:
    """Sums over points and pairs of views that see them: of |colour - colour|, and of weights.

    Colours are those of the pictures, in [0, 1], where the point is projected, absolute
    differences averaged over channels. A view sees a point that lies in the picture and no more
    than SEEN behind its depth there (camera z, 0 where there is nothing).
    """
    with ALONE:
        xy = np.asarray(losses.project_points(points, cameras), np.float64)  # [V, n, 2]
    viewmats = np.asarray(cameras.viewmats, np.float64)
    z = points @ viewmats[:, 2, :3].T + viewmats[:, 2, 3]  # [n, V]
    height, width = pictures.shape[1:3]
    weights = np.ones(len(points)) if weights is None else np.asarray(weights, np.float64)
    colors, seen = [], []
    for view, (picture, depth) in enumerate(zip(pictures, depths, strict=True)):
        x, y = xy[view].T - 0.5
        row, column = (np.clip(np.rint(a), 0, n - 1).astype(int) for a, n in
                       ((y, height), (x, width)))  # fmt: skip
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        there = depth[row, column]
        seen.append(inside & (there > 0) & (z[:, view] > 0) & (z[:, view] < there + SEEN))
        colors.append(at(picture, np.stack([y, x])))
    total = count = 0.0
    for one in range(len(pictures)):
        for other in range(one):
            weight = weights * (seen[one] & seen[other])
            total += float((weight * np.abs(colors[one] - colors[other]).mean(axis=-1)).sum())
            count += float(weight.sum())
    return total, count
