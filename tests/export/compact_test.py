"""The compact form: error bounds for each Gaussian, size, and hostile data."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from export.ply_test import covariances, gaussians

from fourdstar_jax.export import compact
from fourdstar_jax.types import Gaussians

FIXTURES = Path(__file__).parent / "fixtures"
SUMS = [-4351.047, 4091.502, 10263.005, 225.851, 1377.234]  # of demo.4dg's arrays


def moving(timesteps=5, count=301, seed=0):
    """Gaussians that drift a little, of which some are not seen at times and some never."""
    rng = np.random.default_rng(seed)
    first = gaussians(count, seed=seed)
    drift = rng.normal(0, 0.02, (timesteps, count, 3)).cumsum(axis=0)
    opacities = np.tile(first.opacities, (timesteps, 1))
    opacities[rng.uniform(size=opacities.shape) < 0.3] = 0
    opacities[:, :17] = 0.001
    return Gaussians(
        means=(first.means * 0.2 + drift).astype(np.float32),
        quats=np.tile(-3 * first.quats, (timesteps, 1, 1)),
        scales=np.tile(first.scales, (timesteps, 1, 1)),
        opacities=opacities,
        colors=np.tile(first.colors, (timesteps, 1, 1)),
    )


def header(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[4:8], "little")])


@pytest.mark.parametrize("precision", compact.PRECISIONS)
def test_every_gaussian_keeps_to_the_stated_bounds(precision, monkeypatch):
    monkeypatch.setattr(compact, "PRECISIONS", (precision,))
    original = moving()
    data = compact.encode(original, fps=7.5)
    again, fps = compact.decode(data)
    stated = header(data)["largest_error"]
    assert fps == 7.5 and again.means.shape == original.means.shape
    bound = stated["opacity"] + 1e-6
    np.testing.assert_allclose(again.opacities, original.opacities, atol=bound)
    seen = again.opacities > 0
    assert 0.5 < seen.mean() < 0.9 and not seen[:, :17].any()
    assert (original.opacities[~seen] <= bound).all()

    places = original.means[seen]
    extent = (places.max(axis=0) - places.min(axis=0)).max()
    assert stated["position"] <= extent / 1024 * 1.0001
    errors = np.abs(again.means - original.means)[seen]
    assert errors.max() <= stated["position"] * 1.001 and errors.max() > 0.8 * stated["position"]
    np.testing.assert_allclose(again.colors[seen], original.colors[seen], atol=stated["color"])
    # sizes by volume, which renaming axes leaves; shapes by what both make of the unit sphere
    scales = np.maximum(original.scales[seen], extent * compact.LEAST_SCALE)
    grown = np.log(again.scales[seen]).sum(axis=-1) - np.log(scales).sum(axis=-1)
    assert np.abs(grown).max() <= 3 * np.log(stated["scale_factor"]) + 1e-4
    found = covariances(again.quats[seen], again.scales[seen])
    wanted = covariances(original.quats[seen] / 3, scales)
    off = np.linalg.norm(found - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    assert off.max() < 2 * np.log(stated["scale_factor"]) + 4 / precision.rotation


def test_renamed_axes_are_the_same_ellipsoids():
    quats, scales = gaussians(50).quats, gaussians(50).scales
    vectors, renamed = compact._small_rotations(5 * quats, scales)
    real = np.sqrt(1 - np.sum(vectors**2, axis=-1, keepdims=True))
    assert real.min() > 0.85  # cos of half of 62.8 degrees
    again = covariances(np.concatenate([real, vectors], axis=-1), renamed)
    np.testing.assert_allclose(again, covariances(quats, scales), atol=1e-8)


def test_what_hardly_moves_is_eight_times_smaller_at_fine_steps():
    still = moving(timesteps=1, count=3000)
    many = Gaussians(*(np.repeat(x, 24, axis=0) for x in still))
    data = compact.encode(many, fps=8.0)
    assert len(data) * 8 <= 32 * 24 * 3000
    assert header(data)["opacity_steps"] == compact.PRECISIONS[0].opacity


def test_the_demo_of_the_bundled_model():
    """Its Gaussians, kept since the first version of the form: size, and numbers as then."""
    data = (FIXTURES / "demo.4dg").read_bytes()
    again, fps = compact.decode(data)
    assert len(data) * 8 <= 32 * again.opacities.size and fps == 8
    assert again.means.shape == (4, 1024, 3)
    sums = [float(np.sum(x, dtype=np.float64)) for x in again]
    np.testing.assert_allclose(sums, SUMS, rtol=1e-5)


def damaged(change):
    """A good file with its header and its stream changed."""
    data = compact.encode(moving(2, 30), fps=8.0)
    size = int.from_bytes(data[4:8], "little")
    about, raw = json.loads(data[8 : 8 + size]), zlib.decompress(data[8 + size :])
    about, raw = change(about, raw)
    text = json.dumps(about).encode()
    return data[:4] + len(text).to_bytes(4, "little") + text + zlib.compress(raw)


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "not a compact form"),
        (b"4DG1\xff\xff\xff\xff{}", "not a compact form"),
        (b"4DG1\x02\x00\x00\x00{}", "timesteps"),
        (damaged(lambda about, raw: (about | {"gaussians": 1 << 21}, raw)), "damaged"),
        (damaged(lambda about, raw: (about | {"timesteps": 1 << 23}, raw)), "too many"),
        (damaged(lambda about, raw: (about, raw + bytes(1 << 20))), "damaged"),
        (damaged(lambda about, raw: (about, raw[:-1])), "damaged"),
        (damaged(lambda about, raw: (about | {"origin": "here"}, raw)), "origin"),
        (damaged(lambda about, raw: (about | {"origin": [1.0]}, raw)), "origin"),
        (damaged(lambda about, raw: (about | {"color_steps": 0}, raw)), "color_steps"),
        (damaged(lambda about, raw: (about, raw))[:-9], "damaged"),
    ],
)
def test_hostile_data_is_told_in_a_line(data, why):
    with pytest.raises(ValueError, match=why):
        compact.decode(data, "x.4dg")


def test_what_is_not_finite_is_refused():
    broken = moving(2, 5)
    broken.scales[1, 2, 0] = np.inf
    with pytest.raises(ValueError, match="finite"):
        compact.encode(broken, fps=8.0)
