"""Figures that are known beforehand, by the very code that scores: does an installation measure?

Constant pictures and shifted sets have values that follow from the formulas. Networks are asked
whether equal clips are at no distance, and what black is from white, which others have published.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fourdstar_jax.evaluate import clips, distances, score
from fourdstar_jax.evaluate.networks import NETWORKS, Networks
from fourdstar_jax.evaluate.protocols import SAME_PSNR, find

FRAMES, SIDE = 10, 64
# Of black against white pictures; the networks' with float32 weights, as
# github.com/JunyaoHu/common_metrics_on_video_quality tells of as many frames and pixels.
BLACK_AND_WHITE = {
    "psnr": 0.0,
    "ssim": 1e-4 / (1 + 1e-4),
    "lpips_alex": 0.8140,
    "fvd": 570.07,
}


class Case(NamedTuple):
    """One figure, and what it must be."""

    name: str
    found: float
    wanted: float
    tolerance: float

    @property
    def right(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return abs(self.found - self.wanted) <= self.tolerance


def cases(weights: str | os.PathLike[str] | None = None) -> Iterator[Case]:
    """Every case; those of the networks only for what the folder `weights` holds."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8))
    yield Case("Frechet distance of a set and itself", distances.frechet_distance(x, x), 0, 1e-9)
    shifted = distances.frechet_distance(x, x + 3)
    yield Case("Frechet distance of a set shifted by 3 in 8 axes", shifted, 72, 1e-9)
    pair = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    yield Case("kernel distance of {1, 2} and {0, 1}", distances.kernel_distance(*pair), 9.5, 1e-9)
    one = distances.one_video_distance(np.array([0.0, 2.0]), np.array([1.0, 5.0]))
    yield Case("one-video distance of (0, 2) and (1, 5)", one, 12.0, 1e-9)
    with tempfile.TemporaryDirectory(prefix="fourdstar-") as folder:
        yield from _pictures(Path(folder), weights)


def _pictures(folder: Path, weights: str | os.PathLike[str] | None) -> Iterator[Case]:
    noise = np.random.default_rng(1).integers(0, 256, (FRAMES, SIDE, SIDE, 3))
    for side, frames in (
        ("black", np.zeros_like(noise)),
        ("white", np.full_like(noise, 255)),
        ("noise", noise),
    ):
        for view in ("0", "1"):
            below = folder / side / "object" / view
            below.mkdir(parents=True)
            for t, frame in enumerate(frames):
                Image.fromarray(frame.astype(np.uint8)).save(below / f"{t}.png")
    networks = Networks(weights)
    have = {name for name in NETWORKS if _has(networks, name)}
    open_v2 = find("fourdstar-open-v2")
    chosen = [m for m in open_v2.metrics if m.network is None or m.network in have]
    chosen = [
        m.name for m in chosen if m.name not in ("psnr_in_mask", "alpha_iou", "warping_error")
    ]
    sources = {side: _open(folder / side) for side in ("black", "white", "noise")}
    same = score.score(open_v2, sources["noise"], sources["noise"], networks, metrics=chosen)
    for name, figure in same["summary"].items():
        wanted = {"psnr": SAME_PSNR, "ssim": 1.0, "clip_b32": 1.0, "clip_l14": 1.0}.get(name, 0.0)
        if name == "mmd":  # without bias, equal sets are at 0 on average only
            continue
        yield Case(f"{name} of noise and itself", figure["value"], wanted, 1e-3)
    chosen = [name for name in chosen if name in BLACK_AND_WHITE]
    unlike = score.score(open_v2, sources["black"], sources["white"], networks, metrics=chosen)
    for name, figure in unlike["summary"].items():
        wanted = BLACK_AND_WHITE[name]
        yield Case(f"{name} of black and white", figure["value"], wanted, 1e-4 + 2e-3 * wanted)


def _open(path: Path) -> clips.Source:
    def none(path):
        raise ValueError(f"{path}: no such object here")

    return clips.open_source(path, find("fourdstar-open-v2"), read_splats=none)


def _has(networks: Networks, name: str) -> bool:
    try:
        networks.check(name)
    except ValueError:
        return False
    return True
