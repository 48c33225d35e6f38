"""Every test runs with shapes checked, inside a mesh over one CPU device unless it makes one."""

import os
import sys
import types

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from beartype import BeartypeConf, beartype  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The hook wants its checker by name. An int is a float, as in PEP 484.
checker = types.ModuleType("fourdstar_typecheck")
checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
install_import_hook("fourdstar_jax", "fourdstar_typecheck.check")

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

from fourdstar_jax import sharding  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow runs it"))
        for platform in ("gpu", "tpu"):
            if platform in item.keywords and jax.default_backend() != platform:
                item.add_marker(pytest.mark.skip(reason=f"needs a {platform.upper()}"))


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
            {"rig": bundle.rig(num_views=2, fps=8.0, max_timesteps=2)},
        ),
        "star": (
            STAR,
            dict(image_size=16, patch=8, num_layers=1, head_dim=8, head_layers=1, head_heads=2)
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
            build = functools.partial(sharding.build, make, **arguments)
            model = jax.tree.map(fill, jax.eval_shape(build, jax.random.key(0)))
            bundle.save_stage(folder, stage, model, {"stage": stage, "model": arguments}, **info)
    return folder
