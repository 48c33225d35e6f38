"""`fourdstar evaluate --protocol`: predictions against truths, one JSON with a row for each object.

Clips are read and resized ahead by a few threads, measured one after the other, and let go: memory
holds some clips, and for distances of sets one row of features a clip (or frame). The geometry of
objects, which runs on the processor alone, is measured by threads beside it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from fourdstar_jax.arguments import counted
from fourdstar_jax.evaluate import clips, distances, geometry, motion
from fourdstar_jax.evaluate.clips import Pair, Source
from fourdstar_jax.evaluate.measured import SETS, VALUES, Clip, NotHere
from fourdstar_jax.evaluate.metrics import bootstrap_interval
from fourdstar_jax.evaluate.networks import Networks, Rehearsal
from fourdstar_jax.evaluate.progress import Log, Progress, about, silent
from fourdstar_jax.evaluate.protocols import Metric, Protocol, Resize, described
from fourdstar_jax.evaluate.resizing import resized

NO_OBJECT = {"reprojection": "no two views of any object see a tracked point"}
READERS = min(8, os.cpu_count() or 1)  # threads


Features = dict[str, tuple[np.ndarray, np.ndarray]]  # of predictions and truths, by metric


def score(
    protocol: Protocol,
    predictions: Source,
    truths: Source,
    networks: Networks,
    *,
    metrics: Sequence[str] = (),
    features: Features | None = None,
    known: dict[Any, np.ndarray] | None = None,
    log: Log = silent,
) -> dict[str, Any]:
    """All figures as a JSON-ready dict; of `metrics` alone where some are given.

    The features that distances of sets are of are put into `features`, to compare results by. What
    networks make of the truths is taken from `known`, and put there: for other predictions.

    `log` hears how long it takes before anything is measured, and while it is.

    Raises ValueError for clips that do not match, for weights that are missing or damaged, and
    where no metric is left; no clip is read before all networks are.
    """
    start = time.perf_counter()
    named = dict.fromkeys(metrics)  # each once, in order
    chosen = tuple(map(protocol.metric, named)) if metrics else protocol.metrics
    pairs = clips.pairs(predictions, truths, protocol)
    left_out: dict[str, str] = {}
    for metric in chosen:
        try:
            if metric.network is not None:
                networks.check(metric.network)
        except ValueError as error:
            if metrics or not metric.optional:
                raise
            left_out[metric.name] = str(error).removesuffix("; or choose --metrics")
    if len(pairs) < 2:
        for metric in chosen:
            if metric.per == "set":
                left_out[metric.name] = "one video is no set: its distance is not called that"
    sizes = tuple({m.resize for m in chosen if m.name not in left_out})
    values: dict[str, dict[str, dict[str, float]]] = {}  # object, view, metric
    sets: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    shapes: dict[str, dict[str, Any]] = {}
    hashes: dict[tuple[str, str], str] = {}
    names = [m.name for m in chosen if m.name not in left_out]
    log(
        f"{protocol.name}: {counted(len(pairs), 'clips')} of "
        f"{counted(len(truths.entries), 'objects')} by " + ", ".join(names)
    )
    for metric in chosen:
        if metric.network is not None and metric.name not in left_out:
            networks.get(metric.network)
    read = functools.partial(_read, protocol, sizes, {} if known is None else known)
    by_clip = [m for m in chosen if m.name not in left_out and m.per != "object"]
    whole = [m for m in chosen if m.per == "object"]
    all_clips = _ahead(pairs, read)
    if log is not silent:
        but = f", without {', '.join(m.name for m in whole)}" if whole else ""
        all_clips = _estimated(
            pairs, read, by_clip, networks, lambda line: log(line + but), predictions.at_once
        )
    progress = Progress(len(pairs), log)
    wholes: dict[str, dict[str, float]] = {}
    geometries: list[tuple[str, Future]] = []  # of objects
    beside = ThreadPoolExecutor(READERS)
    views: list[Clip] = []  # of the object so far
    try:
        for done, clip in enumerate(all_clips):
            pair = clip.pair
            found = values.setdefault(pair.object, {}).setdefault(pair.view, {})
            count, height, width, _ = clip.truth.images.shape
            hashes[pair.object, pair.view] = clip.truth_sha256
            shapes[pair.object] = {"frames": count, "size": [width, height]}
            for metric in by_clip:
                if metric.name in left_out:
                    continue
                try:
                    _add(clip, metric, networks, found, sets)
                except NotHere as why:
                    if done and any(metric.name in v for o in values.values() for v in o.values()):
                        raise ValueError(f"{_where(pair)}: {metric.name}: {why}") from None
                    left_out[metric.name] = str(why)
                except ValueError as error:
                    raise ValueError(f"{_where(pair)}: {metric.name}: {error}") from error
            if whole:
                views.append(dataclasses.replace(clip, at={}, features={}))
                if done + 1 == len(pairs) or pairs[done + 1].object != pair.object:
                    before = set(left_out)
                    wholes[pair.object], measure = _whole(
                        pair.object, views, predictions, truths, whole, left_out
                    )
                    views = []
                    if measure is not None:
                        geometries.append((pair.object, beside.submit(measure)))
                        if len(geometries) > READERS:  # no more of them wait than are measured
                            geometries[-READERS - 1][1].result()
                    new = [name for name in left_out if name not in before]
                    if new and len(wholes) > 1:
                        raise ValueError(f"object {pair.object}: {new[0]}: {left_out[new[0]]}")
            progress.step()
        for name, future in geometries:
            found = wholes[name] | future.result()
            wholes[name] = {m.name: found[m.name] for m in whole if m.name in found}
    finally:
        beside.shutdown(wait=False, cancel_futures=True)
    for name in (m.name for m in whole if m.name not in left_out):
        if not any(name in found for found in wholes.values()):
            left_out[name] = NO_OBJECT.get(name, "no object has 3 opaque Gaussians in every frame")
    kept = tuple(m for m in chosen if m.name not in left_out)
    if features is not None:
        features |= {n: (np.concatenate(a), np.concatenate(b)) for n, (a, b) in sets.items()}
    if not kept:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in left_out.items()))
    rows = _rows(values, shapes, wholes, predictions, truths)
    summary = {m.name: mean(m, rows) for m in kept if m.per != "set"}
    summary |= {m.name: _distance(m, sets[m.name], pairs) for m in kept if m.per == "set"}
    return {
        "schema": "fourdstar_jax evaluation",
        "schema_version": 1,
        "protocol": {
            "name": protocol.name,
            "version": protocol.version,
            "background": protocol.background,
            "text": described(protocol, kept),
            "left_out": left_out
            | {m.name: "not chosen" for m in protocol.metrics if m not in chosen},
        },
        "predictions": {"path": predictions.path, "kind": predictions.kind, **predictions.about},
        "truths": {
            "path": truths.path,
            "kind": truths.kind,
            "frames_sha256": _digest(hashes),
            **truths.about,
        },
        "generation": _generation(predictions),
        "azimuths_deg": truths.azimuths or predictions.azimuths,
        "num_objects": len(rows),
        "num_clips": len(pairs),
        "summary": summary,
        "objects": rows,
        "weights": networks.about(),
        "versions": _versions(),
        "device": str(jax.devices()[0].device_kind),
        "seconds": time.perf_counter() - start,
    }


def _where(pair: Pair) -> str:
    return f"object {pair.object}, view {pair.view}"


def _add(
    clip: Clip,
    metric: Metric,
    networks: Networks,
    found: dict[str, float],
    sets: dict[str, tuple[list[np.ndarray], list[np.ndarray]]],
) -> None:
    """A metric of a clip: its mean into what is `found` of it, or features into those of `sets`."""
    if metric.per != "set":
        measured = _finite(VALUES[metric.name](clip, metric, networks))
        found[metric.name] = float(np.mean(measured))
        return
    sides = sets.setdefault(metric.name, ([], []))
    for rows, new in zip(sides, SETS[metric.name](clip, metric, networks), strict=True):
        rows.append(_finite(new))


def _finite(values: Any) -> np.ndarray:
    """Values of a clip's frames, or features. Raises ValueError if one is no number."""
    values = np.asarray(values)
    if not np.isfinite(values).all():
        raise ValueError("what was measured is not finite")
    return values


def _ahead(pairs: Sequence[Pair], read: Callable[[Pair], Clip]) -> Iterator[Clip]:
    """Clips in order, a few of them read ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque = deque()
        todo = iter(pairs)
        try:
            for pair in todo:
                waiting.append(pool.submit(read, pair))
                if len(waiting) > READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _estimated(
    pairs: Sequence[Pair],
    read: Callable[[Pair], Clip],
    metrics: Sequence[Metric],
    networks: Networks,
    log: Log,
    at_once: int,
) -> Iterator[Clip]:
    """As `_ahead`, after `log` was told how long all will take.

    That is by the reading of the first object's clips, of which no more are held than are read
    ahead anyway and with which `at_once` objects are made, and by what a clip of the first one's
    size takes to measure.
    """
    first = [pair for pair in pairs[: READERS + 1] if pair.object == pairs[0].object]
    start = time.perf_counter()
    here = deque(_ahead(first, read))
    reading = (time.perf_counter() - start) / len(here) / at_once
    seconds = _seconds(metrics, here[0], networks)
    log(f"{about(seconds * len(pairs) + reading * (len(pairs) - len(here)))} for all")
    yield from (here.popleft() for _ in first)
    yield from _ahead(pairs[len(first) :], read)


def _seconds(metrics: Sequence[Metric], clip: Clip, networks: Networks) -> float:
    """How long a clip is measured. All programs are compiled by this, and each runs one batch."""
    rehearsal, start = Rehearsal(networks), 0.0
    for _ in range(2):  # what is no network's compiles at the first time
        start, rehearsal.seconds = time.perf_counter(), 0.0
        # truths that are known need no network; what comes of these pictures is not to be kept
        copy = dataclasses.replace(clip, known=dict(clip.known), features={})
        for metric in metrics:
            with contextlib.suppress(ValueError, NotHere):  # the measurement will tell
                (VALUES | SETS)[metric.name](copy, metric, rehearsal)
    return time.perf_counter() - start + rehearsal.seconds


def _read(
    protocol: Protocol,
    sizes: tuple[tuple[Resize, ...], ...],
    known: dict[Any, np.ndarray],
    pair: Pair,
) -> Clip:
    prediction, truth = clips.load(pair, protocol)
    at = {}
    for steps in sizes:
        at[steps] = tuple(resized(x.images, steps) for x in (prediction, truth))
    frames = np.ascontiguousarray(truth.images)
    sha = hashlib.sha256(f"{frames.shape} ".encode())
    sha.update(frames.data)
    return Clip(pair, prediction, truth, at, sha.hexdigest(), known)


def _digest(hashes: dict[tuple[str, str], str]) -> str:
    """SHA-256 of all true frames, whatever order and files they came in."""
    return hashlib.sha256(
        json.dumps(sorted([*k, v] for k, v in hashes.items())).encode()
    ).hexdigest()


def _generation(predictions: Source) -> dict[str, Any] | None:
    """Seconds and peak memory of making the objects, over those that say so; None of none."""
    made = [entry.about for entry in predictions.entries.values() if "seconds" in entry.about]
    if not made:
        return None
    seconds = [about["seconds"] for about in made]
    return {
        "objects": len(made),
        "seconds": {"mean": float(np.mean(seconds)), "median": float(np.median(seconds))},
        "peak_memory_bytes": max(a.get("peak_memory_bytes") or 0 for a in made) or None,
        "devices": sorted({about["device"] for about in made if "device" in about}),
    }


def _whole(
    name: str,
    clips: Sequence[Clip],
    predictions: Source,
    truths: Source,
    metrics: Sequence[Metric],
    left_out: dict[str, str],
) -> tuple[dict[str, float], Callable[[], dict[str, float]] | None]:
    """Figures of an object by all that is known of it, and what measures its geometry, if any does.

    What lacks its inputs is left out.
    """
    prediction, truth = predictions.entries[name], truths.entries[name]
    gaussians = None if prediction.gaussians is None else prediction.gaussians()
    points = None if truth.points is None else truth.points()
    found: dict[str, float] = {}
    measure = None
    for metric in metrics:
        if metric.name in left_out:
            continue
        try:
            if metric.name == "reprojection":
                if (value := _reprojection(clips, _points(points))) is not None:
                    found["reprojection"] = value
                continue
            if gaussians is None:
                raise NotHere("predictions are not Gaussians, as objects made here are")
            means, opacities = np.asarray(gaussians.means), np.asarray(gaussians.opacities)
            if metric.name == "jitter":
                found["jitter"] = motion.jitter(means, opacities)
            elif measure is None:
                where = f"object {name}: {metric.name}"
                measure = functools.partial(_geometry, where, means, opacities, _points(points))
        except NotHere as why:
            left_out[metric.name] = str(why)
        except ValueError as error:
            raise ValueError(f"object {name}: {metric.name}: {error}") from error
    return found, measure


def _geometry(where: str, means, opacities, points: np.ndarray) -> dict[str, float]:
    """Nothing of an object without a surface: the figure tells of how many objects it is."""
    try:
        return geometry.measure(means, opacities, points)
    except geometry.NoSurface:
        return {}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _points(points: np.ndarray | None) -> np.ndarray:
    if points is None:
        raise NotHere(
            "the truth has no tracked points: `fourdstar prepare --points` makes data sets"
        )
    return points


def _reprojection(clips: Sequence[Clip], points: np.ndarray) -> float | None:
    """None where no two views see a point, as those of a flat object from two sides do not."""
    truths = [clip.truth for clip in clips]
    if any(truth.depths is None or truth.cameras is None for truth in truths):
        raise NotHere("the truth has no depth: `fourdstar prepare --depth` makes data sets")
    if len(clips) < 2:
        raise NotHere("one view agrees with itself")
    cameras = jax.tree.map(lambda *x: np.concatenate(x), *(truth.cameras for truth in truths))
    sums = np.zeros(2)
    for t, at_t in enumerate(points[: len(truths[0].images)]):
        pictures = np.stack([clip.prediction.images[t] for clip in clips]) / 255
        depths = np.stack([np.asarray(truth.depths)[t] for truth in truths])
        depths = depths.astype(np.float32).reshape(pictures.shape[:3])
        sums += motion.reprojection_error(pictures, depths, cameras, at_t)
    return float(sums[0] / sums[1]) if sums[1] else None


# From values to rows and figures


def _rows(values, shapes, wholes, predictions: Source, truths: Source) -> list[dict[str, Any]]:
    rows = []
    for name, views in values.items():
        found = list(views.values())
        metrics = {m: float(np.mean([v[m] for v in found])) for m in found[0]}
        metrics |= wholes.get(name, {})
        rows.append(
            {
                "object": name,
                "group": truths.entries[name].group,
                **shapes[name],
                "metrics": metrics,
                "views": views,
                "generation": predictions.entries[name].about,
            }
        )
    return rows


def mean(metric: Metric, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A metric's figure over objects, with an interval where there are two groups of them."""
    count = len(rows)
    rows = [row for row in rows if metric.name in row["metrics"]]
    values = np.array([row["metrics"][metric.name] for row in rows])
    groups = np.array([row["group"] for row in rows])
    interval = None
    if len(set(groups)) > 1:
        interval = list(bootstrap_interval(values, groups=groups)[1:])
    found = {"value": float(values.mean()), "interval_95": interval, "objects": len(rows)}
    if len(rows) < count:
        found["warning"] = f"{count - len(rows)} of {count} objects could not be measured"
    return found


def _distance(metric: Metric, sets, pairs: Sequence[Pair]) -> dict[str, Any]:
    first, second = (np.concatenate(rows) for rows in sets)
    groups = np.array([p.group for p in pairs])
    several = len(set(groups)) > 1
    out: dict[str, Any] = {"rows": len(first), "features": first.shape[1], "interval_95": None}
    if metric.name == "mmd":
        out["value"] = distances.kernel_distance(first, second)
        if several:
            out["interval_95"] = list(
                distances.middle(distances.kernel_draws(first, second, groups))
            )
        return out
    out["value"] = distances.frechet_distance(first, second)
    if len(first) <= first.shape[1]:
        out["warning"] = (
            f"{len(first)} rows of {first.shape[1]} features: the covariances have rank "
            f"{len(first) - 1} at most, and the distance depends on the number of rows"
        )
    if several and len(first) == len(groups):  # of frames it would take hours
        out["interval_95"] = list(distances.middle(distances.frechet_draws(first, second, groups)))
        out["interval"] = "drawn with replacement, which raises the distance: read its width"
    return out


def _versions() -> dict[str, str]:
    names = ("fourdstar-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "scipy", "av")
    return {name: importlib.metadata.version(name) for name in names}
