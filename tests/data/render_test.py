"""The renderer against geometry: where points land, depth, exact flow, straight alpha, cameras."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import glb

from fourdstar_jax import geometry
from fourdstar_jax.data import gltf, posing, render

SIZE = 61
DEPTH_TOLERANCE = 1e-4  # float32 through the perspective divide
FLOW_TOLERANCE = 2e-3  # pixels


def drawn(data, cameras, offset=(0, 0, 0), size=SIZE, **options):
    """A frame of the rest pose; flow leads to the same pose moved by `offset`."""
    asset = gltf.load(data)
    p = asset.pose(None, np.array([0.0]))
    renderer = render.Renderer(size, len(cameras.viewmats))
    try:
        renderer.load(asset)
        return renderer.draw(
            p.positions[0],
            p.normals[0],
            cameras,
            next_positions=(p.positions[0] + np.array(offset, np.float32)),
            depth=True,
            **options,
        )
    finally:
        renderer.close()


def project(point, cameras, v):
    x = cameras.viewmats[v, :3, :3] @ point + cameras.viewmats[v, :3, 3]
    pixel = cameras.Ks[v] @ x
    return pixel[:2] / pixel[2], x[2]


def placed_box(center, side=0.08, color=(1.0, 0.0, 0.0, 1.0)):
    w = glb.box_writer((side, side, side), color)
    w.tree["nodes"][0]["translation"] = list(center)
    return w.bytes()


def test_a_point_lands_where_the_camera_says():
    cameras = geometry.orbit_cameras([0, 75, 200, 310], [0, -25, 5, 10], width=SIZE, height=SIZE)
    point = np.array([0.25, 0.1, -0.15])
    frame = drawn(placed_box(point), cameras)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for v in range(4):
        weight = frame.rgba[v, ..., 3] / 255.0
        center = np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()
        pixel, _ = project(point, cameras, v)
        np.testing.assert_allclose(center, pixel, atol=0.15)


def test_depth_and_flow_are_those_of_the_surface():
    """A board facing the camera: depth is constant; after a shift every pixel moves alike."""
    w = glb.box_writer((0.6, 0.5, 0.2))
    cameras = geometry.orbit_cameras([0.0], width=SIZE, height=SIZE)
    shift = np.array([0.06, -0.03, 0.2])
    frame = drawn(w.bytes(), cameras, shift)
    inside = frame.depth[0] > 0
    z = 1.5 - 0.1  # of the front face
    np.testing.assert_allclose(frame.depth[0][inside], z, atol=DEPTH_TOLERANCE)
    f, c = cameras.Ks[0, 0, 0], SIZE / 2
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    px, py = (x - c) / f * z, (y - c) / f * z  # of the front face at the pixel's ray
    assert inside.sum() == ((abs(px) < 0.3) & (abs(py) < 0.25)).sum()
    moved_x = f * (px + shift[0]) / (z - shift[2]) + c - x
    moved_y = f * (py - shift[1]) / (z - shift[2]) + c - y
    np.testing.assert_allclose(frame.flow[0, ..., 0][inside], moved_x[inside], atol=FLOW_TOLERANCE)
    np.testing.assert_allclose(frame.flow[0, ..., 1][inside], moved_y[inside], atol=FLOW_TOLERANCE)
    assert (frame.flow[0][~inside] == 0).all()


def test_flow_of_a_seen_vertex_is_its_own_path():
    """Depth unprojects every pixel to the surface; the point, moved, lands where flow says."""
    cameras = geometry.orbit_cameras([40, 160], [-20, 5], width=SIZE, height=SIZE)
    shift = np.array([0.05, 0.04, -0.06])
    frame = drawn(placed_box((0.1, -0.1, 0.05), 0.5), cameras, shift)
    for v in range(2):
        rows, columns = np.nonzero(frame.depth[v])
        assert len(rows) > 300
        for y, x in list(zip(rows, columns, strict=True))[::37]:
            ray = np.linalg.inv(cameras.Ks[v]) @ [x + 0.5, y + 0.5, 1]
            local = ray * frame.depth[v, y, x]
            world = cameras.viewmats[v, :3, :3].T @ (local - cameras.viewmats[v, :3, 3])
            pixel, _ = project(world + shift, cameras, v)
            np.testing.assert_allclose(frame.flow[v, y, x], pixel - [x + 0.5, y + 0.5], atol=5e-3)


def test_alpha_is_straight_and_background_clear():
    cameras = geometry.orbit_cameras([0.0], width=SIZE, height=SIZE)
    frame = drawn(placed_box((0.013, 0.017, 0), 0.4), cameras)
    alpha = frame.rgba[0, ..., 3]
    edge, full = (alpha > 0) & (alpha < 255), alpha == 255
    assert edge.sum() > 20 and (alpha[0] == 0).all()
    np.testing.assert_allclose(frame.rgba[0][edge][:, 0], frame.rgba[0][full][0, 0], atol=3)
    assert (frame.rgba[0][full][:, 1:3] == 0).all()


def test_textures_are_drawn_upright_and_masked():
    """A board with a 2x2 picture, one quarter of it clear: glTF's v = 0 is the picture's top."""
    import io

    from PIL import Image

    picture = np.zeros((2, 2, 4), np.uint8)
    picture[0, 0], picture[0, 1] = (255, 0, 0, 255), (0, 255, 0, 255)
    picture[1, 0], picture[1, 1] = (0, 0, 255, 255), (0, 0, 0, 0)
    png = io.BytesIO()
    Image.fromarray(picture).resize((64, 64), 0).save(png, "PNG")
    w = glb.GlbWriter()
    w.tree["images"] = [{"bufferView": w.view(png.getvalue())}]
    w.tree["textures"] = [{"source": 0}]
    w.tree["materials"] = [
        {"alphaMode": "MASK", "pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
    ]
    corners = [[-0.3, -0.3, 0], [0.3, -0.3, 0], [0.3, 0.3, 0], [-0.3, 0.3, 0]]
    attributes = {
        "POSITION": w.accessor(corners),
        "TEXCOORD_0": w.accessor([[0, 1], [1, 1], [1, 0], [0, 0]]),
    }
    indices = w.accessor([0, 1, 2, 0, 2, 3], "u1")
    w.tree["meshes"] = [
        {"primitives": [{"attributes": attributes, "indices": indices, "material": 0}]}
    ]
    w.tree["nodes"] = [{"mesh": 0}]
    cameras = geometry.orbit_cameras([0.0], width=SIZE, height=SIZE)
    rgba = drawn(w.bytes(), cameras).rgba[0].astype(int)
    low, high = SIZE // 2 - 8, SIZE // 2 + 8
    assert rgba[low, low, :3].argmax() == 0 and rgba[low, low, 1] == 0 and rgba[low, low, 0] > 60
    assert rgba[low, high, :3].argmax() == 1 and rgba[high, low, :3].argmax() == 2
    assert rgba[high, high, 3] == 0


def test_each_side_is_seen_from_its_azimuth():
    """Boxes on the axes: azimuth 90 stands on +x, a negative elevation looks from above."""
    cameras = geometry.orbit_cameras([0, 90, 0], [0, 0, -30], width=SIZE, height=SIZE)
    frame = drawn(placed_box((0.4, 0, 0), 0.1), cameras)
    x = [np.nonzero(frame.rgba[v, ..., 3])[1].mean() + 0.5 for v in range(3)]
    assert x[0] > SIZE / 2 + 5 and abs(x[1] - SIZE / 2) < 0.5
    frame = drawn(placed_box((0, 0, 0.4), 0.1), cameras)
    rows = [np.nonzero(frame.rgba[v, ..., 3])[0].mean() + 0.5 for v in range(3)]
    assert abs(rows[0] - SIZE / 2) < 0.5 and rows[2] > SIZE / 2 + 5  # what is near sinks


def test_renderers_do_not_disturb_each_other():
    """Each has its own OpenGL context, and only one is current at a time."""
    asset = gltf.load(glb.moving_box())
    cameras = geometry.orbit_cameras([0.0, 120.0], width=9, height=9)
    p = asset.pose(0, np.array([0.3]))
    first = render.Renderer(9, 2)
    first.load(asset)
    before = first.draw(p.positions[0] * 0.5, p.normals[0], cameras)
    second = render.Renderer(5, 1)
    after = first.draw(p.positions[0] * 0.5, p.normals[0], cameras)
    second.load(asset)
    second.close()
    last = first.draw(p.positions[0] * 0.5, p.normals[0], cameras)
    first.close()
    assert before.rgba[..., 3].max() == 255
    np.testing.assert_array_equal(before.rgba, after.rgba)
    np.testing.assert_array_equal(before.rgba, last.rgba)


def test_wrong_calls_name_the_argument():
    cameras = geometry.orbit_cameras([0.0, 90.0], width=8, height=8)
    with pytest.raises(ValueError, match="size=0"):
        render.Renderer(0, 1)
    renderer = render.Renderer(8, 1)
    zeros = np.zeros((8, 3), np.float32)
    with pytest.raises(ValueError, match="load first"):
        renderer.draw(zeros, zeros, cameras)
    renderer.load(gltf.load(glb.moving_box()))
    with pytest.raises(ValueError, match="2 cameras"):
        renderer.draw(zeros, zeros, cameras)
    with pytest.raises(ValueError, match="8 vertices"):
        renderer.draw(zeros[:5], zeros[:5], cameras)
    renderer.close()


def test_without_egl_one_line_says_what_to_install(tmp_path):
    """No EGL driver at all: the loader is pointed at an empty folder of vendors."""
    code = "from fourdstar_jax.data import render; render.Renderer(8, 1)"
    empty = {"__EGL_VENDOR_LIBRARY_DIRS": str(tmp_path), "LIBGL_DRIVERS_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | empty, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "apt-get install libegl1 libgl1-mesa-dri" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def cases():
    folder = Path(__file__).resolve().parents[3] / "shared" / "cases" / "glb"
    if not folder.is_dir():
        pytest.skip("the cases of other projects' bug reports are not here")
    return folder


def picture(path, azimuth=0.0, size=96):
    """The first frame of a file's first clip, on white."""
    asset = gltf.load(path)
    sequence = posing.sample_clip(asset, asset.clips[0], fps=8.0, max_frames=1)
    renderer = render.Renderer(size, 1)
    renderer.load(asset)
    cameras = geometry.orbit_cameras([azimuth], width=size, height=size)
    rgba = renderer.draw(sequence.positions[0], sequence.normals[0], cameras).rgba[0] / 255
    renderer.close()
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:], asset


def quarters(image):
    """The colours in the middle of the four quarters of what is not white."""
    rows, columns = np.nonzero((image < 0.99).any(-1))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    y = rows.min() + np.array([height // 4, 3 * height // 4])
    x = columns.min() + np.array([width // 4, 3 * width // 4])
    return image[np.ix_(y, x)]


FOUR = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]])


@pytest.mark.parametrize(
    "name",
    ["specgloss_texture", "emissive_texture", "webp_required", "webp_used", "basisu_fallback"]
    + ["texcoord1", "wrap_clamp"],
)
def test_textures_are_drawn(cases, name):
    found = quarters(picture(cases / f"{name}.glb")[0])
    np.testing.assert_allclose(found > 0.5, FOUR, err_msg=name)
    if name == "emissive_texture":  # its own light, whatever the lamps
        np.testing.assert_allclose(found, FOUR, atol=0.02)


def test_a_texture_is_repeated_where_the_sampler_says_so(cases):
    image, _ = picture(cases / "wrap_repeat.glb")
    row = image[np.nonzero((image < 0.99).any((1, 2)))[0][3]]
    inside = row[(row < 0.99).any(-1)]
    assert (np.abs(np.diff(inside[:, 0])) > 0.5).sum() >= 4  # three tiles change five times


def test_unlit_is_the_colour_itself(cases):
    found = quarters(picture(cases / "unlit.glb")[0])
    np.testing.assert_allclose(found, 128 / 255, atol=0.005)


def test_an_inverted_hull_is_an_outline(cases):
    image, _ = picture(cases / "inverted_hull_outline.glb", azimuth=20.0)
    red = (image[..., 0] > 0.5) & (image[..., 1] < 0.2)
    black = (image < 0.15).all(-1)
    assert red.sum() > 4 * black.sum() > 1000
    rows, columns = np.nonzero(black)
    inner_rows, inner_columns = np.nonzero(red)
    assert rows.min() < inner_rows.min() and rows.max() > inner_rows.max()
    assert columns.min() < inner_columns.min() and columns.max() > inner_columns.max()


def test_faces_are_seen_from_their_front(cases):
    assert (picture(cases / "unlit.glb")[0] < 0.9).any()
    assert (picture(cases / "unlit.glb", azimuth=180.0)[0] == 1).all()


@pytest.mark.parametrize(
    "name, parts, warning",
    [
        ("gpu_instancing", 3, None),
        ("node_visibility", 1, None),
        ("matrix_animated", 1, "has a matrix"),
        ("empty_primitive", 1, "without vertices"),
        ("negative_time", 1, "before zero"),
        ("two_scenes", 1, None),
        ("skinned_node_transform", 1, None),
        ("morph_zero_accessor", 2, None),
        ("alpha_mask", 1, None),
        ("color_u16", 1, None),
    ],
)
def test_the_rest_of_a_file_is_used(cases, name, parts, warning):
    image, asset = picture(cases / f"{name}.glb")
    columns = (image < 0.95).any((0, 2))
    assert (np.diff(columns.astype(int)) == 1).sum() == parts, name
    if warning is None:
        assert asset.warnings == []
    else:
        assert len(asset.warnings) == 1 and warning in asset.warnings[0]
    assert len(asset.clips) == 1
