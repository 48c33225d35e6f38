"""Pictures of some clips in training: what the 4D VQ-VAE draws, and what STAR samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from fourdstar_jax.geometry import RADIUS
from fourdstar_jax.train import inputs
from fourdstar_jax.types import Array, Cameras
from fourdstar_jax.vqvae import losses

ROWS = 6  # of a picture; clips of one of samples
DEPTHS = (RADIUS - 0.6, RADIUS + 0.6)  # black to white, scene units
FASTEST = 0.05  # of the width of a picture from one timestep to the next: the strongest colour


def render_step(graphdef, state, frozen, batch, *, capacity=None) -> dict[str, Array]:
    """What is drawn of a batch, `[B, Q, h, w, ...]`: timestep 0 from the input view, from the view
    behind and from an extra one, where there are any. Pure.
    """
    model = nnx.merge(graphdef, state.params, state.rest)
    batch = inputs.prepare(batch, frozen.frames)
    rig = batch["images"].shape[2]
    # Views of the rig, then the extra ones.
    views = sorted({0, rig // 2}) + ([rig] if "extra_images" in batch else [])

    chosen = np.array(views)
    cameras = Cameras(*(losses.all_views(batch, name)[:, chosen] for name in ("viewmats", "Ks")))
    codes = frozen.tokenizer.codes(frozen.tokenizer.encode(batch["images"]))
    decoded = model(codes, Cameras(batch["viewmats"], batch["Ks"]), batch["times"])
    size = batch["images"].shape[-2]
    options: dict[str, Any] = dict(width=size, height=size, capacity=capacity)
    first = jax.tree.map(lambda x: x[:, :1], decoded)
    corrected = losses.render(first.gaussians, cameras, **options, with_depths=True)
    assert corrected.depths is not None
    out = {
        "truth": losses.all_views(batch, "images")[:, 0, chosen],
        "coarse": losses.render(first.coarse, cameras, **options).renders[:, 0],
        "corrected": corrected.renders[:, 0],
        "depth": corrected.depths[:, 0],
        "alpha": corrected.alphas[:, 0],
    }
    if batch["images"].shape[1] > 1:
        two = jax.tree.map(lambda x: x[:, :2], decoded.gaussians)
        flow, weight = losses.splatted_flow(two, cameras, **options)
        out["flow"] = (flow * (weight > 0.5))[:, 0]
    return out


def flow_colours(flow: Float[np.ndarray, "*b h w 2"]) -> Float[np.ndarray, "*b h w 3"]:
    """Hue by direction (right is red, down is green-yellow), white where nothing moves."""
    share = np.linalg.norm(flow, axis=-1) / (FASTEST * flow.shape[-2])
    sixths = np.arctan2(flow[..., 1], flow[..., 0]) * 3 / np.pi
    k = (np.array([5.0, 3.0, 1.0]) + sixths[..., None]) % 6
    return 1 - np.minimum(share, 1)[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1)


def sheet(drawn: Mapping[str, Array]) -> Float[np.ndarray, "h w 3"]:
    """Truth | coarse | corrected | depth | flow of `render_step`, in [0, 1], a view a row."""
    columns = []
    for name in ("truth", "coarse", "corrected", "depth", "flow"):
        if name not in drawn:
            continue
        x = np.asarray(drawn[name], np.float32)
        if name == "depth":
            alpha = np.asarray(drawn["alpha"], np.float32)
            shade = (x - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
            x = np.repeat(np.where(alpha > 0.5, shade, 1), 3, axis=-1)
        if name == "flow":
            x = flow_colours(x)
        columns.append(np.clip(x.reshape(-1, *x.shape[2:])[:ROWS], 0, 1))
    rows = np.concatenate(columns, axis=2)  # [rows, h, columns w, 3]
    return rows.reshape(-1, *rows.shape[2:])


def samples_sheet(
    truth: Float[np.ndarray, "B T V h w 3"], samples: Float[np.ndarray, "B T V h w 3"]
) -> Float[np.ndarray, "H W 3"]:
    """Clip after clip a row of the truth and below it one of what was sampled, in [0, 1].

    A row has all views at the first timestep, then at the middle and at the last one.
    """
    steps = sorted({0, truth.shape[1] // 2, truth.shape[1] - 1})
    both = np.stack([truth[:ROWS, steps], samples[:ROWS, steps]], axis=1)
    rows = einops.rearrange(both, "b two t v h w c -> (b two h) (t v w) c")
    return np.clip(rows, 0, 1)


def save(path: Path, picture: Float[np.ndarray, "h w 3"]) -> None:
    """Writes a picture in [0, 1] as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(255 * picture).astype(np.uint8)).save(path)
