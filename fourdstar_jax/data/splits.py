"""The committed split of the training assets: data/splits/v1.csv, the same for ever.

A user's own assets are not in it and belong to train. How the file was made: make_splits.py.
"""

import csv
import functools
import hashlib
from pathlib import Path

PATH = Path(__file__).parent / "splits" / "v1.csv"
SHA256 = "f61ac9a42b6152e8d85a851f46b3ac029902c6bc162d2ccf2c59fe72e5fa64fb"
SPLITS = ("train", "unseen_clip", "unseen_object")


@functools.cache
def load() -> dict[tuple[str, int], str]:
    """(asset's sha256, clip's number in its file) -> split."""
    data = PATH.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(f"the split file {PATH} has sha256 {found}, not {SHA256}: it was changed")
    rows = csv.DictReader(data.decode().splitlines())
    return {(r["asset_sha256"], int(r["clip_index"])): r["split"] for r in rows}


def split_of(asset_sha256: str, clip_index: int) -> str:
    """The clip's split; clips that are not listed follow an unseen object, or else are train."""
    table = load()
    split = table.get((asset_sha256, clip_index))
    if split is None:
        return "unseen_object" if table.get((asset_sha256, 0)) == "unseen_object" else "train"
    return split


def check(clip_id: str, asset_sha256: str, clip_index: int, marked: str, wanted: str) -> None:
    """Raises ValueError unless a record read as `wanted` is marked so and belongs there.

    No wrong file name, edited record or other split file can carry an unseen clip into training.
    """
    committed = split_of(asset_sha256, clip_index)
    if not marked == committed == wanted:
        raise ValueError(
            f"clip {clip_id} of split {wanted!r} is marked {marked!r} and belongs to "
            f"{committed!r}: the data does not fit this version's split file"
        )
