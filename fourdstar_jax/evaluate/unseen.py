"""Figures of a trained bundle on unseen clips: reconstruction, likelihood, use of its conditions.

Reconstruction is compared with the mean training image of each view. STAR's likelihood of the novel
views' tokens is compared with a count model, and with itself under another object's video,
container and captions. What it samples by itself is compared with the true tokens and what the 4D
VQ-VAE makes of them. Figures are means over objects of the means over each one's clips, differences
with a 95 % bootstrap interval over objects; clips are seen from their first frame.
"""

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from fourdstar_jax.arguments import counted
from fourdstar_jax.data import pipeline, transforms
from fourdstar_jax.data.batching import filled_batches, in_batches
from fourdstar_jax.evaluate import comparisons, counts
from fourdstar_jax.evaluate.metrics import bootstrap_interval, by_object, psnr
from fourdstar_jax.evaluate.progress import Log, Progress, silent
from fourdstar_jax.generate import Model, encode_images
from fourdstar_jax.kernels.rasterize import rasterize
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.star.forcing import Forcing
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.train import free
from fourdstar_jax.train.free import condition_of
from fourdstar_jax.types import Cameras

BATCH = 8  # clips
SAMPLED = 16  # clips that are sampled, of as many objects as may be

Swap = Literal["text", "video", "container", "reversed", "cameras"]
SWAPS: dict[Swap, str] = {  # as figures are called
    "video": "another_video",
    "container": "another_container",
    "text": "another_text",
    "reversed": "reversed_video",
    "cameras": "exchanged_cameras",
}


def evaluate(
    bundle_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    split: str = "unseen_clip",
    *,
    lpips: str | os.PathLike[str] | None = None,
    sampled: int = SAMPLED,
    log: Log = silent,
    keep: Callable[[dict[str, Any]], object] = lambda report: None,
) -> dict[str, Any]:
    """All figures of a split as a JSON-ready dict; dB for PSNR, nats a code for likelihoods.

    `sampled` clips are generated from their videos, of as many objects as may be. Pictures are
    compared by LPIPS, too, where its weights are at `lpips`. `figures` of the result has those that
    a table of models needs under one name each. `log` is told which part begins and, from its
    second batch on, how long is left of it; `keep` gets the figures so far after each part that has
    some, so that an evaluation that is cut does not lose them. Raises ValueError if the dataset's
    rig is not the bundle's, for an unknown split, and for clips of one object only.
    """
    model, data_dir = Model(bundle_dir), Path(data_dir)
    rig = pipeline.rig(data_dir)
    if rig != model.rig:
        raise ValueError(f"the dataset's rig {rig} is not the bundle's {model.rig}")
    network = None if lpips is None else perceptual.load(lpips)
    with_star = "star" in model.bundle.stages
    num_parts, begun, start = 6 if with_star else 4, itertools.count(1), time.perf_counter()

    def begin(what: str) -> None:
        log(f"{time.perf_counter() - start:.0f} s: part {next(begun)} of {num_parts}, {what}")

    begin(f"reading of {split}")
    clips = load(model, data_dir, split, log=log)
    num_clips, num_objects = len(clips["images"]), len(set(clips["object"]))
    measured = f"{counted(num_clips, 'clips')} of {counted(num_objects, 'objects')}"
    begin(f"reading of train; measured are {measured} ({split})")
    train = load_train(model, data_dir, log=log)
    report: dict[str, Any] = {
        "split": split,
        "num_clips": num_clips,
        "num_objects": num_objects,
        "timesteps": model.max_timesteps,
        **pipeline.provenance(data_dir),
    }
    report["lpips"] = {"left_out": "its weights are not given"}
    if network is not None:
        about = perceptual.NETWORKS[network.network]
        report["lpips"] = {"network": network.network, "digest": about.digest}
    begin("reconstruction of all clips")
    report["reconstruction"] = _reconstruction(model, clips, train["mean_image"], network, log)
    report["codes_used"] = _codes_used(train["tokens"], model.bundle.spec.vocab_size)
    keep(report)
    shown = None
    if with_star:
        begin(f"likelihood of all clips, {1 + len(SWAPS)} times")
        report["likelihood"] = _likelihood(model, clips, train, log)
        keep(report)
        drawn = sampler(model, clips, sampled, network)
        begin(f"generation of {counted(min(sampled, num_clips), 'clips')}")
        progress = Progress(clips["tokens"].shape[1], log, "timesteps")

        def on_group(t: int, tokens: jax.Array) -> None:
            tokens.block_until_ready()
            progress.step()

        settings = {**drawn.settings, "on_group": on_group}
        found = drawn._replace(settings=settings).sample(model.star)
        report["samples"] = drawn.measure(found)[0]
        keep(report)
        shown = sampled_clips(clips, sampled), found["real"]
    begin("comparisons of pictures")
    report["comparisons"] = comparisons.compare(model, clips, train, shown, network, log=log)
    report["figures"] = figures(report)
    return report


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a table of models, each under one name; those that were not measured lack."""
    compared, likelihood = report["comparisons"], report.get("likelihood", {})
    found = {f"tokenizer_{k}": report["reconstruction"].get(f"tokenizer_{k}") for k in
             ("psnr", "psnr_in_mask", "lpips")}  # fmt: skip
    found["codes_used_least"] = min(report["codes_used"])
    names = ("psnr", "psnr_in_mask", "alpha_iou", "lpips")
    ratios = ("flow_ratio", "change_ratio", "retrieval_top1", "reprojection")
    for row in ("ceiling_novel_views", "ceiling", "generation", "flat_card", "nearest_clip"):
        for name in (*names, *ratios):
            found[f"{row}_{name}"] = compared.get(row, {}).get(name, {}).get("value")
    for swap in ("container", "video"):
        for of, suffix in (("after_first", ""), ("of_drawn", "_drawn")):
            rise = likelihood.get(f"rise_{of}_with_another_{swap}")
            found[f"nll_rise_{swap}{suffix}"] = None if rise is None else rise[0]
    for name in ("propagation", "propagation_frozen", "frozen_change"):
        found[name] = report.get("samples", {}).get(name)
    return {name: float(value) for name, value in found.items() if value is not None}


def load(model: Model, data_dir, split: str, *, log: Log = silent) -> dict[str, np.ndarray]:
    """A split's first windows, one array an entry, with their tokens `[clips, T, V, n, K]`."""
    parts = list(_batches(model, data_dir, split, log=log))
    clips = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    manifest = pipeline.read_manifest(data_dir)["clips"]
    clips["object"] = np.array([manifest[i]["clip_id"].partition("#")[0] for i in clips["clip"]])
    if len(set(clips["object"])) < 2 and split != "train":
        raise ValueError(f"{data_dir}: comparing objects needs two or more of them in {split=}")
    return clips


def load_train(model: Model, data_dir, *, log: Log = silent) -> dict[str, Any]:
    """What others are compared with: training clips' tokens, input views, mean image of each view.

    `input_images` and `input_masks` are uint8 `[clips, T, 1, h, w, c]`; all views' pictures would
    not fit, `read(i)` gives those of one clip.
    """
    parts, total, count = [], np.zeros(()), 0
    for batch in _batches(model, data_dir, "train", maps=(), log=log):
        total = total + batch["images"].sum(axis=(0, 1), dtype=np.float64)
        count += batch["images"].shape[0] * batch["images"].shape[1]
        inputs = {
            f"input_{name}": np.rint(255 * batch[name][:, :, :1]).astype(np.uint8)
            for name in ("images", "masks")
        }
        parts.append({"tokens": batch["tokens"], "clip": batch["clip"], **inputs})
    train = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    source = pipeline.ClipSource(data_dir, "train", cache_bytes=0, maps=())

    def read(i: int) -> tuple[np.ndarray, np.ndarray]:
        clip = source[i]
        assert clip["index"] == train["clip"][i], "the split is read in its order"
        frames = transforms.window(len(clip["frame_times"]), model.max_timesteps, None)
        return transforms.on_white(clip["rig_rgba"][frames])

    return train | {"mean_image": (total / count).astype(np.float32), "read": read}


def _batches(
    model: Model, data_dir, split: str, maps: Sequence[str] = ("flow",), log: Log = silent
) -> Iterator[dict[str, np.ndarray]]:
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
        maps=maps,
        words=model.words if encoder == "words" else None,
        features=functools.cache(features) if encoder == "t5" else None,
    )
    wanted = ["images", "masks", "viewmats", "Ks", "times", "text_ids", "clip"]
    wanted += ["text_features"] if encoder == "t5" else []
    wanted += ["flow"]
    encode = functools.partial(encode_images, model.tokenizer)
    count = len(pipeline.ClipSource(data_dir, split, cache_bytes=0, maps=()))
    progress = Progress(-(-count // BATCH), log, "batches")
    for batch in loader:
        tokens = in_batches(encode, (batch["images"],), BATCH)
        progress.step()
        yield {k: batch[k] for k in wanted if k in batch} | {"tokens": tokens}


def _reconstruction(model: Model, clips, train_image, lpips, log: Log) -> dict[str, Any]:
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

    mean_image = np.broadcast_to(train_image, clips["images"].shape[1:])
    rows: dict[str, list[float]] = {}
    names = ["viewmats", "Ks", "times", "tokens", "images", "masks"]
    progress = Progress(-(-len(clips["images"]) // BATCH), log, "batches")
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
            if lpips is not None:
                for name in ("model", "tokenizer"):
                    distance = comparisons.distance(lpips, pictures[name], truth)
                    rows.setdefault(f"{name}_lpips", []).append(distance)
        progress.step()
    objects = clips["object"]
    out: dict[str, Any] = {name: float(by_object(x, objects).mean()) for name, x in rows.items()}
    for where in ("psnr", "psnr_in_mask"):
        gain = np.subtract(rows[f"model_{where}"], rows[f"mean_image_{where}"])
        out[f"gain_over_mean_image_{where}"] = bootstrap_interval(by_object(gain, objects))
        offsets = np.subtract(rows[f"model_{where}"], rows[f"coarse_{where}"])
        out[f"gain_of_offsets_{where}"] = bootstrap_interval(by_object(offsets, objects))
    return out


@jax.jit
def nll(star: STAR, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Of the codes [B, T, N, K] in the groups, nats; the container is built from `history`."""
    condition = Condition(
        text_ids=batch["text_ids"],
        text_features=batch.get("text_features"),
        video_tokens=batch["video_tokens"],
        times=batch["times"],
        cameras=Cameras(batch["viewmats"], batch["Ks"]),
    )
    return star.nll(batch["tokens"], condition, Forcing(history_tokens=batch["history"]))


def novel_nlls(
    star: STAR,
    clips: Mapping[str, np.ndarray],
    swap: Swap | None = None,
    on_batch: Callable[[], object] = lambda: None,
) -> Float[np.ndarray, "clips T V1 n K"]:
    """Of the novel views' codes, nats, with one condition not their own.

    That is the text, the video or the container's past of a clip of another object; the video's
    frames from the last to the first ("reversed"); or each novel view's camera in the next one's
    place ("cameras").
    """
    count, timesteps, views, n, codes = clips["tokens"].shape
    groups = clips["tokens"].reshape(count, timesteps, -1, codes)
    other = another_object(clips["object"])
    text, video, history = (
        other if swap == name else np.arange(count) for name in ("text", "video", "container")
    )
    order = np.arange(views)
    if swap == "cameras":
        order[1:] = np.roll(order[1:], 1)
    arrays = {
        "tokens": groups,
        "history": groups[history],
        "text_ids": clips["text_ids"][text],
        "video_tokens": clips["tokens"][video][:, :: -1 if swap == "reversed" else 1, 0],
        "times": clips["times"],
        "viewmats": clips["viewmats"][:, order],
        "Ks": clips["Ks"][:, order],
    }
    if "text_features" in clips:
        arrays["text_features"] = clips["text_features"][text]

    def of_batch(*batch: np.ndarray) -> np.ndarray:
        found = np.asarray(nll(star, dict(zip(arrays, batch, strict=True))))
        on_batch()
        return found

    values = in_batches(of_batch, list(arrays.values()), BATCH)
    return values[:, :, star.num_known :].reshape(count, timesteps, -1, n, codes)


def _likelihood(model: Model, clips, train, log: Log = silent) -> dict[str, Any]:
    count, timesteps, _, n, _ = clips["tokens"].shape
    progress = Progress((1 + len(SWAPS)) * -(-count // BATCH), log, "batches")

    def nlls(swap: Swap | None = None) -> np.ndarray:
        return novel_nlls(model.star, clips, swap, progress.step)

    def mean(values: np.ndarray) -> np.ndarray:
        """One value an object; none of no timesteps."""
        return by_object(values.reshape(count, -1).mean(axis=1), clips["object"])

    blank = model.bundle.stage("star").model.get("blank_code")
    by_drawn = blank is not None and timesteps > 1

    def mean_of_drawn(values: np.ndarray) -> np.ndarray:
        """The same over tokens after the first timestep that are not blank."""
        drawn = np.any(clips["tokens"] != blank, axis=-1)
        return by_object(over_drawn(values[:, 1:], drawn[:, 1:, 1:]), clips["object"])

    true = nlls()
    right, row = mean(true), int(round(n**0.5))
    vocab = model.bundle.spec.vocab_size
    table = counts.fit_counts(train["tokens"], vocab_size=vocab, row_length=row)
    baseline = mean(counts.nll(table, clips["tokens"])[:, :, 1:])
    # A view's first tokens have least of their own view before them: there the past tells most.
    first = [mean(true[:, t, :, :row]).mean() for t in range(timesteps)]
    out: dict[str, Any] = {
        "nll_novel": bootstrap_interval(right),
        "count_model_nll_novel": bootstrap_interval(baseline),
        "star_minus_count_model": bootstrap_interval(right - baseline),
        "nll_first_row_by_timestep": [float(x) for x in first],
    }
    if by_drawn:
        out["nll_drawn_after_first"] = bootstrap_interval(mean_of_drawn(true))
    for swap, name in SWAPS.items():
        rise = nlls(swap) - true
        out[f"rise_with_{name}"] = bootstrap_interval(mean(rise))
        if timesteps > 1:
            out[f"rise_after_first_with_{name}"] = bootstrap_interval(mean(rise[:, 1:]))
        if by_drawn:
            out[f"rise_of_drawn_with_{name}"] = bootstrap_interval(mean_of_drawn(rise))
    return out


def over_drawn(
    values: Float[np.ndarray, "clips T V n K"], drawn: Bool[np.ndarray, "clips T V n"]
) -> Float[np.ndarray, " clips"]:
    """A clip's mean over the codes of its drawn tokens; 0 where it has none."""
    axes = (1, 2, 3)
    return values.mean(axis=-1).sum(axes, where=drawn) / np.maximum(drawn.sum(axes), 1)


def _codes_used(tokens: Int[np.ndarray, "*b K"], vocab: int) -> list[float]:
    """The share of each book's codes that these tokens have."""
    return [len(np.unique(tokens[..., k])) / vocab for k in range(tokens.shape[-1])]


def another_object(objects: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For every clip the number of the next one that is of another object."""
    count = len(objects)
    if len(set(objects)) < 2:
        raise ValueError("comparing conditions needs clips of two objects or more")
    places = np.arange(count)
    distance = np.where(objects[:, None] == objects, count, (places - places[:, None]) % count)
    return np.argmin(distance, axis=1)


def sampler(model: Model, clips: Mapping[str, Any], count: int, lpips: Any = None) -> free.Sampler:
    """What samples `count` of the clips as the bundle says, of as many objects as may be."""
    chosen = sampled_clips(clips, count)
    names = ("tokens", "viewmats", "Ks", "times", "text_ids", "text_features")
    batch = {name: clips[name][chosen] for name in names if name in clips}
    return free.Sampler(
        batch=batch,
        condition=jax.tree.map(jnp.asarray, condition_of(batch)),
        key=jax.random.key(0),
        mesh=None,
        decoder=free.Decoder(model.tokenizer, model.vqvae, lpips),
        blank_code=model.bundle.stage("star").model.get("blank_code"),
        settings=model.sampling,
    )


def sampled_clips(clips: Mapping[str, Any], count: int) -> Int[np.ndarray, " m"]:
    """`count` of the clips, or all, of as many objects as may be."""
    turn = np.zeros(len(clips["object"]), np.int64)  # how many of its object come before a clip
    for name in np.unique(clips["object"]):
        turn[clips["object"] == name] = np.arange(np.sum(clips["object"] == name))
    return np.sort(np.argsort(turn, kind="stable")[:count])
