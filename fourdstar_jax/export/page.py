"""`viewer.html`: one file that plays moving Gaussians in a browser, from a disk, with no network.

It is made of the files in `viewer/` and of objects in the form of `compact`, as base64 in JSON.
"""

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from fourdstar_jax.export import compact
from fourdstar_jax.export.splats import read_output
from fourdstar_jax.geometry import Rig
from fourdstar_jax.outside import Fields, parse
from fourdstar_jax.types import Gaussians

SOURCE = Path(__file__).parent / "viewer"
SCRIPTS = ("gaussians.js", "draw.js", "main.js")
NAME = "viewer.html"
MAX_BYTES = 32 << 20  # of a page that `write_page` writes
_OPEN, _CLOSE = '<script type="application/json" id="objects">', "</script>"


def describe(
    name: str,
    gaussians: Gaussians,
    rig: Rig,
    *,
    frames: Float[np.ndarray, "T h w 3"] | None = None,
) -> dict[str, Any]:
    """An object as the page has it, JSON: the Gaussians `[T, G, ...]`, the rig, and the input."""
    return {
        "name": name,
        "rig": rig.to_dict(),
        "data": base64.b64encode(compact.encode(gaussians, fps=rig.fps)).decode(),
        "input": [] if frames is None else [_webp(frame) for frame in frames],
    }


def page(objects: list[dict[str, Any]]) -> str:
    """The text of a page that shows these objects side by side."""
    scripts = "\n".join((SOURCE / name).read_text() for name in SCRIPTS)
    parts = {
        "/* page.css */": "\n" + (SOURCE / "page.css").read_text(),
        "/* scripts */": scripts,
        "/* objects */": json.dumps({"objects": objects}).replace("<", "\\u003c"),
    }
    text = (SOURCE / "page.html").read_text()
    return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], text)


def write_page(path: str | os.PathLike[str], objects: list[dict[str, Any]]) -> bool:
    """Writes the page, unless it would have more than MAX_BYTES; returns whether it did."""
    data = page(objects).encode()
    if len(data) > MAX_BYTES:
        return False
    Path(path).write_bytes(data)
    return True


def objects_in(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a page that `page` made, for another one.

    Nothing else of the file is used. Raises ValueError for other files and for damaged objects.
    """
    with open(path, "rb") as file:
        data = file.read(2 * MAX_BYTES)
    start = data.find(_OPEN.encode()) + len(_OPEN)
    end = data.find(_CLOSE.encode(), start)
    if start < len(_OPEN) or end < 0:
        raise ValueError(f"{path} is no page of this viewer")
    where = f"{path}: its objects"
    found = Fields(parse(data[start:end], where), where).parts("objects")
    for each in found:
        each.text("name")
        each.text("data", pattern="[A-Za-z0-9+/]+=*")
        Rig.from_dict(each.part("rig").values, f"{where}: rig")
        if not all(x.startswith("data:image/") for x in each.texts("input")):
            each.refuse("input", "a list of data:image/...")
    return [each.values for each in found]


def object_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The object of an output folder, named as that: from its page, or from its Gaussians alone.

    Raises ValueError if the folder is no such output.
    """
    folder = Path(folder)
    name = folder.resolve().name
    gaussians, rig = read_output(folder)
    if not (folder / NAME).is_file():
        return describe(name, gaussians, rig)
    found = objects_in(folder / NAME)
    if len(found) != 1:
        raise ValueError(f"{folder / NAME} holds {len(found)} objects, not 1")
    return found[0] | {"name": name}


def _webp(image: Float[np.ndarray, "h w 3"]) -> str:
    out = io.BytesIO()
    picture = Image.fromarray(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8))
    picture.save(out, "WEBP", quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
