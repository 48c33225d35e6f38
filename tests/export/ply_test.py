"""PLY and safetensors of Gaussians: byte layout, round trip, hostile files."""

import json
import shutil
import struct
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax.export import read_ply, read_splats, write_ply, write_splats
from fourdstar_jax.types import Gaussians


def gaussians(*lead, seed=0):
    rng = np.random.default_rng(seed)
    quats = rng.normal(size=(*lead, 4))
    return Gaussians(
        means=rng.normal(size=(*lead, 3)).astype(np.float32),
        quats=(quats / np.linalg.norm(quats, axis=-1, keepdims=True)).astype(np.float32),
        scales=rng.uniform(0.001, 0.1, (*lead, 3)).astype(np.float32),
        opacities=rng.uniform(0.001, 0.999, lead).astype(np.float32),
        colors=rng.uniform(0, 1, (*lead, 3)).astype(np.float32),
    )


def test_ply_round_trip_keeps_number_and_order(tmp_path):
    original = gaussians(7)
    original.opacities[2] = 0  # such Gaussians stay, so that the next frame has the same ones
    write_ply(tmp_path / "a.ply", original)
    for name, a, b in zip(Gaussians._fields, read_ply(tmp_path / "a.ply"), original, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=name)


def test_ply_bytes_are_the_inria_layout(tmp_path):
    """One Gaussian by hand: what every viewer decodes."""
    one = Gaussians(
        means=np.array([[1, 2, 3]], np.float32),
        quats=np.array([[2, 0, 0, 0]], np.float32),
        scales=np.array([[1, np.e, np.e**2]], np.float32),
        opacities=np.array([0.5], np.float32),
        colors=np.array([[0.5, 0.5 + 0.28209479177387814, 0.5]], np.float32),
    )
    write_ply(tmp_path / "a.ply", one)
    header, data = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")
    lines = header.decode().split("\n")
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert lines[2].startswith("comment axes LDB: x left, y down, z towards")
    assert lines[3] == "element vertex 1"
    assert " ".join(line.split()[-1] for line in lines[4:-1]) == (
        "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity "
        "scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    )
    expected = [-1, -2, 3, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 0, 0, 0, 1]
    np.testing.assert_allclose(struct.unpack("<17f", data), expected, atol=1e-6)


def test_the_turn_moves_whole_ellipsoids(tmp_path):
    """What stands in the file is R x and R C R^T of what was written, with R = diag(-1, -1, 1)."""
    original = gaussians(7)
    write_ply(tmp_path / "a.ply", original)
    data = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")[1]
    table = np.frombuffer(data, "<f4").reshape(7, 17)
    turn = np.diag([-1.0, -1.0, 1.0])
    np.testing.assert_allclose(table[:, :3], original.means @ turn, atol=1e-6)
    wanted = turn @ covariances(original.quats, original.scales) @ turn
    found = covariances(table[:, 13:], np.exp(table[:, 10:13]))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def covariances(quats, scales):
    w, x, y, z = quats.T.astype(float)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    ).transpose(2, 0, 1)
    factor = rotation * scales[:, None]
    return factor @ factor.transpose(0, 2, 1)


def test_an_outside_reader_stands_it_up(tmp_path):
    """splat-transform's glTF, whose y is up: red on top, x not mirrored, rotations as written."""
    if shutil.which("npx") is None:
        pytest.skip("npx is not installed")
    command = ["npx", "--yes", "@playcanvas/splat-transform@3.7.0"]
    try:
        subprocess.run([*command, "--version"], check=True, capture_output=True, timeout=90)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("npm does not serve splat-transform here")
    original = gaussians(5)
    original.means[0] = 0.2, 0.5, 0.1
    original.colors[0] = 1, 0, 0
    write_ply(tmp_path / "a.ply", original)
    files = [str(tmp_path / "a.ply"), str(tmp_path / "a.glb")]
    subprocess.run([*command, "--quiet", *files], check=True, timeout=90)
    found = gltf_splats((tmp_path / "a.glb").read_bytes())
    np.testing.assert_allclose(found["POSITION"], original.means, atol=1e-6)
    wanted = covariances(original.quats, original.scales)
    quats = found["KHR_gaussian_splatting:ROTATION"][:, [3, 0, 1, 2]]  # glTF says xyzw
    scales = found["KHR_gaussian_splatting:SCALE"]
    np.testing.assert_allclose(covariances(quats, scales), wanted, atol=1e-6)
    red, green, blue = found["KHR_gaussian_splatting:SH_DEGREE_0_COEF_0"][0]
    assert red > 1 and green < -1 and blue < -1


def gltf_splats(data):
    """The float attributes of the only primitive of a GLB."""
    length = struct.unpack("<I", data[12:16])[0]
    document, binary = json.loads(data[20 : 20 + length]), data[28 + length :]
    found = {}
    for name, index in document["meshes"][0]["primitives"][0]["attributes"].items():
        accessor = document["accessors"][index]
        if accessor["componentType"] == 5126:
            view = document["bufferViews"][accessor["bufferView"]]
            raw = binary[view["byteOffset"] :][: view["byteLength"]]
            found[name] = np.frombuffer(raw, "<f4").reshape(accessor["count"], -1)
    return found


def test_ply_refuses_values_that_are_not_finite(tmp_path):
    broken = gaussians(3)
    broken.means[1, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        write_ply(tmp_path / "a.ply", broken)
    with pytest.raises(ValueError, match="one timestep"):
        write_ply(tmp_path / "a.ply", gaussians(2, 3))


def change(old, new):
    return lambda data: data.replace(old, new, 1)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: b"solid cube", "not a PLY"),
        (lambda data: data[:-1], "vertices"),
        (lambda data: data + b"\0", "vertices"),
        (change(b"vertex 5", b"vertex 2147483648"), "vertices"),
        (change(b"vertex 5", b"vertex -5"), "header line"),
        (change(b"binary_little_endian", b"ascii"), "ascii"),
        (change(b"float nx", b"float evil"), "evil"),
        (change(b"property float nx", b"property list uchar int nx"), "header line"),
        (change(b"property float opacity\n", b""), "opacity"),
        (change(b"float ny", b"float nx"), "double"),
        (change(b"ply\n", b"ply\n" + b"comment x\n" * 2000), "header below"),
    ],
)
def test_hostile_ply(tmp_path, damage, words):
    write_ply(tmp_path / "a.ply", gaussians(5))
    (tmp_path / "a.ply").write_bytes(damage((tmp_path / "a.ply").read_bytes()))
    with pytest.raises(ValueError, match=words):
        read_ply(tmp_path / "a.ply")


def test_splats_round_trip_is_exact(tmp_path):
    original = gaussians(3, 5)
    write_splats(tmp_path / "a.safetensors", original, fps=8)
    result, fps = read_splats(tmp_path / "a.safetensors")
    assert fps == 8.0
    for a, b in zip(result, original, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_safetensors_are_not_splats(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not Gaussians"):
        read_splats(path)
    arrays = gaussians(3, 5)._asdict() | {"quats": np.zeros((3, 5, 3), np.float32)}
    safetensors.numpy.save_file(arrays, path, {"fourdstar_jax": '{"fps": 8}'})
    with pytest.raises(ValueError, match="quats has shape"):
        read_splats(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="header above"):
        read_splats(path)
