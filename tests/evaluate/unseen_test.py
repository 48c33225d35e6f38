"""Evaluation of a bundle: every program compiles once, whatever is left for the last batch."""

import collections

import jax
import numpy as np
import pytest

from fourdstar_jax import generate
from fourdstar_jax.evaluate import metrics, motion, sampling, unseen


@pytest.fixture(autouse=True)
def mesh():
    """None, as for users."""


def test_a_last_batch_that_is_not_full(tiny_bundle, data_dir, monkeypatch):
    compiled = collections.Counter()

    def count(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            compiled[details.get("fun_name")] += 1

    monkeypatch.setattr(unseen, "BATCH", 3)
    monkeypatch.setattr(motion, "SEEN", 100.0)  # else front and back see no Gaussian in common
    lines: list[str] = []
    kept: list[set[str]] = []
    whole = unseen.evaluate(
        tiny_bundle, data_dir, "train", log=lines.append, keep=lambda report: kept.append({*report})
    )
    assert [{"reconstruction", "likelihood", "samples", "figures"} & names for names in kept] == [
        {"reconstruction"}, {"reconstruction", "likelihood"},
        {"reconstruction", "likelihood", "samples"},
    ]  # fmt: skip
    parts = [line.partition(" s: ")[2] for line in lines if ": part " in line]
    assert [part.partition(",")[0] for part in parts] == [f"part {i} of 6" for i in range(1, 7)]
    assert "measured are 3 clips of 2 objects (train)" in parts[1]
    assert "generation of 3 clips" in parts[4]
    # three clips are a batch here, so that only the six likelihoods have a second one
    assert any(line.startswith("2 of 6 batches, about ") for line in lines)
    assert any(line.startswith("2 of 12 rows, about ") for line in lines)
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
    assert {"accuracy", "propagation", "propagation_frozen", "psnr_in_mask"} <= whole[
        "samples"
    ].keys()
    compared = whole["comparisons"]
    assert compared["views_deg"] == [180] and whole["lpips"] == {
        "left_out": "its weights are not given"
    }
    for row in ("flat_card", "nearest_clip", "ceiling", "generation"):
        assert {"psnr", "psnr_in_mask", "alpha_iou"} <= compared[row].keys()
        assert len(compared["clips"][row]) == 3 and compared[row]["psnr"]["objects"] == 2
    # the clips are those of training: each is its own nearest, and seen as it is
    assert compared["nearest_clip"]["alpha_iou"]["value"] == 1
    assert compared["nearest_training_clips"] == [
        row["clip"] for row in compared["clips"]["ceiling"]
    ]
    assert 0 < compared["ceiling"]["reprojection"]["value"] < 1
    assert compared["flat_card"]["flow_ratio"]["value"] == 0
    assert 0 <= whole["figures"]["generation_retrieval_top1"] <= 1
    assert {"ceiling_flow_ratio", "nll_rise_container", "propagation"} <= whole["figures"].keys()
    for name in unseen.SWAPS.values():
        assert np.isfinite(whole["likelihood"][f"rise_with_{name}"]).all()
    assert 0 < whole["figures"]["codes_used_least"] <= 1
    for part in ("reconstruction", "likelihood"):
        assert whole[part].keys() == split[part].keys()
        for name, value in whole[part].items():
            np.testing.assert_allclose(split[part][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_drawn_tokens_count_alone():
    values = np.zeros((2, 1, 2, 2, 2))
    values[0, 0, 0, 1] = 1, 3  # one token's two codes
    drawn = np.zeros((2, 1, 2, 2), bool)
    drawn[0, 0, :, 1] = True
    np.testing.assert_array_equal(unseen.over_drawn(values, drawn), [1, 0])


def test_clips_are_paired_and_averaged_by_object():
    objects = np.array(["a", "a", "b", "a", "c", "c"])
    np.testing.assert_array_equal(unseen.another_object(objects), [2, 2, 3, 4, 0, 0])
    np.testing.assert_allclose(metrics.by_object([1, 2, 7, 6, 1, 2], objects), [3, 7, 1.5])
    with pytest.raises(ValueError, match="two objects"):
        unseen.another_object(objects[:2])


def test_settings_of_the_sampler_are_compared(tiny_bundle, data_dir):
    """At temperature 0 the two samples of a clip are one: nothing of them is the sample's own."""
    lines = []
    rows = sampling.sweep(
        tiny_bundle, data_dir, "train", clips=2, temperatures=(0.0, 1.0), log=lines.append
    )
    assert [row["temperature"] for row in rows] == [0, 1] and len(lines) == 3
    assert rows[0].get("propagation", 0) == 0 and np.isfinite(rows[1]["psnr_in_mask"])
    with pytest.raises(ValueError, match="top_k=0"):
        sampling.sweep(tiny_bundle, data_dir, top_ks=(0,))
