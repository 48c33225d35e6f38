"""Size and place of an object: the box of what is read, root motion, the same rule for videos."""

import numpy as np
import pytest
from helpers import glb

from fourdstar_jax import geometry
from fourdstar_jax.data import gltf, posing, render, video


def sampled(data, frames=8):
    asset = gltf.load(data)
    return posing.sample_clip(asset, asset.clips[0], fps=8, max_frames=frames)


def extents(sequence):
    """Of the box over all frames."""
    return np.ptp(sequence.positions, axis=(0, 1))


def pictures(data, frames=8, size=96, azimuths=(0.0, 90.0, 180.0, 270.0)):
    """RGBA [F, V, h, w, 4] of a file's first clip."""
    asset = gltf.load(data)
    sequence = posing.sample_clip(asset, asset.clips[0], fps=8, max_frames=frames)
    renderer = render.Renderer(size, len(azimuths))
    renderer.load(asset)
    cameras = geometry.orbit_cameras(list(azimuths), width=size, height=size)
    steps = zip(sequence.positions, sequence.normals, strict=True)
    out = np.stack([renderer.draw(p, n, cameras).rgba for p, n in steps])
    renderer.close()
    return out


def sizes(rgba):
    """Pixels from left to right and from top to bottom of the object over all frames."""
    mask = (rgba[..., 3] > 127).any(0)
    return tuple(float(np.ptp(np.flatnonzero(mask.any(axis)))) + 1 for axis in (0, 1))


def test_a_walk_across_the_room_does_not_shrink_the_body():
    near, far = sampled(glb.moving_box(0.02)), sampled(glb.moving_box(30.0))
    np.testing.assert_allclose(extents(far), np.ptp(far.positions[0], axis=0), rtol=1e-4)
    np.testing.assert_allclose(extents(far), extents(near), rtol=0.03)
    assert far.motion > 10  # as measured before: the clip moves
    np.testing.assert_allclose(far.positions[-1], far.positions[0], atol=1e-5)


@pytest.mark.parametrize("direction", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.6, 0, -0.8)])
def test_root_motion_goes_when_it_leads_farther_than_half_of_the_object(direction):
    for distance, stays in ((0.45, True), (0.7, False)):
        w = glb.box_writer()
        w.animate("go", (0, "translation", [0, 1], [[0, 0, 0], distance * np.array(direction)]))
        asset = gltf.load(w.bytes())
        sequence = posing.sample_clip(asset, asset.clips[0], fps=64, max_frames=64)
        moved = np.linalg.norm(sequence.positions[-1, 0] - sequence.positions[0, 0])
        body = np.ptp(sequence.positions[0], axis=0).max()
        np.testing.assert_allclose(moved / body, distance * 63 / 64 if stays else 0, atol=1e-3)


def test_what_has_no_extent_is_refused_also_when_it_moves():
    w = glb.box_writer(size=(0.0, 0.0, 0.0))
    w.animate("go", (0, "translation", [0, 1], [[0, 0, 0], [5, 0, 0]]))
    with pytest.raises(gltf.MalformedAsset, match="'go' has a bounding box of side 0"):
        sampled(w.bytes())


def test_limbs_still_move_when_the_root_is_followed():
    w = glb.box_writer(size=(1.0, 2.0, 1.0))
    corners, triangles = glb.box((0.2, 1.0, 0.2))
    arm = {"POSITION": w.accessor(corners)}
    w.tree["meshes"].append({"primitives": [{"attributes": arm}]})
    w.tree["meshes"][1]["primitives"][0]["indices"] = w.accessor(triangles.ravel(), "u2")
    w.tree["nodes"][0]["children"] = [1]
    w.tree["nodes"].append({"mesh": 1, "translation": [0.8, 0, 0]})
    walk = (0, "translation", [0, 1], [[0, 0, 0], [0, 0, 9]])
    wave = (1, "translation", [0, 1], [[0.8, -1, 0], [0.8, 1, 0]])
    w.animate("walk", walk, wave)
    positions = sampled(w.bytes()).positions
    body, hand = positions[:, :8], positions[:, 8:]
    np.testing.assert_allclose(body[-1], body[0], atol=1e-5)
    assert np.ptp(hand[:, 0, 1]) > 0.4 and np.ptp(hand[:, 0, 2]) < 1e-5


def test_the_box_is_that_of_the_frames_that_are_read():
    """Later on the object grows to ten times its size: the first second does not know."""
    w = glb.box_writer()
    w.animate("grow", (0, "scale", [0, 1, 2], [[1, 1, 1], [1, 1.2, 1], [10, 10, 10]]))
    first = sampled(w.bytes(), frames=8)
    alone = glb.box_writer()
    alone.animate("grow", (0, "scale", [0, 1], [[1, 1, 1], [1, 1.2, 1]]))
    np.testing.assert_allclose(
        first.positions, sampled(alone.bytes(), frames=8).positions, atol=1e-6
    )
    assert extents(sampled(w.bytes(), frames=16))[1] > extents(first)[1] * 0.9
    assert np.ptp(sampled(w.bytes(), frames=16).positions[0], axis=0).max() < 0.2


@pytest.mark.parametrize(
    "size, wide", [((1, 1, 1), 0), ((0.3, 1, 0.3), 0), ((1, 0.2, 1), 1), ((4, 0.3, 0.3), 1)]
)
def test_size_in_pictures_and_nothing_is_cut(size, wide):
    rgba = pictures(glb.moving_box(0.02, size=size))
    assert not rgba[:, :, [0, -1]].any() and not rgba[:, :, :, [0, -1]].any()
    found = [geometry.apparent_size(*sizes(rgba[:, v])) / 96 for v in range(4)]
    if size[0] < 4:  # which is limited by its length
        np.testing.assert_allclose(np.mean(found), geometry.OCCUPANCY, atol=0.025)
    width, height = sizes(rgba[:, 0])
    assert (width > 1.4 * height) == bool(wide)


def test_skinned_parts_count_where_their_bones_put_them():
    """A head without a skin; a body bound in centimetres, under nodes that scale.

    The skinned mesh's own node, a hundredth as large and far away, means nothing (3.7.3.3).
    """
    w = glb.box_writer(size=(0.5, 0.5, 0.5))
    corners, triangles = glb.box((100.0, 150.0, 60.0))
    body = {
        "POSITION": w.accessor(corners),
        "JOINTS_0": w.accessor(np.zeros((8, 4)), "u1"),
        "WEIGHTS_0": w.accessor([[1, 0, 0, 0]] * 8),
    }
    indices = w.accessor(triangles.ravel(), "u2")
    w.tree["meshes"].append({"primitives": [{"attributes": body, "indices": indices}]})
    w.tree["nodes"] = [
        {"name": "root", "children": [1, 2, 4]},
        {"name": "head", "mesh": 0, "translation": [0, 1.0, 0]},
        {"name": "armature", "scale": [0.01] * 3, "children": [3]},
        {"name": "hip"},
        {"name": "body", "mesh": 1, "skin": 0, "scale": [0.01] * 3, "translation": [50, 0, 0]},
    ]
    w.tree["skins"] = [{"joints": [3], "inverseBindMatrices": w.accessor([np.eye(4).ravel()])}]
    w.animate("nod", (1, "translation", [0, 1], [[0, 1, 0], [0, 1.1, 0]]))
    sequence = sampled(w.bytes())
    head, hull = sequence.positions[:, :8], sequence.positions[:, 8:]
    ratio = np.ptp(hull[0], axis=0) / np.ptp(head[0], axis=0)
    np.testing.assert_allclose(ratio, [2, 3, 1.2], rtol=1e-4)
    rgba = pictures(w.bytes())
    assert not rgba[:, :, [0, -1]].any() and not rgba[:, :, :, [0, -1]].any()
    width, height = sizes(rgba[:, 0])
    np.testing.assert_allclose(height / 96, geometry.OCCUPANCY, atol=0.06)
    np.testing.assert_allclose(width / height, 1.0 / 2.1, atol=0.08)


@pytest.mark.parametrize("distance", [0.02, 0.4, 5.0])
def test_a_video_of_a_training_view_is_fitted_to_the_size_of_training(distance):
    """Seen elsewhere and larger; the object's own walk, if it walks, is in the video, too."""
    rgba = pictures(glb.moving_box(distance, size=(0.6, 1.0, 0.5)))[:, 0]
    before = geometry.apparent_size(*sizes(rgba))
    video_frames = np.zeros((8, 120, 400, 4), np.uint8)
    for t, frame in enumerate(rgba):
        left = 10 + (25 * t if distance > 1 else 0)
        video_frames[t, 15:111, left : left + 96] = frame
    images, info = video.frame_object(video_frames, resolution=96)
    assert info["followed"] == (distance > 1)
    seen = np.stack([*images.transpose(3, 0, 1, 2), images.min(-1) < 0.95])[3]
    seen = np.stack([seen * 255] * 4, -1)
    after = geometry.apparent_size(*sizes(seen))
    np.testing.assert_allclose(after / before, 1, atol=0.12)  # the other views have their share
    middles = [np.argwhere(m[..., 3]).mean(0) for m in seen]
    np.testing.assert_allclose(np.mean(middles, 0), 47.5, atol=2)


def test_points_stay_on_their_triangles():
    """Of two triangles the larger has its share of the points; they move as their corners do."""
    first = np.float32([[0, 0, 0], [3, 0, 0], [0, 1, 0], [0, 0, 5], [1, 0, 5], [0, 1, 5]])
    triangles = np.int32([[0, 1, 2], [3, 4, 5]])
    turn = np.float32([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    frames = np.stack([first, first @ turn.T + 2])
    found = posing.track(frames, triangles, 2000, np.random.default_rng(0))
    near = found.points[0][:, 2] == 0
    assert near.mean() == pytest.approx(3 / 4, abs=0.04)
    x, y, _ = found.points[0][near].T
    assert (x / 3 + y <= 1 + 1e-6).all() and x.mean() == pytest.approx(1, abs=0.06)
    np.testing.assert_allclose(found.points[1], found.points[0] @ turn.T + 2, atol=1e-5)
    np.testing.assert_allclose(found.normals[0], np.tile([0, 0, 1], (2000, 1)), atol=1e-6)
    np.testing.assert_allclose(found.normals[1], np.tile([1, 0, 0], (2000, 1)), atol=1e-6)
    flat = np.zeros_like(frames)
    with pytest.raises(gltf.MalformedAsset, match="no area"):
        posing.track(flat, triangles, 3, np.random.default_rng(0))
