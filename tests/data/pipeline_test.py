"""Batches: shapes, windows, the roll of the rig, resuming, shares of processes, splits."""

import shutil

import grain
import jax
import numpy as np
import pytest

from fourdstar_jax.data import pipeline, prepare, splits, transforms
from fourdstar_jax.geometry import Rig
from fourdstar_jax.text.captions import NEUTRAL_PROMPT

SIZES = dict(batch_size=2, timesteps=3, max_len=7)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch_has_the_named_arrays(dataset_dir):
    batch = next(iter(pipeline.make_loader(dataset_dir, "train", **SIZES)))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "images": ((2, 3, 3, 17, 17, 3), "float32"),
        "masks": ((2, 3, 3, 17, 17, 1), "float32"),
        "viewmats": ((2, 3, 4, 4), "float32"),
        "Ks": ((2, 3, 3, 3), "float32"),
        "extra_images": ((2, 3, 2, 17, 17, 3), "float32"),
        "extra_masks": ((2, 3, 2, 17, 17, 1), "float32"),
        "extra_viewmats": ((2, 2, 4, 4), "float32"),
        "extra_Ks": ((2, 2, 3, 3), "float32"),
        "flow": ((2, 2, 3, 17, 17, 2), "float32"),
        "depth": ((2, 3, 3, 17, 17, 1), "float32"),
        "times": ((2, 3), "float32"),
        "text_ids": ((2, 7), "int32"),
        "clip": ((2,), "int32"),
    }
    assert batch["images"].min() >= 0 and batch["images"].max() <= 1
    assert (batch["images"][batch["masks"][..., 0] == 0] == 1).all()  # white
    np.testing.assert_array_equal(batch["times"], [[0, 1, 2]] * 2)
    front = np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1.5], [0, 0, 0, 1]])
    np.testing.assert_allclose(batch["viewmats"][:, 0], [front] * 2, atol=1e-6)


def test_evaluation_is_every_clip_once_as_it_is(dataset_dir):
    words = pipeline.load_words(dataset_dir, 7)
    loader = pipeline.make_loader(dataset_dir, "train", train=False, words=words, **SIZES)
    first, again = list(loader), list(loader)
    assert [len(b["clip"]) for b in first] == [2, 1]
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    source = pipeline.ClipSource(dataset_dir, "train")
    clips = {source[i]["index"]: source[i] for i in range(3)}
    seen = {}
    for batch in first:
        for i, index in enumerate(batch["clip"]):
            clip = seen[int(index)] = clips[int(index)]
            images, _ = transforms.on_white(clip["rig_rgba"][:3])
            np.testing.assert_array_equal(batch["images"][i], images)
            text = f"{clip['appearance']}, {clip['motion']}"
            np.testing.assert_array_equal(batch["text_ids"][i], words([text])[0])
    assert len(seen) == 3


def test_windows_start_at_random_and_short_clips_loop():
    rng = np.random.default_rng(0)
    starts = {tuple(transforms.window(7, 3, rng)) for _ in range(200)}
    assert starts == {(s, s + 1, s + 2) for s in range(5)}  # never over the end
    looped = {tuple(transforms.window(2, 5, rng)) for _ in range(50)}
    assert looped == {(0, 1, 0, 1, 0), (1, 0, 1, 0, 1)}
    assert transforms.window(7, 3, None).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="timesteps=0"):
        transforms.window(7, 0, None)
    wide = {tuple(transforms.window(7, 3, rng, stride=2)) for _ in range(200)}
    assert wide == {(s, s + 2, s + 4) for s in range(3)}


def test_windows_of_other_speeds(dataset_dir):
    """Every or every second frame, and where that would make the clip loop every one."""
    windows = pipeline.Windows(
        pipeline.load_words(dataset_dir, 5), 3, True, True, 0.5, max_stride=2
    )
    for frames, strides in ((5, {1, 2}), (4, {1})):
        drawn = [windows.draw(frames, 3, np.random.default_rng(i))[0] for i in range(60)]
        assert {int(x[1] - x[0]) for x in drawn} == strides
        assert all(np.diff(x).min() == np.diff(x).max() for x in drawn)


def test_a_rolled_rig_shows_the_same_scene(dataset_dir):
    """A point seen in a picture is found at the same pixel after the world has moved along."""
    clip = pipeline.ClipSource(dataset_dir, "train")[0]
    old, old_extra = clip["rig_viewmats"], clip["extra_viewmats"]
    points = np.random.default_rng(1).uniform(-0.4, 0.4, (5, 3))
    for view in range(3):
        new, new_extra = transforms.input_view_to_front(old, old_extra, view)
        np.testing.assert_allclose(np.linalg.inv(new[0])[:3, 3], [0, 0, 1.5], atol=1e-6)
        # the old camera `view` and the new camera 0 are one camera in two worlds
        move = np.linalg.inv(new[0]) @ old[view]
        moved = points @ move[:3, :3].T + move[:3, 3]
        pairs = [*zip(np.roll(old, -view, 0), new, strict=True)]
        for before, after in [*pairs, *zip(old_extra, new_extra, strict=True)]:
            a = points @ before[:3, :3].T + before[:3, 3]
            b = moved @ after[:3, :3].T + after[:3, 3]
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_rolls_and_prompts_vary_in_training_alone(dataset_dir):
    words = pipeline.load_words(dataset_dir, 7)
    loader = pipeline.make_loader(dataset_dir, "train", words=words, seed=5, **SIZES)
    neutral = words([NEUTRAL_PROMPT])[0]
    source = pipeline.ClipSource(dataset_dir, "train")
    clips = {source[i]["index"]: source[i] for i in range(3)}
    prompts, views = [], set()
    for _, batch in zip(range(40), loader, strict=False):
        prompts += [np.array_equal(row, neutral) for row in batch["text_ids"]]
        first = batch["masks"][0, 0, 0, ..., 0]
        rgba = clips[int(batch["clip"][0])]["rig_rgba"]
        same = np.abs(rgba[..., 3] / 255 - first).max((2, 3)) < 1e-6  # [F, V]
        if same.any(0).sum() == 1:
            views.add(int(np.nonzero(same.any(0))[0][0]))
    assert 0.3 < np.mean(prompts) < 0.7  # 80 draws of one half: five deviations are 0.28
    assert views == {0, 1, 2}


def test_training_resumes_with_the_batches_it_would_have_seen(dataset_dir):
    loader = pipeline.make_loader(dataset_dir, "train", seed=3, **SIZES)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(5)]
    fresh = iter(pipeline.make_loader(dataset_dir, "train", seed=3, **SIZES))
    fresh.set_state(state)
    assert all(equal(next(fresh), batch) for batch in expected)
    other = next(iter(pipeline.make_loader(dataset_dir, "train", seed=4, **SIZES)))
    assert not equal(other, next(iter(loader)))


def read_by(monkeypatch, processes, count, dataset_dir, **options):
    """`count` batches as so many processes read them, their rows joined."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        loader = pipeline.make_loader(dataset_dir, "train", seed=3, timesteps=2, **options)
        parts.append([batch for _, batch in zip(range(count), loader, strict=False)])
    return [
        {name: np.concatenate([batch[name] for batch in rows]) for name in rows[0]}
        for rows in zip(*parts, strict=True)
    ]


def test_any_number_of_processes_reads_the_same_batches(monkeypatch, dataset_dir):
    alone = read_by(monkeypatch, 1, 4, dataset_dir, batch_size=6)
    for processes in (2, 3):
        together = read_by(monkeypatch, processes, 4, dataset_dir, batch_size=6)
        assert all(equal(a, b) for a, b in zip(alone, together, strict=True))
    with pytest.raises(ValueError, match="batch_size=4 must be a positive multiple of processes=3"):
        pipeline.make_loader(dataset_dir, "train", batch_size=4, timesteps=2)


def test_processes_evaluate_as_many_batches_each(monkeypatch, dataset_dir):
    """Three clips: of the last batch, which has one, nobody gets a part."""
    (alone, _) = read_by(monkeypatch, 1, 9, dataset_dir, batch_size=2, train=False)
    (together,) = read_by(monkeypatch, 2, 9, dataset_dir, batch_size=2, train=False)
    assert equal(alone, together)


def test_wrong_calls_name_the_argument(dataset_dir, tmp_path):
    with pytest.raises(ValueError, match="split='validation'"):
        pipeline.make_loader(dataset_dir, "validation", **SIZES)
    with pytest.raises(ValueError, match="manifest.json"):
        pipeline.make_loader(tmp_path, "train", **SIZES)
    with pytest.raises(ValueError, match="neutral_prompt=2"):
        pipeline.make_loader(dataset_dir, "train", **SIZES, neutral_prompt=2)
    with pytest.raises(ValueError, match="timesteps=0"):
        pipeline.make_loader(dataset_dir, "train", **SIZES | {"timesteps": 0})


def test_a_few_decoded_clips_are_kept_in_memory(dataset_dir):
    source = pipeline.ClipSource(dataset_dir, "train", cache_bytes=1 << 30)
    assert source[0]["rig_rgba"] is source[0]["rig_rgba"]
    source = pipeline.ClipSource(dataset_dir, "train", cache_bytes=0)
    assert source[0]["rig_rgba"] is not source[0]["rig_rgba"]


def test_rig_and_provenance(dataset_dir):
    assert pipeline.rig(dataset_dir) == Rig((0.0, 120.0, 240.0), 8.0, radius=1.5, fov_deg=49.1)
    hashes = pipeline.provenance(dataset_dir)
    assert hashes["split_sha256"] == splits.SHA256 and len(hashes["data_sha256"]) == 64


@pytest.fixture
def split_dataset(objects_dir, tmp_path, monkeypatch):
    """The objects again, with a split that calls one clip and one object unseen."""
    import hashlib

    def sha(name):
        return hashlib.sha256((objects_dir / name).read_bytes()).hexdigest()

    plate, box = sha("pack/wild_pack__Plate2.glb"), sha("pack/wild_pack__RedBox.glb")
    table = {(plate, 0): "train", (plate, 1): "unseen_clip", (box, 0): "unseen_object"}
    monkeypatch.setattr(splits, "load", lambda: table)
    prepare.prepare(
        objects_dir,
        tmp_path / "set",
        image_size=9,
        views=2,
        extra_views=0,
        max_frames=2,
        workers=0,
        log=lambda line: None,
    )
    return tmp_path / "set"


def test_no_reader_of_training_yields_an_unseen_clip(split_dataset, tmp_path):
    manifest = pipeline.read_manifest(split_dataset)
    assert manifest["splits"] == {"train": 1, "unseen_clip": 1, "unseen_object": 1}
    assert manifest["train_captions"] == ["a plate, jump high"]
    unseen = {i for i, c in enumerate(manifest["clips"]) if c["split"] != "train"}
    loader = pipeline.make_loader(split_dataset, "train", batch_size=1, timesteps=2)
    read = {int(batch["clip"][0]) for _, batch in zip(range(5), loader, strict=False)}
    assert read and not read & unseen
    # a file under another split's name is found out by its records
    other = tmp_path / "renamed"
    shutil.copytree(split_dataset, other)
    (unseen_file,) = other.glob("*unseen_clip*")
    (train_file,) = other.glob("*-train*")
    shutil.copy(unseen_file, train_file)
    with pytest.raises(ValueError, match="belongs to 'unseen_clip'"):
        pipeline.ClipSource(other, "train")[0]


def test_real_unseen_rows_stay_out_of_training(assets, tmp_path):
    """Real files of every split; the committed split file says which rows training may yield."""
    import csv

    with open(assets / "assets.csv", newline="") as file:
        files = {row["sha256"]: row for row in csv.DictReader(file)}
    table = splits.load()
    (tmp_path / "in").mkdir()
    for split in splits.SPLITS:  # the four smallest files that have rows of the split
        having = {sha for (sha, _), s in table.items() if s == split}
        small = sorted(having, key=lambda s: int(files[s]["bytes"]))
        for sha in small[:4]:
            shutil.copy(assets / files[sha]["file"], tmp_path / "in" / f"{sha}.glb")
    options = dict(image_size=8, views=1, extra_views=0, max_frames=2, flow=False, workers=0)
    manifest = prepare.prepare(tmp_path / "in", tmp_path / "out", **options, log=lambda line: None)
    assert set(manifest["splits"]) == set(splits.SPLITS)
    for split in splits.SPLITS:
        loader = pipeline.make_loader(
            tmp_path / "out", split, batch_size=1, timesteps=2, train=False
        )
        for batch in loader:
            sha, clip = manifest["clips"][int(batch["clip"][0])]["clip_id"].split("#")
            assert table.get((sha, int(clip)), "train") == split


@pytest.mark.slow
def test_worker_processes_read_the_same_batches(dataset_dir):
    """Two processes take nine seconds to start."""
    import subprocess
    import sys

    code = f"""
import numpy as np
from absl import app
from fourdstar_jax.data import pipeline

def main(_):
    def some(workers):
        loader = pipeline.make_loader({str(dataset_dir)!r}, "train", batch_size=2, timesteps=3,
                                      worker_count=workers, train=False)
        return [int(c) for batch in loader for c in batch["clip"]]
    assert some(2) == some(0) == [0, 1, 2], (some(2), some(0))
    print("same")

if __name__ == "__main__":
    app.run(main)
"""
    path = dataset_dir.parent / "workers.py"
    path.write_text(code)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]
    assert grain.__name__ == "grain"
