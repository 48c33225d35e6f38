"""`fourdstar evaluate --sheet`: input | four views | truth, moving, a clip a row.

Of scored clips the best and the worst quarter are shown alike, as many rows of each. Objects that
were made of a user's videos have no truth: all are shown, in order of their names.
"""

import base64
import binascii
import dataclasses
import functools
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from fourdstar_jax.data import pipeline
from fourdstar_jax.evaluate import clips, score, tables, unseen
from fourdstar_jax.evaluate.clips import Source, View
from fourdstar_jax.evaluate.networks import Networks
from fourdstar_jax.evaluate.protocols import SIDES, find
from fourdstar_jax.export import page, splats
from fourdstar_jax.folders import OBJECT, is_of_kind, output_file
from fourdstar_jax.generate import Model

PROTOCOL = find("fourdstar-open-v2")
ROWS = 3  # of a quarter, at most
CLIPS = 16  # of a split that are generated and scored, by default
SIZE = 128  # pixels of a view of an object without a truth
GAP, LABEL, QUALITY, FPS = 8, 14, 80, 8.0
Clip = UInt8[np.ndarray, "T h w 3"]


TITLES = ("input", "made: front, right, back, left", "truth")


class Row(NamedTuple):
    """A line of the sheet; clips of unlike length go round."""

    label: str
    input: Clip
    views: list[Clip]
    truth: list[Clip]


def of_model(
    model_dir: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    networks: Networks,
    *,
    parts: Sequence[str] = (),
    count: int = CLIPS,
    log: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Rows of `count` clips of each split that a bundle generates from their videos.

    `parts` are the splits, by default all but train. Raises ValueError for a data set whose rig is
    not the bundle's.
    """
    data_dir, model, rows = Path(data_dir), Model(model_dir), []
    there = [name for name in pipeline.read_manifest(data_dir)["splits"] if name != "train"]
    for part in parts or there:
        truths = of_split(data_dir, part, count)
        truths = tables.first_frames(truths, model.max_timesteps)
        path = Path(model_dir)
        predictions = tables.predicted("generate", path, data_dir, part, truths, PROTOCOL)
        log(f"{part}: {len(truths.entries)} clips are generated")
        rows += of_sources(predictions, truths, networks, title=part, log=log)
    return rows


def of_split(data_dir: Path, part: str, count: int) -> Source:
    """`count` clips, of as many objects as may be, from the four sides or the rig's first views."""
    rig = pipeline.rig(data_dir)
    sides = SIDES if clips.places(rig, SIDES) is not None else rig.azimuths_deg[: len(SIDES)]
    truths = clips.open_source(
        data_dir, PROTOCOL, read_splats=splats.read_splats, split=part, azimuths=sides
    )
    names = list(truths.entries)
    groups = np.array([truths.entries[name].group for name in names])
    kept = [names[i] for i in unseen.sampled_clips({"object": groups}, count)]
    return dataclasses.replace(truths, entries={name: truths.entries[name] for name in kept})


def of_sources(
    predictions: Source,
    truths: Source,
    networks: Networks,
    *,
    title: str = "",
    log: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Rows of the best and of the worst quarter, by LPIPS where its weights are there.

    Else by PSNR inside the truth's mask. View 0 of the truth stands for the input.
    """
    predictions, truths = _kept(predictions), _kept(truths)
    name = "lpips_alex"
    try:
        networks.check(name)
    except ValueError:
        name = "psnr_in_mask"
    result = score.score(PROTOCOL, predictions, truths, networks, metrics=(name,), log=log)
    metric = PROTOCOL.metric(name)
    values = {row["object"]: row["metrics"][name] for row in result["objects"]}
    rows = []
    for quarter, names in quarters(values, higher=metric.better == "higher").items():
        for found in names:
            pairs = [
                clips.load(p, PROTOCOL)
                for p in clips.pairs(_only(predictions, found), _only(truths, found), PROTOCOL)
            ][: len(SIDES)]
            views, truth = ([side.images for side in sides] for sides in zip(*pairs, strict=True))
            told = f"{values[found]:.{metric.digits}f}"
            label = f"{found}, {metric.label} {told}, {quarter} quarter"
            rows.append(Row(f"{title}: {label}" if title else label, truth[0], views, truth))
    return rows


def quarters(values: dict[str, float], *, higher: bool) -> dict[str, list[str]]:
    """Names of the best and the worst quarter, ROWS of each at most, evenly over it."""
    order = sorted(values, key=lambda name: values[name], reverse=higher)
    size = -(-len(order) // 4)
    if len(order) == 1:
        return {"only": order}

    def some(part: list[str]) -> list[str]:
        places = np.linspace(0, len(part) - 1, min(ROWS, len(part))).round().astype(int)
        return [part[i] for i in places]

    return {"best": some(order[:size]), "worst": some(order[-size:])}


def of_objects(folder: str | os.PathLike[str]) -> list[Row]:
    """Rows of the objects that `fourdstar generate` wrote below a folder, or of one such object.

    The input is as their page shows it. Raises ValueError where there is none.
    """
    folder = Path(folder)
    found = [folder] if is_of_kind(folder, OBJECT) else sorted(folder.iterdir())
    found = [path for path in found if path.is_dir() and is_of_kind(path, OBJECT)]
    if not found:
        raise ValueError(f"{folder} holds no object that `fourdstar generate` wrote")
    rows = []
    for path in found:
        gaussians, rig = splats.read_output(path)
        rendered = clips.rendered_views(lambda g=gaussians: g, rig, SIDES, where=str(path))
        views = [view.load((SIZE, SIZE)).images for view in rendered]
        given = [_picture(x, path) for x in page.object_of(path)["input"]]
        shown = np.stack(given) if given else np.full_like(views[0], 255)
        rows.append(Row(path.name, shown, views, []))
    return rows


def _picture(uri: str, path: Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        data = base64.b64decode(uri.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            if max(image.size) > 2048:
                raise ValueError(f"{image.size[0]}x{image.size[1]} pixels")
            return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    except (binascii.Error, OSError, ValueError) as error:
        raise ValueError(f"{path / page.NAME}: a picture of its input: {error}") from error


def _kept(source: Source) -> Source:
    """A source whose views are made once."""

    def once(view: View) -> View:
        return view._replace(load=functools.cache(view.load))

    entries = {
        name: dataclasses.replace(entry, views=tuple(map(once, entry.views)))
        for name, entry in source.entries.items()
    }
    return dataclasses.replace(source, entries=entries)


def _only(source: Source, name: str) -> Source:
    return dataclasses.replace(source, entries={name: source.entries[name]})


def write(path: str | os.PathLike[str], rows: Sequence[Row], *, fps: float = FPS) -> None:
    """Writes the rows as one endless WebP. Raises ValueError for another name and for no rows."""
    path = Path(path)
    if path.suffix.lower() != ".webp":
        raise ValueError(f"{path}: a sheet is an animation, named .webp")
    if not rows:
        raise ValueError(f"{path}: nothing to show")
    size = max(x.shape[1] for row in rows for x in row.views)
    groups = [[row.input] for row in rows], [row.views for row in rows], [row.truth for row in rows]
    widths = [max(len(x) for x in group) for group in groups]
    lefts = np.cumsum([0, *(count * size + GAP for count in widths)])
    width = lefts[3 if widths[2] else 2] - GAP
    pictures = []
    for t in range(max(len(row.views[0]) for row in rows)):
        sheet = Image.new("RGB", (int(width), LABEL + len(rows) * (size + LABEL)), "white")
        draw: Any = ImageDraw.Draw(sheet)
        for left, title in zip(lefts, TITLES, strict=False):
            if left < width:
                draw.text((int(left) + 2, 1), title, "black")
        for place, row in enumerate(rows):
            top = LABEL + place * (size + LABEL)
            for left, group in zip(lefts, ([row.input], row.views, row.truth), strict=False):
                for column, clip in enumerate(group):
                    view = Image.fromarray(clip[t % len(clip)])
                    if view.size != (size, size):
                        view = view.resize((size, size), Image.Resampling.BICUBIC)
                    sheet.paste(view, (int(left) + column * size, top))
            draw.text((2, top + size + 1), row.label, "black")
        pictures.append(sheet)
    with output_file(path) as partial, partial.open("wb") as file:
        options: dict[str, Any] = dict(duration=round(1000 / fps), loop=0, quality=QUALITY)
        pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], **options)
