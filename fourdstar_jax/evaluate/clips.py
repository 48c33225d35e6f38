"""What is scored: folders of pictures and videos, prepared data sets and objects made here.

    DIR/OBJECT/VIEW/0.png ...      pictures, in natural order
    DIR/OBJECT/VIEW.mp4            videos (mp4, webm, gif, ...)
    DIR/OBJECT/manifest.json       an object of `fourdstar generate` or `reconstruct`, rendered
    DIR/OBJECT/0.png ...           an object with one view
    DIR/manifest.json              a prepared data set: the clips of one split are the objects
    DIR/OBJECT/surfaces.npy        beside the views: ActionBench's tracked points [T, N, 6]

Views of folders go by name and must be the same on both sides; rendered ones and those of a data
set are the protocol's azimuths, in order.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from fourdstar_jax import folders, geometry, outside
from fourdstar_jax.data import pipeline, transforms, video
from fourdstar_jax.data.batching import filled_batches
from fourdstar_jax.data.untrusted import PICTURES, natural
from fourdstar_jax.evaluate import motion
from fourdstar_jax.evaluate.device import ALONE
from fourdstar_jax.evaluate.protocols import Protocol
from fourdstar_jax.kernels.rasterize import rasterize
from fourdstar_jax.types import Cameras, Gaussians

VIDEOS = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".gif", ".webp", ".apng", ".tif"}
RENDER_BATCH = 4  # timesteps
OPAQUE = 255

ReadSplats = Callable[[str | os.PathLike[str]], tuple[Gaussians, float]]


class Frames(NamedTuple):
    """A clip of one view."""

    images: UInt8[np.ndarray, "T h w 3"]
    alphas: UInt8[np.ndarray, "T h w"] | None  # None where nothing is known of it
    on_white: bool = True  # else colours are as stored, and alpha is still to be applied
    flow: Float[np.ndarray, "T h w 2"] | None = None  # pixels to the next frame
    depths: Float[np.ndarray, "T h w"] | None = None  # camera z, scene units, 0 for nothing
    cameras: Cameras | None = None  # the one of this view, where depths are known


class View(NamedTuple):
    """A view that can be read; a rendered one takes the size (width, height) of the truth."""

    name: str
    load: Callable[[tuple[int, int] | None], Frames]
    flow: Callable[[tuple[int, int]], Float[np.ndarray, "P h w 2"]] | None = None  # if rendered


@dataclasses.dataclass(frozen=True)
class Entry:
    """An object of a source, its views in order."""

    name: str
    group: str  # what intervals resample: clips of the same object belong together
    views: tuple[View, ...]
    named: bool  # views go by name, not by place
    about: dict[str, Any] = dataclasses.field(default_factory=dict)  # of its making
    gaussians: Callable[[], Gaussians] | None = None  # [T, G, ...], of what was made here
    points: Callable[[], Float[np.ndarray, "T N 3"]] | None = None  # tracked, of a truth


@dataclasses.dataclass(frozen=True)
class Source:
    """Objects by name."""

    path: str
    kind: str  # "folder" or "data set"
    entries: dict[str, Entry]
    azimuths: tuple[float, ...] | None  # of views that go by place, degrees
    about: dict[str, Any]
    at_once: int = 1  # objects that are made when the first of them is asked for


def file_name(clip_id: str) -> str:
    """The name under which a folder of predictions has a data set's clip."""
    return re.sub(r"[^\w.-]+", "_", clip_id)


def open_source(
    path: str | os.PathLike[str],
    protocol: Protocol,
    *,
    read_splats: ReadSplats,
    split: str = "unseen_object",
    azimuths: tuple[float, ...] | None = None,
    min_frames: int = 1,
) -> Source:
    """The objects at `path`; nothing large is read yet.

    `azimuths` are the views of what goes by place, by default the first that the protocol allows
    and a data set has, or all. Clips of a data set with fewer than `min_frames` are passed over.
    `read_splats` reads `splats.safetensors`: it lies a floor above.
    Raises ValueError for a path that holds no objects.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder" if path.exists() else f"{path} does not exist")
    if folders.is_of_kind(path, folders.DATASET):
        return _dataset(path, protocol, split, azimuths, min_frames)
    if folders.is_of_kind(path, folders.OBJECT):
        raise ValueError(f"{path} is one object: give the folder that it lies in")
    entries = {}
    for child in sorted(path.iterdir(), key=lambda p: natural(p.name)):
        if child.name.startswith("."):
            continue
        if child.is_dir():
            entry = _entry(child, protocol, read_splats, azimuths)
        elif child.suffix.lower() in VIDEOS:
            entry = Entry(child.stem, child.stem, (_file_view(child, "0"),), named=True)
        else:
            continue
        if entry.name in entries:
            raise ValueError(f"{path} holds the object {entry.name} twice")
        entries[entry.name] = entry
    if not entries:
        raise ValueError(f"{path} holds no objects: a folder or video each")
    return Source(str(path), "folder", entries, azimuths, {})


def _entry(
    folder: Path,
    protocol: Protocol,
    read_splats: ReadSplats,
    azimuths: tuple[float, ...] | None,
) -> Entry:
    if folders.is_of_kind(folder, folders.OBJECT):
        return _rendered(folder, protocol, read_splats, azimuths)
    children = [c for c in folder.iterdir() if not c.name.startswith(".")]
    children.sort(key=lambda p: natural(p.name))
    below = [c for c in children if c.is_dir()]
    videos = [c for c in children if c.is_file() and c.suffix.lower() in VIDEOS]
    stills = [c for c in children if c.is_file() and c.suffix.lower() in PICTURES]
    if below:
        views = [_file_view(c, c.name) for c in below]
    elif videos and len(stills) <= len(videos):
        views = [_file_view(c, c.stem) for c in videos]
    elif stills:
        views = [_file_view(folder, "0")]
    else:
        raise ValueError(f"{folder}: an object without views: no folders, videos or pictures in it")
    names = [view.name for view in views]
    if len(set(names)) < len(names):
        raise ValueError(f"{folder}: two views of one name among {', '.join(names)}")
    surface = folder / "surfaces.npy"
    points = functools.partial(_surface, surface) if surface.is_file() else None
    return Entry(
        folder.name, folder.name, tuple(views), named=True, about=_making(folder), points=points
    )


def _surface(path: Path) -> Float[np.ndarray, "T N 3"]:
    """The positions of ActionBench's file, which holds normals as well."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: no array: {error}") from error
    if stored.ndim != 3 or stored.shape[-1] not in (3, 6) or stored.dtype.kind != "f":
        raise ValueError(f"{path}: {stored.dtype} {stored.shape}, not floats [T, N, 3 or 6]")
    return np.array(stored[..., :3], np.float32)


def _making(folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of a generation, where its manifest has them."""
    path = folder / folders.OBJECT.manifest
    if not path.is_file():
        return {}
    fields = outside.read(path)
    found: dict[str, Any] = {}
    if "generation" in fields:
        made = fields.part("generation")
        for name in ("seconds", "peak_memory_bytes"):
            if name in made:
                found[name] = made.number(name, 0, 1e18)
        if "device" in made:
            found["device"] = made.text("device")
    return found


def _file_view(path: Path, name: str) -> View:
    def load(size: tuple[int, int] | None) -> Frames:
        frames = video.read_frames(path)
        opaque = frames[..., 3].min() == OPAQUE
        return Frames(frames[..., :3], None if opaque else frames[..., 3], on_white=opaque)

    return View(name, load)


def _rendered(
    folder: Path,
    protocol: Protocol,
    read_splats: ReadSplats,
    azimuths: tuple[float, ...] | None,
) -> Entry:
    """An object made here, rendered at the protocol's views, or at those of its own rig."""
    manifest = outside.read(folder / folders.OBJECT.manifest)
    rig = geometry.Rig.from_dict(manifest.part("rig").values, f"rig: {manifest.where}")
    if azimuths is None:
        azimuths = protocol.azimuths_deg[0] if protocol.azimuths_deg else rig.azimuths_deg

    @functools.cache
    def gaussians() -> Gaussians:
        return read_splats(folder / "splats.safetensors")[0]

    name = folder.name
    told = manifest.values.get("input")
    if isinstance(told, dict) and isinstance(told.get("clip"), str):
        name = file_name(told["clip"])  # of `fourdstar reconstruct --data`
    views = rendered_views(gaussians, rig, azimuths, where=str(folder))
    return Entry(name, name, views, named=False, about=_making(folder), gaussians=gaussians)


def rendered_views(
    gaussians: Callable[[], Gaussians],
    rig: geometry.Rig,
    azimuths: tuple[float, ...],
    *,
    where: str,
) -> tuple[View, ...]:
    """Views of moving Gaussians, drawn as they are asked for; `where` says in errors whose."""

    def view(azimuth: float) -> View:
        def camera(width: int, height: int) -> Cameras:
            return geometry.orbit_cameras(
                [azimuth], radius=rig.radius, fov_deg=rig.fov_deg, width=width, height=height
            )

        def flow(size: tuple[int, int]) -> np.ndarray:
            width, height = size
            return motion.rendered_flow(
                gaussians(), camera(width, height), width=width, height=height
            )

        def load(size: tuple[int, int] | None) -> Frames:
            width, height = size or (256, 256)
            cameras = camera(width, height)
            arrays = [np.asarray(x) for x in gaussians()]
            parts = []
            for count, filled in filled_batches(arrays, RENDER_BATCH):
                with ALONE:
                    pixels, overflow = jax.device_get(
                        _draw(Gaussians(*filled), cameras=cameras, width=width, height=height)
                    )
                if overflow:
                    raise ValueError(f"{where}: more Gaussians in a tile than can be rendered")
                parts.append(pixels[:count])
            pictures = np.concatenate(parts)
            return Frames(pictures[..., :3], pictures[..., 3])

        return View(f"azimuth {azimuth:g}", load, flow)

    return tuple(view(a) for a in azimuths)


@functools.partial(jax.jit, static_argnames=("width", "height"))
def _draw(gaussians: Gaussians, *, cameras: Cameras, width: int, height: int):
    out = rasterize(gaussians, cameras, width=width, height=height, background=jnp.ones(3))
    pixels = jnp.concatenate([out.renders, out.alphas], axis=-1)[:, 0]
    return jnp.round(255 * jnp.clip(pixels, 0, 1)).astype(jnp.uint8), jnp.any(out.overflow)


def _dataset(
    path: Path,
    protocol: Protocol,
    split: str,
    azimuths: tuple[float, ...] | None,
    min_frames: int,
) -> Source:
    manifest = pipeline.read_manifest(path)
    rig = pipeline.rig(path)
    allowed = (azimuths,) if azimuths else protocol.azimuths_deg or (rig.azimuths_deg,)
    found = ((wanted, places(rig, wanted)) for wanted in allowed)
    azimuths, where = next((pair for pair in found if pair[1] is not None), ((), None))
    if where is None:
        has = ", ".join(f"{a:g}" for a in rig.azimuths_deg)
        wanted = " or ".join(", ".join(f"{a:g}" for a in w) for w in allowed)
        raise ValueError(f"{path} has views at {has} degrees; those at {wanted} are scored")
    names = pipeline.Records(path, split, only=("clip_id", "object_id"))
    tracked = bool(manifest["settings"].get("points"))
    clips = pipeline.ClipSource(path, split, cache_bytes=0, points=tracked)
    read = functools.lru_cache(maxsize=4)(clips.__getitem__)  # one clip has several views

    def entry(index: int) -> Entry:
        record = names[index]
        clip_id, object_id = (pipeline.as_text(record[k]) for k in ("clip_id", "object_id"))

        def view(place: int, azimuth: float) -> View:
            def load(size: tuple[int, int] | None) -> Frames:
                clip = read(index)
                rgba = clip["rig_rgba"][:, place]
                images = np.rint(255 * transforms.on_white(rgba)[0]).astype(np.uint8)
                flow = clip["rig_flow"][:, place] if "rig_flow" in clip else None
                depths = clip["rig_depth"][:, place] if "rig_depth" in clip else None
                one = slice(place, place + 1)
                cameras = Cameras(clip["rig_viewmats"][one], clip["rig_Ks"][one])
                return Frames(images, rgba[..., 3], flow=flow, depths=depths, cameras=cameras)

            return View(f"azimuth {azimuth:g}", load)

        views = tuple(view(p, a) for p, a in zip(where, azimuths, strict=True))
        points = (lambda: read(index)["points"]) if tracked else None
        return Entry(file_name(clip_id), object_id, views, named=False, points=points)

    lengths = {clip["clip_id"]: clip["num_frames"] for clip in manifest.get("clips", [])}
    long = [
        i
        for i in range(len(names))
        if min_frames == 1 or lengths[pipeline.as_text(names[i]["clip_id"])] >= min_frames
    ]
    if not long:
        raise ValueError(f"{path}: no clip of {split} has {min_frames} frames or more")
    entries = {e.name: e for e in map(entry, long)}
    about = {"split": split, "min_frames": min_frames}
    about |= {k: manifest[k] for k in ("sha256", "recipe_sha256") if k in manifest}
    return Source(str(path), "data set", entries, azimuths, about)


def places(rig: geometry.Rig, azimuths: tuple[float, ...]) -> list[int] | None:
    """Which of the rig's views these are; None where it has not all of them."""
    found = []
    for azimuth in azimuths:
        near = [
            place
            for place, has in enumerate(rig.azimuths_deg)
            if abs((has - azimuth + 180) % 360 - 180) < 0.1
        ]
        if not near:
            return None
        found.append(near[0])
    return found


class Pair(NamedTuple):
    """A view of a prediction and of its truth."""

    object: str
    group: str
    view: str
    prediction: View
    truth: View


def pairs(predictions: Source, truths: Source, protocol: Protocol) -> list[Pair]:
    """Every view of every object, matched. Raises ValueError where the two sides differ."""
    for one, other in ((predictions, truths), (truths, predictions)):
        if missing := [name for name in one.entries if name not in other.entries]:
            more = f" and {len(missing) - 1} more objects" if len(missing) > 1 else ""
            raise ValueError(f"object {missing[0]}{more} of {one.path}: not in {other.path}")
    found = []
    for name, truth in truths.entries.items():
        prediction = predictions.entries[name]
        where = f"object {name}"
        wanted = protocol.num_views
        for source, entry in ((predictions, prediction), (truths, truth)):
            if wanted is not None and len(entry.views) != wanted:
                raise ValueError(
                    f"{where}: {len(entry.views)} views in {source.path} "
                    f"({', '.join(v.name for v in entry.views)}); {protocol.name} has {wanted}"
                )
        ours, theirs = prediction.views, truth.views
        if prediction.named and truth.named:
            by_name = {view.name: view for view in ours}
            unlike = sorted(set(by_name) ^ {view.name for view in theirs})
            if unlike:
                side = truths.path if unlike[0] in by_name else predictions.path
                raise ValueError(f"{where}: view {unlike[0]} is missing in {side}")
            ours = tuple(by_name[view.name] for view in theirs)
        elif len(ours) != len(theirs):
            raise ValueError(
                f"{where}: {len(ours)} views in {predictions.path}, {len(theirs)} in {truths.path}"
            )
        for a, b in zip(ours, theirs, strict=True):
            found.append(Pair(name, truth.group, b.name, a, b))
    return found


def load(pair: Pair, protocol: Protocol) -> tuple[Frames, Frames]:
    """Prediction and truth on the protocol's background, of one size and count.

    Raises ValueError that names object, view and frame.
    """
    where = f"object {pair.object}, view {pair.view}"
    try:
        truth = pair.truth.load(None)
        height, width = truth.images.shape[1:3]
        prediction = pair.prediction.load((width, height))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    sizes = ["{2}x{1}".format(*x.images.shape) for x in (prediction, truth)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{where}: the prediction has frames of {sizes[0]} pixels, the truth of {sizes[1]}"
        )
    counts = [len(x.images) for x in (prediction, truth)]
    if counts[0] != counts[1]:
        side = "prediction" if counts[0] < counts[1] else "truth"
        raise ValueError(
            f"{where}: frame {min(counts)} is missing in the {side}: {counts[0]} frames are "
            f"predicted, {counts[1]} are true"
        )
    return (
        on_background(prediction, protocol, f"{where}: the prediction"),
        on_background(truth, protocol, f"{where}: the truth"),
    )


def on_background(frames: Frames, protocol: Protocol, where: str) -> Frames:
    """Frames on the protocol's background. Raises ValueError if there is need of one."""
    if frames.on_white or frames.alphas is None:
        return frames
    if protocol.background is None:
        frame = int(np.argmax(frames.alphas.min(axis=(1, 2)) < OPAQUE))
        raise ValueError(
            f"{where} is transparent in frame {frame}, and {protocol.name} states no background: "
            "give --background white"
        )
    rgba = np.concatenate([frames.images, frames.alphas[..., None]], axis=-1)
    images = np.rint(255 * transforms.on_white(rgba)[0]).astype(np.uint8)
    return frames._replace(images=images, on_white=True)
