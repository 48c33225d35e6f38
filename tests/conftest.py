"""Every test runs with shapes checked, inside a mesh over one CPU device unless it makes one."""

import collections
import json
import os
import struct
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling takes most of the time: do it quickly, and once for all workers, commands and runs.
    flags.insert(0, "--xla_backend_optimization_level=0")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["XLA_FLAGS"] = " ".join(flags)

from beartype import BeartypeConf, beartype  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The hook wants its checker by name. An int is a float, as in PEP 484.
checker = types.ModuleType("fourdstar_typecheck")
checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
install_import_hook("fourdstar_jax", "fourdstar_typecheck.check")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from fourdstar_jax import nn, sharding  # noqa: E402

SHARED = ROOT.parent / "shared"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow runs it"))
        for platform in ("gpu", "tpu"):
            if platform in item.keywords and jax.default_backend() != platform:
                item.add_marker(pytest.mark.skip(reason=f"needs a {platform.upper()}"))


def pytest_terminal_summary(terminalreporter):
    """The ten files that took longest, so that they are seen before they grow."""
    seconds = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest files")
    for name, total in seconds.most_common(10):
        terminalreporter.line(f"{total:7.1f} s  {name}")


@pytest.fixture(autouse=True)
def mesh():
    """The one-device mesh that parameters are made on."""
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def assets():
    """Folder of animated GLB files for training, which users do not have."""
    folder = SHARED / "assets"
    if not folder.is_dir():
        pytest.skip("the training assets are not here")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """A whole model bundle with arbitrary weights, for 16x16 images, two views and T up to 2."""
    import functools

    import jax.numpy as jnp
    import numpy as np

    from fourdstar_jax import bundle
    from fourdstar_jax.geometry import Rig
    from fourdstar_jax.star.model import STAR
    from fourdstar_jax.text.words import WordTokenizer
    from fourdstar_jax.tokenizer.unitok import UniTok
    from fourdstar_jax.vqvae.model import VQVAE4D

    words = WordTokenizer.from_captions(["a dog, walking", "a red bird, flying"], max_len=7)
    sizes = dict(dim=12, num_heads=2, hidden_dim=14)
    codes = dict(num_codebooks=2, vocab_size=5, code_dim=6)
    stages = {
        "tokenizer": (
            UniTok,
            dict(resolution=16, stem_channels=[3, 5], tail_channels=[5, 3], num_blocks=1)
            | dict(num_decoder_blocks=1, **sizes, **codes),
            {},
        ),
        "vqvae": (
            VQVAE4D,
            dict(resolution=16, grid=2, code_dim=6, num_blocks=1, view_attention_every=1)
            | dict(up_channels=[6], offset_dim=8, offset_layers=1, offset_heads=2)
            | dict(unet_channels=[8, 16], unet_blocks=1, **sizes),
            {"rig": {**Rig.around(2, fps=8.0).to_dict(), "max_timesteps": 2}},
        ),
        "star": (
            STAR,
            dict(resolution=16, grid=2, num_layers=1, head_dim=8, head_layers=1, head_heads=2)
            | dict(container_slots=3, container_neighbors=2, text_vocab=words.vocab_size)
            | dict(text_length=7, text_dim=5, **sizes, **codes),
            {"words": words.to_dict()},
        ),
    }
    rng = np.random.default_rng(0)

    def fill(shape):
        if np.issubdtype(shape.dtype, np.floating):
            return jnp.asarray(rng.normal(0, 0.3, shape.shape), shape.dtype)
        return jnp.zeros(shape.shape, shape.dtype)

    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    with sharding.use_mesh(devices=jax.devices()[:1]):
        for stage, (make, arguments, info) in stages.items():
            build = functools.partial(nn.build, make, **arguments)
            model = jax.tree.map(fill, jax.eval_shape(build, jax.random.key(0)))
            bundle.save_stage(folder, stage, model, {"stage": stage, "model": arguments}, **info)
    return folder


# A small writer of GLB files, and folders of objects made with it.

CODES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


class GlbWriter:
    """Collects accessors in one binary chunk; `tree` is the JSON that goes with them."""

    def __init__(self):
        self.binary = b""
        self.tree = {
            "asset": {"version": "2.0"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [],
            "meshes": [],
            "accessors": [],
            "bufferViews": [],
        }

    def view(self, data: bytes) -> int:
        self.binary += b"\0" * (-len(self.binary) % 4)
        self.tree["bufferViews"].append(
            {"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)}
        )
        self.binary += data
        return len(self.tree["bufferViews"]) - 1

    def accessor(self, values, dtype="f4", **more) -> int:
        values = np.asarray(values, "<" + dtype)
        width = 1 if values.ndim == 1 else int(np.prod(values.shape[1:]))
        self.tree["accessors"].append(
            {
                "bufferView": self.view(values.tobytes()),
                "componentType": CODES[dtype],
                "count": len(values),
                "type": KINDS[width],
                **more,
            }
        )
        return len(self.tree["accessors"]) - 1

    def sampler(self, times, values, interpolation="LINEAR") -> dict:
        return {
            "input": self.accessor(times),
            "output": self.accessor(values),
            "interpolation": interpolation,
        }

    def animate(self, name, *channels) -> None:
        """channels: (node, path, times, values, interpolation)."""
        made = [self.sampler(*channel[2:]) for channel in channels]
        targets = [{"node": c[0], "path": c[1]} for c in channels]
        self.tree.setdefault("animations", []).append(
            {
                "name": name,
                "samplers": made,
                "channels": [{"sampler": i, "target": t} for i, t in enumerate(targets)],
            }
        )

    def bytes(self) -> bytes:
        self.tree["buffers"] = [{"byteLength": len(self.binary)}]
        text = json.dumps(self.tree).encode()
        text += b" " * (-len(text) % 4)
        binary = self.binary + b"\0" * (-len(self.binary) % 4)
        total = 12 + 8 + len(text) + 8 + len(binary)
        return (
            struct.pack("<4sII", b"glTF", 2, total)
            + struct.pack("<I4s", len(text), b"JSON")
            + text
            + struct.pack("<I4s", len(binary), b"BIN\0")
            + binary
        )


def box(size=(1.0, 1.0, 1.0), center=(0.0, 0.0, 0.0)):
    """Corners [8, 3] and triangles [12, 3] of a box."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]
    return signs * np.array(size) / 2 + np.array(center), np.array(triangles)


def box_writer(size=(1.0, 1.0, 1.0), color=(1.0, 0.0, 0.0, 1.0), **attributes) -> GlbWriter:
    """One coloured box under node 0."""
    w = GlbWriter()
    corners, triangles = box(size)
    w.tree["materials"] = [{"pbrMetallicRoughness": {"baseColorFactor": list(color)}}]
    primitive = {
        "attributes": {"POSITION": w.accessor(corners), **attributes},
        "indices": w.accessor(triangles.ravel(), "u2"),
        "material": 0,
    }
    w.tree["meshes"] = [{"primitives": [primitive]}]
    w.tree["nodes"] = [{"mesh": 0, "name": "body"}]
    return w


def moving_box(distance=1.0, duration_s=1.0, name="Armature|Slide_Right", **box_options) -> bytes:
    w = box_writer(**box_options)
    w.animate(name, (0, "translation", [0, duration_s], [[0, 0, 0], [distance, 0, 0]]))
    return w.bytes()


class Glb:
    Writer, box, box_writer, moving_box = (
        GlbWriter,
        staticmethod(box),
        staticmethod(box_writer),
        staticmethod(moving_box),
    )


@pytest.fixture(scope="session")
def glb():
    """The writer and the boxes, for tests (test modules cannot import each other)."""
    return Glb


@pytest.fixture(scope="session")
def objects_dir(tmp_path_factory):
    """Five files: two that move (one of two clips), one still, one cut short, one of text."""
    folder = tmp_path_factory.mktemp("objects")
    (folder / "pack").mkdir()
    two = box_writer((1.0, 0.4, 0.2))
    two.animate("Armature|Jump_High", (0, "translation", [0, 0.5], [[0, 0, 0], [0, 1, 0]]))
    half = np.sqrt(0.5)
    two.animate("Turn", (0, "rotation", [0, 2.0], [[0, 0, 0, 1], [0, half, 0, half]]))
    files = {
        "pack/wild_pack__RedBox.glb": moving_box(),
        "pack/wild_pack__Plate2.glb": two.bytes(),
        "still.glb": moving_box(0.001),
        "cut.glb": moving_box()[:-40],
        "text.glb": b"this is not a model",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "assets.csv").write_text(
        "file,licence\npack/wild_pack__RedBox.glb,CC0-1.0 (here)\n"
        'pack/wild_pack__Plate2.glb,"CC0-1.0, too"\nstill.glb,CC0-1.0\n'
    )
    return folder


@pytest.fixture(scope="session")
def dataset_dir(objects_dir, tmp_path_factory):
    """The prepared dataset of those objects: 3 clips, V=3, E=2, 17x17 pixels, up to 5 frames."""
    from fourdstar_jax.data import prepare

    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare.prepare(
        objects_dir,
        out,
        image_size=17,
        views=3,
        extra_views=2,
        max_frames=5,
        depth=True,
        workers=0,
        log=lambda line: None,
    )
    return out
