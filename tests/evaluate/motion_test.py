"""Flow, tracks and agreement of views, against values by hand."""

import numpy as np
import pytest

from fourdstar_jax import geometry
from fourdstar_jax.evaluate import motion
from fourdstar_jax.types import Gaussians

SIZE = 24


@pytest.fixture(autouse=True)
def mesh():
    """None, as for users."""


def test_warping_error_by_hand():
    """A square that moves by two pixels, on which the prediction flickers by 0.25."""
    truth = np.ones((3, 12, 12, 3), np.float32)
    masks = np.zeros((3, 12, 12), bool)
    flow = np.zeros((3, 12, 12, 2), np.float32)
    for t in range(3):
        truth[t, 4:8, 2 * t : 2 * t + 4] = 0.5
        masks[t, 4:8, 2 * t : 2 * t + 4] = True
        flow[t, ..., 0] = 2
    images = truth.copy()
    assert motion.warping_error(images, truth, masks, flow) == 0
    images[1][masks[1]] += 0.25
    assert motion.warping_error(images, truth, masks, flow) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no pixel"):
        motion.warping_error(images, truth, masks, flow + 100)


def one_gaussian(means, scale=0.15, opacity=0.95):
    shape = (len(means), 1)
    return Gaussians(
        means=np.asarray(means, np.float32)[:, None],
        quats=np.tile(np.float32([1, 0, 0, 0]), (*shape, 1)),
        scales=np.full((*shape, 3), scale, np.float32),
        opacities=np.full(shape, opacity, np.float32),
        colors=np.zeros((*shape, 3), np.float32),
    )


def test_rendered_flow_of_a_gaussian_that_moves():
    """By 0.05 to the right and 0.1 up, which from the right side is nearer and up."""
    means = np.array([[0, 0, 0], [0.05, 0.1, 0], [0.1, 0.2, 0]])
    gaussians = one_gaussian(means)
    for azimuth, x, distance in ((0.0, 0.05, 2.0), (90.0, 0.0, 1.95)):
        cameras = geometry.orbit_cameras([azimuth], radius=2.0, fov_deg=60, width=SIZE, height=SIZE)
        flow = motion.rendered_flow(gaussians, cameras, width=SIZE, height=SIZE)
        assert flow.shape == (2, SIZE, SIZE, 2)
        focal = cameras.Ks[0, 0, 0]
        middle = flow[0, SIZE // 2, SIZE // 2]
        np.testing.assert_allclose(middle, [focal * x / 2, -focal * 0.1 / distance], atol=0.01)
    assert (flow[0, 0, 0] == 0).all()  # nothing is there


def test_flow_error_by_hand():
    truth = np.zeros((1, 2, 2, 2))
    flow = truth + [3, 4]
    masks = np.array([[[True, False], [False, True]]])
    flow[0, 0, 1] = 1000
    assert motion.flow_error(flow, truth, masks) == 5
    with pytest.raises(ValueError, match="empty"):
        motion.flow_error(flow, truth, ~masks & masks)


def test_jitter_by_hand():
    """Straight at one speed is steady; one there and back of 0.1 bends by 0.2; weights count."""
    t = np.arange(5.0)[:, None, None]
    line = t * [1.0, 0, 0]
    assert motion.jitter(line, np.ones((5, 1))) == pytest.approx(0)
    still = np.zeros((3, 2, 3))
    still[1, 0, 1] = 0.1
    opacities = np.array([[1.0, 1.0], [0.5, 1.0], [1.0, 1.0]])
    assert motion.jitter(still, opacities) == pytest.approx(0.5 * 0.2 / 1.5)
    with pytest.raises(ValueError, match="2 frames"):
        motion.jitter(still[:2], opacities[:2])
    with pytest.raises(ValueError, match="opaque"):
        motion.jitter(still, 0 * opacities)


def test_reprojection_by_hand():
    """Two views of one flat colour each, 0.2 and 0.5: every point that both see is off by 0.3."""
    cameras = geometry.orbit_cameras([0.0, 90.0], radius=2.0, fov_deg=60, width=SIZE, height=SIZE)
    pictures = np.stack([np.full((SIZE, SIZE, 3), c) for c in (0.2, 0.5)])
    depths = np.full((2, SIZE, SIZE), 2.0)
    points = np.array([[0.0, 0, 0], [0.3, 0, 0], [0, 5.0, 0], [0, 0.1, 0]])
    # the second is seen from the right only, 0.3 nearer there, at 2 from the front: both see it
    total, count = motion.reprojection_error(pictures, depths, cameras, points)
    assert (total, count) == (pytest.approx(3 * 0.3), 3)
    points[1] = [-0.3, 0, 0]  # 2.3 from the right: hidden behind what lies at 2
    total, count = motion.reprojection_error(pictures, depths, cameras, points, np.arange(1.0, 5))
    assert (total, count) == (pytest.approx((1 + 4) * 0.3), 5)
    assert motion.reprojection_error(pictures, 0 * depths, cameras, points) == (0, 0)
