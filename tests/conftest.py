"""Every test runs with shapes checked, inside a mesh over one CPU device unless it makes its own."""

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
