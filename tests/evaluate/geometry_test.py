"""Chamfer distances over time of a box, against values by hand; alignment; ActionBench's motion."""

import itertools

import numpy as np
import pytest

from fourdstar_jax.evaluate import geometry

BOX = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
T = 4


def still():
    return np.stack([BOX] * T)


def turned(points, degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return points @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T


def measured(frames):
    return geometry.measure(np.stack(frames), np.ones((T, 8)), still())


def test_a_box_in_place():
    found = measured(still())
    assert found == pytest.approx({"cd_3d": 0, "cd_4d": 0, "cd_m": 0, "f_score": 1}, abs=1e-9)


def test_a_translating_box():
    """By 0.1 more a frame: each corner is so far from its own, and no other is nearer."""
    found = measured([BOX + [0.1 * t, 0, 0] for t in range(T)])
    assert found["cd_3d"] == pytest.approx(0, abs=1e-6)
    assert found["cd_4d"] == pytest.approx(2 * 0.15) and found["cd_m"] == pytest.approx(2 * 0.15)
    assert found["f_score"] == pytest.approx(1 / 4)


def test_a_rotating_box():
    """By a quarter a frame corners fall on corners, which only motion tells from standing still."""
    found = measured([turned(BOX, 90 * t) for t in range(T)])
    assert found["cd_3d"] == pytest.approx(0, abs=1e-6) and found["cd_4d"] == pytest.approx(
        0, abs=1e-6
    )
    chords = [2 * np.sqrt(0.5) * np.sin(np.deg2rad(45 * t)) for t in range(T)]
    assert found["cd_m"] == pytest.approx(2 * np.mean(chords))
    small = measured([turned(BOX, 10 * t) for t in range(T)])
    chords = [2 * np.sqrt(0.5) * np.sin(np.deg2rad(5 * t)) for t in range(T)]
    assert small["cd_4d"] == pytest.approx(2 * np.mean(chords))
    assert small["cd_3d"] == pytest.approx(0, abs=1e-6)


def test_a_scaling_box():
    found = measured([BOX * (1 + 0.2 * t) for t in range(T)])
    assert found["cd_3d"] == pytest.approx(0, abs=1e-6)
    distances = [0.2 * t * np.sqrt(0.75) for t in range(T)]
    assert found["cd_4d"] == pytest.approx(2 * np.mean(distances))
    assert found["cd_m"] == pytest.approx(2 * np.mean(distances))


def test_what_is_aligned_and_opaque():
    """A bent rod that lies elsewhere, turned and larger, is found; what is not opaque is not."""
    rng = np.random.default_rng(0)
    rod = rng.uniform(-1, 1, (300, 3)) * [0.5, 0.05, 0.1] + [0, 0, 0.3]
    rod[:, 1] += rod[:, 0] ** 2 + 0.3 * rod[:, 0]
    moved = 1.7 * turned(rod, 70) + [1, 2, 3]
    found = geometry.align(moved, rod)
    np.testing.assert_allclose(found(moved), rod, atol=1e-6)
    opacities = np.ones((2, 301))
    opacities[:, 300] = 0.4
    means = np.stack([np.concatenate([moved, [[9.0, 9, 9]]])] * 2)
    assert geometry.measure(means, opacities, np.stack([rod] * 2))["cd_m"] < 1e-6
    with pytest.raises(ValueError, match="frame 1: fewer than 3 Gaussians are opaque"):
        geometry.measure(means, opacities * [[1], [0.1]], np.stack([rod] * 2))
    with pytest.raises(ValueError, match="2 frames of Gaussians, 1 of true"):
        geometry.measure(means, opacities, rod[None])


def test_motion_of_unlike_sets():
    """Two points against one: partners are those of the first frame, however far they go."""
    first = np.array([[[0.0, 0, 0], [1, 0, 0]], [[0, 0, 0], [1, 3, 0]]])
    second = np.array([[[0.1, 0, 0]], [[0, 0, 0]]])
    ours = np.mean([[0.1, 0.9], [0, np.sqrt(10)]])
    theirs = np.mean([0.1, 0])
    assert geometry.motion_chamfer(first, second) == pytest.approx(ours + theirs)


def test_a_similarity_and_its_inverse():
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    found = geometry.Similarity(1.7, rotation, rng.normal(size=3))
    points = rng.normal(size=(9, 3))
    np.testing.assert_allclose(found.inverse(found(points)), points, atol=1e-12)


def test_many_points_are_aligned_from_the_start_that_all_of_them_end_best_from():
    """A turned shape of more points than are looked at; no other turn lets it lie as it did."""
    rng = np.random.default_rng(4)
    lobes, sizes, which = (
        rng.normal(size=(6, 3)),
        0.2 + 0.4 * rng.random(6),
        rng.integers(0, 6, 6000),
    )
    ball = rng.normal(size=(6000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    shape = lobes[which] + sizes[which][:, None] * ball
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    seen = 1.3 * shape[::2] @ turn.T + 0.2
    found = geometry.align(seen, shape[1::2])
    assert geometry.chamfer(found(seen), shape[1::2]) < 0.1
    np.testing.assert_allclose(found.scale, 1 / 1.3, rtol=0.01)
    np.testing.assert_allclose(found.rotation @ turn, np.eye(3), atol=0.02)


def test_points_that_are_all_one_are_brought_to_the_middle():
    truth = np.random.default_rng(5).normal(size=(50, 3))
    found = geometry.align(np.zeros((40, 3)), truth)
    assert np.isfinite(found(np.zeros((1, 3)))).all()
