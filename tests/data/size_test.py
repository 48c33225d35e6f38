"""Sizes of unseen clips in pictures of training, and of these fitted as a user's video."""

import csv

import numpy as np
import pytest

from fourdstar_jax import geometry
from fourdstar_jax.data import gltf, posing, render, splits, video

SIZE = 96


@pytest.mark.slow
def test_fitted_videos_have_the_size_of_training(assets):
    """The ratio of both sizes over all unseen clips and all four views, and over view 0 alone."""
    with open(assets / "assets.csv", newline="") as file:
        files = {row["sha256"]: row["file"] for row in csv.DictReader(file)}
    rows = [r for r in splits.rows() if r["split"] == "unseen_clip"]
    renderer = render.Renderer(SIZE, 4)
    cameras = geometry.Rig.around(4, fps=8).cameras(SIZE)
    ratios = []
    for row in rows:
        asset = gltf.load(assets / files[row["asset_sha256"]])
        renderer.load(asset)
        clip = asset.clips[int(row["clip_index"])]
        sequence = posing.sample_clip(asset, clip, fps=8, max_frames=24)
        steps = list(zip(sequence.positions, sequence.normals, strict=True))
        rgba = np.stack([renderer.draw(p, n, cameras).rgba for p, n in steps])
        for view in range(4):
            _, info = video.frame_object(rgba[:, view], resolution=SIZE)
            ratios.append(SIZE / info["crop"][2])  # how much larger the fitted object is
    renderer.close()
    shares = {}
    for name, chosen in (("four views", ratios), ("view 0", ratios[::4])):
        shares[name] = (np.abs(np.log(chosen)) < np.log(1.15)).mean()
        print(f"{name}: median {np.median(chosen):.3f}, {shares[name]:.1%} within 15 %")
    assert abs(np.median(ratios) - 1) < 0.05
    # Nine in ten are wanted. What is long and seen from its end is fitted too large: one view does
    # not tell its length, and most of these clips are of a knight, a snake, a fox and a dragon.
    assert shares["four views"] > 0.75 and shares["view 0"] > 0.55
