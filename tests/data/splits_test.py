"""The committed splits: hashes, counts, and the rules of v2 checked again on the assets."""

import csv
from collections import Counter, defaultdict

import numpy as np
import pytest

from fourdstar_jax.data import gltf, make_splits, splits
from fourdstar_jax.text import captions


@pytest.fixture(scope="module")
def rows():
    """Of v2, those of files that are in the collection."""
    return [r for r in splits.rows() if r["asset_sha256"]]


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


@pytest.mark.parametrize("version", splits.VERSIONS)
def test_the_files_are_the_committed_ones(version, monkeypatch):
    assert set(splits.SPLITS) <= set(splits.load(version).values())
    monkeypatch.setitem(splits.VERSIONS, version, "0" * 64)
    splits.rows.cache_clear()
    with pytest.raises(ValueError, match="it was changed"):
        splits.rows(version)
    splits.rows.cache_clear()


def test_v2_counts_as_agreed(rows):
    by_object = defaultdict(set)
    for row in rows:
        by_object[row["file"]].add(row["split"])
    unseen = {f for f, found in by_object.items() if "unseen_object" in found}
    assert len(unseen) == make_splits.NUM_OBJECTS
    for file in unseen:
        assert by_object[file] <= {"unseen_object", splits.LEFT_OUT}
    clips = [r for r in rows if r["split"] == "unseen_clip"]
    assert len(clips) == make_splits.NUM_CLIPS
    for chosen, least in ((unseen, 10), ({r["file"] for r in clips}, 5)):
        packs = Counter(make_splits.pack_of(file) for file in chosen)
        assert len(packs) >= least and max(packs.values()) <= 4
    trained = Counter(r["file"] for r in rows if r["split"] == "train")
    assert max(trained.values()) == 12 and len(trained) > 300
    reasons = Counter(r["reason"] for r in rows if r["split"] == splits.LEFT_OUT)
    assert "" not in reasons and reasons["covers less than 1% of a picture"] > 0
    assert not any(r["reason"] for r in rows if r["split"] in splits.SPLITS)


def test_near_duplicates_are_on_one_side(rows):
    """As the file numbers them; some pairs that anybody would call so are among them."""
    side, family = defaultdict(set), {}
    for row in rows:
        side[row["family"]].add(row["split"] == "unseen_object")
        family[row["file"].split("/")[-1].removesuffix(".glb")] = row["family"]
    mixed = [f for f, sides in side.items() if len(sides) > 1]
    left_out = {r["family"] for r in rows if r["split"] == splits.LEFT_OUT}
    assert set(mixed) <= left_out  # clips that are in no split have no side
    for a, b in (
        ("ultimate_monsters__Flying_Armabee", "ultimate_monsters__Flying_Armabee_Evolved"),
        ("ultimate_characters__Ninja_Male", "ultimate_characters__Ninja_Male_Hair"),
        ("Alien_Animated_April_2019__Alien", "Alien_Animated_April_2019__Alien_Helmet"),
        ("easy_enemies_pack__Snake", "easy_enemies_pack__Snake_angry"),
        ("animals_pack__Horse", "animals_pack__Horse_White"),
        ("Zombie_Animated_Jan_2018__Zombie", "Zombie_Animated_Jan_2018__ZombieSmooth"),
        ("mini_characters__female-a", "mini_characters__male-f"),
        ("Rogue", "Rogue_Hooded"),
    ):
        assert family[a] == family[b]
    assert len(set(family.values())) > 200


def test_what_was_held_out_stays_so(rows):
    here = {r["asset_sha256"] for r in rows}
    gone = {
        sha for (sha, _), s in splits.load("v1").items() if s == "unseen_object" and sha not in here
    }
    assert gone and all(splits.split_of(sha, 0) == "unseen_object" for sha in gone)
    for index in (0, 7):
        assert splits.split_of("ff" * 32, index, "kaykit/Mage") == "unseen_object"
    assert splits.split_of("ff" * 32, 0, "elsewhere/Mage") == "train"


def test_assets_of_the_user_belong_to_training(rows):
    current, sha_v1 = splits.SHA256, splits.VERSIONS["v1"]
    assert splits.split_of("ff" * 32, 0) == "train"
    sha = next(r["asset_sha256"] for r in rows if r["split"] == "unseen_object")
    assert splits.split_of(sha, 9999) == "unseen_object"
    with pytest.raises(ValueError, match="marked 'train' and belongs to 'unseen_object'"):
        splits.check("a#0", sha, 0, "train", "train", current)
    splits.check("b#0", "ff" * 32, 0, "train", "train", current)
    with pytest.raises(ValueError, match="belongs to 'unseen_object'"):
        splits.check("kaykit/Mage#3@1", "ff" * 32, 3, "train", "train", current)
    old = next(key for key, split in splits.load("v1").items() if split == "unseen_clip")
    splits.check("c#0", *old, "unseen_clip", "unseen_clip", sha_v1)


def test_unseen_rows_have_their_licence_from_a_file(rows, licences):
    """The licence column says where it was read: only these forms name a file of the pack."""
    forms = ("License.txt in the pack", "LICENSE.txt in", "LICENSE-CC0.MD for", "LICENSE.md of")
    for row in rows:
        if row["split"] in ("unseen_clip", "unseen_object"):
            licence = licences[row["asset_sha256"]]["licence"]
            assert licence.startswith("CC0-1.0 (")
            assert any(form in licence for form in (*forms, "licence files in"))


def test_every_clip_that_can_be_read_has_a_row(rows, durations, licences):
    listed = {(r["asset_sha256"], int(r["clip_index"])) for r in rows}
    missing = {licences[sha]["file"] for sha, _ in durations.keys() - listed}
    marked = {row["file"] for row in licences.values() if row["split"] == "malformed"}
    assert listed <= durations.keys() and missing == marked and len(marked) == 3


@pytest.fixture(scope="module")
def loaded(assets, licences, rows):
    used = {r["asset_sha256"] for r in rows}
    return {sha: gltf.load(assets / licences[sha]["file"]) for sha in sorted(used)}


@pytest.mark.slow
def test_unseen_rows_have_colours(rows, loaded):
    for row in rows:
        if row["split"] in ("unseen_clip", "unseen_object"):
            assert loaded[row["asset_sha256"]].coloured()


@pytest.mark.slow
def test_no_unseen_object_has_a_mesh_twin_in_training(rows, loaded):
    """By the shapes of the meshes whatever their place, turn and size."""
    side = {r["asset_sha256"]: r["split"] for r in rows if r["split"] != splits.LEFT_OUT}

    def shapes(asset):
        points = asset.positions - asset.positions.mean(0)
        corners = (points / np.sqrt((points**2).mean()))[asset.triangles].astype(np.float64)
        edges = np.sort(np.linalg.norm(corners - corners[:, [1, 2, 0]], axis=-1), axis=1)
        return {tuple(e) for e in np.round(edges * 2000).astype(int)}

    prints = {sha: shapes(a) for sha, a in loaded.items()}
    unseen = [sha for sha, split in side.items() if split == "unseen_object"]
    for sha in unseen:
        for other in side.keys() - set(unseen):
            a, b = prints[sha], prints[other]
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


def test_colours_are_two_hues_or_a_texture():
    from helpers import glb

    plain = gltf.load(glb.moving_box())
    assert not plain.coloured()  # red alone

    def painted(*colors):
        w = glb.box_writer(color=(1.0, 1.0, 1.0, 1.0))
        values = [colors[i % len(colors)] for i in range(8)]
        attributes = w.tree["meshes"][0]["primitives"][0]["attributes"]
        attributes["COLOR_0"] = w.accessor(values)
        w.animate("go", (0, "translation", [0, 1], [[0, 0, 0], [1, 0, 0]]))
        return gltf.load(w.bytes()).coloured()

    assert painted((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    assert not painted((1.0, 1.0, 1.0), (0.1, 0.1, 0.1))  # grey
    assert not painted((1.0, 0.0, 0.0), (0.4, 0.0, 0.0))  # lighter and darker
