"""Reading and posing GLB files, against formulas and plain loops; files that are broken."""

import base64
import json
import struct
import time

import numpy as np
import pytest
from helpers import glb

from fourdstar_jax.data import gltf

TOLERANCE = 1e-5  # float32 positions of unit size


def posed(data, times, clip=0):
    return gltf.load(data).pose(clip, np.array(times)).positions


def rotation(axis, degrees):
    """xyzw of a turn about a coordinate axis, and its matrix."""
    a = np.deg2rad(degrees)
    q = np.zeros(4)
    q[axis], q[3] = np.sin(a / 2), np.cos(a / 2)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    m = np.eye(3)
    m[i, i] = m[j, j] = np.cos(a)
    m[j, i], m[i, j] = np.sin(a), -np.sin(a)
    return q, m


def test_linear_step_and_cubic_keys_follow_the_specification():
    w = glb.box_writer()
    t = np.array([0.0, 0.5, 2.0])
    # Hermite keys reproduce a cubic exactly: value t^3, tangent 3 t^2, one component
    cubic = np.zeros((3, 3, 3))
    cubic[:, 0, 1] = cubic[:, 2, 1] = 3 * t**2
    cubic[:, 1, 1] = t**3
    w.animate("linear", (0, "translation", [1.0, 3.0], [[0, 0, 0], [4, 2, 0]]))
    w.animate("step", (0, "translation", [0.0, 1.0], [[0, 0, 0], [4, 2, 0]], "STEP"))
    w.animate("cubic", (0, "translation", t, cubic.reshape(9, 3), "CUBICSPLINE"))
    asset = gltf.load(w.bytes())
    start = asset.positions
    assert asset.clips[0] == gltf.Clip(0, "linear", 1.0, 2.0)
    moved = asset.pose(0, np.array([0.0, 0.5, 9.0])).positions - start
    np.testing.assert_allclose(moved[:, 0], [[0, 0, 0], [1, 0.5, 0], [4, 2, 0]], atol=TOLERANCE)
    moved = asset.pose(1, np.array([0.99, 1.0, 5.0])).positions - start
    np.testing.assert_allclose(moved[:, 0, 0], [0, 4, 4], atol=TOLERANCE)
    at = np.array([0.1, 0.5, 1.3, 2.0])
    moved = asset.pose(2, at).positions - start
    np.testing.assert_allclose(moved[:, 0, 1], at**3, atol=TOLERANCE)


def test_rotations_turn_evenly_the_short_way():
    w = glb.box_writer()
    start, end = rotation(2, 0)[0], -rotation(2, 120)[0]  # -q is the same rotation
    w.animate("turn", (0, "rotation", [0, 1], [start, end]))
    asset = gltf.load(w.bytes())
    for u in (0.0, 0.25, 0.7, 1.0):
        expected = asset.positions @ rotation(2, 120 * u)[1].T
        np.testing.assert_allclose(asset.pose(0, np.array([u])).positions[0], expected, atol=1e-5)


def test_nodes_multiply_down_the_tree():
    w = glb.box_writer()
    q, m = rotation(1, 90)
    shift = np.eye(4)
    shift[:3, 3] = [0, 5, 0]
    w.tree["nodes"] = [
        {"children": [1], "rotation": list(q), "translation": [1, 2, 3]},
        {"children": [2], "matrix": list(shift.T.ravel())},
        {"mesh": 0, "scale": [2, 3, 4]},
    ]
    asset = gltf.load(w.bytes())
    expected = (asset.positions * [2, 3, 4] + [0, 5, 0]) @ m.T + [1, 2, 3]
    found = asset.pose(None, np.array([0.0])).positions[0]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def skinned(joint_type="u1"):
    """Seven vertices on two bones, the second one unit above the first and turned by the clip."""
    rng = np.random.default_rng(3)
    w = glb.GlbWriter()
    points = rng.uniform(-1, 1, (7, 3))
    joints = np.array([[0, 1, 0, 0]] * 7)
    first = np.array([1.0, 0.75, 0.5, 0.5, 0.25, 0.0, 0.0])
    weights = np.stack([first, 1 - first, first * 0, first * 0], 1)
    bind = np.stack([np.eye(4), np.eye(4)])
    bind[1, :3, 3] = [0, -1, 0]
    primitive = {
        "attributes": {
            "POSITION": w.accessor(points),
            "NORMAL": w.accessor(points),
            "JOINTS_0": w.accessor(joints, joint_type),
            "WEIGHTS_0": w.accessor(2 * weights),  # normalised by the reader
        },
        "indices": w.accessor([0, 1, 2, 3, 4, 5, 4, 5, 6], "u1"),
    }
    w.tree["meshes"] = [{"primitives": [primitive]}]
    w.tree["nodes"] = [
        {"name": "root", "children": [1, 3]},
        {"name": "hip", "children": [2]},
        {"name": "knee", "translation": [0, 1, 0]},
        {"mesh": 0, "skin": 0, "translation": [9, 9, 9]},  # a skinned mesh's own place is ignored
    ]
    columns = bind.transpose(0, 2, 1).reshape(2, 16)
    w.tree["skins"] = [{"joints": [1, 2], "inverseBindMatrices": w.accessor(columns)}]
    q, m = rotation(0, 60)
    w.animate(
        "bend",
        (2, "rotation", [0, 1], [[0, 0, 0, 1], q]),
        (1, "translation", [0, 1], [[0, 0, 0], [0, 0, 2]]),
    )
    hip = points + [0, 0, 2]
    knee = (points - [0, 1, 0]) @ m.T + [0, 1, 2]
    expected = weights[:, :1] * hip + weights[:, 1:2] * knee
    normals = weights[:, :1] * points + weights[:, 1:2] * (points @ m.T)
    return w, points, expected, normals


@pytest.mark.parametrize("joint_type", ["u1", "u2", "f4"])
def test_skins_blend_the_bones(joint_type):
    w, points, expected, normals = skinned(joint_type)
    asset = gltf.load(w.bytes())
    out = asset.pose(0, np.array([0.0, 1.0]))
    np.testing.assert_allclose(out.positions[0], points, atol=TOLERANCE)
    np.testing.assert_allclose(out.positions[1], expected, atol=TOLERANCE)
    np.testing.assert_allclose(out.normals[1], normals, atol=TOLERANCE)
    assert asset.joint_names == {"hip", "knee"}


def test_morph_targets_add_up_and_sparse_ones_are_read():
    w = glb.box_writer()
    dense = np.arange(24, dtype=float).reshape(8, 3) / 24
    rows, values = [1, 6], [[1.0, 0, 0], [0, 2.0, 0]]
    w.tree["accessors"].append(
        {
            "componentType": 5126,
            "count": 8,
            "type": "VEC3",
            "sparse": {
                "count": 2,
                "indices": {
                    "bufferView": w.view(np.array(rows, "<u2").tobytes()),
                    "componentType": 5123,
                },
                "values": {"bufferView": w.view(np.array(values, "<f4").tobytes())},
            },
        }
    )
    sparse = len(w.tree["accessors"]) - 1
    primitive = w.tree["meshes"][0]["primitives"][0]
    primitive["targets"] = [{"POSITION": w.accessor(dense)}, {"POSITION": sparse}]
    w.tree["meshes"][0]["weights"] = [0.5, 0.0]
    w.animate("morph", (0, "weights", [0, 1], [0.0, 1.0, 1.0, 3.0]))
    asset = gltf.load(w.bytes())
    second = np.zeros((8, 3))
    second[rows] = values
    at_rest = asset.pose(None, np.array([0.0])).positions[0]
    np.testing.assert_allclose(at_rest, asset.positions + 0.5 * dense, atol=TOLERANCE)
    middle = asset.pose(0, np.array([0.5])).positions[0]
    np.testing.assert_allclose(middle, asset.positions + 0.5 * dense + 2 * second, atol=TOLERANCE)


@pytest.mark.parametrize("dtype, limit", [("u1", 255), ("i1", 127), ("u2", 65535), ("i2", 32767)])
def test_normalized_integers_are_fractions(dtype, limit):
    w = glb.box_writer()
    numbers = np.array([[0, limit, limit // 2]] * 8)
    primitive = w.tree["meshes"][0]["primitives"][0]
    primitive["attributes"]["POSITION"] = w.accessor(
        np.where(numbers == 0, np.iinfo(dtype).min, numbers), dtype, normalized=True
    )
    asset = gltf.load(w.bytes())
    low = -1.0 if dtype.startswith("i") else 0.0
    np.testing.assert_allclose(asset.positions[0], [low, 1, (limit // 2) / limit], atol=1e-6)


def test_interleaved_attributes_are_read_by_their_stride():
    w = glb.box_writer()
    corners = glb.box()[0].astype("<f4")
    view = w.view(np.concatenate([corners, corners * 10], 1).astype("<f4").tobytes())
    w.tree["bufferViews"][view]["byteStride"] = 24
    w.tree["accessors"].append(
        {"bufferView": view, "byteOffset": 12, "componentType": 5126, "count": 8, "type": "VEC3"}
    )
    primitive = w.tree["meshes"][0]["primitives"][0]
    primitive["attributes"]["POSITION"] = len(w.tree["accessors"]) - 1
    np.testing.assert_allclose(gltf.load(w.bytes()).positions, corners * 10)


def test_strips_and_fans_become_triangles():
    w = glb.box_writer()
    primitive = w.tree["meshes"][0]["primitives"][0]
    primitive["indices"] = w.accessor([0, 1, 2, 3, 4], "u1")
    primitive["mode"] = 5
    assert gltf.load(w.bytes()).triangles.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    primitive["mode"] = 6
    assert gltf.load(w.bytes()).triangles.tolist() == [[0, 1, 2], [0, 2, 3], [0, 3, 4]]


def test_colors_textures_and_their_transform():
    import io

    from PIL import Image

    w = glb.box_writer(color=(0.5, 1.0, 0.25, 1.0))
    picture = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    w.tree["images"] = [{"bufferView": w.view(png.getvalue()), "mimeType": "image/png"}]
    w.tree["textures"] = [{"source": 0}]
    w.tree["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"] = {
        "index": 0,
        "extensions": {"KHR_texture_transform": {"offset": [0.5, 0.25], "scale": [2, 4]}},
    }
    attributes = w.tree["meshes"][0]["primitives"][0]["attributes"]
    attributes["COLOR_0"] = w.accessor([[0, 127, 255, 255]] * 8, "u1", normalized=True)
    attributes["TEXCOORD_0"] = w.accessor([[1.0, 1.0]] * 8)
    asset = gltf.load(w.bytes())
    np.testing.assert_array_equal(asset.textures[0].image, picture)
    np.testing.assert_allclose(asset.colors[0], [0, 127 / 255, 0.25, 1], atol=1e-6)
    np.testing.assert_allclose(asset.uvs[0], [2.5, 4.25])
    assert [d.surface.texture for d in asset.draws] == [0]


@pytest.mark.parametrize("mode", ["I;16", "L", "P", "LA"])
def test_textures_of_every_pixel_format(mode):
    """A grey of 16 bits is that of 8, not white."""
    import io

    from PIL import Image

    picture = Image.fromarray(np.full((4, 4), 30_000, np.uint16))
    if mode != "I;16":
        picture = Image.new("L", (4, 4), 117).convert(mode)
    png = io.BytesIO()
    picture.save(png, "PNG")
    w = glb.box_writer()
    w.tree["images"] = [{"bufferView": w.view(png.getvalue()), "mimeType": "image/png"}]
    w.tree["textures"] = [{"source": 0}]
    w.tree["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"] = {"index": 0}
    attributes = w.tree["meshes"][0]["primitives"][0]["attributes"]
    attributes["TEXCOORD_0"] = w.accessor([[0.5, 0.5]] * 8)
    (texture,) = gltf.load(w.bytes()).textures
    assert texture.image.tolist() == [[[117, 117, 117, 255]] * 4] * 4


def test_an_image_outside_the_file_is_never_opened(tmp_path):
    w = glb.box_writer()
    (tmp_path / "secret.png").write_bytes(b"not to be read")
    w.tree["images"] = [{"uri": "secret.png"}]
    w.tree["textures"] = [{"source": 0}]
    w.tree["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"] = {"index": 0}
    attributes = w.tree["meshes"][0]["primitives"][0]["attributes"]
    attributes["TEXCOORD_0"] = w.accessor(np.zeros((8, 2)))
    (tmp_path / "a.glb").write_bytes(w.bytes())
    asset = gltf.load(tmp_path / "a.glb")
    assert asset.textures == [] and "outside the file" in asset.warnings[0]


def test_normals_stand_on_surfaces_that_are_stretched():
    """A slope under a node twice as wide: the normal is that of the wider slope."""
    w = glb.box_writer()
    normal = np.float32([[1, 1, 0]] * 8) / np.sqrt(2)
    w.tree["meshes"][0]["primitives"][0]["attributes"]["NORMAL"] = w.accessor(normal)
    for scale in ([2, 1, 1], [-2, 1, 1]):
        w.tree["nodes"][0]["scale"] = scale
        found = gltf.load(w.bytes()).pose(None, np.zeros(1)).normals[0, 0]
        wanted = np.array([np.sign(scale[0]), 2, 0]) / np.sqrt(5)
        np.testing.assert_allclose(found / np.linalg.norm(found), wanted, atol=1e-6)


def test_a_mirrored_node_keeps_its_outside():
    def outward(asset):
        corners = asset.pose(None, np.zeros(1)).positions[0][asset.triangles]
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        return (across * corners.mean(1)).sum(-1) > 0

    w = glb.box_writer()
    plain = outward(gltf.load(w.bytes()))
    assert plain.all() or not plain.any()
    w.tree["nodes"][0]["scale"] = [-1, 1, 1]
    np.testing.assert_array_equal(outward(gltf.load(w.bytes())), plain)


def test_vertices_that_no_triangle_uses_are_gone():
    w = glb.box_writer()
    far = np.concatenate([glb.box()[0], [[50.0, 0, 0]]])
    w.tree["meshes"][0]["primitives"][0]["attributes"]["POSITION"] = w.accessor(far)
    asset = gltf.load(w.bytes())
    assert len(asset.positions) == 8 and asset.triangles.max() == 7
    assert np.abs(asset.positions).max() <= 0.5


def test_what_is_not_read_is_named():
    w = glb.box_writer()
    w.tree["extensionsUsed"] = ["KHR_materials_clearcoat", "KHR_materials_unlit"]
    w.tree["materials"][0] |= {"normalTexture": {"index": 0}, "alphaMode": "BLEND"}
    points = {"attributes": dict(w.tree["meshes"][0]["primitives"][0]["attributes"]), "mode": 0}
    w.tree["meshes"][0]["primitives"].append(points)
    warnings = " | ".join(gltf.load(w.bytes()).warnings)
    for words in ("KHR_materials_clearcoat", "normal maps", "transparency", "points and lines"):
        assert words in warnings
    assert "unlit" not in warnings


@pytest.mark.parametrize("kind", ["nodes", "accessors", "materials"])
def test_endless_lists_are_refused_at_once(kind):
    w = glb.box_writer()
    if kind == "nodes":  # a chain
        w.tree[kind] = [{"children": [i + 1]} for i in range(600_000)] + [{"mesh": 0}]
    else:
        w.tree[kind] += [w.tree[kind][0]] * 600_000
    start = time.process_time()
    with pytest.raises(gltf.MalformedAsset, match=f"{kind}, more than"):
        gltf.load(w.bytes())
    assert time.process_time() - start < 5


def _edit(change):
    def make():
        w, *_ = skinned()
        change(w.tree, w)
        return w.bytes()

    return make


def _bad_weights(tree, w):
    attributes = tree["meshes"][0]["primitives"][0]["attributes"]
    weights = np.zeros((7, 4))
    weights[3] = np.nan
    attributes["WEIGHTS_0"] = w.accessor(weights)


def _huge_image(tree, w):
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 6, 0, 0, 0)
    import zlib

    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    png += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4
    tree["images"] = [{"bufferView": w.view(png)}]
    tree["textures"] = [{"source": 0}]
    tree["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]
    primitive = tree["meshes"][0]["primitives"][0]
    primitive["material"] = 0
    primitive["attributes"]["TEXCOORD_0"] = w.accessor(np.zeros((7, 2)))


BROKEN = {
    "first bytes": lambda: b"GIF89a" + b"\0" * 100,
    "cut short": lambda: skinned()[0].bytes()[:-9],
    "leaves the file": lambda: (
        (data := skinned()[0].bytes())[:12] + struct.pack("<I", 1 << 31) + data[16:]
    ),
    "no JSON chunk": lambda: struct.pack("<4sII", b"glTF", 2, 20) + struct.pack("<I4s", 0, b"X"),
    "not an object": lambda: (
        struct.pack("<4sII", b"glTF", 2, 24) + struct.pack("<I4s", 4, b"JSON") + b"[1] "
    ),
    "missing field": _edit(lambda t, w: t.pop("asset")),
    "leaves its buffer view": _edit(lambda t, w: t["accessors"][0].update(count=10_000)),
    "leaves its buffer$": _edit(lambda t, w: t["bufferViews"][0].update(byteLength=1 << 30)),
    "bufferViews\\[99\\]": _edit(lambda t, w: t["accessors"][0].update(bufferView=99)),
    "elements and no data": _edit(
        lambda t, w: (
            t["accessors"].append(t["accessors"][0] | {"count": 60_000_000})
            or t["accessors"][-1].pop("bufferView")
            or t["meshes"][0]["primitives"][0]["attributes"].update(
                POSITION=len(t["accessors"]) - 1
            )
        )
    ),
    "not finite in 1 of 7": _edit(_bad_weights),
    "names vertex 200": _edit(
        lambda t, w: t["meshes"][0]["primitives"][0].update(indices=w.accessor([0, 1, 200], "u1"))
    ),
    "names joint 7": _edit(
        lambda t, w: t["meshes"][0]["primitives"][0]["attributes"].update(
            JOINTS_0=w.accessor([[0, 7, 0, 0]] * 7, "u1")
        )
    ),
    "own ancestor|two parents": _edit(lambda t, w: t["nodes"][2].update(children=[0])),
    "do not exist|does not exist": _edit(lambda t, w: t["nodes"][2].update(children=[77])),
    "which is not read": _edit(
        lambda t, w: t.update(extensionsRequired=["KHR_draco_mesh_compression"])
    ),
    "too large": _edit(_huge_image),
    "values for 2 keys": _edit(
        lambda t, w: t["animations"][0]["samplers"][0].update(output=w.accessor([[0, 0, 0, 1]] * 3))
    ),
    "run backwards": _edit(
        lambda t, w: t["animations"][0]["samplers"][0].update(input=w.accessor([1.0, 0.0]))
    ),
    "moves node 50": _edit(
        lambda t, w: t["animations"][0]["channels"][0]["target"].update(node=50)
    ),
    "no triangles": _edit(lambda t, w: t["nodes"][3].pop("mesh")),
    "GLB version 1": lambda: b"glTF\1\0\0\0" + skinned()[0].bytes()[8:],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_files_say_why_in_one_line(reason):
    with pytest.raises(gltf.MalformedAsset, match=reason) as caught:
        gltf.load(BROKEN[reason]())
    assert "\n" not in str(caught.value)


def test_buffers_elsewhere_are_refused_and_data_uris_read():
    w = glb.box_writer()
    data = w.bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    tree = json.loads(data[20 : 20 + length])

    def with_uri(uri):
        text = json.dumps(tree | {"buffers": [tree["buffers"][0] | {"uri": uri}]}).encode()
        text += b" " * (-len(text) % 4)
        head = struct.pack("<4sII", b"glTF", 2, 20 + len(text))
        return head + struct.pack("<I4s", len(text), b"JSON") + text

    inside = "data:application/octet-stream;base64," + base64.b64encode(w.binary).decode()
    np.testing.assert_allclose(gltf.load(with_uri(inside)).positions, glb.box()[0])
    for uri in ("mesh.bin", "/etc/hostname", "file:///etc/hostname", "http://127.0.0.1/a.bin"):
        with pytest.raises(gltf.MalformedAsset, match="outside the file"):
            gltf.load(with_uri(uri))


def test_damaged_bytes_never_raise_anything_else():
    """Random damage in the JSON and the data: it is read, or it is a MalformedAsset."""
    data = np.frombuffer(skinned()[0].bytes(), np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = data.copy()
        where = rng.integers(12, len(data), rng.integers(1, 6))
        damaged[where] = rng.integers(0, 256, len(where))
        try:
            gltf.load(damaged.tobytes()).pose(None, np.array([0.0]))
        except gltf.MalformedAsset:
            refused += 1
    assert 10 < refused < 150


def test_training_assets_load_and_the_damaged_ones_are_found(assets):
    """Four files have skin weights that are not numbers; assets.csv marks the three with many."""
    import csv

    with open(assets / "assets.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    marked = {name for name, row in rows.items() if row["split"] == "malformed"}
    wasp = "quaternius/easy_enemies_pack__Wasp.glb"
    refused = {}
    for name in {*sorted(rows)[::9], *marked, wasp}:
        row = rows[name]
        try:
            asset = gltf.load(assets / name)
        except gltf.MalformedAsset as error:
            refused[name] = str(error)
            continue
        assert (asset.sha256, len(asset.clips)) == (row["sha256"], int(row["clips"]))
    assert len(marked) == 3 and set(refused) == marked
    assert "3 of 5423 vertices have skin weights" in "".join(gltf.load(assets / wasp).warnings)
    assert all("(WEIGHTS_0) is not finite in" in reason for reason in refused.values())
