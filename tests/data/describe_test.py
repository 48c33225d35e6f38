"""Captions of motions: what a model sees of a clip, what becomes of its answers, the table."""

import random
import subprocess
import sys

import numpy as np
import pytest

from fourdstar_jax.data import describe, pipeline, prepare
from fourdstar_jax.text import captions

MOTIONS = ["pack/wild_pack__Plate2#0", "pack/wild_pack__Plate2#1", "pack/wild_pack__RedBox#0"]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The object is jumping up and down.", "jumping up and down"),
        ("Walking  forward,\nslowly\n", "walking forward"),
        ("\n\n**Turns around**\n", "turns around"),
        ('"a slow walk."', "slow walk"),
        ("It's an attack with the head", "attack with the head"),
        ("- The 3D model appears to be spinning!", "spinning"),
        ("1. The character's swimming", "swimming"),
        ("the object moves up", "moves up"),
        ("objects fall", "objects fall"),
        ("anchored in place", "anchored in place"),
        ("one two three four five six seven eight nine ten eleven twelve, thirteen",)
        + ("one two three four five six seven eight nine ten eleven twelve",),
        ("\ud800\0jumps\u200b", "jumps"),
        ("...", ""),
        ("The", ""),
        ("The object.", ""),
        ("", ""),
    ],
)
def test_answers_become_captions(answer, expected):
    assert describe.clean(answer) == expected


def test_what_is_written_is_what_is_read(tmp_path):
    """Also of answers of any letters; ids may have commas and quotes."""
    draw = random.Random(0)
    letters = "aZ é漢\t\n\r\0\"',.;#|\\\u2028\ud800*-1"
    answers = ["".join(draw.choices(letters, k=draw.randrange(30))) for _ in range(300)]
    cleaned = [describe.clean(answer) for answer in answers]
    rows = {f'a "pack", {i}#{i}': text for i, text in enumerate(cleaned) if text}
    assert len(rows) > 100 and max(len(x.split()) for x in cleaned) <= describe.MAX_WORDS
    captions.write(tmp_path / "table.csv", rows)
    assert captions.read([tmp_path / "table.csv"]) == rows
    assert captions.read([tmp_path / "table.csv"], list(rows)[:3]) == dict(list(rows.items())[:3])


class Fake:
    """Answers from a list; keeps what it was shown."""

    def __init__(self, *answers):
        self.answers, self.seen, self.loaded = list(answers), [], 0

    def load(self):
        self.loaded += 1
        return self

    def __call__(self, frames, fps):
        self.seen.append((frames, fps))
        answer = self.answers[len(self.seen) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_prepare_reads_what_describe_writes(objects_dir, dataset_dir, tmp_path):
    model, said = Fake("The plate jumps.", "The object is spinning", "slides, to the right"), []
    told = describe.describe(dataset_dir, tmp_path / "c.csv", model.load, log=said.append)
    assert told == (3, 0, []) and model.loaded == 1
    assert said == [
        "3 motions described, 0 were there, 0 answers were empty and have no row: "
        f"{tmp_path / 'c.csv'}"
    ]
    expected = ["plate jumps", "spinning", "slides, to the right"]
    assert captions.read([tmp_path / "c.csv"]) == dict(zip(MOTIONS, expected, strict=True))
    again = prepare.prepare(
        objects_dir,
        tmp_path / "again",
        **dict(image_size=17, views=1, extra_views=0, max_frames=2, flow=False, workers=0, rigs=2),
        captions_from=[tmp_path / "c.csv"],
        log=said.append,
    )
    assert said[-1] == "captions: 0 of 2 objects, 3 of 3 motions"
    assert again["train_captions"] == [
        "a plate, jumps",
        "a plate, spinning",
        "a red box, slides, to the right",
    ]
    # of two rigs the first is described
    model = Fake("one", "two", "three")
    assert describe.describe(tmp_path / "again", tmp_path / "r.csv", model.load)[0] == 3
    source = pipeline.ClipSource(tmp_path / "again", "train")
    clips = {source[i]["clip_id"]: source[i] for i in range(len(source))}
    assert len(clips) == 6
    for motion, (frames, _) in zip(MOTIONS, model.seen, strict=True):
        np.testing.assert_array_equal(frames, describe.shown(clips[motion], 8)[0])
        assert not np.array_equal(frames, describe.shown(clips[f"{motion}@1"], 8)[0])


def test_the_model_sees_the_front_view_on_white(dataset_dir, tmp_path):
    model = Fake("up", "down", "left")
    describe.describe(dataset_dir, tmp_path / "c.csv", model.load, frames=3)
    source = pipeline.ClipSource(dataset_dir, "train")
    clips = {source[i]["clip_id"]: source[i] for i in range(len(source))}
    lengths = set()
    for motion, (frames, fps) in zip(MOTIONS, model.seen, strict=True):
        clip = clips[motion]
        total = len(clip["frame_times"])
        lengths.add(total)
        chosen = {5: [0, 1, 3], 4: [0, 1, 2]}[total]
        assert fps == pytest.approx(8.0 * len(chosen) / total)
        rgba = clip["rig_rgba"][chosen, 0].astype(float)
        alpha = rgba[..., 3:] / 255
        expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
        assert frames.dtype == np.uint8 and np.abs(frames - expected).max() <= 0.51
        assert (frames[:, 0, 0] == 255).all() and (frames != 255).any()
    assert lengths == {4, 5}


def test_a_second_run_asks_only_for_what_is_missing(dataset_dir, tmp_path):
    table = tmp_path / "c.csv"
    table.write_text("other#0,A red bird\n")
    model = Fake("jumps", "...", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        describe.describe(dataset_dir, table, model.load)
    assert captions.read([table]) == {"other#0": "A red bird", MOTIONS[0]: "jumps"}
    model = Fake("", "slides")
    told = describe.describe(dataset_dir, table, model.load)
    assert told == (1, 1, [MOTIONS[1]]) and len(model.seen) == 2
    model = Fake("turns")
    assert describe.describe(dataset_dir, table, model.load) == (1, 2, [])
    expected = dict(zip(MOTIONS, ["jumps", "turns", "slides"], strict=True))
    before = table.read_bytes()
    assert captions.read([table]) == {"other#0": "A red bird"} | expected
    model = Fake()
    assert describe.describe(dataset_dir, table, model.load) == (0, 3, [])
    assert model.loaded == 0 and table.read_bytes() == before
    model = Fake("up", "down", "left")
    assert describe.describe(dataset_dir, table, model.load, overwrite=True) == (3, 0, [])
    assert captions.read([table]) == dict(zip(MOTIONS, ["up", "down", "left"], strict=True))
    with pytest.raises(KeyboardInterrupt):  # before it has anything in place of the old rows
        describe.describe(dataset_dir, table, Fake(KeyboardInterrupt()).load, overwrite=True)
    assert len(captions.read([table])) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]
    told = describe.describe(dataset_dir, tmp_path / "none.csv", Fake("", ".", "the").load)
    assert told == (0, 0, MOTIONS) and not (tmp_path / "none.csv").exists()


def test_the_table_is_saved_from_time_to_time(dataset_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "SAVE_S", 0.0)
    rows = []

    def answer(frames, fps):
        rows.append(len(captions.read([tmp_path / "c.csv"])) if rows else 0)
        return "jumps"

    describe.describe(dataset_dir, tmp_path / "c.csv", lambda: answer)
    assert rows == [0, 1, 2]


def test_what_is_no_table_is_left_alone(dataset_dir, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    model = Fake("up", "down", "left")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="notes.txt, line 1: 'mine' is no id and caption"):
            describe.describe(dataset_dir, path, model.load, overwrite=overwrite)
    assert path.read_text() == "mine\n"
    with pytest.raises(ValueError, match="must be a file of this machine"):
        describe.describe(dataset_dir, "s3://bucket/c.csv", model.load)
    with pytest.raises(ValueError, match="frames=0 must be positive"):
        describe.describe(dataset_dir, tmp_path / "c.csv", model.load, frames=0)
    assert model.loaded == 0


def test_a_clip_that_cannot_be_read_is_left_out(dataset_dir, tmp_path, monkeypatch, capfd):
    read = pipeline.ClipSource.__getitem__

    def broken(source, i):
        clip = read(source, i)
        if clip["clip_id"] == MOTIONS[1]:
            raise pipeline.CorruptRecord("clip 1: bad PNG")
        return clip

    monkeypatch.setattr(pipeline.ClipSource, "__getitem__", broken)
    monkeypatch.setattr("fourdstar_jax.data.quarantine.LIMIT", 0.5)
    assert describe.describe(dataset_dir, tmp_path / "c.csv", Fake("up", "down").load) == (2, 0, [])
    assert "quarantined (1 of 3): clip 1: bad PNG" in capfd.readouterr().err
    assert set(captions.read([tmp_path / "c.csv"])) == {MOTIONS[0], MOTIONS[2]}


WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
from fourdstar_jax import cli

sys.exit(cli.main(sys.argv[1:]))
"""


def test_without_torch_one_line_says_what_to_install(dataset_dir, tmp_path):
    argv = ["prepare", "--describe", "x", "--data", dataset_dir, "--out", tmp_path / "c.csv"]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, argv)], capture_output=True, text=True
    )
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert result.stderr.splitlines() == [
        "fourdstar: to describe motions needs torch: pip install 'fourdstar-jax[train,describe]'"
    ]
