"""A model card: a bundle's `model.json`, what a person noted, and results files, as Markdown.

`notes.md` in the bundle's folder has what no file tells: a first part for the limits, and under
headings of its own data, licences, commands, time and hardware. The card begins with the limits.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fourdstar_jax import bundle, outside
from fourdstar_jax.arguments import counted
from fourdstar_jax.bundle import Bundle
from fourdstar_jax.data import pipeline
from fourdstar_jax.evaluate import protocols
from fourdstar_jax.outside import Fields

NOTES = "notes.md"
MAX_NOTES = 1 << 20  # bytes
LABELS = {
    "reconstruction": "4D VQ-VAE on true tokens (PSNR in dB)",
    "likelihood": "STAR's likelihood (nats a code)",
    "samples": "STAR's samples",
    "comparisons": "videos to objects beside what costs nothing, and the ceiling",
}


def card(
    folder: str | os.PathLike[str],
    *,
    results: Sequence[str | os.PathLike[str]] = (),
    data: str | os.PathLike[str] | None = None,
) -> str:
    """The card of a bundle as Markdown.

    Args:
      results: JSON files of `fourdstar evaluate`, of a protocol or of the bundle on unseen clips.
      data: the dataset that it was trained on, for its counts.

    Raises ValueError for a folder that is no bundle, a dataset that it was not trained on, and
    files that are no results.
    """
    found = bundle.read(folder)
    order = (*bundle.STAGES, *bundle.RAW_STAGES)
    stages = {name: found.stages[name] for name in order if name in found.stages}
    found = dataclasses.replace(found, stages=stages)
    limits, _, more = _notes(found.folder).partition("\n## ")
    parts = [f"# Model card: {_plain(found.folder.resolve().name)}\n", _summary(found)]
    parts.append("## Limits\n\n" + "\n".join(filter(None, [limits.strip(), _limits(found)])) + "\n")
    if more:
        parts.append(f"## {more.strip()}\n")
    parts.append(_data(found, data))
    parts.append(_training(found))
    figures = [_figures(outside.read(path)) for path in results]
    parts.append("## Figures\n\n" + ("\n".join(figures) or "None were given.\n"))
    parts.append(_files(found))
    return "\n".join(parts)


def _notes(folder: Path) -> str:
    path = folder / NOTES
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        data = file.read(MAX_NOTES + 1)
    try:
        if len(data) > MAX_NOTES:
            raise ValueError(f"{path} is larger than {MAX_NOTES} bytes")
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8") from error


def _summary(found: Bundle) -> str:
    millions = sum(stage.num_parameters or 0 for stage in found.stages.values()) / 1e6
    size = sum((found.folder / s.file).stat().st_size for s in found.stages.values()
               if (found.folder / s.file).is_file()) / 1e6  # fmt: skip
    whole = {"tokenizer", "vqvae", "star"} <= set(found.stages)
    what = "A video of one object to 3D Gaussians that move" if whole else "An unfinished model"
    stages = ", ".join(found.stages) or "none"
    return (
        f"{what}, by [fourdstar_jax](https://arxiv.org/abs/2602.18830) (stages: {stages}); "
        f"{millions:.1f} million numbers, {size:.1f} MB.\n"
    )


def _limits(found: Bundle) -> str:
    """What the description itself tells."""
    lines = []
    if found.tokenizer is not None:
        size = found.tokenizer.resolution
        lines.append(f"It sees and makes pictures of {size}x{size} pixels.")
    if "vqvae" in found.stages:
        rig = found.info("vqvae").part("rig")
        timesteps = rig.integer("max_timesteps", 1, 1 << 16)
        views = len(rig.numbers("azimuths_deg", -1e6, 1e6, most=1 << 10))
        fps = rig.number("fps", 1e-3, 1000)
        lines.append(
            f"At most {counted(timesteps, 'timesteps')}, {fps:g} a second; "
            f"{counted(views, 'views')} around the object at "
            "elevation 0, of which the video is one."
        )
    if "star" in found.stages:
        words = found.stage("star").model.get("text_encoder", "words") == "words"
        text = "a table of the words of its own captions" if words else "FLAN-T5's features"
        lines.append(f"Text reaches it as {text}.")
    missing = [name for name in ("tokenizer", "vqvae", "star") if name not in found.stages]
    if missing:
        lines.append(f"It cannot generate: {' and '.join(missing)} is missing.")
    return "\n".join(f"- {line}" for line in lines)


def _data(found: Bundle, data: str | os.PathLike[str] | None) -> str:
    hashes = {stage: found.info(stage).text("data_sha256", default="") for stage in found.stages}
    known = {value for value in hashes.values() if value}
    text = "## Dataset\n\n"
    if data is None:
        return text + (
            "".join(f"- SHA-256 of the dataset: `{_plain(value)}`\n" for value in sorted(known))
            or "Its stages do not say what they were trained on.\n"
        )
    manifest = pipeline.read_manifest(Path(data))
    if known and manifest["sha256"] not in known:
        raise ValueError(
            f"{data} has the SHA-256 {manifest['sha256']}; {found.folder} was trained on "
            f"{', '.join(sorted(known))}"
        )
    rows = [
        [split, str(told["clips"]), str(told["objects"]), str(told["coloured"])]
        for split, told in manifest.get("counts", {}).items()
    ]
    text += _table(["split", "clips", "objects", "with colours"], *rows)
    return text + f"\nSHA-256 of the dataset: `{manifest['sha256']}`\n"


def _training(found: Bundle) -> str:
    """A row a stage, of the resolved configs."""
    rows = []
    for name, stage in found.stages.items():
        config = stage.config
        schedule = config.get("schedule") or {}
        rows.append(
            [name, f"{stage.num_parameters or 0:,}"]
            + [_plain(config.get(key, "")) for key in ("steps", "batch_size", "seed")]
            + [_plain(schedule.get("learning_rate", "")), stage.storage]
        )
    head = ["stage", "parameters", "steps", "batch", "seed", "learning rate", "stored as"]
    return (
        "## Training\n\n"
        + _table(head, *rows)
        + ("\nThe whole configs are in `model.json`, under `stages.*.config`.\n")
    )


def _figures(result: Fields) -> str:
    """One results file, by its kind."""
    if "protocol" in result and "summary" in result:
        return _scored(result)
    if "split" not in result or not any(name in result for name in LABELS):
        raise ValueError(f"{result.where} is no result of `fourdstar evaluate`")
    over = "objects" if "num_objects" in result else "clips"
    count = result.integer(f"num_{over}", 1, 1 << 40)
    text = f"### {_plain(result.text('split'))}: {count} {over}\n\n"
    text += (
        f"`{_plain(Path(result.where).name)}`; in brackets 95 % bootstrap intervals over {over}.\n"
    )
    for name, label in LABELS.items():
        if name in result:
            rows = [[key, shown] for key, shown in _shown(result.part(name).values)]
            text += f"\n{_table([label, ''], *rows)}"
    return text


def _scored(result: Fields) -> str:
    told = result.part("protocol")
    protocol = protocols.find(told.text("name"))
    version = told.integer("version", 0, 10**6)
    rows = []
    for name in (summary := result.part("summary")):
        figure, metric = summary.part(name), protocol.metric(name)
        shown = f"{figure.number('value', -1e12, 1e12):.{metric.digits}f}"
        if figure.values.get("interval_95") is not None:
            low, high = figure.numbers("interval_95", -1e12, 1e12, most=2)
            shown += f" [{low:.{metric.digits}f}, {high:.{metric.digits}f}]"
        rows.append([f"{metric.label} ({metric.better} is better)", shown])
    objects = result.integer("num_objects", 1, 1 << 40)
    return (
        f"### {protocol.name}, version {version}: {objects} objects\n\n"
        f"`{_plain(Path(result.where).name)}`; in brackets 95 % bootstrap intervals over objects."
        f"\n\n{_table(['metric', ''], *rows)}"
    )


def _shown(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and figures, with their intervals where there are some."""
    for name, value in values.items():
        match value:
            case bool() | str() | None:
                continue
            case int() | float():
                yield _plain(name), f"{value:.4g}"
            case [float() | int() as mean, float() | int() as low, float() | int() as high] if (
                low <= mean <= high
            ):
                yield _plain(name), f"{mean:.4g} [{low:.4g}, {high:.4g}]"
            case {
                "value": float() | int() as mean,
                "interval_95": [float() | int() as low, float() | int() as high],
            }:
                yield _plain(name), f"{mean:.4g} [{low:.4g}, {high:.4g}]"
            case {"value": float() | int() as mean}:
                yield _plain(name), f"{mean:.4g}"
            case dict():
                for below, shown in _shown(value):
                    yield f"{_plain(name)}, {below}", shown


def _files(found: Bundle) -> str:
    rows = [[f"`{stage.file}`", f"`{stage.sha256}`"] for stage in found.stages.values()]
    versions = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in sorted(found.packages.items()))
    return f"## Files\n\n{_table(['file', 'SHA-256'], *rows)}\nWritten by {versions or '?'}.\n"


def _table(head: Sequence[str], *rows: Sequence[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def _plain(value: Any) -> str:
    """A value of somebody's file as a word in a table: nothing in it is Markdown or HTML."""
    text = " ".join(str(value).split())[:80]
    return "".join(c if c.isprintable() and c not in "|`<>[]*" else "?" for c in text)
