"""The benchmark: scenes that never change, figures of what ran, the table of docs/RASTERIZER.md."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from fourdstar_jax.kernels.rasterize import bench, bench_table

ROOT = Path(__file__).resolve().parents[2]
ORIGINAL = ROOT.parent / "shared" / "bench" / "gaussian_scenes.py"
RESULTS = ROOT / "docs" / "results" / "rasterize_h200.json"


@pytest.mark.parametrize(
    "seed, last, sums",
    [
        (
            0,
            [-0.1413545, -0.3084683, 0.01098438, 0.5661324, 0.4064491],
            [-32.4633, 39.6598, 23.3762, 506.1402, 1531.8372],
        ),
        (
            3,
            [0.2386193, 0.5760859, 0.01509696, 0.5440522, 0.7029895],
            [20.6539, -15.397, 23.2757, 510.2744, 1484.7318],
        ),
    ],
)
def test_objects_are_the_stored_ones(seed, last, sums):
    gaussians = bench.make_object(1000, seed)
    np.testing.assert_allclose([x.reshape(-1)[-1] for x in gaussians], last, rtol=1e-6)
    np.testing.assert_allclose([x.sum(dtype=np.float64) for x in gaussians], sums, atol=2e-4)


def test_cameras_are_the_stored_ones():
    viewmats, Ks = bench.make_cameras(8, 512, 256)
    half = 0.5**0.5
    wanted = [[-half, half, 0, 0], [0, 0, -1, 0], [-half, -half, 0, 1.5], [0, 0, 0, 1]]
    np.testing.assert_allclose(viewmats[1], wanted, atol=1e-7)
    np.testing.assert_allclose(
        Ks[7], [[280.22208, 0, 256], [0, 280.22208, 128], [0, 0, 1]], rtol=1e-7
    )


@pytest.mark.parametrize("name", ["A", "S"])
def test_scenes_are_the_original_ones(name):
    if not ORIGINAL.exists():
        pytest.skip("the scenes' original definition is not here")
    spec = importlib.util.spec_from_file_location("gaussian_scenes", ORIGINAL)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(original := importlib.util.module_from_spec(spec))
    listed = {case[0]: (1, *case[1:]) for case in original.CASES}
    listed |= {case[0]: tuple(case[1:]) for case in original.BATCHED}
    assert listed == {k: bench.SCENES[k][:5] for k in listed} and set("ABCDEFHS") == set(listed)

    scene = bench.SCENES[name]
    gaussians, cameras = bench.make_scene(scene)
    viewmats, Ks = original.cameras(scene.views, scene.width, scene.height)
    np.testing.assert_array_equal(cameras.viewmats, viewmats)
    np.testing.assert_array_equal(cameras.Ks, Ks)
    for seed in range(scene.timesteps):
        for field, value in original.scene(scene.num, seed).items():
            ours = getattr(gaussians, field)
            np.testing.assert_array_equal(ours[seed] if scene.timesteps > 1 else ours, value)


@pytest.fixture(scope="module")
def results():
    """Of a small scene, with an invented gsplat."""
    with pytest.MonkeyPatch.context() as patch:
        scene = bench.Scene(2, 97, 3, 40, 24, scale=(0.035, 0.1))
        patch.setitem(bench.SCENES, "toy", scene)
        patch.setattr(bench, "WARM_UP", 1)
        times = dict(sync_ms=2.0, sync_events_ms=1.9, back_to_back_ms=1.0, kernels_ms=0.5)
        patch.setattr(
            bench,
            "measure_gsplat",
            lambda name, repeats: dict(
                forward=times,
                forward_backward=times,
                peak_bytes=10**9,
                num_intersections=7,
                mean_rgb=0.5,
                mean_alpha=0.5,
                versions=dict(gsplat="1.5.3"),
            ),
        )
        return bench.run(["toy"], implementations=["reference", "xla"], repeats=1, against="gsplat")


def test_implementations_compute_the_same(results):
    reference, xla = results["scenes"][0]["results"]
    assert xla["num_intersections"] == reference["num_intersections"] > 1000
    assert xla["capacity"] > xla["num_intersections"] and xla["overflow"] is False
    for name in ("mean_rgb", "mean_alpha"):
        assert xla[name] == pytest.approx(reference[name], abs=2e-6)
    assert xla["gradient_norms"] == pytest.approx(reference["gradient_norms"], rel=1e-4)
    assert min(reference["gradient_norms"].values()) > 1
    # At least Gaussians and their gradients, images and their cotangents.
    assert xla["program_bytes"] > 2 * 4 * (2 * 97 * 14 + 2 * 3 * 24 * 40 * 4)


def test_ratios_are_ours_over_gsplats(results):
    line = results["scenes"][0]["results"][1]
    for part in bench.PASSES:
        wait, together, kernels = line["ratios"][part].values()
        assert wait == pytest.approx(line[part]["sync_ms"] / 2)
        assert together == pytest.approx(line[part]["back_to_back_ms"])
        assert kernels == pytest.approx(2 * together)
    assert line["ratios"]["memory"] == pytest.approx(line["program_bytes"] / 1e9)
    assert results["versions"]["gsplat"] == "1.5.3" and results["copy_bytes_per_s"] > 1e6


def test_table(results, tmp_path):
    results = copy.deepcopy(results)
    times = dict(sync_ms=123.4, back_to_back_ms=12.34)
    for line in results["scenes"][0]["results"]:
        line |= dict(forward=times, forward_backward=times, program_bytes=25 * 10**8)
        line["ratios"] = bench.ratios(line, results["scenes"][0]["gsplat"])
    (tmp_path / "results.json").write_text(json.dumps(results))
    lines = bench_table.table(tmp_path / "results.json").splitlines()
    ours = "123 / 12.3 | 61.70 / 12.34 / 24.68"
    theirs = "2.00 / 1.00 / 0.50 | "
    what = "toy: 2 x 97 Gaussians, 3 views of 40x24"
    assert lines[4] == f"| {what} | reference | {ours} | {ours} | 2.50 (2.5x) |"
    assert lines[5] == f"|  | xla | {ours} | {ours} | 2.50 (2.5x) |"
    assert lines[6] == f"|  | gsplat | {theirs} | {theirs} | 1.00 |"
    assert {line.count("|") for line in lines[2:]} == {8}


def test_gsplat_that_is_missing_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: torch, gsplat"):
        bench.run(["tiny"], implementations=["xla"], against="gsplat")


def test_readme_has_the_table():
    if not RESULTS.exists():
        pytest.skip("there are no results yet")
    text = (ROOT / "docs" / "RASTERIZER.md").read_text()
    between = text.split("<!-- rasterize_h200: begin -->\n")[1]
    assert between.split("<!-- rasterize_h200: end -->")[0] == bench_table.table(RESULTS)
