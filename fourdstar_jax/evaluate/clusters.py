"""The container's clusters, seen (paper Figure 7): plots of features, and maps over the views.

The clip's own tokens are clustered as generation would have clustered them: what the last timestep
is told. Drawn without a plotting library; t-SNE is scikit-learn's (the extra `plots`).
"""

import colorsys
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from fourdstar_jax.data import pipeline
from fourdstar_jax.generate import Model, encode_images
from fourdstar_jax.star.container import Container
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.types import Cameras

PANEL, LABEL = 320, 16  # pixels of a plot's side, and of the line above it
NONE = (225, 225, 225)  # of tokens in no cluster


class Found(NamedTuple):
    """Clusters of the tokens of the timesteps before the last, S = (T - 1) N of them."""

    features: Float[np.ndarray, "S D"]  # normalised, as they are clustered
    assignment: Int[np.ndarray, " S"]  # -1: none
    centers: Int[np.ndarray, " M"]  # tokens
    valid: Bool[np.ndarray, " M"]

    @property
    def occupancy(self) -> Int[np.ndarray, " M"]:
        """Tokens of each cluster there is."""
        return np.bincount(self.assignment[self.assignment >= 0], minlength=len(self.valid))[
            self.valid
        ]


def find(star: STAR, tokens: Int[np.ndarray, "T A K"], condition: Condition) -> Found:
    """Clusters of the tokens of one clip, all views of it.

    Raises ValueError for a STAR whose past is not in clusters of all history, and for clips of one
    timestep.
    """
    container = star.container
    if not isinstance(container, Container) or container.recursive:
        raise ValueError("this model's past is not in clusters of all tokens before")
    if len(tokens) < 2:
        raise ValueError("the first timestep has no past: a clip of two or more is needed")
    x, clusters = _cluster(star, jnp.asarray(tokens)[None], condition)
    x, clusters = jax.device_get((x[0, :-1], jax.tree.map(lambda y: y[0, -1], clusters)))
    seen = x.shape[0] * x.shape[1]
    return Found(x.reshape(seen, -1), clusters.assignment[:seen], clusters.centers, clusters.valid)


@jax.jit
def _cluster(star: STAR, tokens, condition: Condition):
    places = jax.tree.map(star.in_groups, star.places(condition))
    tokens = star.in_groups(tokens)
    visible = star.visible(tokens, None)
    groups = star.container.group(star.past(tokens, visible), tokens, places.rays, visible)
    return groups.x[..., : star.container.dim], star.container.cluster_history(groups)


def flat(features: Float[np.ndarray, "S D"]) -> dict[str, Float[np.ndarray, "S 2"]]:
    """Features in two dimensions, by PCA and, where scikit-learn is installed, by t-SNE."""
    centred = features - features.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    out = {"PCA": centred @ axes[:2].T}
    try:
        from sklearn.manifold import TSNE  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return out
    near = min(30.0, (len(features) - 1) / 3)
    found = TSNE(perplexity=near, init="pca", random_state=0).fit_transform(features)
    return out | {"t-SNE": np.asarray(found, np.float32)}


def colours(number: int) -> Int[np.ndarray, "M 3"]:
    """As many colours as there are clusters; neighbours in number differ in hue and shade."""
    hues = (np.arange(number) * 0.618034) % 1
    shades = 0.55 + 0.4 * (np.arange(number) % 3) / 2
    values = [colorsys.hsv_to_rgb(h, 0.85, v) for h, v in zip(hues, shades, strict=True)]
    return np.rint(255 * np.array(values).reshape(-1, 3)).astype(np.int64)


def plot(found: Found, timesteps: int) -> Any:
    """Each projection twice: tokens by timestep with the centre of each, and clusters' centres."""
    from PIL import Image, ImageDraw

    projections = flat(found.features)
    sheet = Image.new("RGB", (2 * PANEL, len(projections) * (PANEL + LABEL)), (255, 255, 255))
    draw: Any = ImageDraw.Draw(sheet)
    step = np.repeat(np.arange(timesteps), len(found.features) // timesteps)
    by_step, by_cluster = colours(timesteps), colours(len(found.valid))
    for row, (name, points) in enumerate(projections.items()):
        low, high = points.min(axis=0), points.max(axis=0)
        places = 8 + (points - low) / np.maximum(high - low, 1e-9) * (PANEL - 16)
        top = row * (PANEL + LABEL) + LABEL
        draw.text((4, top - LABEL), f"{name}: tokens by timestep, and their centres", (0, 0, 0))
        draw.text((PANEL + 4, top - LABEL), f"{name}: centres of the clusters", (0, 0, 0))

        def dot(place, left, colour, radius, edge=None, top=top):
            x, y = place[0] + left, place[1] + top
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=tuple(int(c) for c in colour), outline=edge)

        for place, t in zip(places, step, strict=True):
            dot(place, 0, by_step[t], 1)
            dot(place, PANEL, NONE, 1)
        for t in range(timesteps):
            dot(places[step == t].mean(axis=0), 0, by_step[t], 6, (0, 0, 0))
        for cluster in np.flatnonzero(found.valid):
            dot(places[found.centers[cluster]], PANEL, by_cluster[cluster], 5, (0, 0, 0))
    return sheet


def paint(
    found: Found, images: Float[np.ndarray, "t V h w 3"], grid: int
) -> Float[np.ndarray, "t V h w 3"]:
    """Pictures of the views in the groups with the colour of each token's cluster over them."""
    t, views, height, width, _ = images.shape
    table = np.concatenate([colours(len(found.valid)), [NONE]]) / 255
    maps = table[found.assignment].reshape(t, views, grid, grid, 3)
    maps = maps.repeat(height // grid, axis=2).repeat(width // grid, axis=3)
    return 0.5 * images + 0.5 * maps


def write(
    bundle_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    split: str = "unseen_clip",
    clip: int = 0,
) -> Found:
    """Writes plots and, below them, maps of a clip's clusters as a picture.

    A row of maps is a timestep before the last, a column a view. Raises ValueError if `path` is no
    name of a picture, and for clips that there are not.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"{path} must end in .png, .jpg or .webp")
    model = Model(bundle_dir)
    example = _example(model, data_dir, split, clip)
    images = example["images"]
    tokens = np.asarray(encode_images(model.tokenizer, jnp.asarray(images)))
    condition = Condition(
        text_ids=jnp.zeros((1, model.bundle.stage("star").model["text_length"]), jnp.int32),
        video_tokens=jnp.asarray(tokens[None, :, 0]),
        times=jnp.asarray(example["times"])[None],
        cameras=Cameras(*(jnp.asarray(example[name])[None] for name in ("viewmats", "Ks"))),
    )
    found = find(model.star, tokens.reshape(len(tokens), -1, tokens.shape[-1]), condition)
    first = 0 if model.star.num_known else 1
    painted = paint(found, images[:-1, first:], model.star.grid)
    t, views, height, width, _ = painted.shape
    maps = painted.transpose(0, 2, 1, 3, 4).reshape(t * height, views * width, 3)
    maps = Image.fromarray(np.rint(255 * np.clip(maps, 0, 1)).astype(np.uint8))
    plots = plot(found, t)
    sheet = Image.new("RGB", (max(plots.width, maps.width), plots.height + maps.height), "white")
    sheet.paste(plots, (0, 0))
    sheet.paste(maps, (0, plots.height))
    sheet.save(path)
    return found


def _example(model: Model, data_dir, split: str, clip: int) -> dict[str, np.ndarray]:
    loader = pipeline.make_loader(
        data_dir, split, batch_size=1, timesteps=model.max_timesteps, train=False
    )
    for number, batch in enumerate(loader):
        if number == clip:
            return {name: batch[name][0] for name in ("images", "times", "viewmats", "Ks")}
    raise ValueError(f"{data_dir}: {split} has no clip {clip}; they count from 0")
