"""What the offsets are worth: corrected against coarse Gaussians, with right and with wrong codes.

Every clip is seen from its first frame, all its timesteps from all its views. Wrong codes are drawn
as in training: each timestep's anew, near ones in place of the right ones, view 0's left as they
are. The same errors go into both. Differences are paired over objects.

Beside them stands an oracle, what averaging over time could win at best: of each timestep the mean
of as many coarse pictures as there are timesteps, each with wrong codes drawn anew. So much would T
timesteps tell if nothing moved, or every motion were known. More is won only by telling which codes
are wrong: with all of them undone, what is left is the coarse row at a rate of 0.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.data import pipeline
from fourdstar_jax.evaluate.metrics import bootstrap_interval
from fourdstar_jax.generate import Model
from fourdstar_jax.kernels.rasterize import pick_capacity
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.train import inputs
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae import losses, measures


def measure(
    vqvae, tokenizer, lpips, near, batch, key, rate, *, capacity: int | None = None
) -> dict[str, Any]:
    """Measures of one clip, a batch of one: `coarse_`, `corrected_` and `oracle_` ones.

    A share `rate` of the codes is wrong. `pairs` and `overflow` are those of the rasterizer. Pure.
    """
    batch = inputs.prepare(batch)
    tokens = tokenizer.encode(batch["images"])
    rig_cameras = Cameras(batch["viewmats"], batch["Ks"])
    images, masks, *cameras = (
        losses.all_views(batch, name) for name in ("images", "masks", "viewmats", "Ks")
    )
    size, rig = images.shape[-2], batch["images"].shape[2]

    def decode(key):
        noisy = quantize.corrupt(key, tokens[:, :, 1:], near, rate)
        codes = tokenizer.codes(jnp.concatenate([tokens[:, :, :1], noisy], axis=2))
        return vqvae(codes, rig_cameras, batch["times"])

    def render(gaussians):
        to = Cameras(*cameras)
        return losses.render(gaussians, to, width=size, height=size, capacity=capacity)

    decoded = decode(key)
    coarse, corrected = render(decoded.coarse), render(decoded.gaussians)
    draws = jax.random.split(key, images.shape[1])
    others = jax.lax.map(lambda key: render(decode(key).coarse), draws)
    pairs = (jnp.max(x.num_intersections) for x in (coarse, corrected, others))
    out: dict[str, Any] = {
        "pairs": functools.reduce(jnp.maximum, pairs),
        "overflow": coarse.overflow | corrected.overflow | jnp.any(others.overflow),
    }
    pictures = {
        "coarse": coarse.renders,
        "corrected": corrected.renders,
        "oracle": jnp.mean(others.renders, axis=0),
    }
    for name, renders in pictures.items():
        found = {
            "temporal_error": losses.temporal_error(renders, images, masks)[0],
            "psnr_in_mask": losses.psnr_in_mask(renders, images, masks),
        }
        if lpips is not None:
            found["temporal_lpips"] = measures.temporal_lpips(lpips, renders, images)[0]
            found["lpips"] = jnp.mean(lpips(renders, images))
        if "flow" in batch:
            seen, true, inside = (x[:, :, :rig] for x in (renders, images, masks))
            known = jnp.ones((1, rig))
            found["warping_error"] = losses.warp_loss(seen, true, inside, batch["flow"], known)
        out |= {f"{name}_{key}": value for key, value in found.items()}
    return out


def compare(
    bundle_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    split: str = "unseen_clip",
    *,
    rates: Sequence[float] = (0.0, 0.1),
    near: int = 16,
    lpips: str | os.PathLike[str] | None = None,
    timesteps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures of coarse and corrected Gaussians by share of wrong codes, as a JSON-ready dict.

    For each rate and measure: the means over objects of both, `gain`, the mean over objects of
    coarse minus corrected with its 95 % interval, and `gain_share`, the same as a share of the
    coarse mean. Where lower is better a positive gain is the offsets' worth. `oracle` and
    `oracle_gain` (with its `_share`) are what averaging over time gives at best.

    Args:
      near: how many codes one may be taken for.
      lpips: file of LPIPS' weights (docs/WEIGHTS.md); without it nothing is measured by LPIPS.
      timesteps: of a clip; by default as many as the model was trained with.

    Raises ValueError if the dataset's rig is not the bundle's, or for an unknown split.
    """
    model, data_dir = Model(bundle_dir), Path(data_dir)
    if pipeline.rig(data_dir) != model.rig:
        raise ValueError(f"the dataset's rig {pipeline.rig(data_dir)} is not the bundle's")
    tokenizer = model.tokenizer
    network = None if lpips is None else perceptual.load(lpips)
    codes = quantize.near_codes(tokenizer.codebooks(), near, has_blank=tokenizer.has_blank)
    clips = pipeline.read_manifest(data_dir)["clips"]
    loader = pipeline.make_loader(
        data_dir,
        split,
        form="uint8",
        batch_size=1,
        timesteps=timesteps or model.max_timesteps,
        train=False,
    )
    step = jax.jit(measure, static_argnames="capacity")
    step = functools.partial(step, model.vqvae, tokenizer, network, codes)
    capacity = None
    rows: dict[float, dict[str, list[dict[str, float]]]] = {rate: {} for rate in rates}
    for batch in loader:
        clip = int(batch["clip"][0])
        key = jax.random.fold_in(jax.random.key(seed), clip)
        name = clips[clip]["clip_id"].partition("#")[0]
        for rate, objects in rows.items():
            found = jax.device_get(step(batch, key, rate, capacity=capacity))
            if found["overflow"]:
                capacity = pick_capacity(int(found["pairs"]), capacity)
                found = jax.device_get(step(batch, key, rate, capacity=capacity))
            assert not found["overflow"], "the rasterizer overflowed"
            del found["overflow"], found["pairs"]
            objects.setdefault(name, []).append({k: float(v) for k, v in found.items()})
    report: dict[str, Any] = {
        "split": split,
        "objects": len(rows[rates[0]]),
        "clips": sum(len(found) for found in rows[rates[0]].values()),
        "near": near,
        **pipeline.provenance(data_dir),
    }
    for rate, objects in rows.items():
        report[f"{rate:g}"] = _summary(list(objects.values()))
    return report


def _summary(objects: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Means over objects of the means over each one's clips, and what the offsets gain."""
    out = {}
    names = [name.removeprefix("coarse_") for name in objects[0][0] if name.startswith("coarse_")]
    for name in names:

        def means(of, name=name):
            return np.array([np.mean([clip[f"{of}_{name}"] for clip in c]) for c in objects])

        coarse = means("coarse")
        row: dict[str, Any] = {"coarse": float(coarse.mean())}
        for of, gain in (("corrected", "gain"), ("oracle", "oracle_gain")):
            other = means(of)
            found = coarse - other
            row[of] = float(other.mean())
            row[gain] = bootstrap_interval(found) if len(found) > 1 else (float(found.mean()),) * 3
            row[f"{gain}_share"] = tuple(x / row["coarse"] for x in row[gain])
        out[name] = row
    return out
