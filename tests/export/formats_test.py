"""Files of other programs: golden bytes, an independent decoding, and readers from outside."""

import functools
import gzip
import hashlib
import json
import shutil
import struct
import subprocess

import numpy as np
import pytest
from export.ply_test import covariances, gaussians, gltf_splats

from fourdstar_jax.export import formats, read_ply, write_ply
from fourdstar_jax.export.ply import SH_C0
from fourdstar_jax.types import Gaussians

STAND_UP = np.diag([-1.0, -1.0, 1.0])  # what viewers do to files that lie as PLY does
COUNT = 300  # more than a chunk of compressed.ply


@functools.cache
def original():
    return gaussians(COUNT, seed=3)


def splat_read(data):
    rows = np.frombuffer(data, np.dtype([("f", "<f4", 6), ("c", "u1", 4), ("q", "u1", 4)]))
    quats = rows["q"] / 128.0 - 1
    quats /= np.linalg.norm(quats, axis=-1, keepdims=True)
    rgba = rows["c"] / 255.0
    return rows["f"][:, :3], quats, rows["f"][:, 3:], rgba[:, 3], rgba[:, :3]


def spz_read(data):
    raw = gzip.decompress(data)
    magic, version, count, degree, bits, flags, zero = struct.unpack("<4sIIBBBB", raw[:16])
    assert (magic, version, degree, flags, zero) == (b"NGSP", 3, 0, 0, 0)
    parts, at = [], 16
    for width in (9, 1, 3, 3, 4):
        parts.append(np.frombuffer(raw, np.uint8, count * width, at).reshape(count, width))
        at += count * width
    assert at == len(raw)
    places = np.concatenate([np.zeros((count, 3, 1), np.uint8), parts[0].reshape(-1, 3, 3)], -1)
    means = (np.ascontiguousarray(places).view("<i4")[..., 0] >> 8) / 2.0**bits
    colors = (parts[2] / 255.0 - 0.5) / 0.15 * SH_C0 + 0.5
    quats = np.zeros((count, 4))
    for row, word in zip(quats, parts[4].copy().view("<u4")[:, 0].tolist(), strict=True):
        left_out = word >> 30
        for i in reversed([i for i in range(4) if i != left_out]):  # the last is in the low bits
            row[i] = (word & 511) / 511 * np.sqrt(0.5) * (-1 if word >> 9 & 1 else 1)
            word >>= 10
        row[left_out] = np.sqrt(1 - np.sum(row**2))
    scales = np.exp(parts[3] / 16.0 - 10)
    return means, quats[:, [3, 0, 1, 2]], scales, parts[1][:, 0] / 255.0, colors


def compressed_ply_read(data):
    header, body = data.split(b"end_header\n", 1)
    lines = header.decode().splitlines()
    (chunks,) = [int(x.split()[2]) for x in lines if x.startswith("element chunk")]
    (count,) = [int(x.split()[2]) for x in lines if x.startswith("element vertex")]
    names = [x.split()[2] for x in lines if x.startswith("property float")]
    assert names[::3] == ["min_x", "max_x", "min_scale_x", "max_scale_x", "min_r", "max_r"]
    bounds = np.frombuffer(body, "<f4", 18 * chunks).reshape(chunks, 6, 3)
    bounds = bounds.repeat(256, axis=0)[:count]
    words = np.frombuffer(body, "<u4", offset=72 * chunks).reshape(count, 4)

    def unpack(word, *bits):
        fields = []
        for width in reversed(bits):
            fields.append((word & (1 << width) - 1) / ((1 << width) - 1))
            word = word >> width
        return np.stack(fields[::-1], axis=-1)

    def between(low, unit):
        return bounds[:, low] + unit * (bounds[:, low + 1] - bounds[:, low])

    quats = np.zeros((count, 4))
    others = (unpack(words[:, 1], 10, 10, 10) - 0.5) * np.sqrt(2)
    for row, left_out, three in zip(quats, words[:, 1] >> 30, others, strict=True):
        row[np.arange(4) != left_out] = three
        row[left_out] = np.sqrt(1 - np.sum(three**2))
    rgba = unpack(words[:, 3], 8, 8, 8, 8)
    return (
        between(0, unpack(words[:, 0], 11, 10, 11)),
        quats,
        np.exp(between(2, unpack(words[:, 2], 11, 10, 11))),
        rgba[:, 3],
        between(4, rgba[:, :3]),
    )


def glb_read(data):
    found = gltf_splats(data)
    name = "KHR_gaussian_splatting:"
    return (
        found["POSITION"],
        found[f"{name}ROTATION"][:, [3, 0, 1, 2]],
        found[f"{name}SCALE"],
        found[f"{name}OPACITY"][:, 0],
        found[f"{name}SH_DEGREE_0_COEF_0"] * SH_C0 + 0.5,
    )


@pytest.mark.parametrize(
    "name, reader, turn, places, shapes, shades",
    [
        ("splat", splat_read, STAND_UP, 1e-6, 0.05, 0.5 / 255),
        ("spz", spz_read, np.eye(3), 0.51 / 4096, 0.08, 0.5 / 255 / 0.15 * SH_C0),
        ("compressed_ply", compressed_ply_read, STAND_UP, 4e-3, 0.02, 0.51 / 255),
        ("glb", glb_read, np.eye(3), 1e-6, 1e-5, 1e-6),
    ],
)
def test_round_trip(name, reader, turn, places, shapes, shades):
    """Every Gaussian in its place, as an independent decoder sees it."""
    written = getattr(formats, name)(original())
    means, quats, scales, opacities, colors = reader(written)
    np.testing.assert_allclose(means @ turn, original().means, atol=places)
    wanted = covariances(original().quats, original().scales)
    found = turn @ covariances(quats, scales) @ turn
    off = np.linalg.norm(found - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    assert off.max() < 2 * shapes and np.median(off) < shapes
    np.testing.assert_allclose(opacities, original().opacities, atol=0.51 / 255)
    np.testing.assert_allclose(colors, original().colors, atol=shades + 1e-6)
    assert written == getattr(formats, name)(original())


TWO = Gaussians(
    means=np.float32([[1, 2, 3], [0.5, -0.25, 0]]),
    quats=np.float32([[2, 0, 0, 0], [0, 0, -1, 0]]),
    scales=np.float32([[1, 0.5, 0.25], [0.125, 0.125, 0.125]]),
    opacities=np.float32([1, 0.25]),
    colors=np.float32([[1, 0, 0.5], [0.25, 0.75, 1]]),
)
# `TWO` written by hand, from antimatter15/splat's convert.py. They lie as PLY does: x and y are
# negated, and rotations are i k and -j k in place of 1 and -j: k and i.
SPLAT = bytes.fromhex(
    "000080bf 000000c0 00004040"  # -1 -2 3
    "0000803f 0000003f 0000803e"  # 1 1/2 1/4
    "ff0080ff 808080ff"  # 255 rgba; 128 + 128 wxyz, at most 255
    "000000bf 0000803e 00000000"  # -1/2 1/4 0
    "0000003e 0000003e 0000003e"  # 1/8 each
    "40bfff40 80ff8080"
)
# From the README and load-spz.cc of nianticlabs/spz: all of one attribute, then all of the next.
SPZ = bytes.fromhex(
    "4e475350 03000000 02000000 00 0c 00 00"  # NGSP, version 3, two, degree 0, 12 bits, no flags
    "001000 002000 003000 000800 00fcff 000000"  # x 4096, 24 bits with a sign
    "ff 40"  # x 255
    "c33c80 5ea1c3"  # 255 (0.15 (c - 0.5) / 0.2821 + 0.5)
    "a0958a 7f7f7f"  # 16 (ln + 10)
    "000000c0 00000040"  # the largest of xyzw is the last (3 << 30), the second (1 << 30)
)
GOLDEN = {"compressed_ply": "430b8424546125c3", "glb": "770e730eb2daffc6"}


def test_bytes_are_those_of_the_published_descriptions():
    assert formats.splat(TWO).hex(" ", 4) == SPLAT.hex(" ", 4)
    assert gzip.decompress(formats.spz(TWO)).hex(" ", 4) == SPZ.hex(" ", 4)


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_stay_what_they_were(name):
    """Of numbers without rounding."""
    assert hashlib.sha256(getattr(formats, name)(TWO)).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", ["splat", "spz", "compressed_ply", "glb"])
def test_what_cannot_be_written_is_refused(name):
    broken = gaussians(3)
    broken.scales[1, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        getattr(formats, name)(broken)
    with pytest.raises(ValueError, match="one timestep"):
        getattr(formats, name)(gaussians(2, 3))


def test_spz_takes_fewer_bits_where_positions_are_far():
    far = gaussians(3)
    far.means[0, 0] = 5000.0
    means = spz_read(formats.spz(far))[0]
    np.testing.assert_allclose(means, far.means, atol=0.51 / 512)
    far.means[0, 0] = 1e7
    with pytest.raises(ValueError, match="does not fit"):
        formats.spz(far)


def npm(package, folder, *command):
    """A command of a package that npm serves; skips where there is none."""
    if shutil.which("npx") is None:
        pytest.skip("npx is not installed")
    whole = ["npx", "--yes", f"--package={package}", *command]
    return subprocess.run(whole, cwd=folder, capture_output=True, text=True, timeout=90)


def test_outside_readers_see_the_same(tmp_path):
    """splat-transform turns all that it reads into PLY, and PLY into a GLB as ours."""
    package = "@playcanvas/splat-transform@3.7.0"
    if npm(package, tmp_path, "splat-transform", "--version").returncode:
        pytest.skip("npm does not serve splat-transform here")
    for name, suffix in (
        ("splat", ".splat"),
        ("spz", ".spz"),
        ("compressed_ply", ".compressed.ply"),
    ):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(getattr(formats, name)(original()))
        result = npm(package, tmp_path, "splat-transform", "-q", path.name, f"{name}.ply")
        assert result.returncode == 0, result.stderr
        found = read_ply(tmp_path / f"{name}.ply")
        # It takes spz to lie as PLY does, with y down, against what the authors of spz say.
        turn = np.diag([-1.0, -1.0, 1.0]) if name == "spz" else np.eye(3)
        np.testing.assert_allclose(found.means @ turn, original().means, atol=4e-3, err_msg=name)
        np.testing.assert_allclose(found.colors, original().colors, atol=0.01, err_msg=name)
        np.testing.assert_allclose(found.opacities, original().opacities, atol=0.005)
        wanted = covariances(original().quats, original().scales)
        again = turn @ covariances(found.quats, found.scales) @ turn
        off = np.linalg.norm(again - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
        assert off.max() < 0.16, name
    write_ply(tmp_path / "a.ply", original())
    result = npm(package, tmp_path, "splat-transform", "-q", "a.ply", "a.glb")
    assert result.returncode == 0, result.stderr
    theirs = (tmp_path / "a.glb").read_bytes()
    found, wanted = glb_read(theirs), glb_read(formats.glb(original()))
    turned = np.sign(np.sum(found[1] * wanted[1], axis=-1, keepdims=True))  # q and -q are alike
    found = (found[0], found[1] * turned, *found[2:])
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


READ_SPZ = """
process.type = "renderer";  // it is made for browsers
import(`file://${process.argv[1]}/@spz-loader/core/dist/index.js`)
  .then(({ loadSpz }) => loadSpz(new Uint8Array(require("fs").readFileSync("a.spz"))))
  .then((cloud) => console.log(JSON.stringify(cloud, (_, x) => x.buffer ? Array.from(x) : x)));
"""


def npm_folder(package):
    """The node_modules of a package that npm serves; skips where there is none."""
    find = 'cd "$(dirname "$(command -v node)")"; echo "$PATH" | tr : "\\n" | grep _npx | head -1'
    place = npm(package, None, "-c", find)
    if place.returncode or "_npx" not in place.stdout:
        pytest.skip(f"npm does not serve {package} here")
    return place.stdout.strip().removesuffix("/.bin")


def node(program, folder, package):
    """What a program writes as JSON, which is called with the node_modules of a package."""
    command = ["node", "-e", program, npm_folder(package)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_code_of_niantic_reads_spz(tmp_path):
    (tmp_path / "a.spz").write_bytes(formats.spz(original()))
    cloud = node(READ_SPZ, tmp_path, "@spz-loader/core@0.3.1")
    assert cloud["numPoints"] == COUNT and cloud["shDegree"] == 0 and not cloud["antialiased"]
    names = ("positions", "rotations", "scales", "alphas", "colors")
    found = {name: np.array(cloud[name]).reshape(COUNT, -1) for name in names}
    np.testing.assert_allclose(found["positions"], original().means, atol=0.51 / 4096)
    wanted = covariances(original().quats, original().scales)
    again = covariances(found["rotations"][:, [3, 0, 1, 2]], found["scales"])
    off = np.linalg.norm(again - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    assert off.max() < 0.16
    np.testing.assert_allclose(found["alphas"][:, 0], original().opacities, atol=0.51 / 255)
    np.testing.assert_allclose(found["colors"], original().colors, atol=0.005)


VALIDATE = """
const validator = require(require.resolve("gltf-validator", { paths: [process.argv[1]] }));
const bytes = new Uint8Array(require("fs").readFileSync("a.glb"));
validator.validateBytes(bytes).then((report) => console.log(JSON.stringify(report)));
"""


def test_the_validator_of_gltf_accepts_it(tmp_path):
    (tmp_path / "a.glb").write_bytes(formats.glb(original()))
    report = node(VALIDATE, tmp_path, "gltf-validator@2.0.0-dev.3.10")
    # It does not know the extension yet, whose names of attributes it takes for errors.
    other = [
        message
        for message in report["issues"]["messages"]
        if "KHR_gaussian_splatting" not in message["pointer"] and message["severity"] < 2
    ]
    assert other == []
    assert report["info"]["totalVertexCount"] == COUNT
