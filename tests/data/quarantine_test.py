"""Corrupt records and files: left out, counted, told, and too many of them refused."""

import shutil

import numpy as np
import pytest

from fourdstar_jax.data import pipeline
from fourdstar_jax.data.quarantine import CorruptRecord, Quarantine, Readable


class Numbers:
    """2,000 records, each its own number; some are corrupt."""

    def __init__(self, *corrupt):
        self.corrupt, self.quarantine = corrupt, Quarantine("numbers, split train", len(self))

    def __len__(self):
        return 2000

    def __getitem__(self, i):
        if i in self.corrupt:
            raise CorruptRecord(f"record {i} is no number")
        return i


def test_the_next_record_stands_for_a_corrupt_one(capfd):
    source = Numbers(7, 1999)
    readable = Readable(source)
    for _ in range(2):
        assert [readable[i] for i in (6, 7, 8, 1999)] == [6, 8, 8, 0]
    assert source.quarantine.count == 2
    told = capfd.readouterr().err.splitlines()
    assert told == [
        "quarantined (1 of 2000): record 7 is no number",
        "quarantined (2 of 2000): record 1999 is no number",
    ]


def test_more_than_a_thousandth_stops_with_count_and_names():
    readable = Readable(Numbers(3, 4, 5))
    with pytest.raises(
        ValueError, match=r"3 of 2000 records cannot be read, more than 0.1%: .*4 is no number"
    ):
        readable[3]


def corrupted(dataset_dir, out, change):
    """A copy of the dataset whose training file is changed, bytes to bytes."""
    shutil.copytree(dataset_dir, out)
    (path,) = out.glob("*-train.array_record*")
    path.write_bytes(change(path.read_bytes()))
    return out


def test_a_file_that_cannot_be_opened_is_named(dataset_dir, tmp_path):
    folder = corrupted(dataset_dir, tmp_path / "set", lambda data: data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"3 of 3 records cannot be read.*array_record-00000"):
        pipeline.ClipSource(folder, "train")


def test_a_damaged_picture_stops_a_small_dataset_in_one_line(dataset_dir, tmp_path):
    def damage(data):
        place = data.find(b"IDAT") + 20  # of a PNG, whose checksum is then wrong
        return data[:place] + bytes(64) + data[place + 64 :]

    folder = corrupted(dataset_dir, tmp_path / "set", damage)
    with pytest.raises(ValueError, match="1 of 3 records cannot be read") as error:
        list(pipeline.make_loader(folder, "train", batch_size=1, timesteps=2, train=False))
    assert "\n" not in str(error.value)


def test_values_that_are_not_finite_are_corrupt(dataset_dir, monkeypatch):
    source = pipeline.ClipSource(dataset_dir, "train")
    record = source._source[0]
    record["rig_viewmats"] = np.full_like(record["rig_viewmats"], np.nan)
    monkeypatch.setattr(source, "_source", [record])
    with pytest.raises(CorruptRecord, match="rig_viewmats is not finite"):
        source[0]
