"""Blender draws what our renderer draws, ends with its asset alone, and does not go unnoticed."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import glb
from PIL import Image

from fourdstar_jax import cli, geometry
from fourdstar_jax.data import blender, gltf, pipeline, prepare, render
from fourdstar_jax.data.settings import SAMPLES, Limits

SIZE = 64
IOU = 0.97  # of alpha: samples are not where ours are
LEVELS = 1.0  # of 255, mean where colours are even: edges are mixed in linear light there
TINY: dict[str, Any] = dict(
    image_size=9, views=2, extra_views=0, max_frames=2, workers=0, log=lambda line: None
)
VERSION, FEW = "9.9.0", 5
RED, BLUE = (1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)

# Speaks as our script within Blender does; the colours tell the view and what it was called with.
PAINTER = """#!{python}
import io, os, sys, time
import numpy as np
from PIL import Image
print("Blender {version}", flush=True)
print("fourdstar-blender {version}", flush=True)
assert "--python" in sys.argv and sys.argv[-4] == "--"
size, samples = int(sys.argv[-3]), int(sys.argv[-2])
blue = False
while len(head := sys.stdin.buffer.read(8)) == 8:
    message = io.BytesIO(sys.stdin.buffer.read(int.from_bytes(head, "little")))
    request = dict(np.load(message, allow_pickle=False))
    answers = [b""]
    if "triangles" in request:
        blue = request["color"][0, 2] == 1
    else:
        if blue:
            {does}
        answers = []
        for v in range(len(request["viewmats"])):
            picture = np.full((size, size, 4), (v, samples, 7, 255), np.uint8)
            out = io.BytesIO()
            Image.fromarray(picture).save(out, "PNG")
            answers.append(out.getvalue())
    for answer in answers:
        sys.stdout.buffer.write(len(answer).to_bytes(8, "little") + answer)
    sys.stdout.flush()
"""


def painter(folder, does="pass"):
    """A program in Blender's place; `does` is what it does when it is to draw what is blue."""
    path = folder / "painter"
    path.write_text(PAINTER.format(python=sys.executable, version=VERSION, does=does))
    path.chmod(0o755)
    return path


def boxes(folder):
    """A red box, a blue one and a red one, which move."""
    folder.mkdir()
    for name, color in (("a", RED), ("b", BLUE), ("c", RED)):
        (folder / f"{name}.glb").write_bytes(glb.moving_box(color=color))
    return folder


def test_colours_are_blenders_and_exact_maps_ours(tmp_path):
    assets, program = boxes(tmp_path / "in"), painter(tmp_path)
    options = TINY | {"work_dir": tmp_path / "work"}
    theirs = prepare.prepare(assets, tmp_path / "a", **options, blender=program, samples=FEW)
    ours = prepare.prepare(assets, tmp_path / "b", **TINY)
    found, usual = (pipeline.ClipSource(tmp_path / x, "train") for x in ("a", "b"))
    for clip, other in ((found[i], usual[i]) for i in range(3)):
        for v in range(2):
            assert (clip["rig_rgba"][:, v] == (v, FEW, 7, 255)).all()
        np.testing.assert_array_equal(clip["rig_flow"], other["rig_flow"])
    assert {k: theirs["settings"][k] for k in ("blender", "samples")} == {
        "blender": VERSION,
        "samples": FEW,
    }
    assert not {"blender", "samples"} & set(ours["settings"])
    assert theirs["recipe_sha256"] != ours["recipe_sha256"]
    more = prepare.prepare(assets, tmp_path / "c", **TINY, blender=program)
    assert more["settings"]["samples"] == SAMPLES
    assert more["recipe_sha256"] != theirs["recipe_sha256"]
    with pytest.raises(ValueError, match=f"work was begun with blender={VERSION}, not None"):
        prepare.prepare(assets, tmp_path / "d", **options)


@pytest.mark.parametrize(
    "does, reason",
    [
        ("os.abort()", "Blender ended with SIGABRT"),
        ("sys.exit('no more paint')", "Blender ended with code 1: no more paint"),
    ],
)
def test_a_crash_costs_one_asset(tmp_path, does, reason):
    assets, program = boxes(tmp_path / "in"), painter(tmp_path, does)
    manifest = prepare.prepare(assets, tmp_path / "out", **TINY, blender=program)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quarantined"] == [{"file": "b.glb", "reason": reason}]
    assert [c["clip_id"] for c in manifest["clips"]] == ["a#0", "c#0"]


def test_a_blender_that_hangs_costs_one_asset(tmp_path):
    assets, program = boxes(tmp_path / "in"), painter(tmp_path, "time.sleep(30)")
    options = TINY | {"workers": 2, "limits": Limits(seconds=10), "blender": program}
    manifest = prepare.prepare(assets, tmp_path / "out", **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quarantined"] == [{"file": "b.glb", "reason": "not done within 10 s"}]
    assert [c["clip_id"] for c in manifest["clips"]] == ["a#0", "c#0"]


@pytest.mark.parametrize(
    "program, named",
    [
        ("no-such-program", "there is no such program"),
        (shutil.which("true"), "is neither Blender nor a Python that has bpy"),
        (sys.executable, "neither Blender nor a Python that has bpy: ModuleNotFoundError: No mod"),
    ],
)
def test_a_wrong_program_is_told_before_anything_is_drawn(tmp_path, capsys, program, named):
    assets = boxes(tmp_path / "in")
    argv = ["prepare", "--assets", assets, "--out", tmp_path / "out", "--work", tmp_path / "work"]
    assert cli.main([str(word) for word in [*argv, "--blender", program]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--blender {program}" in line and named in line
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_what_does_not_go_with_it_is_told(tmp_path):
    assets = boxes(tmp_path / "in")
    with pytest.raises(ValueError, match="samples=5 needs Blender"):
        prepare.prepare(assets, tmp_path / "out", **TINY, samples=5)
    options = {"renders": True, "flow": False, "zoom": (1.0, 1.0), "shift": 0.0}
    with pytest.raises(ValueError, match=f"blender={VERSION} needs GLB files"):
        prepare.prepare(
            assets, tmp_path / "out", **TINY | options, blender=painter(tmp_path), samples=5
        )


# With a Blender


@pytest.fixture(scope="module")
def program():
    if not (path := os.environ.get("FOURDSTAR_BLENDER")):
        pytest.skip("FOURDSTAR_BLENDER names no Blender, nor a Python that has bpy")
    return blender.find(path)


def board(material, wrap=(10497, 10497), uv=2.0, **surface):
    """A textured board that shows its picture `uv` times, a part of which is clear, as bytes."""
    picture = np.zeros((4, 4, 4), np.uint8)  # far smaller than it is drawn
    picture[:2, :2], picture[:2, 2:] = (255, 0, 0, 255), (0, 255, 0, 255)
    picture[2:, :2], picture[2:, 2:] = (40, 90, 255, 255), (255, 255, 255, 40)
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    w = glb.GlbWriter()
    w.tree["images"] = [{"bufferView": w.view(png.getvalue())}]
    w.tree["samplers"] = [{"wrapS": wrap[0], "wrapT": wrap[1], "magFilter": 9728}]
    w.tree["textures"] = [{"source": 0, "sampler": 0}]
    w.tree["materials"] = [material]
    corners = [[-0.4, -0.3, 0], [0.4, -0.3, 0.1], [0.4, 0.3, 0.1], [-0.4, 0.3, 0]]
    attributes = {
        "POSITION": w.accessor(corners),
        "NORMAL": w.accessor([[0.3, 0, 1], [-0.3, 0, 1], [-0.3, 0.4, 1], [0.3, 0.4, 1]]),
        "TEXCOORD_0": w.accessor([[-0.5, uv], [uv, uv], [uv, -0.5], [-0.5, -0.5]]),
        "COLOR_0": w.accessor([[1, 1, 1], [0.5, 1, 1], [1, 0.5, 1], [1, 1, 0.2]]),
    }
    indices = w.accessor([0, 1, 2, 0, 2, 3], "u1")
    primitive = {"attributes": attributes, "indices": indices, "material": 0}
    w.tree["meshes"] = [{"primitives": [primitive]}]
    w.tree["nodes"] = [{"mesh": 0}]
    return w.bytes()


TEXTURED = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
REPEAT, CLAMP, MIRROR = 10497, 33071, 33648
ASSETS = {
    "without normals": glb.box_writer((0.5, 0.4, 0.3), (0.8, 0.4, 0.1, 1.0)).bytes(),
    "both sides": board(TEXTURED | {"doubleSided": True}),
    "one side, clear": board(TEXTURED | {"alphaMode": "MASK"}),
    "mirrored, clamped": board(TEXTURED, (MIRROR, CLAMP)),
    "clamped, repeated": board(TEXTURED, (CLAMP, REPEAT)),
    "mirrored": board(TEXTURED, (MIRROR, MIRROR)),
    "unlit": board(TEXTURED | {"extensions": {"KHR_materials_unlit": {}}}),
    "emission": board(
        {
            "pbrMetallicRoughness": {"baseColorFactor": [0.1, 0.2, 0.1, 1]},
            "emissiveFactor": [0.9, 0.5, 0.7],
            "emissiveTexture": {"index": 0},
        }
    ),
}


@pytest.fixture(scope="module")
def renderer(program):
    renderer = blender.Renderer(program, SIZE, 3, samples=SAMPLES)
    yield renderer
    renderer.close()


@pytest.mark.parametrize("name", ASSETS)
def test_pictures_are_as_ours(renderer, name):
    asset = gltf.load(ASSETS[name])
    cameras = geometry.orbit_cameras([10, 150, 320], [0, -20, 5], width=SIZE, height=SIZE)
    p = asset.pose(None, np.array([0.0]))
    assert p.normals is not None
    renderer.load(asset)
    found = renderer.draw(p.positions[0], p.normals[0], cameras).rgba.astype(float)
    ours = render.Renderer.draw(renderer, p.positions[0], p.normals[0], cameras).rgba.astype(float)
    for one, other in zip(found, ours, strict=True):
        assert (one[one[..., 3] == 0] == 0).all()
        seen = np.maximum(one[..., 3], other[..., 3]).sum()
        if seen == 0:  # from behind
            assert name not in ("without normals", "both sides")
            continue
        assert np.minimum(one[..., 3], other[..., 3]).sum() / seen > IOU
        around = np.lib.stride_tricks.sliding_window_view(other, (3, 3), axis=(0, 1))
        plain = np.zeros((SIZE, SIZE), bool)  # inside, and no edge in the texture
        plain[1:-1, 1:-1] = (np.ptp(around, axis=(-2, -1)).max(axis=-1) < 20) & (
            other[1:-1, 1:-1, 3] == 255
        )
        assert plain.sum() > 150
        mean = np.abs(one - other)[plain].mean(axis=0)
        np.testing.assert_allclose(mean, 0, atol=LEVELS)


def test_the_camera_may_be_anywhere_and_pictures_are_the_same_again(renderer):
    """A principal point off the middle, another focal length; a fixed seed."""
    asset = gltf.load(ASSETS["without normals"])
    cameras = geometry.orbit_cameras([40, 200, 300], [-70, 10, 0], width=SIZE, height=SIZE)
    Ks = np.array(cameras.Ks)
    Ks[1, :2, 2] += (9, -6)
    Ks[2, [0, 1], [0, 1]] *= 0.7
    cameras = cameras._replace(Ks=Ks)
    p = asset.pose(None, np.array([0.0]))
    assert p.normals is not None
    renderer.load(asset)
    found = [renderer.draw(p.positions[0], p.normals[0], cameras).rgba for _ in range(2)]
    np.testing.assert_array_equal(*found)
    ours = render.Renderer.draw(renderer, p.positions[0], p.normals[0], cameras).rgba
    one, other = (x[..., 3].astype(float) for x in (found[0], ours))
    shared = np.minimum(one, other).sum((1, 2)) / np.maximum(one, other).sum((1, 2))
    assert (shared > IOU).all(), shared


def test_blender_ends_with_the_process_that_began_it(program, tmp_path):
    """Even while it draws a picture that takes it minutes."""
    (tmp_path / "box.glb").write_bytes(ASSETS["without normals"])
    code = f"""
import numpy as np
from fourdstar_jax import geometry
from fourdstar_jax.data import blender, gltf
renderer = blender.Renderer(blender.find({program.command[0]!r}), 1024, 1, samples=4096)
asset = gltf.load({str(tmp_path / "box.glb")!r})
renderer.load(asset)
p = asset.pose(None, np.array([0.0]))
print(renderer._process.pid, flush=True)
cameras = geometry.orbit_cameras([0.0], width=1024, height=1024)
renderer.draw(p.positions[0], p.normals[0], cameras)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        place = Path("/proc") / process.stdout.readline().decode().strip() / "stat"
        time.sleep(2)
        assert place.exists()
        process.kill()
    until = time.monotonic() + 10
    while place.exists() and place.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.1)
