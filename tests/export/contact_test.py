"""The contact sheet: which clips it shows, what stands where, and the command."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from fourdstar_jax import cli
from fourdstar_jax.data import prepare
from fourdstar_jax.evaluate.networks import Networks
from fourdstar_jax.export import contact


@pytest.fixture(autouse=True)
def mesh():
    """None, as for users."""


def test_the_best_and_the_worst_quarter_are_shown_alike():
    values = {f"c{i}": float(i) for i in range(20)}
    found = contact.quarters(values, higher=True)
    assert found == {"best": ["c19", "c17", "c15"], "worst": ["c4", "c2", "c0"]}
    found = contact.quarters(values, higher=False)
    assert found == {"best": ["c0", "c2", "c4"], "worst": ["c15", "c17", "c19"]}
    assert contact.quarters({"a": 1.0, "b": 2.0}, higher=True) == {"best": ["b"], "worst": ["a"]}
    assert contact.quarters({"a": 1.0}, higher=True) == {"only": ["a"]}


def test_input_views_and_truth_stand_beside_each_other(tmp_path):
    def clip(frames, level):
        return np.full((frames, 16, 16, 3), level, np.uint8)

    rows = [
        contact.Row("a", clip(2, 10), [clip(2, 40 + 20 * v) for v in range(4)], [clip(2, 200)] * 4),
        contact.Row("b", clip(1, 0), [clip(1, 100)] * 4, []),
    ]
    contact.write(tmp_path / "sheet.webp", rows)
    with Image.open(tmp_path / "sheet.webp") as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    step, gap, line = 16, contact.GAP, contact.LABEL
    assert shown.shape == (line + 2 * (step + line), 9 * step + 2 * gap, 3)
    middles = [8, *(step + gap + step * v + 8 for v in range(4)), 5 * step + 2 * gap + 8]
    found = shown[line + 8, middles].mean(axis=-1)
    assert np.abs(found - [10, 40, 60, 80, 100, 200]).max() < 12
    second = shown[2 * line + step + 8, middles].mean(axis=-1)
    assert np.abs(second - [0, 100, 100, 100, 100, 255]).max() < 12
    with pytest.raises(ValueError, match="sheet.png: a sheet is an animation, named .webp"):
        contact.write(tmp_path / "sheet.png", rows)
    with pytest.raises(ValueError, match="nothing to show"):
        contact.write(tmp_path / "sheet.webp", [])


def test_a_bundles_own_clips_and_objects_that_were_made(objects_dir, tiny_bundle, tmp_path, capsys):
    options: dict[str, Any] = dict(image_size=16, views=2, extra_views=0, max_frames=3, workers=0)
    data = tmp_path / "data"
    prepare.prepare(objects_dir, data, **options, log=lambda line: None)
    command = ["evaluate", "--sheet", str(tmp_path / "a.webp")]
    of_data = ["--data", str(data), "--model", str(tiny_bundle), "--split", "train", "--clips", "2"]
    assert cli.main([*command, *of_data]) == 0
    assert "2 rows: " in capsys.readouterr().out
    with Image.open(tmp_path / "a.webp") as image:
        assert image.size[0] == 5 * 16 + 2 * contact.GAP  # the input, and two views of both
    truths = contact.of_split(data, "train", 2)
    assert len({entry.group for entry in truths.entries.values()}) == 2
    rows = contact.of_sources(truths, truths, Networks(None), title="t")
    assert [row.label.split(",")[-1] for row in rows] == [" best quarter", " worst quarter"]
    assert all(np.array_equal(row.views, row.truth) for row in rows)
    for more, told in (
        ([], "needs --pred DIR, or --data DIR"),
        (["--data", str(data), "--out", "x"], "--out does not go with --sheet"),
        (["--pred", str(data)], "holds no object that `fourdstar generate` wrote"),
    ):
        assert cli.main([*command, *more]) == 2
        assert told in capsys.readouterr().err
