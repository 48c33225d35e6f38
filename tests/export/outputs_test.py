"""`fourdstar export`: every format of an output folder, whole or not at all."""

import json
import resource
import shutil
import subprocess

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


OURS = [name for name in FORMATS if name != "splat4d"]  # which another program writes


def run(source, out, *more):
    return cli.main(["export", str(source), "--out", str(out), "--size", "16", *more])


def test_the_command_knows_all_formats():
    assert FORMATS == outputs.FORMATS


def test_every_format_is_written_and_again_the_same(source, tmp_path, capsys):
    assert run(source, tmp_path / "a", "--to", *OURS) == 0
    assert capsys.readouterr().out.startswith("ply splat spz")
    endings = {"compressed_ply": "compressed.ply"}
    sequences = ("ply", "splat", "spz", "compressed_ply", "glb")
    expected = {f"{n}/frame_{t:04d}.{endings.get(n, n)}" for n in sequences for t in range(3)}
    expected |= {"object.4dg", "viewer.html", "tracks.npz", "sheet.png", "manifest.json"}
    expected |= {f"orbit.{x}" for x in ("mp4", "gif", "webp")}
    files = [f for f in (tmp_path / "a").rglob("*") if f.is_file()]
    assert {f.relative_to(tmp_path / "a").as_posix() for f in files} == expected
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["exported_from"] == "fox" and manifest["formats"] == OURS
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
    assert run(source, tmp_path / "a", "--overwrite", "--to", *OURS) == 0
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before  # with all files' hashes


def program(folder, body):
    path = folder / "splat4d"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_splat4d_is_written_by_its_program(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(source, tmp_path / "a", "--to", "splat4d") == 2
    assert "pip install splats4d" in capsys.readouterr().err and not (tmp_path / "a").exists()
    program(tmp_path, "echo reading >&2; echo no room >&2; exit 3")
    assert run(source, tmp_path / "a", "--to", "splat4d") == 2
    assert capsys.readouterr().err.endswith("failed with exit code 3: no room\n")
    assert not (tmp_path / "a").exists()
    program(tmp_path, 'echo "$@" > "$5"; for file in "$3"/*; do echo "${file##*/}" >> "$5"; done')
    assert run(source, tmp_path / "a", "--to", "splat4d") == 0
    called, *frames = (tmp_path / "a" / "object.splat4d").read_text().splitlines()
    assert called.startswith("encode -i /") and called.endswith("--fps 8 --pos-mm 1")
    assert frames == [f"frame_{t:04d}.splat" for t in range(3)]


def test_splat4d_of_the_real_program_holds_what_was_written(source, tmp_path):
    found = shutil.which("splat4d")
    if found is None:
        pytest.skip("splat4d is not installed: pip install splats4d")
    assert run(source, tmp_path / "a", "--to", "splat", "splat4d") == 0
    file = tmp_path / "a" / "object.splat4d"
    subprocess.run([found, "verify", str(file), "-i", str(tmp_path / "a" / "splat")], check=True)
    frame = tmp_path / "frame.splat"
    subprocess.run([found, "decode", str(file), "--frame", "2", "-o", str(frame)], check=True)

    def places(path):
        data = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 32)[:, :12]
        return np.ascontiguousarray(data).view("<f4")

    written = places(tmp_path / "a" / "splat" / "frame_0002.splat")
    # the program sorts them
    nearest = np.abs(places(frame)[:, None] - written[None]).max(axis=-1).min(axis=1)
    assert len(written) == 40 and nearest.max() <= 1e-3 * outputs.SPLAT4D_MM + 1e-6


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


@pytest.mark.parametrize("what", [name for name in OURS if name != "viewer"])
def test_a_full_disk_leaves_what_was_there(source, tmp_path, capsys, what):
    """Files above a limit, as on a full disk; what is compiled is compiled before."""
    assert run(source, tmp_path / "a", "--to", what) == 0
    before = {f: f.read_bytes() for f in (tmp_path / "a").rglob("*") if f.is_file()}
    capsys.readouterr()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        assert run(source, tmp_path / "a", "--to", what, "--overwrite") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "cannot be written: File too large after 0.0 MB; " in lines[0], lines
    assert {f: f.read_bytes() for f in (tmp_path / "a").rglob("*") if f.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
