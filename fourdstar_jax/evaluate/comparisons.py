"""What figures of generation mean: beside the same ones of what costs nothing, and of the ceiling.

    flat_card     the input's first frame, a card through the object's middle that stands still
    nearest_clip  the training clip whose input view is nearest, seen from the same sides
    ceiling       what the 4D VQ-VAE makes of the true tokens
    generation    what STAR samples from the video

All are measured against the true pictures of the sides: the views at +90, 180 and 270 degrees of
the input view where the rig has them, else all novel views.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from fourdstar_jax import geometry
from fourdstar_jax.data.batching import in_batches
from fourdstar_jax.evaluate import motion
from fourdstar_jax.evaluate.metrics import bootstrap_interval, by_object, psnr
from fourdstar_jax.evaluate.progress import Log, Progress, silent
from fourdstar_jax.evaluate.protocols import SAME_PSNR
from fourdstar_jax.generate import Model, decode_tokens
from fourdstar_jax.kernels.rasterize import pick_capacity
from fourdstar_jax.perceptual.lpips import LPIPS
from fourdstar_jax.types import Array, Cameras, Gaussians
from fourdstar_jax.vqvae import losses

SIDES = (90.0, 180.0, 270.0)  # degrees from the input view
PICTURES = 8  # that go through LPIPS at once
CLIPS = 8  # of the training split that are compared at once
MADE_OF = ("input_images", "input_masks")
ROOM = 1 << 30  # bytes of vectors that wait to be compared
# figure: what it is the ratio of, where it is one
RATIOS = {"change_ratio": ("change", "true_change"), "flow_ratio": ("flow", "true_flow")}
Row = dict[str, float]


def sides(rig: geometry.Rig) -> list[int]:
    """Which of the rig's views are measured."""
    turned = (np.array(rig.azimuths_deg) - rig.azimuths_deg[0]) % 360
    found = [np.flatnonzero(np.abs(turned - side) < 0.1) for side in SIDES]
    if all(len(places) for places in found):
        return [int(places[0]) for places in found]
    return list(range(1, rig.num_views))


def compare(
    model: Model,
    clips: Mapping[str, Any],
    train: Mapping[str, Any],
    samples: tuple[Int[np.ndarray, " m"], Int[np.ndarray, "m T V n K"]] | None,
    lpips: LPIPS | None,
    *,
    log: Log = silent,
) -> dict[str, Any]:
    """Figures of each of the four over objects, and each clip's own, as a JSON-ready dict.

    `clips` are of `unseen.load`, `train` of `unseen.load_train`; `samples` are which clips were
    sampled, and their tokens.
    """
    where = sides(model.rig)
    objects, count = clips["object"], len(clips["images"])
    truth, masks = clips["images"][:, :, where], clips["masks"][:, :, where]
    flow = clips["flow"][:, :, where] if "flow" in clips else None
    true_rows = [_of_truth(lpips, truth[i], masks[i], None if flow is None else flow[i])
                 for i in range(count)]  # fmt: skip
    rows: dict[str, dict[int, Row]] = {}

    def measure(name: str, i: int, images, alphas, more: Row | None = None) -> None:
        found = measured(lpips, images, alphas, truth[i], masks[i]) | true_rows[i] | (more or {})
        rows.setdefault(name, {})[i] = found
        progress.step()

    nearest = nearest_clips(lpips, clips, train)
    progress = Progress(3 * count + (0 if samples is None else len(samples[0])), log, "rows")
    timesteps = truth.shape[1]
    for i in range(count):
        cameras = Cameras(clips["viewmats"][i], clips["Ks"][i])
        card, alphas = flat_card(clips["images"][i, 0, 0], clips["masks"][i, 0, 0], cameras)
        still = [np.repeat(x[None, where], timesteps, axis=0) for x in (card, alphas)]
        measure("flat_card", i, still[0], still[1], {"flow": 0.0})
        images, alphas = train["read"](int(nearest[i]))
        measure("nearest_clip", i, images[:, where], alphas[:, where])
    shown: dict[str, dict[int, np.ndarray]] = {}
    ceilings = (np.arange(count), clips["tokens"])
    for name, found in (("ceiling", ceilings), ("generation", samples)):
        for place, tokens in () if found is None else zip(*found, strict=True):
            i = int(place)
            images, alphas, speed = rendered(model, tokens, clips, i, where)
            measure(name, i, images[:, where], alphas[:, where], speed)
            if name == "ceiling":
                novel = (x[:, 1:] for x in (images, alphas, clips["images"][i], clips["masks"][i]))
                rows.setdefault("ceiling_novel_views", {})[i] = measured(lpips, *novel)
            else:
                shown.setdefault(name, {})[i] = images[:, where]
    for name, pictures in shown.items():
        for i, right in retrieved(lpips, pictures, truth, masks).items():
            rows[name][i]["retrieval_top1"] = float(right)
    azimuths = np.array(model.rig.azimuths_deg)
    return {
        "views_deg": [float(x) for x in (azimuths[where] - azimuths[0]) % 360],
        **{name: summary(found, objects) for name, found in rows.items()},
        "nearest_training_clips": [int(train["clip"][j]) for j in nearest],
        "clips": {
            name: [{"clip": int(clips["clip"][i]), "object": str(objects[i]), **row}
                   for i, row in found.items()]
            for name, found in rows.items()
        },
    }  # fmt: skip


def summary(rows: Mapping[int, Row], objects: Shaped[np.ndarray, " n"]) -> dict[str, Any]:
    """Means, or ratios of means, over objects of the means over each one's clips, with intervals.

    A clip that lacks a figure does not count for it.
    """
    out: dict[str, Any] = {}
    names = {name: (name,) for name in dict.fromkeys(k for row in rows.values() for k in row)}
    parts = {part for pair in RATIOS.values() for part in pair}
    for name, of in ({n: k for n, k in names.items() if n not in parts} | RATIOS).items():
        places = [i for i, row in rows.items() if all(part in row for part in of)]
        if not places:
            continue
        groups = objects[places]
        values = [by_object([rows[i][part] for i in places], groups) for part in of]
        over = values[1] if len(values) > 1 else np.ones(len(values[0]))
        if not over.mean() > 0:
            continue  # the truth stands still
        interval = None
        if len(values[0]) > 1:
            interval = list(bootstrap_interval(values[0], over=over)[1:])
        out[name] = {
            "value": float(values[0].mean() / over.mean()),
            "interval_95": interval,
            "objects": len(values[0]),
            "clips": len(places),
        }
    return out


def measured(
    lpips: LPIPS | None,
    images: Float[Array, "T S h w 3"],
    alphas: Float[Array, "T S h w 1"],
    truth: Float[Array, "T S h w 3"],
    masks: Float[Array, "T S h w 1"],
) -> Row:
    """PSNR, the same inside the true mask, alpha IoU and, with its network, LPIPS.

    `change` is LPIPS(t, t+1) of the pictures, of two timesteps or more.
    """
    covered, there = np.asarray(alphas) > 0.5, np.asarray(masks) > 0.5
    axes = (2, 3, 4)
    both, either = (covered & there).sum(axis=axes), (covered | there).sum(axis=axes)
    found = {
        "psnr": min(psnr(images, truth), SAME_PSNR),
        "psnr_in_mask": min(psnr(images, truth, masks), SAME_PSNR),
        "alpha_iou": float(np.where(either, both / np.maximum(either, 1), 1.0).mean()),
    }
    if lpips is not None:
        found["lpips"] = distance(lpips, images, truth)
        if len(images) > 1:
            found["change"] = distance(lpips, images[:-1], images[1:])
    return found


def _of_truth(lpips, truth, masks, flow) -> Row:
    """What ratios are taken of."""
    found = {}
    if lpips is not None and len(truth) > 1:
        found["true_change"] = distance(lpips, truth[:-1], truth[1:])
    if flow is not None and len(truth) > 1:
        found["true_flow"] = _speed(flow, masks)
    return found


def _speed(flow: Float[Array, "P S h w 2"], masks: Float[Array, "_ S h w 1"]) -> float:
    """Mean length of the flow inside the masks, pixels a timestep."""
    inside = np.asarray(masks)[: len(flow), ..., 0] > 0.5
    lengths = np.linalg.norm(np.asarray(flow, np.float32), axis=-1)
    return float(lengths[inside].mean()) if inside.any() else 0.0


def distance(lpips: LPIPS, first: Array, second: Array) -> float:
    """Mean LPIPS of pairs of pictures, a few at a time."""
    first, second = (np.asarray(x).reshape(-1, *x.shape[-3:]) for x in (first, second))
    return float(in_batches(lambda a, b: _lpips(lpips, a, b), (first, second), PICTURES).mean())


@jax.jit
def _lpips(lpips: LPIPS, first: Array, second: Array) -> Array:
    return lpips(first, second)


def flat_card(
    image: Float[Array, "h w 3"], mask: Float[Array, "h w 1"], cameras: Cameras
) -> tuple[Float[np.ndarray, "V h w 3"], Float[np.ndarray, "V h w 1"]]:
    """A picture on white of view 0, seen from all views as a card, with its mask.

    The card goes through the world's origin and faces view 0; from behind it is mirrored, and from
    the side nothing of it is seen.
    """
    height, width = image.shape[:2]
    origins, directions = (
        np.asarray(x, np.float64) for x in geometry.pixel_rays(cameras, width=width, height=height)
    )
    normal = np.asarray(cameras.viewmats, np.float64)[0, 2, :3]
    slope = directions @ normal
    edge_on = np.abs(slope) < 1e-4
    distance = -(origins @ normal) / np.where(edge_on, 1.0, slope)
    seen = ~edge_on & (distance > 1e-3)
    points = (origins + distance[..., None] * directions).reshape(-1, 3)
    front = jax.tree.map(lambda x: np.asarray(x, np.float64)[:1], cameras)
    x, y = np.asarray(losses.project_points(points, front)).reshape(*seen.shape, 2).T - 0.5
    places = np.stack([np.where(seen, a.T, -10.0) for a in (y, x)])
    drawn = [1 - motion.at(1 - np.asarray(image), p) for p in np.moveaxis(places, 1, 0)]
    masks = [motion.at(np.asarray(mask), p) for p in np.moveaxis(places, 1, 0)]
    return np.stack(drawn), np.stack(masks)


def rendered(
    model: Model,
    tokens: Int[np.ndarray, "T V n K"],
    clips: Mapping[str, Any],
    i: int,
    where: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, Row]:
    """Pictures and alphas of all views of tokens, and figures of their Gaussians.

    `flow` is the mean rendered flow of the views `where`; `reprojection` how much the pictures that
    the 2D tokenizer decodes differ in the colour of a Gaussian that two views see.
    """
    cameras = Cameras(clips["viewmats"][i], clips["Ks"][i])
    gaussians = decode_tokens(model.tokenizer, model.vqvae, tokens[None], cameras)
    options: dict[str, Any] = dict(size=model.resolution)
    found = _pictures(gaussians, cameras, **options)
    if found.overflow:
        options["capacity"] = pick_capacity(int(found.num_intersections))
        found = _pictures(gaussians, cameras, **options)
    images, alphas = np.asarray(found.renders[0]), np.asarray(found.alphas[0])
    moving = Gaussians(*(np.asarray(x[0]) for x in gaussians))
    decoded = np.asarray(_decoded(model.tokenizer, tokens))
    sums = np.zeros(2)
    for t, depths in enumerate(np.asarray(found.depths)[0, ..., 0]):
        points, weights = np.asarray(moving.means[t]), np.asarray(moving.opacities[t])
        sums += motion.reprojection_error(decoded[t], depths, cameras, points, weights)
    figures = {"reprojection": float(sums[0] / sums[1])} if sums[1] else {}
    if len(tokens) < 2 or "flow" not in clips:
        return images, alphas, figures
    flows = []
    for view in where:
        camera = Cameras(*(np.asarray(x)[view : view + 1] for x in cameras))
        size = model.resolution
        flows.append(motion.rendered_flow(moving, camera, width=size, height=size))
    return images, alphas, figures | {"flow": _speed(np.stack(flows, axis=1), alphas[:, where])}


@jax.jit
def _decoded(tokenizer: Any, tokens: Array) -> Array:
    return tokenizer.decode(tokens)


@jax.jit(static_argnames=("size", "capacity"))
def _pictures(gaussians: Gaussians, cameras: Cameras, *, size: int, capacity: int | None = None):
    cameras = jax.tree.map(lambda x: jnp.asarray(x)[None], cameras)
    options: dict[str, Any] = dict(width=size, height=size, capacity=capacity)
    return losses.render(gaussians, cameras, with_depths=True, **options)


# Which of many clips is nearest


def nearest_clips(
    lpips: LPIPS | None, clips: Mapping[str, Any], train: Mapping[str, Any]
) -> Int[np.ndarray, " n"]:
    """For each clip, which training clip's input view is nearest, timestep by timestep.

    By LPIPS; without its network by the squared difference of colours, over the pixels of either
    mask.
    """
    found = []
    for queries in _chunks(lpips, clips["images"][:, :, :1], clips["masks"][:, :, :1]):
        near = [
            queries.distances(_vectors(lpips, *(train[k][j : j + CLIPS] for k in MADE_OF)))
            for j in range(0, len(train["clip"]), CLIPS)
        ]
        found.append(np.argmin(np.concatenate(near, axis=1), axis=1))
    return np.concatenate(found)


def retrieved(
    lpips: LPIPS | None,
    pictures: Mapping[int, Float[np.ndarray, "T S h w 3"]],
    truth: Float[np.ndarray, "n T S h w 3"],
    masks: Float[np.ndarray, "n T S h w 1"],
) -> dict[int, bool]:
    """Of the pictures made for a clip: is the nearest of all true clips that one? As above."""
    places = np.array(list(pictures))
    whole = np.ones_like(masks[:1])
    made = np.stack(list(pictures.values()))
    found = []
    for queries in _chunks(lpips, made, np.repeat(whole, len(made), axis=0)):
        near = [
            queries.distances(_vectors(lpips, truth[c : c + 1], whole)) for c in range(len(truth))
        ]
        found.append(np.argmin(np.concatenate(near, axis=1), axis=1))
    return dict(zip(places.tolist(), (np.concatenate(found) == places).tolist(), strict=True))


class _Vectors:
    """Clips as rows whose squared distance, over the pixels that count, is what is compared."""

    def __init__(self, rows: Float[np.ndarray, "n d"], masks: Float[np.ndarray, "n p"] | None):
        self.rows, self.masks = rows, masks

    def distances(self, other: "_Vectors") -> Float[np.ndarray, "n m"]:
        """All pairs'."""
        squares = [np.einsum("nd,nd->n", x.rows, x.rows) for x in (self, other)]
        between = squares[0][:, None] + squares[1] - 2 * self.rows @ other.rows.T
        if self.masks is None or other.masks is None:
            return between
        a, b = self.masks, other.masks
        return between / np.maximum(a.sum(axis=1)[:, None] + b.sum(axis=1) - a @ b.T, 1)


def _vectors(lpips: LPIPS | None, images: np.ndarray, masks: np.ndarray) -> _Vectors:
    count = len(images)
    images = images / np.float32(255) if images.dtype == np.uint8 else images
    if lpips is None:
        there = (masks > 0.5).astype(np.float32).reshape(count, -1)
        return _Vectors((1 - images).astype(np.float32).reshape(count, -1), there)
    flat = images.reshape(-1, *images.shape[-3:])
    rows = in_batches(lambda x: _embedded(lpips, x), (flat,), PICTURES)
    return _Vectors(rows.reshape(count, -1), None)


def _chunks(lpips: LPIPS | None, images: np.ndarray, masks: np.ndarray) -> Iterator[_Vectors]:
    """A few clips at a time, so that their vectors have room."""
    first = _vectors(lpips, images[:1], masks[:1])
    size = max(1, ROOM // first.rows.nbytes)
    for start in range(0, len(images), size):
        yield _vectors(lpips, images[start : start + size], masks[start : start + size])


@jax.jit
def _embedded(lpips: LPIPS, images: Array) -> Array:
    return lpips.vectors(images)
