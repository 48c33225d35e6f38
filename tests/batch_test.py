"""Many videos: every output there once, bad ones named, nothing made twice."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from fourdstar_jax import cli, lists
from fourdstar_jax.folders import OBJECT, is_of_kind
from fourdstar_jax.shards import Shard


def pictures(folder, count, bad=()):
    """Pictures of a box on white, some of them cut short, and the list of them."""
    names = [f"box_{i:02}" for i in range(count)]
    for i, name in enumerate(names):
        image = np.full((24, 24, 3), 255, np.uint8)
        image[6 : 15 + i % 4, 8:16] = (200, 10 * i, 0)
        path = folder / f"{name}.png"
        Image.fromarray(image).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:-30])
    (folder / "list.txt").write_text("".join(f"{name}.png\n" for name in names))
    return names


def generate(folder, bundle, *more):
    argv = ["generate", "--videos", folder / "list.txt", "--out", folder / "out"]
    return [*map(str, argv), "--model", str(bundle), "--size", "16", *map(str, more)]


def made(folder):
    return sorted(p.name for p in (folder / "out").iterdir() if is_of_kind(p, OBJECT))


def test_a_bad_video_is_quarantined_and_a_second_run_does_what_is_missing(
    tmp_path, tiny_bundle, capsys, monkeypatch
):
    names = pictures(tmp_path, 4, bad=(1,))
    sound = tmp_path / "box_01.png"
    assert cli.main(generate(tmp_path, tiny_bundle, "--shard", "0/1")) == 0
    out, errors = capsys.readouterr()
    assert made(tmp_path) == [names[0], *names[2:]]
    assert "3 made, 1 quarantined" in out
    assert len(errors.splitlines()) == 1 and f"quarantined: {sound}: {sound}" in errors
    told = json.loads((tmp_path / "out" / "quarantined" / "box_01.json").read_text())
    assert told["video"] == str(sound) and "cannot be read" in told["reason"]

    from fourdstar_jax.cli import generate as command

    with monkeypatch.context() as without:
        without.setattr(command, "load_model", None)  # nothing to do: none is loaded
        assert cli.main(generate(tmp_path, tiny_bundle)) == 0
    assert "0 made, 0 quarantined" in capsys.readouterr().out
    Image.open(tmp_path / "box_00.png").save(sound)
    assert cli.main(generate(tmp_path, tiny_bundle, "--retry")) == 0
    assert made(tmp_path) == names and "1 made" in capsys.readouterr().out
    assert not list((tmp_path / "out" / "quarantined").iterdir())


def test_it_makes_what_one_video_makes(tmp_path, tiny_bundle, capsys):
    (name,) = pictures(tmp_path, 1)
    (tmp_path / "list.csv").write_text(f"video,text,name\n{name}.png,a red box,mine\n")
    argv = generate(tmp_path, tiny_bundle, "--seed", 3)
    argv[2] = str(tmp_path / "list.csv")
    assert cli.main(argv) == 0
    alone = ["generate", "--video", tmp_path / f"{name}.png", "--out", tmp_path / "alone"]
    alone += ["--model", tiny_bundle, "--size", 16, "--seed", 3, "--text", "a red box"]
    assert cli.main([str(word) for word in alone]) == 0
    files = {p.name for p in (tmp_path / "alone").iterdir() if p.is_file()}
    assert "splats.safetensors" in files
    for file in files:
        ours = (tmp_path / "out" / "mine" / file).read_bytes()
        assert ours == (tmp_path / "alone" / file).read_bytes(), file


def test_what_is_wrong_with_all_quarantines_none(tmp_path, tiny_bundle, capsys):
    pictures(tmp_path, 2)
    assert cli.main(generate(tmp_path, tiny_bundle, "--frames", 99)) == 2
    assert "timesteps=99 must be from 1 to" in capsys.readouterr().err
    assert not (tmp_path / "out" / "quarantined").exists() and made(tmp_path) == []


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.txt", "# none\n", "lists no videos"),
        (
            "a.txt",
            "x/fox.mp4\n\ny/fox.webm\n",
            "line 3: its output would be 'fox', as that of line",
        ),
        ("a.csv", "path\nx\n", "no column video"),
        ("a.csv", "video,name\nx.mp4,../up\n", "line 2: '../up' cannot be the name"),
        ("a.csv", "video,name\n,up\n", "line 2: no video is named"),
        ("none.txt", None, "No such file"),
    ],
)
def test_lists_that_cannot_be_used_are_told(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        lists.read_list(tmp_path / name)


def test_flags_that_do_not_go_together(capsys, tmp_path):
    for argv, words in (
        (["--videos", "l", "--out", "o", "--overwrite"], "takes no --overwrite: remove an output"),
        (["--videos", "l"], "--videos needs --out DIR"),
        (["--video", "v", "--out", "o", "--shard", "0/2"], "go with --videos LIST"),
    ):
        assert cli.main(["generate", *argv]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_shards_of_which_one_is_killed(tmp_path, tiny_bundle):
    """The other goes on with the killed one's part: each output once, the bad one named."""
    names = pictures(tmp_path, 10, bad=(3,))
    start = [sys.executable, "-m", "fourdstar_jax.cli"]
    both = [
        subprocess.Popen([*start, *generate(tmp_path, tiny_bundle, "--shard", f"{i}/2")])
        for i in range(2)
    ]
    out = tmp_path / "out"
    while not any((out / name).exists() for name in names[1::2]):
        assert both[1].poll() is None
        time.sleep(0.02)
    os.kill(both[1].pid, signal.SIGKILL)
    assert both[0].wait(300) == 0 and both[1].wait(10) == -9
    assert made(tmp_path) == [name for i, name in enumerate(names) if i != 3]
    assert [p.name for p in (out / "quarantined").iterdir()] == ["box_03.json"]
    assert Shard.parse("1/2") == (1, 2)
