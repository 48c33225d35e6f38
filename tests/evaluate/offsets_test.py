"""Coarse against corrected Gaussians: equal where there are no offsets, and paired over objects."""

import numpy as np
import pytest

from fourdstar_jax.data import prepare
from fourdstar_jax.evaluate import offsets


@pytest.fixture(scope="module")
def data_dir(objects_dir, tmp_path_factory):
    """Three clips of two objects."""
    out = tmp_path_factory.mktemp("offsets") / "data"
    options = dict(image_size=16, views=2, extra_views=1, max_frames=3, workers=0)
    prepare.prepare(objects_dir, out, **options, log=lambda line: None)
    return out


def test_comparison(tiny_bundle, data_dir):
    report = offsets.compare(tiny_bundle, data_dir, "train", rates=(0.0, 0.5), near=3)
    assert (report["objects"], report["clips"]) == (2, 3)
    right, wrong = report["0"], report["0.5"]
    assert set(right) == {"temporal_error", "psnr_in_mask", "warping_error"}
    for name, found in right.items():
        mean, low, high = found["gain"]
        assert low <= mean <= high and found["coarse"] > 0
        np.testing.assert_allclose(mean, found["coarse"] - found["corrected"], rtol=1e-4)
        np.testing.assert_allclose(found["gain_share"][0], mean / found["coarse"], rtol=1e-4)
        assert found["coarse"] != wrong[name]["coarse"]  # wrong codes are seen
        assert mean != 0  # arbitrary offsets make a difference
        np.testing.assert_allclose(found["oracle"], found["coarse"], rtol=1e-5)
    assert wrong["temporal_error"]["oracle"] < wrong["temporal_error"]["coarse"]


def test_objects_count_once():
    """Two clips of one object and one of another: the mean of the means."""
    values = [[(1.0, 0.0, 0.0), (3.0, 1.0, 0.0)], [(4.0, 4.0, 0.0)]]
    names = ("coarse_x", "corrected_x", "oracle_x")
    clips = [[dict(zip(names, clip, strict=True)) for clip in of_one] for of_one in values]
    found = offsets._summary(clips)["x"]
    assert found["coarse"] == 3 and found["corrected"] == 2.25 and found["gain"][0] == 0.75
    assert found["gain_share"] == (0.25, 0.0, 0.5)
    assert (
        found["oracle"] == 0 and found["oracle_gain"][0] == 3 and found["oracle_gain_share"][0] == 1
    )


def test_another_rig_is_refused(tiny_bundle, dataset_dir):
    with pytest.raises(ValueError, match="is not the bundle's"):
        offsets.compare(tiny_bundle, dataset_dir, "train")
