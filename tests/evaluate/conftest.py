"""A prepared dataset for the bundle with arbitrary weights."""

import pytest

from fourdstar_jax.data import prepare


@pytest.fixture(scope="package")
def data_dir(objects_dir, tmp_path_factory):
    """Three clips of two objects, two views of 16x16 pixels."""
    out = tmp_path_factory.mktemp("evaluate") / "data"
    options = dict(image_size=16, views=2, extra_views=0, max_frames=3, workers=0)
    prepare.prepare(objects_dir, out, **options, log=lambda line: None)
    return out
