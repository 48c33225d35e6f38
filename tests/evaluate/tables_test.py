"""The paper's tables as commands: rows that run, rows that cannot, the paper's values apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from fourdstar_jax import cli
from fourdstar_jax.data import pipeline, transforms
from fourdstar_jax.evaluate import clips, distances, measured, protocols, readers, score, tables
from fourdstar_jax.evaluate.device import ALONE
from fourdstar_jax.evaluate.networks import Networks
from fourdstar_jax.export import read_splats
from fourdstar_jax.generate import Model
from fourdstar_jax.vqvae import losses

TABLES = sorted(Path(__file__).parents[2].joinpath("configs", "tables").glob("*.py"))


@pytest.fixture(autouse=True)
def mesh():
    """None, as for users."""


def test_the_four_tables_are_whole():
    configs = [cli.read_config(str(path), []).to_dict() for path in TABLES]
    assert sorted(c["title"][:7] for c in configs) == [f"Table {n}" for n in (1, 2, 3, 4)]
    hows = {"tokenizer", "reconstruct", "generate", *readers.SYSTEMS}
    for config in configs:
        protocol = protocols.find(config["protocol"])
        assert {row["how"] for row in config["rows"].values()} <= hows
        assert (
            sorted(config["order"]) == sorted(config["rows"])
            and config["against"] in config["rows"]
        )
        for values in config["paper"].values():
            assert [protocol.metric(name).better for name in values]


def alone(function):
    """The function, which no other thread's programs may run beside."""

    def call(*arguments, **options):
        assert ALONE._is_owned()
        return function(*arguments, **options)

    return call


def test_rows_are_run_or_named(tiny_bundle, data_dir, tmp_path, capsys, monkeypatch):
    for module, name in (
        (clips, "_draw"), (measured, "_similarity"), (tables, "_sampled"),
        (losses, "temporal_error"), (losses, "project_points"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, alone(getattr(module, name)))
    rows = {
        name: dict(label=name, how=name, path=str(tiny_bundle))
        for name in ("tokenizer", "reconstruct", "generate")
    }
    rows["l4gm"] = dict(label="L4GM", how="l4gm", path=str(tmp_path / "none"))
    rows["stag4d"] = dict(label="STAG4D", how="stag4d", path=str(tmp_path))
    config = dict(
        title="A table",
        protocol="fourdstar-open-v2",
        split="train",
        frames=2,
        rows=rows,
        against="generate",
        paper={"4DSTAR": {"psnr": 20.0}},
        paper_sha256="",
    )
    rows["twice"] = dict(label="twice", how="reconstruct", path="")
    lines: list[str] = []
    options = dict(
        read_splats=read_splats, metrics=("psnr", "ssim", "temporal_error"), log=lines.append
    )
    paths = {"twice": [str(tiny_bundle), str(tmp_path / "no second training")]}
    out = tmp_path / "out"
    text = tables.run(config, data_dir, out, Networks(None), paths=paths, **options)
    assert [line for line in lines if line.startswith("twice")] == [
        f"twice is not run: {paths['twice'][1]} does not exist"  # and not first by the first
    ]
    assert (tmp_path / "out" / "table.md").read_text() == text
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in rows
             if (tmp_path / "out" / f"{name}.json").is_file()}  # fmt: skip
    assert list(found) == ["tokenizer", "reconstruct", "generate"]
    for name, result in found.items():
        assert result["num_objects"] == 3 and result["objects"][0]["frames"] == 2
        assert f"| {name} | {result['summary']['psnr']['value']:.2f} [" in text
    assert "| L4GM | not run |" in text and "- L4GM was not run: " in text and "not exist" in text
    assert "- STAG4D was not run: " in text and "nothing that stag4d writes" in text
    ours, _, theirs = text.partition("The paper's own")
    assert "4DSTAR, the paper's | 20.00" in theirs and "the paper's" not in ours
    config["paper_sha256"] = found["generate"]["truths"]["frames_sha256"]
    results = {"generate": found["generate"]}
    plain = dict(protocol=protocols.find("fourdstar-open-v2"), compared={})
    beside = tables.markdown(config, results, {}, {}, **plain)
    assert "The paper's own" not in beside and "4DSTAR, the paper's | 20.00" in beside
    nothing = {**config, "rows": {"l4gm": rows["l4gm"]}}
    with pytest.raises(ValueError, match="no row of the table can be run: l4gm: .* not exist"):
        tables.run(nothing, data_dir, tmp_path / "nothing", Networks(None), **options)
    with pytest.raises(ValueError, match="no row 'x', only tokenizer, "):
        tables.run(config, data_dir, tmp_path, Networks(None), paths={"x": ["y"]}, **options)
    command = ["evaluate", "--table", "configs/tables/stop.py", "--out", str(tmp_path / "t")]
    assert cli.main([*command, "--data", str(data_dir)]) == 2
    assert "has views at 0, 180 degrees" in capsys.readouterr().err


def test_objects_made_at_once_are_what_each_is_by_itself(tiny_bundle, data_dir, monkeypatch):
    monkeypatch.setattr(tables, "OBJECTS", 2)
    protocol = protocols.find("fourdstar-open-v2")
    truths = clips.open_source(data_dir, protocol, read_splats=read_splats, split="train")
    truths = tables.first_frames(truths, 2)
    made = tables.predicted("generate", tiny_bundle, data_dir, "train", truths, protocol, 7)
    assert len(made.entries) == 3 and made.at_once == 2
    model, data = Model(tiny_bundle), pipeline.ClipSource(data_dir, "train", cache_bytes=0, maps=())
    assert model.sampling["temperature"] > 0  # drawn, each by the seed alone
    for i, entry in enumerate(made.entries.values()):
        seen = transforms.on_white(data[i]["rig_rgba"][:2])[0][:, 0]
        alone = model.generate(seen, fit="none", fps=model.rig.fps, seed=7).gaussians
        for x, y in zip(entry.gaussians(), alone, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)


def test_as_many_objects_are_made_at_once_as_have_room(tiny_bundle, monkeypatch):
    model = Model(tiny_bundle)
    assert tables._at_once(model, 4) == tables.OBJECTS
    monkeypatch.setattr(tables, "KEPT", 1)
    assert tables._at_once(model, 4) == 1


def test_batches_are_of_one_length_and_size():
    found = tables._batches({i: 8 for i in range(5)} | {9: 3}, 4)
    assert set(found.values()) == {((0, 1, 2), 3), ((3, 4), 3), ((9,), 1)}


def run_of(rows, features=None):
    """A result of clips a, b of object x and c of object y, by PSNR, and LPIPS of some."""
    objects = [
        {"object": clip, "group": group, "metrics": row, "views": {}}
        for clip, group, row in zip("abc", "xxy", rows, strict=True)
    ]
    protocol = protocols.find("fourdstar-open-v2")
    measured = sorted({m for row in rows for m in row}, key=str)
    summary = {m: score.mean(protocol.metric(m), objects) for m in measured}
    summary |= {m: {"value": v, "interval_95": None} for m, v in (features or {}).items()}
    told = {"name": protocol.name, "version": protocol.version}
    truths = {"frames_sha256": "0" * 64}
    result = dict(objects=objects, summary=summary, protocol=told, truths=truths)
    return tables.Run(result, {})


def test_samples_of_a_clip_are_no_more_objects():
    protocol = protocols.find("fourdstar-open-v2")
    values = [[10.0, 12.0, 20.0], [14.0, 12.0, 24.0]]
    runs = [run_of([{"psnr": v} for v in row]) for row in values]
    both = tables.merged(protocol, runs)
    assert [row["metrics"]["psnr"] for row in both["objects"]] == [12, 12, 22]
    figure = both["summary"]["psnr"]
    assert figure["runs"] == [14, pytest.approx(50 / 3)] and both["runs"] == 2
    assert figure["objects"] == 3
    # two objects are drawn: x twice, x and y, y twice
    assert figure["interval_95"] == [12, 22]
    assert tables.merged(protocol, runs[:1]) is runs[0].result


def unread(size):
    raise AssertionError


def test_rows_are_compared_in_pairs_over_what_both_have():
    protocol = protocols.find("fourdstar-open-v2")
    rng = np.random.default_rng(0)
    true, ours, theirs = (rng.normal(size=(6, 5)) for _ in range(3))
    first = run_of(
        [{"psnr": 10.0, "cd_4d": 1.0}, {"psnr": 11.0}, {"psnr": 15.0, "cd_4d": 3.0}],
        {"mmd": 4.0},
    )
    other = run_of(
        [{"psnr": 9.0, "cd_4d": 1.5}, {"psnr": 10.0, "cd_4d": 9.0}, {"psnr": 11.0}],
        {"mmd": 3.0},
    )
    first.features["mmd"], other.features["mmd"] = (ours, true), (theirs, true)
    entries = {
        clip: clips.Entry(clip, group, (clips.View("0", unread), clips.View("1", unread)), False)
        for clip, group in zip("abc", "xxy", strict=True)
    }
    truths = clips.Source("", "", entries, None, {})
    found = tables.differences(protocol, [first], [other], truths)
    assert found["psnr"]["difference"] == 2 and found["psnr"]["interval_95"] == [1, 4]
    assert found["cd_4d"]["objects"] == 1 and found["cd_4d"]["difference"] == -0.5
    low, high = found["mmd"]["interval_95"]
    groups = np.array(list("xxxxyy"))
    draws = [distances.kernel_draws(x, true, groups) for x in (ours, theirs)]
    assert (low, high) == distances.middle(draws[0] - draws[1]) and low < high
    same = tables.differences(protocol, [first], [first, first], truths)["mmd"]
    assert same["interval_95"] == [0, 0] and same["difference"] == 0
