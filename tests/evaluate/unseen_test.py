"""Evaluation of a bundle: every program compiles once, whatever is left for the last batch."""

import collections

import jax
import numpy as np
import pytest

from fourdstar_jax import generate
from fourdstar_jax.data import prepare
from fourdstar_jax.evaluate import unseen


@pytest.fixture(autouse=True)
def mesh():
    """None, as for users."""


@pytest.fixture(scope="module")
def data_dir(objects_dir, tmp_path_factory):
    """Three clips."""
    out = tmp_path_factory.mktemp("evaluate") / "data"
    options = dict(image_size=16, views=2, extra_views=0, max_frames=3, workers=0)
    prepare.prepare(objects_dir, out, **options, log=lambda line: None)
    return out


def test_a_last_batch_that_is_not_full(tiny_bundle, data_dir, monkeypatch):
    compiled = collections.Counter()

    def count(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            compiled[details.get("fun_name")] += 1

    monkeypatch.setattr(unseen, "BATCH", 3)
    whole = unseen.evaluate(tiny_bundle, data_dir, "train")
    assert whole["num_clips"] == 3
    monkeypatch.setattr(unseen, "BATCH", 2)
    generate.encode_images.clear_cache()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        split = unseen.evaluate(tiny_bundle, data_dir, "train")
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    for name in ("encode_images", "render", "nll"):
        assert compiled[f"jit({name})"] == 1, name
    for part in ("reconstruction", "likelihood"):
        assert whole[part].keys() == split[part].keys()
        for name, value in whole[part].items():
            np.testing.assert_allclose(split[part][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
