"""What the offsets are worth: corrected against coarse Gaussians, with right and with wrong codes.

Every clip is seen from its first frame, all its timesteps from all its views. Wrong codes are drawn
as in training: each timestep's anew, near ones in place of the right ones, view 0's left as they
are. The same errors go into both. Differences are paired over objects.
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
    vqvae, tokenizer, lpips, near, batch, key, *, rate: float, capacity: int | None = None
) -> dict[str, Any]:
    """Measures of one clip, a batch of one, by their name and `coarse_` or `corrected_` before it.

    A share `rate` of the codes is wrong. `pairs` and `overflow` are those of the rasterizer. Pure.
    """
    batch = inputs.prepare(batch)
    tokens = tokenizer.encode(batch["images"])
    noisy = quantize.corrupt(key, tokens[:, :, 1:], near, rate)
    codes = tokenizer.codes(jnp.concatenate([tokens[:, :, :1], noisy], axis=2))
    decoded = vqvae(codes, Cameras(batch["viewmats"], batch["Ks"]), batch["times"])
    whole = {
        name: jnp.concatenate([batch[name], batch[f"extra_{name}"]], axis=axis)
        if f"extra_{name}" in batch
        else batch[name]
        for name, axis in (("images", 2), ("masks", 2), ("viewmats", 1), ("Ks", 1))
    }
    images, masks = whole["images"], whole["masks"]
    cameras = Cameras(whole["viewmats"], whole["Ks"])
    size, rig = images.shape[-2], batch["images"].shape[2]
    out: dict[str, Any] = {"pairs": 0, "overflow": False}
    both = {"coarse": decoded.coarse, "corrected": decoded.gaussians}
    for name, gaussians in both.items():
        rendered = losses.render(gaussians, cameras, width=size, height=size, capacity=capacity)
        renders = rendered.renders
        found = {
            "temporal_error": measures.temporal_error(renders, images, masks)[0],
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
        out["pairs"] = jnp.maximum(out["pairs"], rendered.num_intersections)
        out["overflow"] = out["overflow"] | rendered.overflow
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
    coarse minus corrected with its 95 % interval, and `gain_share`, that of the coarse mean. Where
    lower is better a positive gain is the offsets' worth.

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
    step = jax.jit(measure, static_argnames=("rate", "capacity"))
    step = functools.partial(step, model.vqvae, tokenizer, network, codes)
    capacity = None
    rows: dict[float, dict[str, list[dict[str, float]]]] = {rate: {} for rate in rates}
    for batch in loader:
        clip = int(batch["clip"][0])
        key = jax.random.fold_in(jax.random.key(seed), clip)
        name = clips[clip]["clip_id"].partition("#")[0]
        for rate, objects in rows.items():
            found = jax.device_get(step(batch, key, rate=rate, capacity=capacity))
            if found["overflow"]:
                capacity = pick_capacity(int(found["pairs"]), capacity)
                found = jax.device_get(step(batch, key, rate=rate, capacity=capacity))
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
        coarse, corrected = (
            np.array([np.mean([clip[f"{which}_{name}"] for clip in clips]) for clips in objects])
            for which in ("coarse", "corrected")
        )
        gain = coarse - corrected
        out[name] = {
            "coarse": float(coarse.mean()),
            "corrected": float(corrected.mean()),
            "gain": bootstrap_interval(gain) if len(gain) > 1 else (float(gain.mean()),) * 3,
            "gain_share": float(gain.mean() / coarse.mean()),
        }
    return out
