"""From animated GLB files, or L4GM's renders, to a dataset: what `fourdstar prepare` does.

Every asset is rendered (or read) once, by a process of its own, into a work folder (`workers`),
which many machines may share; the dataset is made of that. Files that cannot be read are
quarantined, clips that hardly move are dropped; both are named with the reason in `report.json`.
The dataset is written to a temporary folder beside the wanted one and renamed at the end, so that a
folder of that name is complete.
"""

import collections
import contextlib
import csv
import errno
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fourdstar_jax.arguments import counted
from fourdstar_jax.data import blender as blender_drawing
from fourdstar_jax.data import l4gm, splits
from fourdstar_jax.data import render as rendering
from fourdstar_jax.data.assets import Job, content_hash
from fourdstar_jax.data.licences import UNKNOWN, has, listed
from fourdstar_jax.data.settings import SAMPLES, Limits, Settings
from fourdstar_jax.data.workers import Work, run
from fourdstar_jax.folders import DATASET, file_sha256, output_folder
from fourdstar_jax.geometry import Rig
from fourdstar_jax.shards import WHOLE, Shard
from fourdstar_jax.text import captions

LIMITS = Limits()
POLL_S = 1.0  # while other processes finish what they are at


def prepare(
    assets_dir: str | Path,
    out_dir: str | Path,
    *,
    renders: bool = False,
    list_file: str | Path | None = None,
    licence: str | None = None,
    limit: int | None = None,
    blender: str | Path | None = None,
    captions_from: Sequence[str | Path] = (),
    work_dir: str | Path | None = None,
    more_work: Sequence[str | Path] = (),
    workers: int | None = None,
    limits: Limits = LIMITS,
    retry: bool = False,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> dict:
    """Renders every moving clip below `assets_dir` into `out_dir`; returns the manifest.

    Args:
      settings: fields of `Settings`.
      blender: a Blender, or a Python that has `bpy`, which draws the colours (`data.blender`).
      renders: `assets_dir` has pictures in L4GM's layout (`l4gm`), and no GLB files.
      list_file: the files to take, a path below `assets_dir` a line; otherwise all there are.
      licence: keep assets that have it in `assets_dir/assets.csv`, as `licences.has` says ("cc0").
      limit: keep the first so many assets, in order of their paths or of the list.
      captions_from: CSV files of captions, as `captions.read` says, in place of those from names.
      work_dir: where rendered assets are kept; what is there already is not rendered again, and
        what other processes are at is waited for. None is a temporary folder.
      more_work: folders like it, of shards that had their own, which are only read.
      workers: processes that render; None is one a core, 0 renders in this process, without limits.
      retry: try assets again that are quarantined in `work_dir`.
      overwrite: replace `out_dir` if it holds a dataset.

    Raises ValueError for settings out of range, a `blender` that is none, a folder without usable
    clips, a `work_dir` of other settings and an `out_dir` that is not empty; RuntimeError when
    there is no EGL.
    """
    chosen, program = _chosen(settings, blender)
    assets = _Assets(Path(assets_dir), renders, list_file, licence, limit, chosen, program)
    out_dir = Path(out_dir)
    with output_folder(out_dir, DATASET, overwrite=overwrite) as partial:
        place = partial / "work" if work_dir is None else Path(work_dir)
        work = Work(place, chosen, limits, [Path(folder) for folder in more_work])
        start = time.perf_counter()
        _render(work, assets, WHOLE, workers, retry, log)
        seconds = time.perf_counter() - start
        results = {file: work.result(file) for file in assets.files}
        clips = sorted(
            (c for r in results.values() for c in r["clips"]), key=lambda c: c["clip_id"]
        )
        told = {
            name: [x for r in results.values() for x in r[name]]
            for name in ("quarantined", "dropped", "warnings")
        }
        if not clips:
            left_out = told["quarantined"] + told["dropped"]
            shown = [f"{q['file']}: {q['reason']}" for q in left_out[:3]]
            more = len(left_out) - len(shown)
            detail = "; ".join(shown) + (f" and {more} more" if more else "")
            raise ValueError(
                f"no clip left of {len(assets.files)} files below {assets_dir} ({detail})"
            )
        told_by = _captioned(clips, captions_from) if captions_from else None
        _build(partial, clips, chosen)
        images = sum(c["num_frames"] for c in clips) * (chosen.views + chosen.extra_views)
        worker_s = sum(r["seconds"] for r in results.values())
        manifest = _manifest(clips, chosen, captioned=told_by is not None)
        report = {
            "assets": len(assets.files),
            "assets_without_the_licence": assets.without_the_licence,
            "clips_kept": len(clips),
            "counts": manifest["counts"],
            "missing": sorted(q["file"] for q in told["quarantined"] if _missing(q)),
            "quarantined": sorted(told["quarantined"], key=lambda q: q["file"]),
            "dropped": sorted(told["dropped"], key=lambda d: (d["file"], d["clip"])),
            "reasons": {name: _reasons(told[name]) for name in ("quarantined", "dropped")},
            "warnings": sorted(told["warnings"], key=lambda w: w["file"]),
            **({} if told_by is None else {"captions": told_by}),
            "images": images,
            "render_seconds": round(seconds, 1),  # of this run
            "worker_seconds": round(worker_s, 1),  # of all processes that rendered, added up
            "images_per_worker_second": round(images / max(worker_s, 1e-3), 1),
        }
        for name, content in (("report.json", report), (DATASET.manifest, manifest)):
            (partial / name).write_text(json.dumps(content, indent=1) + "\n")
        if work_dir is None:
            shutil.rmtree(place)
    of_splits = ", ".join(f"{n} {s}" for s, n in manifest["splits"].items())
    log(
        f"{counted(len(clips), 'clips')} ({of_splits}), {len(report['dropped'])} dropped, "
        f"{counted(len(report['quarantined']), 'files')} quarantined (of which "
        f"{len(report['missing'])} not there): {out_dir / 'report.json'}"
    )
    if told_by is not None:
        log(
            "captions: "
            + ", ".join(
                f"{told['found']} of {told['found'] + len(told['without'])} {what}"
                for what, told in told_by.items()
            )
        )
    return manifest


def _chosen(
    settings: dict[str, Any], blender: str | Path | None
) -> tuple[Settings, blender_drawing.Program | None]:
    """The settings, with what is to be known of Blender if it draws."""
    if blender is None:
        return Settings(**settings).check(), None
    program = blender_drawing.find(blender)
    chosen = Settings(**settings, blender=program.version)
    if chosen.samples is None:
        chosen = chosen._replace(samples=SAMPLES)
    return chosen.check(), program


def _captioned(clips: list[dict], paths: Sequence[str | Path]) -> dict[str, dict]:
    """Gives clips the captions of CSV files where these have them; returns what the report says.

    Rows of an object have its id, or the last part of that (Objaverse's uid), and tell its looks;
    rows of a clip have the clip's id and tell its motion. Raises ValueError if there is no row of
    any.
    """
    ids = {name for c in clips for name in (c["object_id"], _uid(c))}
    ids |= {captions.motion_id(c["clip_id"]) for c in clips}
    found = captions.read(paths, ids)
    if not found:
        files, uid = ", ".join(map(str, paths)), _uid(clips[0])
        raise ValueError(f"{files}: no row is of these {len(clips)} clips, as of {uid!r}")
    told = {name: {"found": set(), "without": set()} for name in ("objects", "motions")}
    for clip in clips:
        looks = found.get(clip["object_id"], found.get(_uid(clip)))
        motion_id = captions.motion_id(clip["clip_id"])
        motion = found.get(motion_id)
        clip["appearance"], clip["motion"] = looks or clip["appearance"], motion or clip["motion"]
        told["objects"]["found" if looks else "without"].add(clip["object_id"])
        told["motions"]["found" if motion else "without"].add(motion_id)
    return {
        what: {"found": len(names["found"]), "without": sorted(names["without"])}
        for what, names in told.items()
    }


def _uid(clip: dict) -> str:
    return clip["object_id"].rpartition("/")[2]


def _reasons(told: list[dict]) -> dict[str, int]:
    """How often each reason occurs, whatever its numbers; the most frequent first."""
    kinds = (re.sub(r"\d[\d.]*", "N", one["reason"].partition(": ")[0]) for one in told)
    return dict(collections.Counter(kinds).most_common())


def render(
    assets_dir: str | Path,
    work_dir: str | Path,
    *,
    shard: Shard,
    renders: bool = False,
    more_work: Sequence[str | Path] = (),
    list_file: str | Path | None = None,
    licence: str | None = None,
    limit: int | None = None,
    blender: str | Path | None = None,
    workers: int | None = None,
    limits: Limits = LIMITS,
    retry: bool = False,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> None:
    """Renders a part of the assets into `work_dir`, and then what other parts have not begun.

    `prepare` with the same arguments makes the dataset. Raises as that does.
    """
    chosen, program = _chosen(settings, blender)
    assets = _Assets(Path(assets_dir), renders, list_file, licence, limit, chosen, program)
    work = Work(Path(work_dir), chosen, limits, [Path(folder) for folder in more_work])
    _render(work, assets, shard, workers, retry, log)
    left = [file for file in assets.files if not work.done(file)]
    told = f"{len(assets.files) - len(left)} of {len(assets.files)} assets are in {work_dir}"
    log(told + (f"; other processes are at {len(left)}" if left else ""))


def _missing(quarantined: dict) -> bool:
    return quarantined["reason"] == f"cannot be read: {os.strerror(errno.ENOENT)}"


class _Assets:
    """The files to take, as they are listed at the moment, and what is known of them."""

    def __init__(
        self,
        folder: Path,
        renders: bool,
        list_file: str | Path | None,
        licence: str | None,
        limit: int | None,
        settings: Settings,
        program: blender_drawing.Program | None,
    ):
        if not folder.is_dir():
            raise ValueError(f"assets_dir={str(folder)!r} is not a folder")
        if renders:
            _check_renders(settings)
        self._program = program
        self.renders, self._what = renders, "clip of L4GM's layout" if renders else ".glb file"
        of_splits = settings.splits
        self.folder, self._list, self._licence, self._limit = folder, list_file, licence, limit
        self._splits = of_splits
        self._may_have = splits.may_have(of_splits or splits.SPLITS)
        self._licences: dict[str, str] = {}
        table = folder / "assets.csv"
        if table.is_file():
            with open(table, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if not {"file", "licence"} <= set(reader.fieldnames or ()):
                    raise ValueError(f"{table} has no columns file and licence")
                self._licences = {row["file"]: row["licence"] or UNKNOWN for row in reader}
        self.read()

    def read(self) -> None:
        """Looks again at what is listed."""
        if self._list is not None:
            files = _listed(Path(self._list), "" if self.renders else ".glb")
        elif self.renders:
            files = l4gm.clips(self.folder)
        else:
            found = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.glb"))
            files = sorted(found)
        kept = files
        if self._licence is not None:
            kept = [f for f in files if has(self._licences.get(f, UNKNOWN), self._licence)]
            if files and not kept:
                there = listed(self._licences.get(f, UNKNOWN) for f in files)
                raise ValueError(
                    f"no file below {self.folder} has the licence {self._licence!r}: "
                    f"there are {there}"
                )
        self.without_the_licence = len(files) - len(kept)
        if self._splits is not None:
            kept = [f for f in kept if self._wanted(self.folder / f, f)]
            if not kept:
                wanted = " or ".join(self._splits)
                raise ValueError(f"no file below {self.folder} has a clip of {wanted}")
        self.files = kept[: self._limit]
        if not self.files:
            raise ValueError(
                f"no {self._what} below {self.folder}"
                if self._list is None
                else f"{self._list} lists no {self._what}"
            )

    def _wanted(self, path: Path, file: str) -> bool:
        """Whether a clip may be; a file that is not there is told later."""
        return not path.is_file() or self._may_have(file_sha256(path), file.removesuffix(".glb"))

    def job(self, file: str, settings: Settings) -> Job:
        """What is to be made of a file."""
        path = self.folder if self.renders else self.folder / file
        licence = self._licences.get(file, UNKNOWN)
        return Job(str(path), file, licence, settings, self.renders, self._program)


def _check_renders(s: Settings) -> None:
    """Raises ValueError for what pictures do not have or cannot be made to have."""
    for name, wanted in (
        ("flow", False),
        ("depth", False),
        ("points", 0),
        ("rigs", 1),
        ("shift", 0.0),
        ("blender", None),
    ):
        if (value := getattr(s, name)) != wanted:
            raise ValueError(f"{name}={value} needs GLB files: renders have {name}={wanted}")
    if tuple(s.zoom) != (1.0, 1.0):
        raise ValueError(f"zoom={s.zoom} needs GLB files: renders are as large as they are, 1 1")


def _listed(path: Path, ending: str) -> list[str]:
    """The paths in a list file: one a line, in order, each once."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"{path} cannot be read: {why}") from error
    files: dict[str, None] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        parts = PurePosixPath(line).parts
        if "://" in line:
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is a URL: download it first")
        if not line.endswith(ending) or line.startswith("/") or ".." in parts or "\0" in line:
            what = "a .glb file below --assets" if ending else "a clip below --renders"
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is no path of {what}")
        files[PurePosixPath(line).as_posix()] = None
    return list(files)


def _render(
    work: Work,
    assets: _Assets,
    shard: Shard,
    workers: int | None,
    retry: bool,
    log: Callable[[str], None],
) -> None:
    """Does what is left to do: of the shard, then of the others; the only shard waits for more."""
    if not assets.renders:
        rendering.Renderer(work.settings.image_size, 1).close()  # a missing EGL is said here, once
    if retry:
        for i in shard.own(len(assets.files)):
            work.forget_quarantined(assets.files[i])

    def claimed(numbers: Iterator[int]) -> Iterator[Job]:
        for file in [assets.files[i] for i in numbers]:
            if work.take(file):
                yield assets.job(file, work.settings)

    def jobs() -> Iterator[Job]:
        yield from claimed(shard.own(len(assets.files)))
        assets.read()  # it may have grown
        yield from claimed(shard.own(len(assets.files)))
        yield from claimed(shard.others(len(assets.files)))

    workers = os.cpu_count() or 1 if workers is None else workers
    start, count, waiting = time.perf_counter(), 0, False
    total = sum(not work.done(assets.files[i]) for i in shard.own(len(assets.files)))
    while True:
        for _ in run(work, jobs(), workers):
            count += 1
            if count % max(1, total // 10) == 0 or count == total:
                elapsed = time.perf_counter() - start
                left = elapsed / count * max(0, total - count)
                log(f"rendered {count}/{total} assets, {elapsed:.0f} s, about {left:.0f} s left")
        left = sum(not work.done(file) for file in assets.files) if shard.parts == 1 else 0
        if not left:
            return
        if not waiting:
            log(f"waits for {left} assets that other processes are at")
            waiting = True
        time.sleep(POLL_S)


def _build(folder: Path, clips: list[dict], s: Settings) -> None:
    """Writes the records with tensorflow-datasets and moves them to the top of `folder`."""
    from fourdstar_jax.data.builder import Fourdstar, FourdstarConfig

    records: dict[str, list] = {}
    for index, clip in enumerate(clips):
        read = functools.partial(_example, clip, index, s)
        records.setdefault(clip["split"], []).append((clip["clip_id"], read))

    config = FourdstarConfig(
        name=f"{s.image_size}px_{s.views}+{s.extra_views}views",
        image_size=s.image_size,
        views=s.views,
        extra_views=s.extra_views,
        flow=s.flow,
        depth=s.depth,
        points=s.points,
        splits=tuple(x for x in splits.SPLITS if x in records),
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


def _example(clip: dict, index: int, s: Settings) -> dict:
    path = clip["record"]
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):
        with np.load(path, allow_pickle=False) as stored:
            record = {key: stored[key] for key in stored.files}
    if content_hash(record) != clip["sha256"]:
        raise ValueError(f"{path} is damaged: remove its folder and prepare again")
    example: dict[str, Any] = {"index": index}
    record |= {name: np.asarray(clip[name]) for name in ("appearance", "motion")}
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


def _recipe(clips: list[dict], s: Settings) -> dict[str, Any]:
    """What was to be rendered, which is the same on all machines where pixels' last bits are not.

    Of an asset that an earlier version rendered into a work folder the hash is not known: null.
    """
    return {
        "schema": 1,
        "look": rendering.LOOK,
        "settings": _told(s, "blender", "samples"),
        "rig": Rig.around(s.views, fps=s.fps).to_dict(),
        "split_sha256": splits.SHA256,
        "records": [[c["clip_id"], c.get("asset_sha256"), c["num_frames"]] for c in clips],
    }


def _told(s: Settings, *later: str) -> dict[str, Any]:
    """Settings by name, `later` ones only if set: the hash of datasets before them is the same."""
    return {k: v for k, v in s._asdict().items() if v or k not in later}


def _hash(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _manifest(clips: list[dict], s: Settings, *, captioned: bool) -> dict:
    """What a reader must know, with a hash over settings, records and split."""
    identity = {
        "schema": 1,
        "settings": _told(s, "points", "splits", "blender", "samples"),
        "split_sha256": splits.SHA256,
        "records": [[c["clip_id"], c["sha256"]] for c in clips],
    }
    if captioned:
        identity["captions"] = [[c["appearance"], c["motion"]] for c in clips]
    train = {(c["appearance"], c["motion"]) for c in clips if c["split"] == "train"}
    return {
        "schema": 1,
        "sha256": _hash(identity),
        "recipe_sha256": _hash(_recipe(clips, s)),
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
