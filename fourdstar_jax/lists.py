"""The files that a command is given: those of a folder, those of `generate --videos LIST`."""

import csv
import os
import re
from pathlib import Path
from typing import NamedTuple

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"}
VIDEOS = {".mp4", ".m4v", ".webm", ".gif", ".mov", ".mkv", ".avi", ".mpg", ".ts", ".ogv", ".flv"}
QUARANTINED = "quarantined"  # the folder among the outputs, which no output may be called


class Item(NamedTuple):
    """A video or picture, what it shows, and the name of its output."""

    video: Path
    name: str
    text: str | None = None


def read_list(path: Path) -> list[Item]:
    """The videos in a list: a text file with a path a line, or a CSV file.

    That has a column `video` and may have `text` and `name` (of the output; by default the file's
    name without its ending). Paths are relative to the list's folder. Raises ValueError, which
    names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"{path} cannot be read: {why}") from error
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(text.splitlines())
        if "video" not in (reader.fieldnames or ()):
            raise ValueError(f"{path} has no column video")
        rows = [(reader.line_num, row) for row in reader]
    else:
        lines = enumerate(map(str.strip, text.splitlines()), 1)
        rows = [(n, {"video": line}) for n, line in lines if line and not line.startswith("#")]
    items: dict[str, Item] = {}
    lines_of: dict[str, int] = {}
    for number, row in rows:
        place = f"{path}, line {number}"
        if not row["video"] or "\0" in row["video"]:
            raise ValueError(f"{place}: no video is named")
        video = path.parent / row["video"]
        name = row.get("name") or video.stem
        if not re.fullmatch(r"[^/\0.][^/\0]{0,199}", name) or name == QUARANTINED:
            raise ValueError(f"{place}: {name[:60]!r} cannot be the name of an output folder")
        if name in items:
            raise ValueError(
                f"{place}: its output would be {name!r}, as that of line {lines_of[name]}: give "
                "them names of their own in a CSV file (columns video, name)"
            )
        items[name], lines_of[name] = Item(video, name, row.get("text") or None), number
    if not items:
        raise ValueError(f"{path} lists no videos")
    return list(items.values())


def pictures_and_videos(source: str | os.PathLike[str]) -> list[Path]:
    """The pictures and videos of a folder in order of name, or the one file that `source` is.

    Raises ValueError if there is none.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    found = sorted(source.iterdir()) if source.is_dir() else [source]
    found = [path for path in found if path.suffix.lower() in IMAGES | VIDEOS]
    if not found:
        raise ValueError(
            f"{source} holds no picture or video ({' '.join(sorted(IMAGES | VIDEOS))})"
        )
    return found
