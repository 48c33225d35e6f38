"""Every test runs with shapes checked, inside a mesh over one CPU device unless it makes one."""

import collections
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling takes most of the time: do it quickly, and once for all workers, commands and runs.
    # XLA's newer emitters of loops, by MLIR, take three times as long as the ones before them;
    # a test that needs programs as users have them compiles with the options of helpers.compiling.
    flags.insert(0, "--xla_backend_optimization_level=0")
    flags.insert(0, "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters")
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
from helpers.glb import box_writer, moving_box  # noqa: E402

from fourdstar_jax import bars, nn, sharding  # noqa: E402

bars.LOG_S = 3600.0  # on a slow machine, too, an error is the only line

SHARED = ROOT.parent / "shared"
# Files that take a minute or more come first, so that no worker is left with one at the end.
LONGEST = [
    *("train/trainers", "train/stages", "kernels/rasterize_gpu", "kernels/rasterize_values"),
    *("vqvae/overfit", "train/faults", "train/bench", "star/gates", "vqvae/model"),
    *("train/warm_start", "star/container", "tokenizer/unitok", "train/text", "star/sample"),
    *("kernels/rasterize_arguments", "tokenizer/bench", "star/overfit"),
]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    places = {f"tests/{name}_test.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(LONGEST)))
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


@pytest.fixture(scope="module", autouse=True)
def programs():
    """A file's compiled programs go with it: all files' have more memory maps than Linux grants."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def mesh():
    """The one-device mesh that parameters are made on."""
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def assets():
    """Folder of animated GLB files for training, which users do not have."""
    folder = SHARED / "assets_v2"
    if not folder.is_dir():
        pytest.skip("the training assets are not here")
    return folder


@pytest.fixture(scope="session")
def released_weights():
    """Gives the file of a measuring network's released weights by the start of its name."""

    def find(name):
        found = sorted((SHARED / "weights").glob(f"{name}*.npz"))
        if not found:
            pytest.skip(f"the released weights of {name} are not here")
        return found[0]

    return find


@pytest.fixture(scope="session")
def lpips_weights(released_weights):
    """File of LPIPS' released weights, VGG16."""
    return released_weights("lpips_vgg16")


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
        'pack/wild_pack__Plate2.glb,"CC-BY-4.0, too"\nstill.glb,CC0-1.0\n'
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
