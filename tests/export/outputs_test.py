"""`fourdstar export`: every format of an output folder, whole or not at all."""

import json

import numpy as np
import pytest
from export.compact_test import moving
from PIL import Image

from fourdstar_jax import cli, export, generate, geometry
from fourdstar_jax.cli.export import FORMATS
from fourdstar_jax.export import compact, outputs, page


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "fox"
    folder.mkdir()
    object4d = generate.Object4D(
        gaussians=moving(3, 40),
        rig=geometry.Rig((0.0, 90.0), fps=8.0),
        tokens=np.zeros((3, 4, 1), np.int32),
        meta={"seed": 0},
    )
    export.write_splats(folder / "splats.safetensors", object4d.gaussians, fps=8.0)
    manifest = export.manifest(object4d, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run(source, out, *more):
    return cli.main(["export", str(source), "--out", str(out), "--size", "16", *more])


def test_the_command_knows_all_formats():
    assert FORMATS == outputs.FORMATS


def test_every_format_is_written_and_again_the_same(source, tmp_path, capsys):
    assert run(source, tmp_path / "a", "--to", *FORMATS) == 0
    assert capsys.readouterr().out.startswith("ply splat spz")
    endings = {"compressed_ply": "compressed.ply"}
    sequences = ("ply", "splat", "spz", "compressed_ply", "glb")
    expected = {f"{n}/frame_{t:04d}.{endings.get(n, n)}" for n in sequences for t in range(3)}
    expected |= {"object.4dg", "viewer.html", "tracks.npz", "sheet.png", "manifest.json"}
    expected |= {f"orbit.{x}" for x in ("mp4", "gif", "webp")}
    files = [f for f in (tmp_path / "a").rglob("*") if f.is_file()]
    assert {f.relative_to(tmp_path / "a").as_posix() for f in files} == expected
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["exported_from"] == "fox" and manifest["formats"] == list(FORMATS)
    assert set(manifest["files"]) == expected - {"manifest.json"}

    gaussians = moving(3, 40)
    again, _ = compact.decode((tmp_path / "a" / "object.4dg").read_bytes())
    assert again.means.shape == gaussians.means.shape
    with np.load(tmp_path / "a" / "tracks.npz", allow_pickle=False) as tracks:
        np.testing.assert_array_equal(tracks["means"], gaussians.means)
        assert tracks["fps"] == 8 and tracks["opacities"].shape == (3, 40)
    third = export.read_ply(tmp_path / "a" / "ply" / "frame_0002.ply")
    np.testing.assert_allclose(third.means, gaussians.means[2])
    (shown,) = page.objects_in(tmp_path / "a" / "viewer.html")
    assert shown["name"] == "fox"
    for name in ("gif", "webp"):
        with Image.open(tmp_path / "a" / f"orbit.{name}") as moved:
            assert moved.size == (16, 16) and moved.n_frames > 18 and moved.info["loop"] == 0
    assert Image.open(tmp_path / "a" / "sheet.png").size == (3 * 18 + 2, 2 * 18 + 2)

    assert run(source, tmp_path / "a", "--to", "ply") == 2
    assert "not empty" in capsys.readouterr().err
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    assert run(source, tmp_path / "a", "--overwrite", "--to", *FORMATS) == 0
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before  # with all files' hashes


def test_what_cannot_be_is_told_in_a_line(source, tmp_path, capsys, monkeypatch):
    assert run(tmp_path, tmp_path / "o", "--to", "ply") == 2
    assert f"{tmp_path} is no output of" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(source, tmp_path / "o", "--to", "obj")
    assert stop.value.code == 2 and "choose from" in capsys.readouterr().err
    monkeypatch.setattr(page, "MAX_BYTES", 1000)
    assert run(source, tmp_path / "o", "--to", "viewer") == 2
    assert "would be over" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
