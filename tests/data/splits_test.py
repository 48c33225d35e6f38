"""The committed split: its hash, its counts, and its rules checked again on the assets."""

import csv
import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from fourdstar_jax.data import gltf, splits
from fourdstar_jax.text import captions


@pytest.fixture(scope="module")
def rows():
    with open(splits.PATH, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def licences(assets):
    with open(assets / "assets.csv", newline="") as file:
        return {row["sha256"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def durations(assets, licences):
    """(sha256, clip) -> seconds, as an independent tool measured them."""
    sha = {row["file"]: key for key, row in licences.items()}
    with open(assets / "clips.csv", newline="") as file:
        return {
            (sha[r["file"]], int(r["clip_index"])): float(r["duration_s"])
            for r in csv.DictReader(file)
        }


def test_the_file_is_the_committed_one_and_counts_as_agreed(rows, monkeypatch):
    assert hashlib.sha256(splits.PATH.read_bytes()).hexdigest() == splits.SHA256
    assert set(splits.load().values()) == set(splits.SPLITS)
    unseen = {r["asset_sha256"] for r in rows if r["split"] == "unseen_object"}
    assert len(unseen) == 20
    assert sum(r["split"] == "unseen_clip" for r in rows) == 40
    for sha in unseen:
        assert {r["split"] for r in rows if r["asset_sha256"] == sha} == {"unseen_object"}
    splits.load.cache_clear()
    monkeypatch.setattr(splits, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="it was changed"):
        splits.load()
    splits.load.cache_clear()


def test_assets_of_the_user_belong_to_training(rows):
    assert splits.split_of("ff" * 32, 0) == "train"
    sha = next(r["asset_sha256"] for r in rows if r["split"] == "unseen_object")
    assert splits.split_of(sha, 9999) == "unseen_object"
    with pytest.raises(ValueError, match="marked 'train' and belongs to 'unseen_object'"):
        splits.check("a#0", sha, 0, "train", "train")
    splits.check("b#0", "ff" * 32, 0, "train", "train")


def test_unseen_rows_have_their_licence_from_a_file(rows, licences):
    """The licence column says where it was read: only these three forms name a file."""
    files = ("License.txt in the pack", "LICENSE.txt in repo", "LICENSE-CC0.MD for art assets")
    for row in rows:
        if row["split"] != "train":
            licence = licences[row["asset_sha256"]]["licence"]
            assert licence.startswith("CC0-1.0 (") and any(name in licence for name in files)


def test_every_clip_that_can_be_read_has_a_row(rows, durations, licences):
    listed = {(r["asset_sha256"], int(r["clip_index"])) for r in rows}
    missing = Counter(licences[sha]["file"] for sha, _ in durations.keys() - listed)
    assert listed <= durations.keys() and len(missing) == 5  # the files with damaged weights
    marked = {row["file"] for row in licences.values() if row["split"] == "malformed"}
    assert marked <= set(missing)


@pytest.fixture(scope="module")
def loaded(assets, licences, rows):
    used = {r["asset_sha256"] for r in rows}
    return {sha: gltf.load(assets / licences[sha]["file"]) for sha in sorted(used)}


@pytest.mark.slow
def test_no_unseen_object_has_a_mesh_twin_in_training(rows, loaded):
    """By topology, and by the shapes of the meshes whatever their place, turn and size."""
    side = {r["asset_sha256"]: r["split"] == "unseen_object" for r in rows}

    def shapes(asset):
        points = asset.positions - asset.positions.mean(0)
        corners = (points / np.sqrt((points**2).mean()))[asset.triangles].astype(np.float64)
        edges = np.sort(np.linalg.norm(corners - corners[:, [1, 2, 0]], axis=-1), axis=1)
        return {tuple(e) for e in np.round(edges * 2000).astype(int)}

    prints = {sha: (len(a.triangles), shapes(a)) for sha, a in loaded.items()}
    for sha, unseen in side.items():
        if not unseen:
            continue
        for other, other_unseen in side.items():
            if other_unseen:
                continue
            (n, a), (m, b) = prints[sha], prints[other]
            assert n != m, (loaded[sha].name, loaded[other].name)
            assert len(a & b) < 0.25 * min(len(a), len(b)), (loaded[sha].name, loaded[other].name)


@pytest.mark.slow
def test_no_unseen_motion_is_on_a_training_body_with_the_same_joints(rows, loaded, durations):
    trained = defaultdict(set)
    for row in rows:
        if row["split"] == "train":
            rig = loaded[row["asset_sha256"]].joint_names
            trained[rig].add(row["clip_name"])
            trained[rig].add(captions.motion_caption(row["clip_name"]))
    unseen = [r for r in rows if r["split"] == "unseen_clip"]
    for row in unseen:
        rig = loaded[row["asset_sha256"]].joint_names
        assert row["clip_name"] not in trained[rig]
        assert captions.motion_caption(row["clip_name"]) not in trained[rig]
        assert durations[row["asset_sha256"], int(row["clip_index"])] >= 0.5
    assert len({loaded[r["asset_sha256"]].joint_names for r in unseen}) >= 15  # many rigs
