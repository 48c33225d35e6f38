"""Figures of a trained bundle on unseen clips: reconstruction, likelihood, use of its conditions.

Reconstruction is compared with the mean training image of each view. STAR's likelihood of the novel
views' tokens is compared with a count model, and with itself under another clip's video, another
object's container and swapped captions. Every difference is a mean over clips with a 95 % bootstrap
interval; clips are seen from their first frame.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.data import pipeline
from fourdstar_jax.data.batching import filled_batches, in_batches
from fourdstar_jax.evaluate import counts
from fourdstar_jax.evaluate.metrics import bootstrap_interval, psnr
from fourdstar_jax.generate import Model, encode_images
from fourdstar_jax.kernels.rasterize import rasterize
from fourdstar_jax.star.forcing import Forcing
from fourdstar_jax.star.model import Condition
from fourdstar_jax.types import Cameras

BATCH = 8  # clips


def evaluate(
    bundle_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    split: str = "unseen_clip",
) -> dict[str, Any]:
    """All figures of a split as a JSON-ready dict; dB for PSNR, nats a code for likelihoods.

    Raises ValueError if the dataset's rig is not the bundle's, or for an unknown split.
    """
    model, data_dir = Model(bundle_dir), Path(data_dir)
    rig = pipeline.rig(data_dir)
    if rig != model.rig:
        raise ValueError(f"the dataset's rig {rig} is not the bundle's {model.rig}")
    clips = _load(model, data_dir, split)
    train = _load(model, data_dir, "train")
    report: dict[str, Any] = {
        "split": split,
        "num_clips": len(clips["images"]),
        "timesteps": model.max_timesteps,
        **pipeline.provenance(data_dir),
    }
    report["reconstruction"] = _reconstruction(model, clips, train["images"])
    if "star" in model.bundle.stages:
        report["likelihood"] = _likelihood(model, clips, train)
    return report


def _load(model: Model, data_dir, split: str) -> dict[str, np.ndarray]:
    """A split's first windows, one array an entry, with their tokens `[clips, T, V, n, K]`."""
    encoder = model.text_encoder if "star" in model.bundle.stages else None

    def features(text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, features = model.encode_text(text)
        assert features is not None
        return ids, features

    loader = pipeline.make_loader(
        data_dir,
        split,
        batch_size=BATCH,
        timesteps=model.max_timesteps,
        train=False,
        words=model.words if encoder == "words" else None,
        features=functools.cache(features) if encoder == "t5" else None,
    )
    wanted = ["images", "masks", "viewmats", "Ks", "times", "text_ids", "clip"]
    wanted += ["text_features"] if encoder == "t5" else []
    parts = [{k: batch[k] for k in wanted} for batch in loader]
    clips = {k: np.concatenate([part[k] for part in parts]) for k in wanted}
    encode = functools.partial(encode_images, model.tokenizer)
    return clips | {"tokens": in_batches(encode, (clips["images"],), BATCH)}


def _reconstruction(model: Model, clips, train_images) -> dict[str, Any]:
    size = model.resolution

    @jax.jit
    def render(vqvae, tokenizer, viewmats, Ks, times, tokens):
        cameras = Cameras(viewmats, Ks)
        decoded = vqvae(tokenizer.codes(tokens), cameras, times)
        cameras = jax.tree.map(lambda x: x[:, None], cameras)
        white = jnp.ones(3)
        options: dict[str, Any] = dict(width=size, height=size, background=white)
        both = [rasterize(g, cameras, **options) for g in (decoded.gaussians, decoded.coarse)]
        tokenized = tokenizer.decode(tokens)
        return both[0].renders, both[1].renders, tokenized, both[0].overflow | both[1].overflow

    mean_image = np.broadcast_to(train_images.mean(axis=(0, 1)), clips["images"].shape[1:])
    rows: dict[str, list[float]] = {}
    names = ["viewmats", "Ks", "times", "tokens", "images", "masks"]
    for count, arrays in filled_batches([clips[name] for name in names], BATCH):
        *seen, images, masks = arrays
        fine, coarse, tokenized, overflow = render(model.vqvae, model.tokenizer, *seen)
        assert not overflow, "the rasterizer overflowed"
        for i in range(count):
            truth, mask = images[i], masks[i]
            pictures = {
                "model": np.asarray(fine[i]),
                "coarse": np.asarray(coarse[i]),
                "tokenizer": np.asarray(tokenized[i]),
                "mean_image": mean_image,
            }
            for name, picture in pictures.items():
                rows.setdefault(f"{name}_psnr", []).append(psnr(picture, truth))
                rows.setdefault(f"{name}_psnr_in_mask", []).append(psnr(picture, truth, mask))
    out: dict[str, Any] = {name: float(np.mean(values)) for name, values in rows.items()}
    for where in ("psnr", "psnr_in_mask"):
        gain = np.subtract(rows[f"model_{where}"], rows[f"mean_image_{where}"])
        out[f"gain_over_mean_image_{where}"] = bootstrap_interval(gain)
        offsets = np.subtract(rows[f"model_{where}"], rows[f"coarse_{where}"])
        out[f"gain_of_offsets_{where}"] = bootstrap_interval(offsets)
    return out


def _likelihood(model: Model, clips, train) -> dict[str, Any]:
    @jax.jit
    def nll(star, batch):
        condition = Condition(
            text_ids=batch["text_ids"],
            text_features=batch.get("text_features"),
            video_tokens=batch["video_tokens"],
            times=batch["times"],
            cameras=Cameras(batch["viewmats"], batch["Ks"]),
        )
        return star.nll(batch["tokens"], condition, Forcing(history_tokens=batch["history"]))

    other = _another_object(clips)
    count, timesteps, _, n, codes = clips["tokens"].shape
    groups = clips["tokens"].reshape(count, timesteps, -1, codes)

    def novel(swap: str | None = None) -> np.ndarray:
        """Mean over the novel views' codes of each clip, nats."""
        text, video, history = (
            other if swap == name else np.arange(count) for name in ("text", "video", "container")
        )
        arrays = {
            "tokens": groups,
            "history": groups[history],
            "text_ids": clips["text_ids"][text],
            "video_tokens": clips["tokens"][video][:, :, 0],
            "times": clips["times"],
            "viewmats": clips["viewmats"],
            "Ks": clips["Ks"],
        }
        if "text_features" in clips:
            arrays["text_features"] = clips["text_features"][text]
        values = in_batches(
            lambda *batch: nll(model.star, dict(zip(arrays, batch, strict=True))),
            list(arrays.values()),
            BATCH,
        )
        return values[:, :, model.star.num_known :].mean(axis=(1, 2, 3))

    right = novel()
    row = int(round(n**0.5))
    vocab = model.bundle.spec.vocab_size
    table = counts.fit_counts(train["tokens"], vocab_size=vocab, row_length=row)
    baseline = counts.nll(table, clips["tokens"])[:, :, 1:].mean(axis=(1, 2, 3, 4))
    out: dict[str, Any] = {
        "nll_novel": bootstrap_interval(right),
        "count_model_nll_novel": bootstrap_interval(baseline),
        "star_minus_count_model": bootstrap_interval(right - baseline),
    }
    for swap in ("video", "container", "text"):
        out[f"rise_with_another_{swap}"] = bootstrap_interval(novel(swap) - right)
    return out


def _another_object(clips) -> np.ndarray:
    """For every clip the number of another, the next one whose video has other tokens."""
    videos = clips["tokens"][:, :, 0].reshape(len(clips["tokens"]), -1)
    count = len(videos)
    if count < 2:
        raise ValueError("comparing conditions needs two clips or more")
    other = np.empty(count, np.int64)
    for i in range(count):
        later = np.arange(i + 1, i + count) % count
        differs = np.any(videos[later] != videos[i], axis=1)
        other[i] = later[np.argmax(differs)]
    return other
