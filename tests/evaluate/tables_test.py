"""The paper's tables as commands: rows that run, rows that cannot, the paper's values apart."""

import json
from pathlib import Path

import pytest

from fourdstar_jax import cli
from fourdstar_jax.evaluate import protocols, readers, tables
from fourdstar_jax.evaluate.networks import Networks
from fourdstar_jax.export import read_splats

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
        for values in config["paper"].values():
            assert [protocol.metric(name).better for name in values]


def test_rows_are_run_or_named(tiny_bundle, data_dir, tmp_path, capsys):
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
        paper={"4DSTAR": {"psnr": 20.0}},
        paper_sha256="",
    )
    options = dict(read_splats=read_splats, metrics=("psnr", "ssim"), log=lambda line: None)
    text = tables.run(config, data_dir, tmp_path / "out", Networks(None), **options)
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
    beside = tables.markdown(config, results, {}, {})
    assert "The paper's own" not in beside and "4DSTAR, the paper's | 20.00" in beside
    with pytest.raises(ValueError, match="no row 'x', only tokenizer, "):
        tables.run(config, data_dir, tmp_path, Networks(None), paths={"x": "y"}, **options)
    command = ["evaluate", "--table", "configs/tables/stop.py", "--out", str(tmp_path / "t")]
    assert cli.main([*command, "--data", str(data_dir)]) == 2
    assert "has views at 0, 180 degrees" in capsys.readouterr().err
