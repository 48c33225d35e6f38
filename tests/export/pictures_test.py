import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fourdstar_jax import bundle, cli
from fourdstar_jax.export.video import write_video
from tests.helpers import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[:48, :96] / 96
    picture = np.stack([x, y, 1 - x], axis=-1)
    Image.fromarray((255 * picture).astype(np.uint8)).save(folder / "a.png")
    frames = np.stack([np.roll(picture[:, :48], 8 * t, axis=1) for t in range(3)])
    write_video(folder / "b.mp4", frames, fps=8)
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(folder, out, *more):
    return cli.main(
        ["reconstruct", "--model", str(TINY), "--tokenizer", "unitok"]
        + ["--input", str(folder), "--out", str(out), *more]
    )


def test_pictures_and_videos_come_back(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "--batch", "2") == 0
    said = capsys.readouterr().out
    assert "2 files" in said and "a.png: a picture of 96x48 pixels" in said
    assert "b.mp4: video of 48x48 pixels: 0.38 of 0.38 s" in said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [(f["file"], f["frames"]) for f in manifest["files"]] == [("a.png", 1), ("b.mp4", 3)]
    assert [f["input"]["kind"] for f in manifest["files"]] == ["picture", "video"]
    assert manifest["tokenizer"] == bundle.read(TINY).spec.to_dict()
    assert Image.open(tmp_path / "out" / "a.png").size == (128, 64)
    assert (tmp_path / "out" / "b.mp4").stat().st_size > 500
    tokens = np.load(tmp_path / "out" / "tokens" / "b.npy", allow_pickle=False)
    tokenizer = bundle.read(TINY).load("tokenizer")
    assert tokens.shape == (3, tokenizer.num_tokens, 4)
    # the right half of the picture is what the tokenizer makes of its tokens
    again = np.asarray(Image.open(tmp_path / "out" / "a.png"), np.float32)[:, 64:] / 255
    one = np.load(tmp_path / "out" / "tokens" / "a.npy", allow_pickle=False)
    np.testing.assert_allclose(again, tokenizer.decode(jnp.asarray(one))[0], atol=0.6 / 255)


def test_the_start_and_the_whole_frame_of_videos(folder, tmp_path, capsys):
    more = ["--start", "0.25", "--fit", "object"]
    assert run(folder / "b.mp4", tmp_path / "out", *more) == 0
    (result,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert result["frames"] == 1 and result["input"]["object"] is None
    warning = f"warning: {folder / 'b.mp4'}: no object was found"
    assert warning in capsys.readouterr().err


def test_crop_takes_the_middle(folder, tmp_path):
    assert run(folder / "a.png", tmp_path / "pad") == 0
    assert run(folder / "a.png", tmp_path / "crop", "--fit", "crop") == 0
    padded, cropped = (
        np.asarray(Image.open(tmp_path / name / "a.png"), np.float32)[:, :64]
        for name in ("pad", "crop")
    )
    assert (padded[0] == 255).all()  # white above a picture that is wider than high
    side = 48 / 1.125
    left = (96 - side) / 2
    assert abs(cropped[32, 0, 0] - 255 * (left + side / 128) / 96) < 2
    assert abs(cropped[32, -1, 0] - 255 * (left + side * 127 / 128) / 96) < 2


@pytest.mark.parametrize(
    "more, why",
    [
        (["--tokenizer", "vq16", "--input", "."], "is local, not vq16"),
        (["--input", "."], "needs --tokenizer"),
        (["--tokenizer", "unitok", "--data", "."], "goes with --input"),
        (["--tokenizer", "local", "--input", "nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(more, why, tmp_path, capsys):
    assert cli.main(["reconstruct", "--out", str(tmp_path / "o"), *more]) == 2
    error = capsys.readouterr().err
    assert why in error and len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_folder_without_pictures_is_told(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "o") == 2
    assert "no picture or video" in capsys.readouterr().err
