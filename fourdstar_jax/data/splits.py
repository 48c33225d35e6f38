"""The committed splits of the training assets: data/splits/v1.csv and v2.csv, the same for ever.

New datasets follow v2; those of v1 can be read. A user's own assets are in neither and belong to
train. How the files were made: make_splits.py.
"""

import csv
import functools
import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

FOLDER = Path(__file__).parent / "splits"
VERSIONS = {
    "v1": "f61ac9a42b6152e8d85a851f46b3ac029902c6bc162d2ccf2c59fe72e5fa64fb",
    "v2": "1a192e46b51a9a00416262c761cc43f731507b169647a5fb320db0a82fe82c03",
}
CURRENT = "v2"
SHA256 = VERSIONS[CURRENT]
SPLITS = ("train", "unseen_clip", "unseen_object")
LEFT_OUT = "left_out"  # of every split; the file says why


@functools.cache
def rows(version: str = CURRENT) -> list[dict[str, str]]:
    """The lines of a version's file. Raises ValueError if it is not the committed one."""
    path = FOLDER / f"{version}.csv"
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != VERSIONS[version]:
        raise ValueError(
            f"the split file {path} has sha256 {found}, not {VERSIONS[version]}: it was changed"
        )
    return list(csv.DictReader(data.decode().splitlines()))


@functools.cache
def load(version: str = CURRENT) -> dict[tuple[str, int], str]:
    """(asset's sha256, clip's number in its file) -> split."""
    listed = (r for r in rows(version) if r["asset_sha256"])
    return {(r["asset_sha256"], int(r["clip_index"])): r["split"] for r in listed}


@functools.cache
def held_out() -> frozenset[str]:
    """What else is an unseen object: the assets of v1, and paths of files that never were here."""
    v1 = {r["asset_sha256"] for r in rows("v1") if r["split"] == "unseen_object"}
    return frozenset(v1 | {r["file"] for r in rows() if not r["asset_sha256"]})


def split_of(
    asset_sha256: str, clip_index: int, object_id: str = "", version: str = CURRENT
) -> str:
    """The clip's split; clips that are not listed follow an unseen object, or else are train."""
    table = load() if version == CURRENT else load(version)
    if split := table.get((asset_sha256, clip_index)):
        return split
    if table.get((asset_sha256, 0)) == "unseen_object":
        return "unseen_object"
    listed = version != CURRENT or (asset_sha256, 0) in table
    held = not listed and {asset_sha256, f"{object_id}.glb"} & held_out()
    return "unseen_object" if held else "train"


def may_have(names: Collection[str]) -> Callable[[str, str], bool]:
    """Tells of an asset, by its sha256 and object_id, whether a clip may be in these splits."""
    listed = frozenset(asset for (asset, _), split in load().items() if split in names)
    return lambda sha256, object_id: sha256 in listed or split_of(sha256, 0, object_id) in names


def reason_of(asset_sha256: str, clip_index: int) -> str:
    """Why a clip is in no split."""
    key = (asset_sha256, str(clip_index))
    return next((r["reason"] for r in rows() if (r["asset_sha256"], r["clip_index"]) == key), "")


def check(
    clip_id: str, asset_sha256: str, clip_index: int, marked: str, wanted: str, split_sha256: str
) -> None:
    """Raises ValueError unless a record read as `wanted` is marked so and belongs there.

    No wrong file name, edited record or other split file can carry an unseen clip into training.
    `split_sha256` is that of the split that the dataset was made by.
    """
    version = {sha: name for name, sha in VERSIONS.items()}.get(split_sha256, CURRENT)
    committed = split_of(asset_sha256, clip_index, clip_id.rpartition("#")[0], version)
    if not marked == committed == wanted:
        raise ValueError(
            f"clip {clip_id} of split {wanted!r} is marked {marked!r} and belongs to "
            f"{committed!r}: the data does not fit this version's split file"
        )
