"""Damaged files that users bring: read, or refused in one line by the reader that knows them.

A little of the longer runs that SECURITY.md tells of, with the same damage each time.
"""

import random

import numpy as np
import pytest
from helpers.glb import moving_box
from PIL import Image

from fourdstar_jax.data import gltf, video


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a piece cut out, doubled or moved, or the end gone."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out))
        piece = slice(at, at + rng.choice((1, 4, 32)))
        match rng.randrange(5):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[piece] = rng.choice((b"\0", b"\xff", b"\x80")) * len(out[piece])
            case 2:
                del out[piece]
            case 3:
                out[at:at] = out[piece]
            case _:
                out = out[: max(at, 1)]
    return bytes(out)


def test_damaged_glb():
    whole, outcomes = moving_box(), {"read": 0, "refused": 0}
    for seed in range(400):
        data = damaged(whole, random.Random(seed))
        try:
            asset = gltf.load(data, name="damaged.glb")
            for clip in asset.clips:
                asset.pose(clip.index, np.zeros(1))
            outcomes["read"] += 1
        except gltf.MalformedAsset as error:
            assert len(str(error).splitlines()) == 1, seed
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_damaged_pictures(tmp_path, suffix):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)) for _ in range(3)]
    path = tmp_path / f"a.{suffix}"
    more = {} if suffix == "png" else dict(save_all=True, append_images=frames[1:], duration=125)
    frames[0].save(path, **more)
    whole, refused = path.read_bytes(), 0
    for seed in range(4):
        path.write_bytes(damaged(whole, random.Random(seed)))
        try:
            images, _ = video.read_video(path, resolution=16, timesteps=2)
            assert np.isfinite(images).all()
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error), seed
            refused += 1
    assert refused > 0
