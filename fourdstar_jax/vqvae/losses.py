"""Losses of the 4D VQ-VAE: pictures of both stages, surfaces, and wrong motion (section 3.1).

The paper names a pixel, a discriminator and an optical-flow loss and leaves weights and forms to a
supplement that is not public; L4GM's pixel losses (MSE of colour and of alpha) and LPIPS stand in.
Rendering all T x V pictures of an object is the larger cost, so each step draws a few.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from fourdstar_jax import sharding
from fourdstar_jax.kernels.rasterize import rasterize
from fourdstar_jax.perceptual.lpips import LPIPS
from fourdstar_jax.types import Array, Cameras, Gaussians, Rendered
from fourdstar_jax.vqvae.model import Decoded

NEAR = 0.01  # camera z below which nothing is projected, scene units


class OwnPixels(NamedTuple):
    """What each rig view saw itself, at every timestep."""

    cameras: Cameras  # [B, V, ...]
    masks: Float[Array, "B T V h w 1"]
    depth: Float[Array, "B T V h w 1"]  # camera z in scene units, 0 where there is nothing


class Supervision(NamedTuple):
    """The pictures one step is compared with: S consecutive timesteps of Q views an object."""

    timesteps: Int[Array, "B S"]
    views: Int[Array, "B Q"]  # 0 to V - 1 are the rig's, the extra ones follow
    images: Float[Array, "B S Q h w 3"]  # [0, 1], on white
    masks: Float[Array, "B S Q h w 1"]
    cameras: Cameras  # [B, Q, ...]
    flow: Float[Array, "B P Q h w 2"] | None  # pixels to the next timestep (P = S - 1)
    flow_known: Float[Array, "B Q"]  # 1 for views that have flow
    own: OwnPixels | None  # where the data has depth


def all_views(batch: Mapping[str, Any], name: str) -> Array:
    """`images`, `masks`, `viewmats` or `Ks` of a batch, the rig's and then the extra views'."""
    parts = [batch[key] for key in (name, f"extra_{name}") if key in batch]
    return jnp.concatenate(parts, axis=2 if name in ("images", "masks") else 1)


def choose_supervision(
    key: Array, batch: Mapping[str, Any], *, num_timesteps: int, rig_views: int, extra_views: int
) -> Supervision:
    """Draws consecutive timesteps and distinct views, for each object of a data batch on its own.

    `rig_views` of the rig's come first, then `extra_views` of the others (`extra_*`, if there);
    fewer are returned where there are not as many. `num_timesteps=1` leaves the flow out.
    """
    b, t, v = batch["images"].shape[:3]
    extra = batch["extra_images"].shape[2] if "extra_images" in batch else 0
    num_timesteps = min(num_timesteps, t)

    def draw(key, count, there):
        order = jnp.argsort(jax.random.uniform(key, (b, there)), axis=1)
        return order[:, : min(count, there)]

    viewmats, Ks = all_views(batch, "viewmats"), all_views(batch, "Ks")
    start_key, rig_key, extra_key = jax.random.split(key, 3)
    start = jax.random.randint(start_key, (b,), 0, t - num_timesteps + 1)
    timesteps = start[:, None] + jnp.arange(num_timesteps)
    chosen = jnp.concatenate(
        [draw(rig_key, rig_views, v), v + draw(extra_key, extra_views, extra)], axis=1
    )

    def pick(x):  # [B, T, V, ...] -> [B, S, Q, ...]
        return jax.vmap(lambda x, i, j: x[i][:, j])(x, timesteps, chosen)

    flow = None
    known = jnp.broadcast_to((chosen < v).astype(jnp.float32), chosen.shape)
    if "flow_known" in batch:  # of each clip
        known = known * batch["flow_known"][:, None]
    if "flow" in batch and num_timesteps > 1:
        flow = jax.vmap(lambda x, i, j: x[i][:, j])(
            batch["flow"], timesteps[:, :-1], jnp.minimum(chosen, v - 1)
        )
        flow = flow * known[:, None, :, None, None, None]
    else:
        known = jnp.zeros_like(known)
    take = jax.vmap(lambda x, j: x[j])
    return Supervision(
        timesteps=timesteps,
        views=chosen,
        images=pick(all_views(batch, "images")),
        masks=pick(all_views(batch, "masks")),
        cameras=Cameras(take(viewmats, chosen), take(Ks, chosen)),
        flow=flow,
        flow_known=known,
        own=OwnPixels(Cameras(batch["viewmats"], batch["Ks"]), batch["masks"], batch["depth"])
        if "depth" in batch
        else None,
    )


def take_timesteps(gaussians: Gaussians, timesteps: Int[Array, "B S"]) -> Gaussians:
    """`[B, T, G, ...]` to `[B, S, G, ...]`."""
    return jax.tree.map(lambda a: jax.vmap(lambda x, i: x[i])(a, timesteps), gaussians)


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    width: int,
    height: int,
    capacity: int | None = None,
    implementation: str | None = None,
    with_depths: bool = False,
) -> Rendered:
    """`[B, S, Q, h, w, ...]` of Gaussians `[B, S, G, ...]` and `[B, Q, ...]` cameras, on white."""
    cameras = jax.tree.map(lambda a: a[:, None], cameras)
    return _rasterize_batch(
        gaussians,
        cameras,
        background=jnp.ones(3),
        width=width,
        height=height,
        capacity=capacity,
        implementation=implementation,
        with_depths=with_depths,
    )


def _rasterize_batch(
    gaussians, cameras, features=None, *, with_depths=False, **options
) -> Rendered:
    """`rasterize` by each device on its part of the batch.

    `capacity` is each device's; `num_intersections` is that of the device with most.
    """

    def part(gaussians, cameras, features):
        rendered = rasterize(
            gaussians, cameras, features=features, with_depths=with_depths, **options
        )
        # An axis for the devices.
        return rendered._replace(
            num_intersections=rendered.num_intersections[None], overflow=rendered.overflow[None]
        )

    rendered = sharding.map_batch(part, gaussians, cameras, features)
    return rendered._replace(
        num_intersections=jnp.max(rendered.num_intersections), overflow=jnp.any(rendered.overflow)
    )


def psnr(mse: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return -10 * jnp.log10(jnp.maximum(mse, 1e-10))


def psnr_in_mask(
    renders: Float[Array, "*b h w 3"], images: Float[Array, "*b h w 3"], masks: Float[Array, "..."]
) -> Float[Array, ""]:
    """PSNR in dB of images in [0, 1] over all pixels inside the masks `[..., 1]` together."""
    error = jnp.sum(masks * (renders - images) ** 2)
    return psnr(error / (3 * jnp.maximum(jnp.sum(masks), 1.0)))


def mean_where(values: Float[Array, "B ..."], weights: Float[Array, "B ..."]) -> Float[Array, ""]:
    """Mean over objects of each one's mean by weights; an object without any counts 0.

    So the mean over parts of a batch is that of the batch.
    """
    axes = tuple(range(1, values.ndim))
    total = jnp.sum(weights, axis=axes)
    return jnp.mean(jnp.sum(weights * values, axis=axes) / jnp.maximum(total, 1.0))


def pixel_losses(
    rendered: Rendered,
    images: Float[Array, "B S Q h w 3"],
    masks: Float[Array, "B S Q h w 1"],
    *,
    foreground_weight: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean squared errors of colour and of alpha (L4GM).

    A pixel of mask m counts 1 + `foreground_weight` m times in the first, normalised by the sum:
    on white, the object is a small share of the picture.
    """
    error = jnp.mean((rendered.renders - images) ** 2, axis=-1, keepdims=True)
    rgb = mean_where(error, 1 + foreground_weight * masks)
    alpha = jnp.mean((rendered.alphas - masks) ** 2)
    return rgb, alpha


def own_surface(
    gaussians: Gaussians, own: OwnPixels
) -> tuple[
    Float[Array, "B T V m m"],
    Float[Array, "B T V m m"],
    Float[Array, "B T V m m"],
    Float[Array, "B T V m m"],
]:
    """What each Gaussian `[B, T, G, ...]` of view-major maps sees through its own pixels.

    Its depth; the surface's, camera z in scene units; 1 where that is known, of half of the pixels
    or more; and the share of the mask.
    """
    cameras, masks, depth = own
    b, t, v, h = depth.shape[:4]
    m = math.isqrt(gaussians.means.shape[-2] // v)
    patch = h // m
    means = gaussians.means.reshape(b, t, v, m, m, 3)
    row = cameras.viewmats[:, None, :, 2]  # [B, 1, V, 4]
    z = jnp.einsum("btvijc,bovc->btvij", means, row[..., :3]) + row[..., 3, None, None]

    def pool(x):  # sums over the pixels of a Gaussian
        return x.reshape(b, t, v, m, patch, m, patch).sum((4, 6))

    count = pool((depth > 0).astype(jnp.float32))
    target = pool(depth) / jnp.maximum(count, 1.0)
    known = (count > 0.5 * patch**2).astype(jnp.float32)
    return z, target, known, pool(masks) / patch**2


def own_pixel_losses(
    gaussians: Gaussians, own: OwnPixels
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What a view's own Gaussians should be: on the surface that their pixels see, and opaque.

    `gaussians` `[B, T, G, ...]` are view-major maps of the V views. Returns the mean absolute error
    of depth inside the mask, scene units, and the cross-entropy of opacity against the mask, nats.
    Photometric losses alone make fog first; of these two, early in training, come surfaces.
    """
    z, target, known, share = own_surface(gaussians, own)
    error = mean_where(jnp.abs(z - target), known)
    opacity = jnp.clip(gaussians.opacities.reshape(z.shape), 1e-4, 1 - 1e-4)
    entropy = -(share * jnp.log(opacity) + (1 - share) * jnp.log1p(-opacity))
    return error, jnp.mean(entropy)


def project_points(points: Float[Array, "*b G 3"], cameras: Cameras) -> Float[Array, "*b V G 2"]:
    """Pixel coordinates of world points `[..., G, 3]` in cameras `[..., V, ...]`."""
    local = jnp.einsum("...vij,...gj->...vgi", cameras.viewmats[..., :3, :3], points)
    local = local + cameras.viewmats[..., None, :3, 3]
    z = jnp.maximum(local[..., 2:], NEAR)
    focal = jnp.stack([cameras.Ks[..., 0, 0], cameras.Ks[..., 1, 1]], axis=-1)
    return focal[..., None, :] * local[..., :2] / z + cameras.Ks[..., None, :2, 2]


def splatted_flow(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    width: int,
    height: int,
    capacity: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B P Q h w 2"], Float[Array, "B P Q h w 1"]]:
    """Motion of the Gaussians in the picture, pixels to the next timestep, and its weight.

    Gaussian g's centres at t and t + 1 are projected; the displacements are blended as colours are
    (GaussianFlow, Gao et al. 2024, arXiv:2403.12365). A Gaussian counts by the smaller of its two
    opacities: one that fades away has no motion worth fitting. The weight is the blended share of
    such Gaussians in the pixel, [0, 1], without gradient.
    """
    cameras = jax.tree.map(lambda a: a[:, None], cameras)
    pixels = project_points(gaussians.means, cameras)  # [B, S, Q, G, 2]
    move = pixels[:, 1:] - pixels[:, :-1]
    now, later = gaussians.opacities[:, :-1], gaussians.opacities[:, 1:]
    share = jax.lax.stop_gradient(jnp.minimum(later, now) / jnp.maximum(now, 1e-6))
    share = jnp.broadcast_to(share[:, :, None, :, None], (*move.shape[:-1], 1))
    features = jnp.concatenate([share * move, share], axis=-1)  # [B, S - 1, Q, G, 3]
    # Displacements differ between views: views become a leading axis, with one camera each.
    rendered = _rasterize_batch(
        jax.tree.map(lambda a: a[:, :-1, None], gaussians),
        jax.tree.map(lambda a: a[:, :, :, None], cameras),
        features,
        width=width,
        height=height,
        capacity=capacity,
        implementation=implementation,
    )
    assert rendered.features is not None
    blended = rendered.features[:, :, :, 0]
    flow = blended[..., :2] / jnp.maximum(blended[..., 2:], 1e-3)
    return flow, jax.lax.stop_gradient(blended[..., 2:])


def flow_loss(
    flow: Float[Array, "B P Q h w 2"],
    weight: Float[Array, "B P Q h w 1"],
    target: Float[Array, "B P Q h w 2"],
    masks: Float[Array, "B P Q h w 1"],
    known: Float[Array, "B Q"],
    *,
    max_share: float = 0.1,
) -> Float[Array, ""]:
    """Weighted L1 between splatted and true flow inside the mask, in widths of the image.

    Pixels whose true motion exceeds `max_share` widths are left out: index correspondence and pixel
    alignment then contradict each other.
    """
    width = target.shape[-2]
    slow = jnp.sum(target**2, axis=-1, keepdims=True) < (max_share * width) ** 2
    weight = weight * masks * slow * known[:, None, :, None, None, None]
    error = jnp.sum(jnp.abs(flow - target), axis=-1, keepdims=True) / width
    return mean_where(error, weight)


def sample_bilinear(
    images: Float[Array, "*b h w c"], xy: Float[Array, "*b h w 2"]
) -> Float[Array, "*b h w c"]:
    """Images read at pixel positions (x, y), pixel centres at +0.5, edges repeated."""
    h, w = images.shape[-3:-1]
    x, y = xy[..., 0] - 0.5, xy[..., 1] - 0.5
    x0, y0 = jnp.floor(x), jnp.floor(y)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    flat = images.reshape(*images.shape[:-3], h * w, -1)

    def at(row, column):
        row = jnp.clip(row, 0, h - 1).astype(jnp.int32)
        column = jnp.clip(column, 0, w - 1).astype(jnp.int32)
        index = (row * w + column).reshape(*row.shape[:-2], h * w, 1)
        return jnp.take_along_axis(flat, index, axis=-2).reshape(images.shape)

    top = (1 - fx) * at(y0, x0) + fx * at(y0, x0 + 1)
    bottom = (1 - fx) * at(y0 + 1, x0) + fx * at(y0 + 1, x0 + 1)
    return (1 - fy) * top + fy * bottom


def warp_loss(
    renders: Float[Array, "B S Q h w 3"],
    images: Float[Array, "B S Q h w 3"],
    masks: Float[Array, "B S Q h w 1"],
    flow: Float[Array, "B P Q h w 2"],
    known: Float[Array, "B Q"],
    *,
    max_difference: float = 0.1,
) -> Float[Array, ""]:
    """How wrongly the render changes from t to t + 1, the later one drawn back by the true flow.

    The mean absolute difference between this change and that of the true pictures, which is not
    zero: lights that stand still shade a surface that turns. It needs no correspondence between
    Gaussians, and punishes flicker. Only pixels visible in both count: inside both masks, inside
    the picture, and of one colour (within `max_difference`) in the true pictures, which occluded
    pixels seldom are.
    """
    h, w = images.shape[-3:-1]
    x, y = jnp.meshgrid(jnp.arange(w) + 0.5, jnp.arange(h) + 0.5)
    xy = jnp.stack([x, y], axis=-1) + flow
    inside = (xy >= 0) & (xy <= jnp.array([w, h], xy.dtype))
    true_change = sample_bilinear(images[:, 1:], xy) - images[:, :-1]
    same = jnp.max(jnp.abs(true_change), axis=-1, keepdims=True) < max_difference
    weight = masks[:, :-1] * sample_bilinear(masks[:, 1:], xy) * same
    weight = weight * jnp.all(inside, axis=-1, keepdims=True)
    weight = weight * known[:, None, :, None, None, None]
    change = sample_bilinear(renders[:, 1:], xy) - renders[:, :-1]
    difference = jnp.mean(jnp.abs(change - true_change), axis=-1, keepdims=True)
    return mean_where(difference, weight)


def temporal_error(
    renders: Float[Array, "*b T V h w 3"],
    images: Float[Array, "*b T V h w 3"],
    masks: Float[Array, "*b T V h w 1"],
) -> Float[Array, "*b"]:
    """Mean |(r(t+1) - r(t)) - (g(t+1) - g(t))| over the pixels of the object at t or t + 1.

    r are renders, g true pictures; both in [0, 1]. The plain change, at fixed pixels: what moves
    wrongly counts as what flickers does.
    """

    def change(x):
        return jnp.asarray(x[..., 1:, :, :, :, :] - x[..., :-1, :, :, :, :])

    error = jnp.mean(jnp.abs(change(renders) - change(images)), axis=-1)
    inside = jnp.maximum(masks[..., 1:, :, :, :, 0], masks[..., :-1, :, :, :, 0])
    axes = (-4, -3, -2, -1)
    return jnp.sum(inside * error, axis=axes) / jnp.maximum(jnp.sum(inside, axis=axes), 1.0)


class Annealed(NamedTuple):
    """A weight that moves in a straight line over the steps, `start` to `end`, until `until`."""

    start: float
    end: float
    until: float  # share of all steps

    def at(self, progress: Float[Array, ""] | float) -> Float[Array, ""]:
        """The weight after a share `progress` of all steps."""
        done = jnp.minimum(jnp.asarray(progress) / self.until, 1.0)
        return self.start + (self.end - self.start) * done


def reconstruction_loss(
    decoded: Decoded,
    supervision: Supervision,
    *,
    progress: Float[Array, ""] | float = 0.0,
    lpips: LPIPS | None = None,
    coarse_weight: Sequence[float] = (0.5, 0.1, 1.0),
    alpha_weight: float = 1.0,
    foreground_weight: float = 0.0,
    lpips_weight: float = 0.0,
    own_depth_weight: Sequence[float] = (0.0, 0.0, 1.0),
    own_opacity_weight: Sequence[float] = (0.0, 0.0, 1.0),
    flow_weight: float = 0.0,
    warp_weight: float = 0.0,
    temporal_weight: float = 0.0,
    capacity: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of one step and its parts before weighting.

    The corrected Gaussians weigh 1 and the coarse ones `coarse_weight`, so that the model without
    the offset predictor stays a valid one. `coarse_weight` and the `own_` ones are (first, last,
    share of all steps at which it is the last), see `Annealed`; `progress` is the share that is
    done. Own pixels, `flow` and `warp` are computed where their weight is not zero; the last two
    only where the data has flow; and so `temporal`, the `temporal_error`. `pairs` counts the
    (Gaussian, tile) pairs of the render with most, for `pick_capacity`; `overflow`
    tells that `capacity` (of `rasterize`) was too small: the step's gradients are then not to be
    used. `renders` has the pictures [B, S, Q, h, w, 3] of the corrected Gaussians, "", and of the
    coarse ones, "coarse_", if made.

    Raises ValueError for weights without what they need: LPIPS' network, the data's depth.
    """
    images, masks, cameras = supervision.images, supervision.masks, supervision.cameras
    height, width = images.shape[-3:-1]
    options: dict[str, Any] = dict(
        width=width, height=height, capacity=capacity, implementation=implementation
    )
    loss = jnp.zeros(())
    metrics = {}
    overflow = jnp.zeros((), bool)
    pairs = jnp.zeros((), jnp.int32)
    coarse = Annealed(*coarse_weight)
    chosen = {
        "": take_timesteps(decoded.gaussians, supervision.timesteps),
        "coarse_": take_timesteps(decoded.coarse, supervision.timesteps),
    }
    renders = {}
    both = any(coarse[:2]) and decoded.coarse is not decoded.gaussians
    for prefix in ("", "coarse_") if both else ("",):
        weight = coarse.at(progress) if prefix else 1.0
        rendered = render(chosen[prefix], cameras, **options)
        rgb, alpha = pixel_losses(rendered, images, masks, foreground_weight=foreground_weight)
        loss = loss + weight * (rgb + alpha_weight * alpha)
        overflow = overflow | rendered.overflow
        pairs = jnp.maximum(pairs, rendered.num_intersections)
        renders[prefix] = rendered.renders
        metrics[f"{prefix}rgb"] = rgb
        metrics[f"{prefix}alpha"] = alpha
        metrics[f"{prefix}psnr"] = psnr(jnp.mean((rendered.renders - images) ** 2))
    if lpips_weight > 0:
        if lpips is None:
            raise ValueError(f"{lpips_weight=} needs the network: lpips=")
        metrics["lpips"] = jnp.mean(lpips(renders[""], jnp.asarray(images)))
        loss = loss + lpips_weight * metrics["lpips"]
    own = Annealed(*own_depth_weight), Annealed(*own_opacity_weight)
    if any(weight.start or weight.end for weight in own):
        if supervision.own is None:
            raise ValueError("own_depth_weight needs data with depth: `fourdstar prepare --depth`")
        found = own_pixel_losses(decoded.coarse, supervision.own)
        for name, weight, value in zip(("own_depth", "own_opacity"), own, found, strict=True):
            metrics[name] = value
            loss = loss + weight.at(progress) * value
    if supervision.flow is not None and flow_weight > 0:
        flow, share = splatted_flow(chosen[""], cameras, **options)
        metrics["flow"] = flow_loss(
            flow, share, supervision.flow, masks[:, :-1], supervision.flow_known
        )
        loss = loss + flow_weight * metrics["flow"]
    if supervision.flow is not None and warp_weight > 0:
        metrics["warp"] = warp_loss(
            renders[""], images, masks, supervision.flow, supervision.flow_known
        )
        loss = loss + warp_weight * metrics["warp"]
    if images.shape[1] > 1 and temporal_weight > 0:
        metrics["temporal"] = jnp.mean(temporal_error(renders[""], images, masks))
        loss = loss + temporal_weight * metrics["temporal"]
    metrics["loss"] = loss
    metrics["overflow"] = overflow
    metrics["pairs"] = pairs
    metrics["renders"] = renders
    return loss, metrics
