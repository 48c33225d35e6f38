"""The model card: what the files say, the limits first, and nothing of theirs as Markdown."""

import json
import shutil

import pytest

from fourdstar_jax import bundle, cli
from fourdstar_jax.evaluate import card, protocols

UNSEEN = {
    "split": "unseen_clip",
    "num_clips": 9,
    "num_objects": 4,
    "reconstruction": {"model_psnr": 25.8284, "gain": [0.51, -0.25, 1.25]},
    "comparisons": {
        "views_deg": [90.0, 180.0, 270.0],
        "ceiling": {"psnr": {"value": 20.5, "interval_95": [19.25, 21.5], "clips": 9}},
        "generation": {"psnr": {"value": 17.5, "interval_95": None, "clips": 9}},
    },
    "samples": {"lpips": {"own": 0.125}, "what": "left out"},
}


@pytest.fixture
def model(tiny_bundle, tmp_path):
    folder = tmp_path / "fox"
    shutil.copytree(tiny_bundle, folder)
    return folder


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_a_card_tells_what_the_files_say(model, tmp_path, capsys):
    (model / "notes.md").write_text("- Foxes only.\n\n## Data and licences\n\nAll CC0-1.0.\n")
    protocol = protocols.find("fourdstar-open-v2")
    metric = protocol.metrics[0]
    scored = {
        "protocol": {"name": protocol.name, "version": protocol.version},
        "num_objects": 7,
        "summary": {metric.name: {"value": 21.5, "interval_95": [20.25, 22.75]}},
    }
    files = [write(tmp_path / "unseen.json", UNSEEN), write(tmp_path / "scored.json", scored)]
    out = tmp_path / "README.md"
    words = ["card", str(model), "--results", *map(str, files), "--out", str(out)]
    assert cli.main(words) == 0 and capsys.readouterr().out == ""
    text = out.read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    wanted = ["Limits", "Data and licences", "Dataset", "Training", "Figures", "Files"]
    assert headings == wanted and text.startswith("# Model card: fox\n")
    limits = text.partition("## Limits")[2].partition("##")[0]
    assert "- Foxes only.\n- It sees and makes pictures of 16x16 pixels." in limits
    assert "At most 2 timesteps, 8 a second; 2 views" in limits
    assert "9 clips" not in text and "### unseen_clip: 4 objects" in text
    assert "| model_psnr | 25.83 |" in text and "| gain | 0.51 [-0.25, 1.25] |" in text
    assert "| ceiling, psnr | 20.5 [19.25, 21.5] |" in text
    assert "| generation, psnr | 17.5 |" in text and "views_deg" not in text
    assert "| lpips, own | 0.125 |" in text and "left out" not in text
    d = metric.digits
    assert f"{protocol.name}, version {protocol.version}: 7 objects" in text
    assert f"{21.5:.{d}f} [{20.25:.{d}f}, {22.75:.{d}f}]" in text
    for stage in bundle.read(model).stages.values():
        assert stage.sha256 in text


def test_what_is_not_there_is_said(model, tmp_path):
    description = json.loads((model / "model.json").read_text())
    del description["stages"]["star"]
    description["stages"]["vqvae"]["config"]["steps"] = "<b>|9\n# no"
    write(model / "model.json", description)
    text = card.card(model)
    assert "It cannot generate: star is missing." in text and "None were given." in text
    assert "do not say what they were trained on" in text
    assert "?b??9 # no" in text and "<b>" not in text


def test_files_that_are_no_results_and_other_datasets_are_refused(model, tmp_path, dataset_dir):
    with pytest.raises(ValueError, match="a.json is no result of `fourdstar evaluate`"):
        card.card(model, results=[write(tmp_path / "a.json", {"split": "train"})])
    (model / "notes.md").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="notes.md is not UTF-8"):
        card.card(model)
    (model / "notes.md").unlink()
    assert "| train | 3 |" in card.card(model, data=dataset_dir)
    description = json.loads((model / "model.json").read_text())
    description["stages"]["star"]["info"]["data_sha256"] = "0" * 64
    write(model / "model.json", description)
    with pytest.raises(ValueError, match="was trained on 0000"):
        card.card(model, data=dataset_dir)
