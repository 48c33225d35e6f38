"""From a folder of animated GLB files to a dataset: what `fourdstar prepare` does.

Files that cannot be read are quarantined, clips that hardly move are dropped; both are named with
the reason in `report.json`. The dataset is written to a temporary folder beside the wanted one and
renamed at the end, so that a folder of that name is complete.
"""

import contextlib
import csv
import ctypes
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fourdstar_jax import geometry
from fourdstar_jax.data import gltf, posing, render, splits
from fourdstar_jax.data.licences import UNKNOWN, has, listed
from fourdstar_jax.data.settings import Settings
from fourdstar_jax.folders import DATASET, output_folder
from fourdstar_jax.text import captions
from fourdstar_jax.types import Cameras

EXTRA_ELEVATIONS_DEG = (-30.0, 5.0)  # negative looks from above
PNG_LEVEL = 4


class _Job(NamedTuple):
    path: str
    object_id: str
    licence: str
    settings: Settings
    spool: str


def prepare(
    assets_dir: str | Path,
    out_dir: str | Path,
    *,
    licence: str | None = None,
    limit: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> dict:
    """Renders every moving clip below `assets_dir` into `out_dir`; returns the manifest.

    Args:
      settings: fields of `Settings`.
      licence: keep assets that have it in `assets_dir/assets.csv`, as `licences.has` says ("cc0").
      limit: keep the first so many assets, in order of their paths.
      workers: processes that render; None is one a core, 0 renders in this process.
      overwrite: replace `out_dir` if it holds a dataset.

    Raises ValueError for settings out of range, a folder without usable clips and an `out_dir`
    that is not empty; RuntimeError when there is no EGL.
    """
    chosen = Settings(**settings).check()
    assets_dir, out_dir = Path(assets_dir), Path(out_dir)
    if not assets_dir.is_dir():
        raise ValueError(f"assets_dir={str(assets_dir)!r} is not a folder")
    files, licences, skipped = _find(assets_dir, licence)
    files = files[:limit]
    if not files:
        raise ValueError(f"no .glb file below {assets_dir}")
    render.Renderer(chosen.image_size, 1).close()  # a missing EGL is said here, once

    with output_folder(out_dir, DATASET, overwrite=overwrite) as partial:
        start = time.perf_counter()
        spool = partial / "spool"
        spool.mkdir()
        jobs = [
            _Job(
                str(assets_dir / f),
                f.removesuffix(".glb"),
                licences.get(f, UNKNOWN),
                chosen,
                str(spool),
            )
            for f in files
        ]
        results = _run(jobs, os.cpu_count() or 1 if workers is None else workers, log)
        clips = sorted((c for r in results for c in r["clips"]), key=lambda c: c["clip_id"])
        render_s = time.perf_counter() - start
        if not clips:
            left_out = [q for r in results for q in (*r["quarantined"], *r["dropped"])]
            shown = [f"{q['file']}: {q['reason']}" for q in left_out[:3]]
            more = len(left_out) - len(shown)
            detail = "; ".join(shown) + (f" and {more} more" if more else "")
            raise ValueError(f"no clip left of {len(files)} files below {assets_dir} ({detail})")
        _build(partial, clips, chosen)
        frames = sum(c["num_frames"] for c in clips) * (chosen.views + chosen.extra_views)
        manifest = _manifest(clips, chosen)
        report = {
            "assets": len(files),
            "assets_without_the_licence": skipped,
            "clips_kept": len(clips),
            "counts": manifest["counts"],
            "quarantined": sorted(
                (q for r in results for q in r["quarantined"]), key=lambda q: q["file"]
            ),
            "dropped": sorted(
                (d for r in results for d in r["dropped"]), key=lambda d: (d["file"], d["clip"])
            ),
            "warnings": sorted(
                (w for r in results for w in r["warnings"]), key=lambda w: w["file"]
            ),
            "images": frames,
            "render_seconds": round(render_s, 1),
            "images_per_second": round(frames / render_s, 1),
        }
        for name, content in (("report.json", report), (DATASET.manifest, manifest)):
            (partial / name).write_text(json.dumps(content, indent=1) + "\n")
        shutil.rmtree(spool)
    of_splits = ", ".join(f"{n} {s}" for s, n in manifest["splits"].items())
    log(
        f"{len(clips)} clips ({of_splits}), {len(report['dropped'])} dropped, "
        f"{len(report['quarantined'])} files quarantined: {out_dir / 'report.json'}"
    )
    return manifest


def _find(assets_dir: Path, licence: str | None) -> tuple[list[str], dict[str, str], int]:
    """GLB files below the folder that have the licence, all licences, and how many lack it."""
    files = sorted(p.relative_to(assets_dir).as_posix() for p in assets_dir.rglob("*.glb"))
    found = {}
    table = assets_dir / "assets.csv"
    if table.is_file():
        with open(table, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"file", "licence"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{table} has no columns file and licence")
            found = {row["file"]: row["licence"] or UNKNOWN for row in reader}
    if licence is None:
        return files, found, 0
    kept = [f for f in files if has(found.get(f, UNKNOWN), licence)]
    if files and not kept:
        there = listed(found.get(f, UNKNOWN) for f in files)
        raise ValueError(
            f"no file below {assets_dir} has the licence {licence!r}: there are {there}"
        )
    return kept, found, len(files) - len(kept)


def _run(jobs: list[_Job], workers: int, log: Callable[[str], None]) -> list[dict]:
    results, start = [], time.perf_counter()

    def done(result):
        results.append(result)
        n = len(results)
        if n % max(1, len(jobs) // 10) == 0 or n == len(jobs):
            elapsed = time.perf_counter() - start
            left = elapsed / n * (len(jobs) - n)
            log(f"rendered {n}/{len(jobs)} assets, {elapsed:.0f} s, about {left:.0f} s left")

    if workers == 0:
        for job in jobs:
            done(_render_asset(job))
        return results
    context = multiprocessing.get_context("spawn")  # OpenGL and JAX do not survive a fork
    initargs = (workers, os.getpid())
    with ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_start_worker, initargs=initargs
    ) as pool:
        # Ctrl-C reaches the workers too, which have nothing to say to it: this process ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_render_asset, job) for job in jobs]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for future in as_completed(futures):
                done(future.result())
        except BrokenProcessPool:
            raise ValueError(
                f"a worker of {workers} was killed, as when memory runs out: try fewer --workers"
            ) from None
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _start_worker(workers: int, parent: int) -> None:
    """One thread of llvmpipe a process when there are several; none outlives its parent."""
    if workers > 1:
        os.environ.setdefault("LP_NUM_THREADS", "1")
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


_renderers: dict[tuple[int, int], render.Renderer] = {}


def _render_asset(job: _Job) -> dict:
    """Renders an asset's clips to the spool folder; returns what is to be said about them."""
    s = job.settings
    file = f"{job.object_id}.glb"
    result = {"clips": [], "quarantined": [], "dropped": [], "warnings": []}
    made: list[Path] = []
    try:
        asset = gltf.load(job.path, name=file)
        result["warnings"] += [{"file": file, "warning": w} for w in asset.warnings]
        if not asset.clips:
            raise gltf.MalformedAsset("no animation")
        key = (s.image_size, s.views + s.extra_views)
        if key not in _renderers:
            _renderers[key] = render.Renderer(*key)
        renderer = _renderers[key]
        renderer.load(asset)
        for clip in asset.clips:
            split = splits.split_of(asset.sha256, clip.index, job.object_id)
            for rig in range(s.rigs if split == "train" else 1):
                path = Path(job.spool) / f"{asset.sha256}-{clip.index}-{rig}.npz"
                told = _render_clip(asset, clip, split, rig, renderer, job, path)
                if isinstance(told, str):
                    result["dropped"].append({"file": file, "clip": clip.name, "reason": told})
                    break
                made.append(path)
                result["clips"].append(told)
    except gltf.MalformedAsset as error:  # the file is set aside whole, its clips with it
        for path in made:
            path.unlink()
        result = {
            "clips": [],
            "quarantined": [{"file": file, "reason": str(error)}],
            "dropped": [],
            "warnings": [],
        }
    return result


def _render_clip(asset, clip, split: str, rig: int, renderer, job: _Job, path: Path) -> dict | str:
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
    zoom = min(rng.uniform(*s.zoom), sequence.room) if split == "train" else 1.0
    sequence = sequence._replace(positions=sequence.positions * np.float32(zoom))
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
    np.savez(path, allow_pickle=False, **record)
    told = {k: str(record[k]) for k in ("clip_id", "object_id", "split", "appearance", "motion")}
    return told | {
        "num_frames": len(sequence.positions),
        "sha256": _content_hash(record),
        "spool": str(path),
        "coloured": asset.coloured(),
        "textured": bool(asset.textures),
        "mask_area": float(areas.mean()),
    }


def _record(asset, clip, sequence, renderer, job: _Job, rng) -> tuple[dict, np.ndarray]:
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
    record: dict[str, Any] = {
        "object_id": job.object_id,
        "asset_sha256": asset.sha256,
        "clip_index": clip.index,
        "clip_name": clip.name,
        "licence": job.licence,
        "appearance": captions.appearance_caption(job.object_id),
        "motion": captions.motion_caption(clip.name),
        "fps": np.float32(s.fps),
        "frame_times": (np.arange(F) / s.fps).astype(np.float32),
        "rig_viewmats": rig.viewmats,
        "rig_Ks": rig.Ks,
        "extra_viewmats": extra.viewmats,
        "extra_Ks": extra.Ks,
    }
    for key, images in pngs.items():
        record[key] = np.frombuffer(b"".join(images), np.uint8)
        record[f"{key}_lengths"] = np.array([len(p) for p in images], np.int64)
    if s.flow:
        record["rig_flow"] = np.stack(flow)
    if s.depth:
        record["rig_depth"] = np.stack(depth)
    return {key: np.asarray(value) for key, value in record.items()}, np.array(areas)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


def _content_hash(record: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(record):
        value = record[key]
        digest.update(f"{key} {value.dtype.str} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _build(folder: Path, clips: list[dict], s: Settings) -> None:
    """Writes the records with tensorflow-datasets and moves them to the top of `folder`."""
    from fourdstar_jax.data.builder import Fourdstar, FourdstarConfig

    def records(split: str):
        for index, clip in enumerate(clips):
            if clip["split"] == split:
                yield clip["clip_id"], _example(clip["spool"], index, s)

    config = FourdstarConfig(
        name=f"{s.image_size}px_{s.views}+{s.extra_views}views",
        image_size=s.image_size,
        views=s.views,
        extra_views=s.extra_views,
        flow=s.flow,
        depth=s.depth,
        points=s.points,
        splits=tuple(x for x in splits.SPLITS if any(c["split"] == x for c in clips)),
        records=records,
    )
    built = folder / "built"
    with _quiet():
        builder = Fourdstar(data_dir=str(built), config=config, file_format="array_record")
        builder.download_and_prepare()
    for path in Path(builder.data_dir).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(built)


@contextlib.contextmanager
def _quiet():
    """Without tensorflow-datasets' own progress and talk of downloads: nothing is downloaded."""
    import tensorflow_datasets as tfds
    from absl import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(level)


def _example(path: str, index: int, s: Settings) -> dict:
    with np.load(path, allow_pickle=False) as stored:
        record: dict[str, Any] = {key: stored[key] for key in stored.files}
    example: dict[str, Any] = {"index": index}
    for key, value in record.items():
        if key.endswith("_lengths") or (key.startswith("extra_") and s.extra_views == 0):
            continue
        if key.endswith("_rgba"):
            ends = np.cumsum(record[f"{key}_lengths"])
            starts = ends - record[f"{key}_lengths"]
            example[key] = [
                io.BytesIO(value[a:b].tobytes()) for a, b in zip(starts, ends, strict=True)
            ]
        elif value.dtype.kind == "U":
            example[key] = str(value)
        else:
            example[key] = value
    return example


def counts(clips: list[dict]) -> dict[str, dict]:
    """Of each split: records, objects, how many have colours, and how large they are seen."""
    out = {}
    for split in splits.SPLITS:
        chosen = [c for c in clips if c["split"] == split]
        objects = {c["object_id"]: c for c in chosen}.values()
        if chosen:
            quartiles = np.quantile([c["mask_area"] for c in chosen], [0.25, 0.5, 0.75])
            out[split] = {
                "clips": len(chosen),
                "objects": len(objects),
                "coloured": sum(c["coloured"] for c in objects),
                "textured": sum(c["textured"] for c in objects),
                "mask_area_quartiles": [round(float(q), 4) for q in quartiles],
            }
    return out


def _manifest(clips: list[dict], s: Settings) -> dict:
    """What a reader must know, with a hash over settings, records and split."""
    identity = {
        "schema": 1,
        # without points, as datasets of before had them: the hash stays the same
        "settings": {k: v for k, v in s._asdict().items() if k != "points" or v},
        "split_sha256": splits.SHA256,
        "records": [[c["clip_id"], c["sha256"]] for c in clips],
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    train = {(c["appearance"], c["motion"]) for c in clips if c["split"] == "train"}
    return {
        "schema": 1,
        "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "settings": identity["settings"],
        "split_sha256": splits.SHA256,
        "splits": {x: n for x in splits.SPLITS if (n := sum(c["split"] == x for c in clips))},
        "counts": counts(clips),
        "train_captions": sorted(captions.caption(a, m) for a, m in train),
        "clips": [{k: c[k] for k in ("clip_id", "split", "num_frames", "sha256")} for c in clips],
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("numpy", "pillow", "moderngl", "tensorflow-datasets")
        },
    }
