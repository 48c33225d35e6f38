"""The page for blind preference: what it holds, and how it answers in a real browser."""

import base64
import io
import json
import re
import urllib.parse

import numpy as np
import pytest
from helpers import browser
from PIL import Image

from fourdstar_jax import cli
from fourdstar_jax.data import untrusted, video
from fourdstar_jax.data.decode import MIN_SIDE

COLOURS = {"a": (200, 60, 60), "b": (60, 60, 200)}


@pytest.fixture
def page(tmp_path, monkeypatch, capsys):
    """Four objects of two views and two frames: A is red, B blue."""

    def decode(path, **request):
        return untrusted.read(path, request | {"min_side": MIN_SIDE})

    monkeypatch.setattr(video, "decode", decode)
    for side, colour in (*COLOURS.items(), ("gt", (60, 200, 60))):
        for number in range(4):
            for view in "01":
                folder = tmp_path / side / f"o{number}" / view
                folder.mkdir(parents=True)
                for t in range(2):
                    frame = np.full((16, 16, 3), colour, np.uint8) + np.uint8(20 * t)
                    Image.fromarray(frame).save(folder / f"{t}.png")
    out = tmp_path / "page.html"
    command = ["evaluate", "--pairs", *(str(tmp_path / x) for x in "ab"), "--out", str(out)]
    assert cli.main([*command, "--gt", str(tmp_path / "gt"), "--seed", "3"]) == 0
    assert "4 pairs: " in capsys.readouterr().out
    return out


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_what_it_holds(page, tmp_path, capsys):
    study = json.loads(re.search(r'id="study">(.*?)</script>', page.read_text(), re.S)[1])
    assert sorted(q["object"] for q in study["questions"]) == ["o0", "o1", "o2", "o3"]
    assert {q["left"] for q in study["questions"]} == {"A", "B"}
    for question in study["questions"]:
        found = picture(question["pair"])
        assert found.n_frames == 2 and found.size == (2 * 32 + 16, 16)
        left, right = (np.asarray(found.convert("RGB"))[8, x] for x in (8, -8))
        assert (left[0] > left[2]) == (question["left"] == "A") == (right[0] < right[2])
        green = np.asarray(picture(question["truth"]).convert("RGB"))[8, 8]
        assert green[1] > 150 > green[0]
    assert str(tmp_path / "a") not in page.read_text().partition('<script type="app')[0]
    both = ["evaluate", "--pairs", str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main(both) == 2 and "--out PAGE.html" in capsys.readouterr().err
    (tmp_path / "b" / "o1" / "1" / "1.png").unlink()
    assert cli.main([*both, "--out", str(page)]) == 2
    told = capsys.readouterr().err
    assert "object o1, view 1: A has 2 frames of 16x16 pixels, B 1 frames of 16x16" in told


def test_answers_in_a_browser(page):
    with browser.page() as opened:
        opened.open(f"file://{page}", width=600, height=500, offline=True)
        opened.until("document.getElementById('pair')?.complete && study.questions.length === 4")
        opened.eval("document.querySelector('[data-choice=left]').click()")
        opened.key("2", "Digit2")
        opened.eval("document.getElementById('back').click()")
        opened.key("3", "Digit3")
        opened.key("2", "Digit2")
        assert opened.eval("document.getElementById('end').hidden")
        opened.key("1", "Digit1")
        assert not opened.eval("document.getElementById('end').hidden")
        link = opened.eval("document.getElementById('save').href")
        order = opened.eval("study.questions.map((q) => [q.object, q.left])")
        assert opened.errors() == []
    found = json.loads(urllib.parse.unquote(link.partition(",")[2]))
    assert found["seed"] == 3 and found["schema"] == "fourdstar_jax pairs"
    other = {"A": "B", "B": "A"}
    wanted = [order[0][1], other[order[1][1]], "same", order[3][1]]
    assert [a["better"] for a in found["answers"]] == wanted
    assert [[a["object"], a["left"]] for a in found["answers"]] == order
