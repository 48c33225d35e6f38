"""Makes the split of the training assets, once and for ever: data/splits/v1.csv.

    python -m fourdstar_jax.data.make_splits --assets DIR --out v1.csv

Rules. 20 unseen objects and 40 unseen clips, all of objects whose licence was read from a licence
file. Objects whose meshes look alike (see `_families`) stay on one side. A motion (clip name, or
the same movement under another name) of an unseen clip is on no training body with the same
joints: all such clips are unseen together. What is eligible is taken in the order of a hash, so
nobody chose. The result is committed with its hash in splits.py; later versions get a new file.
"""

import argparse
import csv
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from fourdstar_jax.data import gltf, posing
from fourdstar_jax.text import captions

NUM_OBJECTS, NUM_CLIPS = 20, 40
MAX_FAMILY, MAX_MOTION_GROUP = 2, 8
MIN_DURATION_S = 0.5
TWIN_OVERLAP = 0.25  # shared part of two meshes' triangles or vertices that makes them twins


def _order(*key) -> str:
    return hashlib.sha256("/".join(["fourdstar v1", *map(str, key)]).encode()).hexdigest()


def from_licence_file(licence: str) -> bool:
    """CC0 as read from a file that came with the object: "CC0-1.0 (License.txt in the pack)"."""
    low = licence.lower()
    named = any(word in low for word in ("license.txt in", "license-cc0.md"))
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


def _families(prints: list) -> list[int]:
    """Groups of look-alike meshes, as one number an asset: same counts, or parts shared."""
    parent = list(range(len(prints)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i, (counts, shapes, points) in enumerate(prints):
        for j in range(i):
            other = prints[j]
            if (
                counts == other[0]
                or counts[1] == other[0][1]
                or _overlap(shapes, other[1]) > TWIN_OVERLAP
                or _overlap(points, other[2]) > TWIN_OVERLAP
            ):
                parent[root(i)] = root(j)
    return [root(i) for i in range(len(prints))]


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
    free = [from_licence_file(licences[f]) for f in files]
    family = _families([mesh_fingerprint(a) for a in assets])
    size = Counter(family)
    moves = [[_usable(asset, clip) for clip in asset.clips] for asset in assets]

    members = defaultdict(list)
    for i, f in enumerate(family):
        members[f].append(i)
    eligible = [
        group
        for group in members.values()
        if len(group) <= MAX_FAMILY and all(free[i] and any(moves[i]) for i in group)
    ]
    eligible.sort(key=lambda group: _order("object", min(assets[i].sha256 for i in group)))
    unseen_objects: set[int] = set()
    for group in eligible:
        if len(unseen_objects) + len(group) <= NUM_OBJECTS:
            unseen_objects |= set(group)

    unseen_clips = _choose_clips(assets, free, moves, unseen_objects)
    rows = []
    for i, asset in enumerate(assets):
        for clip in asset.clips:
            split = "train"
            if i in unseen_objects:
                split = "unseen_object"
            elif (i, clip.index) in unseen_clips:
                split = "unseen_clip"
            rows.append((asset.sha256, clip.index, clip.name, split))
    print(f"{len(unseen_objects)} unseen objects, {len(unseen_clips)} unseen clips")
    print(f"{len(members)} families, the largest of {max(size.values())}")
    for i in sorted(unseen_objects):
        print("object", files[i])
    for i, c in sorted(unseen_clips):
        print("clip", files[i], assets[i].clips[c].name)
    keys = ("asset_sha256", "clip_index", "clip_name", "split")
    return [dict(zip(keys, row, strict=True)) for row in sorted(rows)]


def _usable(asset: gltf.Asset, clip: gltf.Clip) -> bool:
    if clip.duration_s < MIN_DURATION_S:
        return False
    return posing.sample_clip(asset, clip, fps=8, max_frames=8).motion >= posing.MIN_MOTION


def _choose_clips(assets, free, moves, unseen_objects) -> set[tuple[int, int]]:
    rigs = defaultdict(list)
    for i, asset in enumerate(assets):
        if i not in unseen_objects:
            rigs[asset.joint_names].append(i)
    queues = []  # one a rig: its eligible motions in hash order
    for bodies in rigs.values():
        units = [
            unit
            for unit in _motions(assets, bodies)
            if len(unit) <= MAX_MOTION_GROUP and all(free[i] and moves[i][c] for i, c in unit)
        ]
        key = {id(u): _order("clip", *min((assets[i].sha256, c) for i, c in u)) for u in units}
        queues.append(sorted(units, key=lambda unit: key[id(unit)]))
    queues = [q for q in queues if q]
    queues.sort(key=lambda q: _order("rig", *min((assets[i].sha256, c) for i, c in q[0])))
    chosen: set[tuple[int, int]] = set()
    while any(queues):  # one motion of each rig at a time, so that no rig fills the split
        for queue in queues:
            if not queue:
                continue
            unit = queue.pop(0)
            left = Counter(i for i, _ in [*chosen, *unit])
            enough = all(2 * n <= len(assets[i].clips) for i, n in left.items())
            if enough and len(chosen) + len(unit) <= NUM_CLIPS:
                chosen |= set(unit)
    return chosen


def _motions(assets, bodies: list[int]) -> list[list[tuple[int, int]]]:
    """Groups of (asset, clip) of one rig that are one motion, by name or by movement."""
    clips = [(i, clip) for i in bodies for clip in assets[i].clips]
    names = [captions.motion_caption(clip.name) for _, clip in clips]
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
        same = np.array([name == names[k] for name in names]) | _alike(turns[k], turns)
        for g in np.unique(group[same]):
            group[group == g] = group[k]
    return [
        [(i, clip.index) for (i, clip), h in zip(clips, group, strict=True) if h == g]
        for g in np.unique(group)
    ]


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
    print("sha256", hashlib.sha256(args.out.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
