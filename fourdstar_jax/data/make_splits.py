"""Makes the split of the training assets, once and for ever: data/splits/v2.csv.

    python -m fourdstar_jax.data.make_splits --assets DIR --out v2.csv

Rules. 20 unseen objects and 40 unseen clips, chosen in turn from packs, all of objects that have
colours (two hues or a texture) and whose licence was read from a licence file. Objects that are
near-duplicates (see `families`) stay on one side. A motion (clip name, or the same movement under
another name) of an unseen clip is on no training body with the same joints: all such clips are
unseen together, and last half a second at least. What is eligible is taken in the order of a hash,
so nobody chose. Clips of one frame and those that hardly move or cover too little of a picture are
left out, and of an asset's others training has at most 12, each motion once before any comes again.
What was held out of the collection stays so. The result is committed with its hash in splits.py;
later versions get a new file (v1.csv was made by an earlier form of this one).
"""

import argparse
import csv
import hashlib
import multiprocessing
import re
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from fourdstar_jax import geometry
from fourdstar_jax.data import gltf, posing, render, splits
from fourdstar_jax.text import captions

NUM_OBJECTS, NUM_CLIPS, MAX_TRAIN_CLIPS = 20, 40, 12
MAX_FAMILY, MAX_MOTION_GROUP = 2, 8
MIN_DURATION_S = 0.5
TWIN_OVERLAP = 0.25  # shared part of two meshes' triangles or vertices that makes them twins
RIG_OVERLAP = 0.1  # the same, of meshes of one pack with the same joints
VARIANT = re.compile(  # what the name of a variant has beyond that of the object
    r"_(Evolved|Helmet|Hat|Hair|Bald|Gun|Skull|Armor|Hooded|angry|White|smooth|Large|Small"
    r"|ExtraSmall|Old|Young)(?=_|$)|^Smooth_|(Smooth|Flatshaded|[0-9]+)$|-transformed$"
)
HELD_OUT = (  # of the collection of v1, never on the machine that made the split
    "kaykit/Mage.glb",
    "khronos/BrainStem.glb",
    "khronos/CesiumMan.glb",
    "mesh2motion/bird-animations.glb",
    "mesh2motion/kaiju-animations.glb",
    "mesh2motion/shark-animations.glb",
    "mesh2motion/spider-animations.glb",
    "misc/boxman.glb",
    "misc/godot_platformer_player.glb",
    "misc/lumberjack.glb",
    "quaternius/animals_pack__Alpaca.glb",
    "quaternius/animals_pack__Husky.glb",
    "quaternius/dinosaurs_pack__Trex.glb",
    "quaternius/dinosaurs_pack__Triceratops.glb",
    "quaternius/mech_pack__George.glb",
    "quaternius/mech_pack__Leela.glb",
    "quaternius/mech_pack__Mike.glb",
    "quaternius/mech_pack__Stan.glb",
    "quaternius_fbx/Fruit_Characters_Animated_Mar_2017__Pineapple.glb",
    "quaternius_fbx/Monster_Pack_Animated_Aug_2018__Dragon.glb",
)


def _order(*key) -> str:
    return hashlib.sha256("/".join(["fourdstar v2", *map(str, key)]).encode()).hexdigest()


def pack_of(file: str) -> str:
    """The pack that an object comes with, by its path: "quaternius/farm_pack__Cow.glb"."""
    return file.split("__")[0] if "__" in file else file.rpartition("/")[0]


def from_licence_file(licence: str) -> bool:
    """CC0 as read from a file that came with the object: "CC0-1.0 (License.txt in the pack)"."""
    low = licence.lower()
    forms = ("license.txt in", "license-cc0.md", "license.md of", "licence files in")
    named = any(form in low for form in forms)
    return low.startswith("cc0") and named


def mesh_fingerprint(asset: gltf.Asset) -> tuple[tuple[int, int], set, set]:
    """Topology counts, and hashes of triangle shapes (sizes relative) and of vertex positions.

    Triangle shapes survive moving, turning and scaling the mesh; vertices split for shading or
    seams count once.
    """
    points = asset.positions.astype(np.float64)
    unique = np.unique(np.round(points / max(np.ptp(points, axis=0).max(), 1e-12), 4), axis=0)
    corners = points[asset.triangles]  # [F, 3, 3]
    edges = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1)
    edges = np.sort(edges, axis=1)
    edges = edges[edges[:, 0] > 1e-9 * max(edges.max(), 1e-12)]
    size = np.median(edges) if len(edges) else 1.0
    shapes = {tuple(row) for row in np.round(np.log(edges / size) * 200).astype(int)}
    return (len(unique), len(asset.triangles)), shapes, {tuple(p) for p in unique}


def _overlap(a: set, b: set) -> float:
    return len(a & b) / max(1, min(len(a), len(b)))


def families(files: list[str], assets: list[gltf.Asset]) -> list[int]:
    """Groups of near-duplicates, as one number an asset.

    Two assets belong together that share parts of their meshes or have as many triangles and
    vertices; within a pack also those with as many triangles, with the same joints and fewer
    shared parts, and with one name but for a word that says a variant.
    """
    prints = [mesh_fingerprint(asset) for asset in assets]
    stems = [f.removesuffix(".glb") for f in files]
    names = [(pack_of(s), VARIANT.sub("", s.split("__")[-1]).strip("_")) for s in stems]
    parent = list(range(len(files)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i, (counts, shapes, points) in enumerate(prints):
        for j in range(i):
            other = prints[j]
            same_pack = names[i][0] == names[j][0]
            same_rig = same_pack and assets[i].joint_names == assets[j].joint_names
            limit = RIG_OVERLAP if same_rig else TWIN_OVERLAP
            if (
                names[i] == names[j]
                or (counts[1] == other[0][1] if same_pack else counts == other[0])
                or _overlap(shapes, other[1]) > limit
                or _overlap(points, other[2]) > limit
            ):
                parent[root(i)] = root(j)
    return [root(i) for i in range(len(files))]


def _alike(turns: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of `others` [C, T, J, 4] turn the joints as `turns` does (mean < 1 degree)."""
    dots = np.abs((others * turns).sum(-1))
    return np.degrees(2 * np.arccos(np.clip(dots, 0, 1))).mean((1, 2)) < 1.0


def make(assets_dir: Path) -> list[dict]:
    """The rows of the split's file, sorted by asset and clip; unreadable assets have none."""
    with open(assets_dir / "assets.csv", newline="") as file:
        licences = {row["file"]: row["licence"] for row in csv.DictReader(file)}
    files, assets = [], []
    for name in sorted(licences):
        try:
            assets.append(gltf.load(assets_dir / name))
            files.append(name)
        except gltf.MalformedAsset as error:
            print(f"{name}: {error}")
    held_out = {i for i, name in enumerate(files) if name in HELD_OUT}
    may_be_unseen = [
        i not in held_out and from_licence_file(licences[f]) and a.coloured()
        for i, (f, a) in enumerate(zip(files, assets, strict=True))
    ]
    family = families(files, assets)
    context = multiprocessing.get_context("spawn")  # OpenGL does not survive a fork
    with ProcessPoolExecutor(mp_context=context) as pool:
        found = pool.map(_faults, [assets_dir / f for f in files])
        # of a clip: why it is left out, or ""
        faults = {(i, c): fault for i, asset in enumerate(found) for c, fault in enumerate(asset)}
    good = {key for key, fault in faults.items() if not fault}

    # those of a fair length, which may be unseen
    fair = {(i, c) for i, c in good if assets[i].clips[c].duration_s >= MIN_DURATION_S}
    unseen_objects = held_out | _choose_objects(files, assets, family, may_be_unseen, fair)
    motions = _motions(assets, [i for i in range(len(files)) if i not in unseen_objects])
    able = {(i, c) for i, c in fair if may_be_unseen[i]}
    unseen_clips = _choose_clips(files, assets, motions, able)
    train = _choose_training(assets, motions, good - unseen_clips)
    rows = []
    for i, asset in enumerate(assets):
        for clip in asset.clips:
            key, reason = (i, clip.index), ""
            if faults[key]:
                split, reason = splits.LEFT_OUT, faults[key]
            elif i in unseen_objects:
                split = "unseen_object"
            elif key in unseen_clips:
                split = "unseen_clip"
            elif key in train:
                split = "train"
            else:
                split, reason = splits.LEFT_OUT, f"more than {MAX_TRAIN_CLIPS} clips of the asset"
            rows.append((asset.sha256, clip.index, clip.name, split, files[i], family[i], reason))
    for name in sorted(set(HELD_OUT) - set(files)):
        rows.append(("", 0, "", "unseen_object", name, "", "held out of the collection of v1"))
    keys = ("asset_sha256", "clip_index", "clip_name", "split", "file", "family", "reason")
    return [dict(zip(keys, row, strict=True)) for row in sorted(rows, key=lambda r: r[:3] + r[4:5])]


def _faults(path: Path) -> list[str]:
    """Why each of an asset's clips is left out of all splits; "" for those that are not."""
    asset, renderer = gltf.load(path), render.Renderer(64, 4)
    renderer.load(asset)
    faults = [_fault(asset, clip, renderer) for clip in asset.clips]
    renderer.close()
    return faults


def _fault(asset: gltf.Asset, clip: gltf.Clip, renderer: render.Renderer) -> str:
    if posing.num_frames(clip, 8, 24) < 2:
        return "has one frame only"
    sequence = posing.sample_clip(asset, clip, fps=8, max_frames=24)
    if sequence.motion < posing.MIN_MOTION:
        return "hardly moves"
    cameras = geometry.Rig.around(renderer.views, fps=8).cameras(renderer.size)
    F = len(sequence.positions)
    for f in range(0, F, max(1, F // 6)):
        rgba = renderer.draw(sequence.positions[f], sequence.normals[f], cameras).rgba
        if rgba[..., 3].mean(axis=(1, 2)).min() < 255 * posing.MIN_AREA:
            return f"covers less than {posing.MIN_AREA:.0%} of a picture"
    return ""


def _choose_objects(files, assets, family, may_be_unseen, fair) -> set[int]:
    """Whole families, one of each pack at a time."""
    members = defaultdict(list)
    for i, f in enumerate(family):
        members[f].append(i)
    moving = {i for i, _ in fair}
    queues = defaultdict(list)
    for group in members.values():
        if len(group) <= MAX_FAMILY and all(may_be_unseen[i] and i in moving for i in group):
            first = min(group, key=lambda i: assets[i].sha256)
            queues[pack_of(files[first])].append((_order("object", assets[first].sha256), group))
    chosen: set[int] = set()
    for group in _in_turn(queues):
        if len(chosen) + len(group) <= NUM_OBJECTS:
            chosen |= set(group)
    return chosen


def _choose_clips(files, assets, motions, able) -> set[tuple[int, int]]:
    """Whole motions, one of each pack at a time; an asset keeps half of its clips at least."""
    queues = defaultdict(list)
    for unit in motions:
        if len(unit) <= MAX_MOTION_GROUP and set(unit) <= able:
            sha, c, i = min((assets[i].sha256, c, i) for i, c in unit)
            queues[pack_of(files[i])].append((_order("clip", sha, c), unit))
    chosen: set[tuple[int, int]] = set()
    for unit in _in_turn(queues):
        left = [i for i, _ in [*chosen, *unit]]
        enough = all(2 * left.count(i) <= len(assets[i].clips) for i in left)
        if enough and len(chosen) + len(unit) <= NUM_CLIPS:
            chosen |= set(unit)
    return chosen


def _choose_training(assets, motions, good) -> set[tuple[int, int]]:
    """At most MAX_TRAIN_CLIPS clips an asset: every motion once, then the others, by hash."""
    queues = defaultdict(list)
    for unit in motions:
        seen = set()
        for i, c in sorted(unit):
            if (i, c) in good:
                queues[i].append((i in seen, _order("train", assets[i].sha256, c), c))
                seen.add(i)
    return {(i, c) for i, q in queues.items() for *_, c in sorted(q)[:MAX_TRAIN_CLIPS]}


def _in_turn(queues: dict[str, list]):
    """Items (key, item) of all queues: the first of each by key, then the second of each ..."""
    ordered = sorted((sorted(q) for q in queues.values()), key=lambda q: q[0])
    for place in range(max(map(len, ordered), default=0)):
        for queue in ordered:
            if place < len(queue):
                yield queue[place][1]


def _motions(assets, chosen: list[int]) -> list[list[tuple[int, int]]]:
    """Groups of (asset, clip) of bodies with the same joints that are one motion.

    One by name, or by movement.
    """
    rigs = defaultdict(list)
    for i in chosen:
        rigs[assets[i].joint_names].extend((i, clip) for clip in assets[i].clips)
    groups = []
    for clips in rigs.values():
        names = np.array([captions.motion_caption(clip.name) for _, clip in clips])
        turns = np.stack(
            [
                assets[i].local_rotations(
                    clip.index, np.linspace(0, clip.duration_s, 6, endpoint=False)
                )
                for i, clip in clips
            ]
        )
        group = np.arange(len(clips))
        for k in range(len(clips)):
            same = (names == names[k]) | _alike(turns[k], turns)
            group[np.isin(group, group[same])] = group[k]
        keys = [(i, clip.index) for i, clip in clips]
        groups += [[keys[n] for n in np.flatnonzero(group == g)] for g in np.unique(group)]
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the split of the training assets.")
    parser.add_argument("--assets", type=Path, required=True, help="folder with assets.csv")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = make(args.assets)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for split in (*splits.SPLITS, splits.LEFT_OUT):
        print(sum(row["split"] == split for row in rows), split)
    print("sha256", hashlib.sha256(args.out.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
