"""One asset to the records of its clips: what a worker process of `prepare` does."""

import functools
import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fourdstar_jax import geometry
from fourdstar_jax.data import blender, gltf, l4gm, posing, render, splits
from fourdstar_jax.data.settings import Settings
from fourdstar_jax.text import captions
from fourdstar_jax.types import Cameras

EXTRA_ELEVATIONS_DEG = (-30.0, 5.0)  # negative looks from above
PNG_LEVEL = 4
MIN_CHANGE = 0.01  # of what pictures show, mean over the object: nearly nothing, as noise is


class Job(NamedTuple):
    """An asset, and what is to be made of it."""

    path: str
    file: str  # the path below the folder of assets
    licence: str
    settings: Settings
    renders: bool = False  # a clip's folder of pictures below `path`, not a GLB file
    program: blender.Program | None = None  # that draws the colours; None: our own renderer

    @property
    def object_id(self) -> str:
        """The file's path without its ending, or that of a clip's folder without its number."""
        return l4gm.identity(self.file)[0] if self.renders else self.file.removesuffix(".glb")


@functools.cache
def renderer_of(settings: Settings, program: blender.Program | None) -> render.Renderer:
    """This process's renderer. Raises RuntimeError where there is no EGL."""
    size, views = settings.image_size, settings.views + settings.extra_views
    if program is None:
        return render.Renderer(size, views)
    assert settings.samples is not None
    return blender.Renderer(program, size, views, samples=settings.samples)


def render_asset(job: Job, folder: Path) -> dict[str, list[dict]]:
    """Writes an asset's clips as records to the folder; returns what is to be said about them.

    That is lists of its clips, of clips that were dropped, of warnings, and of itself if it is
    quarantined: then nothing is written. Raises OSError if the folder cannot be written to.
    """
    if job.renders:
        return _read_renders(job, folder)
    s = job.settings
    result = {"clips": [], "quarantined": [], "dropped": [], "warnings": []}
    made: list[Path] = []
    try:
        try:
            asset = gltf.load(job.path, name=job.file)
        except OSError as error:
            raise gltf.MalformedAsset(f"cannot be read: {error.strerror}") from error
        result["warnings"] += [{"file": job.file, "warning": w} for w in asset.warnings]
        if not asset.clips:
            raise gltf.MalformedAsset("no animation")
        renderer = renderer_of(s, job.program)
        renderer.load(asset)
        for clip in asset.clips:
            split = splits.split_of(asset.sha256, clip.index, job.object_id)
            if s.splits is not None and split not in s.splits:
                continue
            for rig in range(s.rigs if split == "train" else 1):
                path = folder / f"{clip.index}-{rig}.npz"
                told = _render_clip(asset, clip, split, rig, renderer, job, path)
                if isinstance(told, str):
                    result["dropped"].append({"file": job.file, "clip": clip.name, "reason": told})
                    break
                made.append(path)
                result["clips"].append(told)
    except (gltf.MalformedAsset, blender.Failed) as error:  # the file whole, its clips with it
        for path in made:
            path.unlink()
        return quarantined(job.file, str(error))
    return result


def quarantined(file: str, reason: str) -> dict[str, list[dict]]:
    """What is said of an asset of which nothing is made."""
    told = [{"file": file, "reason": reason}]
    return {"clips": [], "quarantined": told, "dropped": [], "warnings": []}


def _render_clip(asset, clip, split: str, rig: int, renderer, job: Job, path: Path) -> dict | str:
    """Writes one record to `path`; returns what the report says of it, or why there is none."""
    s = job.settings
    if split == splits.LEFT_OUT:
        reason = splits.reason_of(asset.sha256, clip.index)
        return f"left out of the split {splits.CURRENT}: {reason}"
    if posing.num_frames(clip, s.fps, s.max_frames) < min(2, s.max_frames):
        return f"{clip.duration_s:.3f} s long: one frame at {s.fps:g} frames a second"
    seed = hashlib.sha256(f"{asset.sha256}#{clip.index}@{rig}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(seed, "<u4"))
    turn_deg = rng.uniform(0, 360) if rig else 0.0
    sequence = posing.sample_clip(
        asset, clip, fps=s.fps, max_frames=s.max_frames, turn_deg=turn_deg
    )
    if sequence.motion < posing.MIN_MOTION and s.max_frames > 1:
        return f"hardly moves: {sequence.motion:.4f} < {posing.MIN_MOTION}"
    zoom = 1.0
    if split == "train":
        zoom = min(rng.uniform(*s.zoom), sequence.room)
        shift = s.shift * rng.uniform(-1, 1, 3) if s.shift else np.zeros(3)
        sequence = posing.varied(sequence, zoom, shift)
    record, areas = _record(asset, clip, sequence, renderer, job, rng)
    if s.points:
        draws = np.random.default_rng(np.frombuffer(seed, "<u4")[::-1])  # `rng` has its own uses
        tracked = posing.track(sequence.positions, asset.triangles, s.points, draws)
        record |= {"points": tracked.points, "point_normals": tracked.normals.astype(np.float16)}
    seen = areas.max(axis=1).min() / zoom**2  # from where most of it is seen: it may be flat
    if seen < posing.MIN_AREA:
        return f"covers {seen:.2%} of each picture of a frame, less than {posing.MIN_AREA:.0%}"
    record |= {
        "clip_id": np.asarray(f"{job.object_id}#{clip.index}" + (f"@{rig}" if rig else "")),
        "split": np.asarray(split),
    }
    looks = {"coloured": asset.coloured(), "textured": bool(asset.textures)}
    return _written(record, areas, path) | looks


def _written(record: dict[str, np.ndarray], areas: np.ndarray, path: Path) -> dict:
    """Writes a record to `path`; returns what the report says of it."""
    np.savez(path, allow_pickle=False, **record)
    texts = ("clip_id", "object_id", "split", "appearance", "motion", "asset_sha256")
    return {k: str(record[k]) for k in texts} | {
        "num_frames": len(record["frame_times"]),
        "sha256": content_hash(record),
        "record": path.name,
        "mask_area": float(areas.mean()),
    }


def _read_renders(job: Job, folder: Path) -> dict[str, list[dict]]:
    """As `render_asset`, of a clip that is there as pictures.

    It is of training unless its path is that of an unseen object. Whether it has colours is not
    looked at.
    """
    s, (object_id, index) = job.settings, l4gm.identity(job.file)
    result = {"clips": [], "quarantined": [], "dropped": [], "warnings": []}
    try:
        clip = l4gm.Clip(*l4gm.places(Path(job.path), job.file), s.views, s.extra_views)
        if (F := min(clip.num_frames, s.max_frames)) < 1:
            raise l4gm.Malformed("no frames that all cameras have")
        frames = np.stack(list(clip.pictures(F, s.image_size)))
    except l4gm.Malformed as error:
        return quarantined(job.file, str(error))
    split = splits.split_of(clip.sha256(), index, object_id)
    if s.splits is not None and split not in s.splits:
        return result
    if (dropped := _dropped(frames[:, : s.views], s.max_frames)) is not None:
        told = {"file": job.file, "clip": str(index), "reason": dropped}
        return result | {"dropped": [told]}
    pngs = {
        "rig_rgba": [_png(image) for frame in frames for image in frame[: s.views]],
        "extra_rgba": [_png(image) for frame in frames for image in frame[s.views :]],
    }
    record = _fields(job, clip.sha256(), index, "", F, pngs, *clip.cameras(s.image_size))
    record |= {"clip_id": np.asarray(f"{object_id}#{index}"), "split": np.asarray(split)}
    areas = frames[:, : s.views, ..., 3].mean(axis=(2, 3)) / 255
    told = _written(record, areas, folder / f"{index}-0.npz")
    return result | {"clips": [told | {"coloured": False, "textured": False}]}


def _dropped(frames: np.ndarray, wanted: int) -> str | None:
    """Why a clip of pictures [F, V, h, w, 4] is no use, if it is none."""
    if len(frames) < min(2, wanted):
        return "one frame"
    areas = frames[..., 3].mean(axis=(2, 3)) / 255
    if (seen := areas.max(axis=1).min()) < posing.MIN_AREA:
        return f"covers {seen:.2%} of each picture of a frame, less than {posing.MIN_AREA:.0%}"
    way = np.abs(frames.astype(np.float32) - frames[0]).mean(axis=(1, 2, 3, 4)).max() / 255
    if wanted > 1 and (share := way / areas.mean()) < MIN_CHANGE:
        return f"hardly moves: its pictures change by {share:.4f} < {MIN_CHANGE}"
    return None


def _record(asset, clip, sequence, renderer, job: Job, rng) -> tuple[dict, np.ndarray]:
    """The clip's fields as arrays, and the share [F, V] of each rig picture that is covered.

    PNG files are kept as their bytes in a row and their lengths.
    """
    s = job.settings
    rig = geometry.Rig.around(s.views, fps=s.fps).cameras(s.image_size)
    extra = geometry.orbit_cameras(
        rng.uniform(0, 360, s.extra_views),
        rng.uniform(*EXTRA_ELEVATIONS_DEG, s.extra_views),
        width=s.image_size,
        height=s.image_size,
    )
    cameras = Cameras(*(np.concatenate(pair) for pair in zip(rig, extra, strict=True)))
    F, V = len(sequence.positions), s.views
    pngs: dict[str, list[bytes]] = {"rig_rgba": [], "extra_rgba": []}
    flow, depth, areas = [], [], []
    for f in range(F):
        frame = renderer.draw(
            sequence.positions[f],
            sequence.normals[f],
            cameras,
            next_positions=sequence.positions[(f + 1) % F] if s.flow else None,
            depth=s.depth,
        )
        areas.append(frame.rgba[:V, ..., 3].mean(axis=(1, 2)) / 255)
        for v, image in enumerate(frame.rgba):
            pngs["rig_rgba" if v < V else "extra_rgba"].append(_png(image))
        if frame.flow is not None:
            flow.append(frame.flow[:V].astype(np.float16))
        if frame.depth is not None:
            depth.append(frame.depth[:V].astype(np.float16))
    record = _fields(job, asset.sha256, clip.index, clip.name, F, pngs, rig, extra)
    if s.flow:
        record["rig_flow"] = np.stack(flow)
    if s.depth:
        record["rig_depth"] = np.stack(depth)
    return record, np.array(areas)


def _fields(
    job: Job,
    sha256: str,
    clip_index: int,
    clip_name: str,
    num_frames: int,
    pngs: dict[str, list[bytes]],
    rig: Cameras,
    extra: Cameras,
) -> dict[str, np.ndarray]:
    """What every record has."""
    fps = job.settings.fps
    record: dict[str, Any] = {
        "object_id": job.object_id,
        "asset_sha256": sha256,
        "clip_index": clip_index,
        "clip_name": clip_name,
        "licence": job.licence,
        "appearance": captions.appearance_caption(job.object_id),
        "motion": captions.motion_caption(clip_name),
        "fps": np.float32(fps),
        "frame_times": (np.arange(num_frames) / fps).astype(np.float32),
        "rig_viewmats": rig.viewmats,
        "rig_Ks": rig.Ks,
        "extra_viewmats": extra.viewmats,
        "extra_Ks": extra.Ks,
    }
    for key, images in pngs.items():
        record[key] = np.frombuffer(b"".join(images), np.uint8)
        record[f"{key}_lengths"] = np.array([len(p) for p in images], np.int64)
    return {key: np.asarray(value) for key, value in record.items()}


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


def content_hash(record: dict[str, np.ndarray]) -> str:
    """SHA-256 over the fields of a record, in order of their names."""
    digest = hashlib.sha256()
    for key in sorted(record):
        value = record[key]
        digest.update(f"{key} {value.dtype.str} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
