"""What each metric is of a clip that was read, prediction beside truth.

`VALUES` has those that are figures of a clip, `SETS` those that are distances of sets, of which a
clip gives rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fourdstar_jax.data.batching import in_batches
from fourdstar_jax.evaluate import distances, motion
from fourdstar_jax.evaluate.clips import Frames, Pair
from fourdstar_jax.evaluate.device import ALONE
from fourdstar_jax.evaluate.metrics import psnr
from fourdstar_jax.evaluate.networks import Networks
from fourdstar_jax.evaluate.protocols import SAME_PSNR, Metric, Resize
from fourdstar_jax.perceptual import i3d, ssim
from fourdstar_jax.vqvae import losses

WINDOW = 16  # frames that 3D-ResNet50 sees at once


@dataclasses.dataclass
class Clip:
    """A pair that was read: its frames, and these at all sizes that the metrics take."""

    pair: Pair
    prediction: Frames
    truth: Frames
    at: dict[tuple[Resize, ...], tuple[np.ndarray, np.ndarray]]  # [T, h, w, 3], 0 to 255
    truth_sha256: str  # of the true frames
    known: dict[Any, np.ndarray]  # features of truths, by object, view and what they are
    features: dict[Any, tuple[np.ndarray, ...]] = dataclasses.field(default_factory=dict)

    def of_both(
        self, metric: Metric, key: Any, function: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A network's features of prediction and truth, computed once."""
        if key not in self.features:
            prediction, truth = self.both(metric)
            where = (self.pair.object, self.pair.view, self.truth_sha256, key)
            if where not in self.known:
                self.known[where] = function(truth)
            self.features[key] = function(prediction), self.known[where]
        first, second = self.features[key]
        return first, second

    def both(self, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
        """Prediction and truth at a metric's size."""
        return self.at[metric.resize]


class NotHere(Exception):
    """Why a metric has no value for these clips."""


# What clips are measured by: [T] values of a clip, or one


def _psnr(clip: Clip, metric: Metric, networks: Networks) -> list[float]:
    return [_decibels(psnr(p / 255, t / 255)) for p, t in zip(*clip.both(metric), strict=True)]


def _psnr_in_mask(clip: Clip, metric: Metric, networks: Networks) -> list[float]:
    masks = _alphas(clip.truth, "truth")[..., None] / 255
    found = []
    for p, t, mask in zip(*clip.both(metric), masks, strict=True):
        if mask.any():  # else the object is not in the picture
            found.append(_decibels(psnr(p / 255, t / 255, mask)))
    if not found:
        raise ValueError("the truth's mask is empty in every frame")
    return found


def _psnr_own_range(clip: Clip, metric: Metric, networks: Networks) -> list[float]:
    found = []
    for p, t in zip(*clip.both(metric), strict=True):
        span = float(np.ptp(t)) or 1.0
        found.append(_decibels(psnr(p / span, t / span)))
    return found


def _decibels(value: float) -> float:
    return min(value, SAME_PSNR)


def _alpha_iou(clip: Clip, metric: Metric, networks: Networks) -> np.ndarray:
    sides = ((clip.prediction, "prediction"), (clip.truth, "truth"))
    p, t = (_alphas(frames, side) > 127 for frames, side in sides)
    both, either = (p & t).sum(axis=(1, 2)), (p | t).sum(axis=(1, 2))
    return np.where(either, both / np.maximum(either, 1), 1.0)


def _alphas(frames: Frames, side: str) -> np.ndarray:
    if frames.alphas is None:
        raise NotHere(f"the {side} has no alpha channel")
    return frames.alphas


def _ssim(clip: Clip, metric: Metric, networks: Networks) -> np.ndarray:
    p, t = clip.both(metric)
    with ALONE:
        return in_batches(_similarity, (p / 255, t / 255), networks.batch)


def _ssim_own_range(clip: Clip, metric: Metric, networks: Networks) -> np.ndarray:
    p, t = clip.both(metric)
    span = np.maximum(*(np.ptp(x, axis=(1, 2, 3), keepdims=True) for x in (p, t)))
    span = np.where(span == 0, 1, span)
    with ALONE:
        return in_batches(_similarity, (p / span, t / span), networks.batch)


@jax.jit
def _similarity(first, second):
    return ssim.ssim(first, second)


def _lpips(clip: Clip, metric: Metric, networks: Networks) -> np.ndarray:
    assert metric.network is not None
    return networks.lpips(metric.network, *clip.both(metric))


def _temporal_lpips(clip: Clip, metric: Metric, networks: Networks) -> np.ndarray:
    assert metric.network is not None
    if len(clip.truth.images) < 2:
        raise ValueError("a single frame has no change in time")
    _, p, t = _in_time(clip, metric, networks)
    return np.abs(p - t)


def _lpips_vgg(clip: Clip, metric: Metric, networks: Networks) -> np.ndarray:
    return _in_time(clip, metric, networks)[0]


def _in_time(clip: Clip, metric: Metric, networks: Networks) -> tuple[np.ndarray, ...]:
    """What two metrics need of the same activations, which take the time."""
    assert metric.network is not None
    key = ("in time", metric.network, metric.resize)
    if key not in clip.features:
        clip.features[key] = networks.lpips_in_time(metric.network, *clip.both(metric))
    return clip.features[key]


def _temporal_error(clip: Clip, metric: Metric, networks: Networks) -> float:
    if len(clip.truth.images) < 2:
        raise ValueError("a single frame has no change in time")
    p, t = (x[:, None] / 255 for x in clip.both(metric))
    masks = _alphas(clip.truth, "truth")[:, None, ..., None] / 255
    with ALONE:
        return float(losses.temporal_error(p, t, (masks > 0.5).astype(np.float32)))


def _warping_error(clip: Clip, metric: Metric, networks: Networks) -> float:
    flow = clip.truth.flow
    if flow is None:
        raise NotHere("the truth has no flow: `fourdstar prepare` makes data sets that do")
    p, t = (x / 255 for x in clip.both(metric))
    return motion.warping_error(
        p, t, _alphas(clip.truth, "truth") > 127, np.asarray(flow, np.float32)
    )


def _flow_error(clip: Clip, metric: Metric, networks: Networks) -> float:
    flow, drawn = clip.truth.flow, clip.pair.prediction.flow
    if flow is None:
        raise NotHere("the truth has no flow: `fourdstar prepare` makes data sets that do")
    if drawn is None:
        raise NotHere("predictions are not Gaussians, as objects made here are")
    count, height, width, _ = clip.truth.images.shape
    if count < 2:
        raise ValueError("a single frame has no flow")
    masks = _alphas(clip.truth, "truth")[:-1] > 127
    return motion.flow_error(
        drawn((width, height)), np.asarray(flow[: count - 1], np.float32), masks
    )


def _one_video(clip: Clip, metric: Metric, networks: Networks) -> float:
    return distances.one_video_distance(*_logits(clip, metric, networks, pool_frames=1))


def _fid_vid(clip: Clip, metric: Metric, networks: Networks) -> float:
    return distances.frechet_distance(*_features(clip, metric, networks))


def _cosine(clip: Clip, metric: Metric, networks: Networks) -> np.ndarray:
    first, second = (x.astype(np.float64) for x in _features(clip, metric, networks))
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return (first * second).sum(axis=-1) / lengths


def _dreamsim(clip: Clip, metric: Metric, networks: Networks) -> np.ndarray:
    return 1 - _cosine(clip, metric, networks)


VALUES: dict[str, Callable[[Clip, Metric, Networks], Any]] = {
    "psnr": _psnr,
    "psnr_in_mask": _psnr_in_mask,
    "psnr_own_range": _psnr_own_range,
    "alpha_iou": _alpha_iou,
    "ssim": _ssim,
    "ssim_own_range": _ssim_own_range,
    "lpips_vgg": _lpips_vgg,
    "lpips_alex": _lpips,
    "temporal_lpips": _temporal_lpips,
    "temporal_error": _temporal_error,
    "warping_error": _warping_error,
    "flow_error": _flow_error,
    "i3d_one_video": _one_video,
    "fid_vid": _fid_vid,
    "clip_b32": _cosine,
    "clip_l14": _cosine,
    "dreamsim": _dreamsim,
}


# What sets are made of: [rows, features] of a clip, for both sides


def _logits(clip: Clip, metric: Metric, networks: Networks, *, pool_frames: int):
    least = i3d.MIN_FRAMES if pool_frames == i3d.POOL_FRAMES else 1

    def logits(frames):
        return networks.logits(_stretched(frames, least), pool_frames=pool_frames)

    return clip.of_both(metric, ("i3d", metric.resize, pool_frames), logits)


def _stretched(frames: np.ndarray, least: int) -> np.ndarray:
    """Each frame as often as makes `least` of them."""
    return np.repeat(frames, -(-least // len(frames)), axis=0)


def _features(clip: Clip, metric: Metric, networks: Networks):
    assert metric.network is not None
    features = functools.partial(networks.features, metric.network)
    return clip.of_both(metric, (metric.network, metric.resize), features)


def _windows(clip: Clip, metric: Metric, networks: Networks):
    """3D-ResNet50's features of all windows of 16 frames."""
    assert metric.network is not None
    found = []
    for frames in clip.both(metric):
        frames = _stretched(frames, WINDOW)
        count = len(frames) - WINDOW + 1
        starts = range(count)
        parts = [networks.features(metric.network, frames[None, i : i + WINDOW]) for i in starts]
        found.append(np.concatenate(parts))
    return found


def _clip_logits(clip: Clip, metric: Metric, networks: Networks):
    return [x[None] for x in _logits(clip, metric, networks, pool_frames=2)]


SETS: dict[str, Callable[[Clip, Metric, Networks], Any]] = {
    "fvd": _clip_logits,
    "mmd": _clip_logits,
    "fid": _features,
    "fid_vid_resnet": _windows,
}
