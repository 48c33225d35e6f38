"""A contact sheet of a dataset: every object once, from the front and the side, with its name."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fourdstar_jax.data import pipeline

CELL, LABEL, COLUMNS = 96, 12, 12  # pixels of a view and of the line below it; objects in a row


def write(data_dir: str | Path, path: str | os.PathLike[str]) -> int:
    """Writes the sheet as a picture; returns how many objects are on it.

    Each object is shown in the middle of its first clip, on light grey, so that holes and white
    parts are seen. Raises ValueError if `path` is no name of a picture.
    """
    from PIL import Image, ImageDraw

    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"{path} must end in .png, .jpg or .webp")
    shown: dict[str, np.ndarray] = {}
    for split in pipeline.read_manifest(data_dir)["splits"]:
        records = pipeline.Records(data_dir, split)
        names = pipeline.Records(data_dir, split, only=["object_id"])
        for i in range(len(names)):
            name = pipeline.as_text(names[i]["object_id"])
            if name not in shown:
                shown[name] = _two_views(records[i])
    rows = -(-len(shown) // COLUMNS)
    size = (min(COLUMNS, len(shown)) * 2 * CELL, rows * (CELL + LABEL))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw: Any = ImageDraw.Draw(sheet)
    for place, (name, pair) in enumerate(sorted(shown.items())):
        left, top = place % COLUMNS * 2 * CELL, place // COLUMNS * (CELL + LABEL)
        for side, rgba in enumerate(pair):
            view = Image.fromarray(rgba).resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(
                (225, 225, 230), (left + side * CELL, top, left + (side + 1) * CELL, top + CELL)
            )
            sheet.paste(view, (left + side * CELL, top), view)
        draw.text((left + 2, top + CELL), name.split("/")[-1][-32:], (0, 0, 0))
    sheet.save(path)
    return len(shown)


def _two_views(record: Any) -> np.ndarray:
    """RGBA pictures of views 0 and 1, or of view 0 twice, in the middle of the clip."""
    views = len(record["rig_viewmats"])
    first = len(record["frame_times"]) // 2 * views
    return np.stack([record["rig_rgba"][first + v] for v in (0, min(1, views - 1))])
