"""The paper's tables as commands: rows of bundles and other systems' folders, on one data set.

What has no bundle or folder is named as not run. The paper's values stand beside ours only where
the true frames are the paper's, by their hash; else they are a table of their own.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from fourdstar_jax import bundle, outside
from fourdstar_jax.arguments import counted
from fourdstar_jax.data import pipeline, transforms
from fourdstar_jax.data.batching import filled_batches, in_batches
from fourdstar_jax.evaluate import clips, distances, protocols, readers, report, score
from fourdstar_jax.evaluate.clips import Entry, Frames, Source, View
from fourdstar_jax.evaluate.device import ALONE
from fourdstar_jax.evaluate.networks import Networks
from fourdstar_jax.folders import replace_file
from fourdstar_jax.generate import Model, decode_tokens, encode_images
from fourdstar_jax.star import sample
from fourdstar_jax.text.captions import NEUTRAL_PROMPT
from fourdstar_jax.types import Gaussians

BATCH = 8  # pictures through a tokenizer
OBJECTS, KEPT = 48, 8 << 30  # that STAR makes at once at most, and bytes of keys and values


def run(
    config: Mapping[str, Any],
    data_dir: Path,
    out: Path,
    networks: Networks,
    *,
    read_splats: clips.ReadSplats,
    paths: Mapping[str, Sequence[str]] | None = None,
    seeds: Sequence[int] = (0,),
    protocol_name: str | None = None,
    frames: int | None = None,
    split: str | None = None,
    metrics: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> str:
    """Runs the rows of a table (configs/tables), and returns it as Markdown.

    Each row's result is `out`/ROW.json, the table `out`/table.md. `paths` are rows' own bundles
    and folders, several of what was trained several times; what generates does so by each of the
    `seeds`. A row of several runs is their mean, object by object, with the runs in
    `out`/ROW_1.json and so on. Every row is compared with the table's own (`against`), in pairs.
    Metrics whose weights are missing are left out, and named. Raises ValueError for rows that the
    table has not, where none can be run, and for a data set without the protocol's views.
    """
    own = dict(paths or {})
    if unknown := own.keys() - config["rows"].keys():
        names = ", ".join(config["rows"])
        raise ValueError(f"--rows: the table has no row {min(unknown)!r}, only {names}")
    protocol = protocols.find(protocol_name or config["protocol"])
    part: str = split or config["split"]
    truths = clips.open_source(data_dir, protocol, read_splats=read_splats, split=part)
    truths = first_frames(truths, frames or config["frames"])
    kept, left_out = _measured(protocol, networks, metrics)
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {}
    results: dict[str, dict[str, Any]] = {}
    not_run: dict[str, str] = {}
    known: dict[Any, np.ndarray] = {}  # what networks make of the truths, the same for all rows
    for name in config.get("order", config["rows"]):
        row = config["rows"][name]
        several = seeds if row["how"] == "generate" else seeds[:1]
        paths_of = [Path(p) for p in own.get(name) or [row["path"]]]
        if missing := [path for path in paths_of if not path.exists()]:
            not_run[name] = f"{missing[0]} does not exist"  # of several, none stands for the row
            log(f"{row['label']} is not run: {not_run[name]}")
            continue
        for path, seed in itertools.product(paths_of, several):
            told = f", seed {seed}" if len(several) > 1 else ""
            log(f"{row['label']}: {path}{told}")
            try:
                predictions = predicted(row["how"], path, data_dir, part, truths, protocol, seed)
            except ValueError as error:
                not_run[name] = str(error)
                log(f"{row['label']} is not run: {error}")
                runs.pop(name, None)
                break
            run = Run({}, {})
            run.result.update(
                score.score(
                    protocol, predictions, truths, networks, metrics=kept, features=run.features,
                    known=known, log=log,
                )
            )  # fmt: skip
            runs.setdefault(name, []).append(run)
        if name in runs:  # written at once: the rows after it may take hours
            results[name] = merged(protocol, runs[name])
            files = {name: results[name]}
            if len(runs[name]) > 1:
                files |= {f"{name}_{i}": run.result for i, run in enumerate(runs[name], 1)}
            for file, content in files.items():
                replace_file(out / f"{file}.json", f"{json.dumps(content, indent=1)}\n".encode())
    compared = {}
    if (ours := config["against"]) in results:
        compared = {
            name: differences(protocol, runs[name], runs[ours], truths)
            for name in results
            if name != ours
        }
        text = json.dumps({"less": ours, "rows": compared}, indent=1)
        replace_file(out / "differences.json", f"{text}\n".encode())
    if not results:
        told = "; ".join(f"{name}: {why}" for name, why in not_run.items())
        raise ValueError(f"no row of the table can be run: {told}")
    text = markdown(config, results, not_run, left_out, protocol=protocol, compared=compared)
    replace_file(out / "table.md", text.encode())
    return text


class Run(NamedTuple):
    """One bundle and seed of a row."""

    result: dict[str, Any]
    features: score.Features


def merged(protocol: protocols.Protocol, runs: Sequence[Run]) -> dict[str, Any]:
    """The result of several runs: every object's mean over them, and intervals over objects.

    Several samples of a clip are no more objects. Distances of sets are the runs' mean, whose
    interval, of clips, is not known.
    """
    first = runs[0].result
    if len(runs) == 1:
        return first
    objects = []
    for rows in zip(*(run.result["objects"] for run in runs), strict=True):
        names = [name for name in rows[0]["metrics"] if all(name in r["metrics"] for r in rows)]
        means = {name: float(np.mean([r["metrics"][name] for r in rows])) for name in names}
        objects.append({**rows[0], "metrics": means, "views": {}})
    summary = {}
    for name, figure in first["summary"].items():
        values = [run.result["summary"][name]["value"] for run in runs]
        if protocol.metric(name).per == "set":
            summary[name] = {**figure, "value": float(np.mean(values)), "interval_95": None}
            summary[name].pop("interval", None)
        else:
            summary[name] = score.mean(protocol.metric(name), objects)
        summary[name]["runs"] = values
    return {**first, "objects": objects, "summary": summary, "runs": len(runs)}


def differences(
    protocol: protocols.Protocol, runs: Sequence[Run], others: Sequence[Run], truths: Source
) -> dict[str, Any]:
    """What `runs` have more than `others`, clip by clip, with 95 % intervals over objects."""
    first, second = merged(protocol, runs), merged(protocol, others)
    found = report.compare(first, outside.Fields(second, "the other row"))["metrics"]
    groups = np.array([e.group for e in truths.entries.values() for _ in e.views])
    for name in first["summary"]:
        if protocol.metric(name).per != "set":
            continue
        values = [np.mean(result["summary"][name]["value"]) for result in (first, second)]
        found[name] = {"difference": float(values[0] - values[1]), "interval_95": None}
        rows = len(runs[0].features[name][0])
        if rows == len(groups) and len(set(groups)) > 1:  # of frames it would take hours
            draw = distances.kernel_draws if name == "mmd" else distances.frechet_draws
            draws = [
                np.mean([draw(*run.features[name], groups) for run in side], axis=0)
                for side in (runs, others)
            ]
            found[name]["interval_95"] = list(distances.middle(draws[0] - draws[1]))
    return found


def _measured(
    protocol: protocols.Protocol, networks: Networks, metrics: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Metrics whose weights are there, and why the others are left out; chosen ones must be."""
    kept, left_out = [], {}
    for metric in [protocol.metric(m) for m in metrics] or protocol.metrics:
        try:
            if metric.network is not None:
                networks.check(metric.network)
            kept.append(metric.name)
        except ValueError as error:
            if metrics:
                raise
            left_out[metric.name] = str(error).removesuffix("; or choose --metrics")
    if not kept:
        raise ValueError("; ".join(left_out.values()))
    for name in kept:
        if (network := protocol.metric(name).network) is not None:
            networks.get(network)  # says what is wrong with it before anything is made
    return kept, left_out


def first_frames(source: Source, count: int) -> Source:
    """A source of which the first `count` frames alone are looked at."""

    def cut(view: View) -> View:
        def load(size: tuple[int, int] | None) -> Frames:
            found = view.load(size)
            arrays = {k: getattr(found, k) for k in ("images", "alphas", "flow", "depths")}
            return found._replace(**{k: x if x is None else x[:count] for k, x in arrays.items()})

        return view._replace(load=load)

    def points(entry: Entry):
        return None if entry.points is None else lambda: entry.points()[:count]  # type: ignore[misc]

    entries = {
        name: dataclasses.replace(e, views=tuple(map(cut, e.views)), points=points(e))
        for name, e in source.entries.items()
    }
    about = source.about | {"frames": f"the first {count} of each clip"}
    return dataclasses.replace(source, entries=entries, about=about)


def predicted(
    how: str,
    path: Path,
    data_dir: Path,
    split: str,
    truths: Source,
    protocol: protocols.Protocol,
    seed: int = 0,
) -> Source:
    """A row's predictions, made as they are asked for. Raises ValueError if it cannot be run."""
    azimuths = truths.azimuths
    assert azimuths is not None, "of a data set"
    if how in readers.SYSTEMS:
        return readers.open_source(path, how, protocol, azimuths=azimuths)
    data = pipeline.ClipSource(data_dir, split, cache_bytes=0, maps=())
    rig = pipeline.rig(data_dir)
    names = pipeline.Records(data_dir, split, only=("clip_id",))
    places = {clips.file_name(pipeline.as_text(names[i]["clip_id"])): i for i in range(len(names))}
    frames = {
        places[name]: len(entry.views[0].load(None).images)
        for name, entry in truths.entries.items()
    }

    def images(i: int) -> np.ndarray:
        return transforms.on_white(data[i]["rig_rgba"][: frames[i]])[0]

    if how == "tokenizer":
        found = bundle.read(path)
        if found.tokenizer is None:
            raise ValueError(f"{path} has no tokenizer")
        return _pictures(path, found, truths, azimuths)
    model = Model(path)
    if how == "generate" and "star" not in model.bundle.stages:
        raise ValueError(f"{path} has no STAR: it cannot generate")
    if dataclasses.replace(model.rig, fps=rig.fps) != rig:
        raise ValueError(f"the data set's rig {rig} is not that of {path}, {model.rig}")
    if (longest := max(frames.values())) > model.max_timesteps:
        raise ValueError(
            f"{path} makes {counted(model.max_timesteps, 'timesteps')} at most, {longest} are "
            "scored (--frames)"
        )
    tokens_of = functools.cache(functools.partial(_sampled, model, images, seed))
    batches = _batches(frames, _at_once(model, longest) if how == "generate" else 1)

    stages = ["tokenizer", "vqvae"]
    if how == "generate":
        stages += ["star", "text"] if model.text_encoder == "t5" else ["star"]
    for stage in stages:  # are loaded here, not by a thread that reads
        getattr(model, stage)

    @functools.lru_cache(maxsize=4)  # of as many objects are views read ahead
    def made(i: int) -> Gaussians:
        if how == "reconstruct":
            return model.reconstruct(images(i)).gaussians
        tokens = tokens_of(batches[i])[batches[i].clips.index(i)]
        cameras = model.rig.cameras(model.resolution)
        found = decode_tokens(model.tokenizer, model.vqvae, tokens[None], cameras)
        return Gaussians(*(np.asarray(x[0], np.float32) for x in found))

    def gaussians(i: int) -> Gaussians:
        with ALONE:
            return made(i)

    entries = {}
    for name, truth in truths.entries.items():
        own = functools.partial(gaussians, places[name])
        views = clips.rendered_views(own, rig, azimuths, where=f"{path}: {name}")
        entries[name] = Entry(name, truth.group, views, named=False, gaussians=own)
    about = {"how": how, "seed": seed}
    about |= {"weights_sha256": {s: e.sha256 for s, e in model.bundle.stages.items()}}
    at_once = max(batch.size for batch in batches.values())
    return Source(str(path), "bundle", entries, azimuths, about, at_once)


class Batch(NamedTuple):
    """Clips that are made at once, and how many of them there is room for."""

    clips: tuple[int, ...]
    size: int


def _at_once(model: Model, timesteps: int) -> int:
    """How many objects have room for the keys and values of prefix and group, guided."""
    sizes = model.bundle.stage("star").model
    heads = sizes.get("num_kv_heads") or sizes["num_heads"]
    width = sizes["dim"] // sizes["num_heads"] * heads
    slots = sizes["text_length"] + sizes["container_slots"]
    slots += (timesteps + model.rig.num_views) * sizes["grid"] ** 2
    number = 2 * 2 * sizes["num_layers"] * width * slots  # keys and values, with and without video
    size = jnp.dtype(sizes.get("dtype", "float32")).itemsize
    return max(1, min(OBJECTS, KEPT // (number * size)))


def _batches(lengths: Mapping[int, int], most: int) -> dict[int, Batch]:
    """The batch of each clip, given their lengths: of one length, and of one size but the last."""
    found = {}
    for length in dict.fromkeys(lengths.values()):
        same = [i for i, n in lengths.items() if n == length]
        size = math.ceil(len(same) / math.ceil(len(same) / most))
        for start in range(0, len(same), size):
            batch = Batch(tuple(same[start : start + size]), size)
            found |= dict.fromkeys(batch.clips, batch)
    return found


def _sampled(
    model: Model, images: Callable[[int], np.ndarray], seed: int, batch: Batch
) -> Int[np.ndarray, "B T V n K"]:
    """Tokens that STAR makes of the first views of clips, each as by itself.

    At once they take little more than one: on an H200 it is the steps that take the time.
    """
    seen = np.stack([images(i)[:, 0] for i in batch.clips])
    count, (filled,) = next(filled_batches([seen], batch.size))
    condition = model.condition(filled, NEUTRAL_PROMPT)
    keys = jnp.broadcast_to(jax.random.key(seed), len(filled))  # as `Model.generate` has it
    tokens = np.asarray(sample.generate(model.star, condition, keys, **model.settings()))[:count]
    return tokens.reshape(*tokens.shape[:2], model.rig.num_views, -1, tokens.shape[-1])


def _pictures(path: Path, found: Any, truths: Source, azimuths: tuple[float, ...]) -> Source:
    """Every true view through a 2D tokenizer and back."""
    tokenizer, size = found.load("tokenizer"), found.spec.resolution

    def through(images):
        return tokenizer.decode(encode_images(tokenizer, jnp.asarray(images)))

    def view(truth: View) -> View:
        def load(asked: tuple[int, int] | None) -> Frames:
            images = truth.load(None).images
            if images.shape[1:3] != (size, size):
                told = "{1}x{0}".format(*images.shape[1:3])
                raise ValueError(f"{path} takes {size}x{size} pixels; the data set has {told}")
            with ALONE:
                decoded = in_batches(through, (images / np.float32(255),), BATCH)
            return Frames(np.rint(255 * decoded.clip(0, 1)).astype(np.uint8), None)

        return View(truth.name, load)

    entries = {
        name: Entry(name, e.group, tuple(map(view, e.views)), named=False)
        for name, e in truths.entries.items()
    }
    about = {"how": "tokenizer", "weights_sha256": found.spec.weights_sha256}
    return Source(str(path), "bundle", entries, azimuths, about)


def markdown(
    config: Mapping[str, Any],
    results: Mapping[str, dict[str, Any]],
    not_run: Mapping[str, str],
    left_out: Mapping[str, str],
    *,
    protocol: protocols.Protocol,
    compared: Mapping[str, dict[str, Any]],
) -> str:
    """The table with its caption, differences of rows, what was not run, the paper's own apart."""
    columns = [m for m in protocol.metrics if m.name not in left_out]
    first = next(iter(results.values()), None)
    if first is not None:
        columns = [m for m in columns if m.name in first["summary"]]

    def table(rows: Mapping[str, list[str]]) -> list[str]:
        head = ["", *(f"{m.label} {report.ARROWS[m.better]}" for m in columns)]
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        return lines + ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()]

    same = first is not None and first["truths"]["frames_sha256"] == config["paper_sha256"]
    rows = {}
    for name in config.get("order", config["rows"]):
        row = config["rows"][name]
        rows[row["label"]] = ["not run", *[""] * (len(columns) - 1)]
        if name in results:
            rows[row["label"]] = report.summary(results[name], columns, "{}", " [{}, {}]")
    known = {m.name for m in columns} & {name for v in config["paper"].values() for name in v}
    paper = {
        f"{label}, the paper's": [
            f"{values[m.name]:.{m.digits}f}" if m.name in values else "" for m in columns
        ]
        for label, values in config["paper"].items()
    }
    lines = [f"# {config['title']}", "", *table(rows | paper if same else rows), ""]
    if first is not None:
        truths = first["truths"]
        lines += [
            f"{counted(first['num_objects'], 'clips')} of {truths['path']} ({truths['split']}, "
            f"{truths['frames']}), true frames {truths['frames_sha256'][:16]}; protocol "
            f"{protocol.name}, version {protocol.version}; 95 % intervals over objects.",
            "",
        ]
    several = {name: r["runs"] for name, r in results.items() if "runs" in r}
    if several:
        told = ", ".join(f"{config['rows'][name]['label']} {n}" for name, n in several.items())
        lines += [f"Means over runs (trainings, seeds), first of each object: {told}.", ""]
    if compared:
        ours = config["rows"][config["against"]]["label"]
        rows = {
            f"{config['rows'][name]['label']} less {ours}": [_difference(m, found) for m in columns]
            for name, found in compared.items()
        }
        pairs = "Differences in pairs, clip by clip, with 95 % intervals over objects:"
        lines += [pairs, "", *table(rows), ""]
    lines += [
        f"- {config['rows'][name]['label']}: {metric}: {figure['warning']}"
        for name, result in results.items()
        for metric, figure in result["summary"].items()
        if "warning" in figure
    ]
    lines += [
        f"- {config['rows'][name]['label']} was not run: {why}" for name, why in not_run.items()
    ]
    lines += [f"- left out: {name}: {why}" for name, why in left_out.items()]
    if not same and known:
        apart = "The paper's own, of its 100 objects, which are other data than those above:"
        lines += ["", apart, "", *table(paper)]
    return "\n".join(lines) + "\n"


def _difference(metric: protocols.Metric, found: Mapping[str, Any]) -> str:
    if metric.name not in found:
        return ""
    text = f"{found[metric.name]['difference']:+.{metric.digits}f}"
    if (interval := found[metric.name]["interval_95"]) is not None:
        text += " [{:+.{d}f}, {:+.{d}f}]".format(*interval, d=metric.digits)
    return text
