"""`fourdstar generate`: a video or picture to a moving 3D object."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourdstar_jax import arguments as allowed
from fourdstar_jax.arguments import counted, there
from fourdstar_jax.cli.common import (
    load_model,
    model_flag,
    output_flags,
    real,
    say_device,
    say_input,
    say_viewer,
    shard,
    there_is_a_bundle,
    whole,
)
from fourdstar_jax.data.decode import MAX_FRAMES, check
from fourdstar_jax.lists import read_list
from fourdstar_jax.shards import WHOLE

if TYPE_CHECKING:
    from fourdstar_jax.generate import Clip, Model

SUMMARY = "turn a video or picture into a moving 3D object"


def add_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--video", type=Path, metavar="PATH", help="mp4, webm, gif, or a folder of frames"
    )
    source.add_argument("--image", type=Path, metavar="PATH", help="a picture: a static 3D object")
    source.add_argument(
        "--videos",
        type=Path,
        metavar="LIST",
        help="many: a path a line, or a CSV file with columns video and perhaps text, name; each "
        "becomes a folder of its name in --out, and what is there is not made again",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="of --videos: the I-th of N parts, then what others have not begun",
    )
    parser.add_argument(
        "--retry", action="store_true", help="of --videos: try again what was quarantined"
    )
    other_flags(parser)


def other_flags(parser: argparse.ArgumentParser) -> None:
    """All but the input, for `demo` as well."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder")
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="FILE.png",
        help="write what the model will see; without --out nothing else is done",
    )
    model_flag(parser)
    parser.add_argument("--text", help="what the object is and does; default a neutral prompt")
    parser.add_argument("--seed", type=whole(*allowed.SEEDS), default=0, help="of the sampling")
    parser.add_argument(
        "--frames",
        type=whole(*allowed.TIMESTEPS),
        metavar="T",
        help="timesteps; default all of the video that fit",
    )
    parser.add_argument(
        "--start",
        type=real(*allowed.START_S),
        default=0.0,
        metavar="SECONDS",
        help="where in the video",
    )
    parser.add_argument(
        "--fps",
        type=real(*allowed.FPS),
        help="timesteps a second of the video; default the model's",
    )
    parser.add_argument(
        "--folder_fps",
        type=real(*allowed.FPS),
        default=8.0,
        help="what a folder of frames counts as",
    )
    parser.add_argument(
        "--fit",
        choices=allowed.FITS,
        default="object",
        help="cut the object out and scale it as in training, only resize, or take the middle",
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="FOLDER",
        help="what the object is: a picture for each frame of the video, in order, white on black",
    )
    parser.add_argument(
        "--rembg",
        type=Path,
        metavar="MODEL.onnx",
        help="cut the object out of a video without alpha by a network of yours (extra rembg)",
    )
    parser.add_argument(
        "--temperature",
        type=real(*allowed.TEMPERATURES),
        help="0 takes the likeliest; default the model's",
    )
    parser.add_argument(
        "--top_k",
        type=whole(*allowed.TOP_K),
        help="sample from the k likeliest; default the model's",
    )
    parser.add_argument(
        "--cfg",
        type=real(*allowed.GUIDANCE),
        help="classifier-free guidance scale; default the model's",
    )
    parser.add_argument(
        "--history_cfg",
        type=real(*allowed.GUIDANCE),
        help="guidance towards the timesteps before; default the model's",
    )
    parser.add_argument(
        "--max_frames",
        type=whole(*allowed.FRAMES),
        default=MAX_FRAMES,
        help="longer inputs are refused",
    )
    output_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.videos is not None:
        return _run_list(arguments)
    if arguments.shard is not None or arguments.retry:
        raise ValueError("--shard and --retry go with --videos LIST")
    source = arguments.video if arguments.video is not None else arguments.image
    there(source)
    preview = arguments.preview
    if preview is not None:
        _check_preview(preview, (source, arguments.out), overwrite=arguments.overwrite)
    if arguments.out is None:
        if preview is None:
            raise ValueError("give --out DIR, or --preview FILE.png to see the input only")
        _see(source, arguments)
        return
    from fourdstar_jax.folders import OBJECT, output_folder

    with output_folder(arguments.out, OBJECT, overwrite=arguments.overwrite) as folder:
        model, clip = _see(source, arguments)
        from fourdstar_jax import export, timing

        say_device()
        start = time.perf_counter()
        object4d = model.generate(clip, **options(arguments), progress=True)
        if arguments.timing:
            object4d.meta["generation"] = timing.of_generation(start)
        export.write(object4d, folder, size=arguments.size, progress=True)
    print(f"{counted(len(object4d.gaussians.means), 'timesteps')} of 3D Gaussians: {arguments.out}")
    say_viewer(arguments.out)


def _run_list(arguments: argparse.Namespace) -> None:
    unfit = [name for name in ("preview", "overwrite", "masks") if getattr(arguments, name)]
    if arguments.out is None or unfit:
        named = f", and takes no --{unfit[0]}" if unfit else ""
        again = ": remove an output to have it made again" if "overwrite" in unfit else ""
        raise ValueError(f"--videos needs --out DIR{named}{again}")
    items = read_list(arguments.videos)
    there_is_a_bundle(arguments.model)
    from fourdstar_jax import bars, batch

    def load() -> "Model":
        with bars.waiting("loading"):
            model = load_model(arguments.model)
        say_device()
        return model

    batch.generate(
        load,
        items,
        arguments.out,
        shard=arguments.shard or WHOLE,
        reading=reading(arguments),
        options=options(arguments),
        size=arguments.size,
        timed=arguments.timing,
        retry=arguments.retry,
        warn=lambda line: print(f"warning: {line}", file=sys.stderr),
    )


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """For `Model.read`."""
    names = ("fit", "start", "fps", "folder_fps", "masks", "rembg", "max_frames")
    timesteps = 1 if arguments.image is not None else arguments.frames
    return {name: getattr(arguments, name) for name in names} | {"timesteps": timesteps}


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """For `Model.generate`."""
    names = ("text", "seed", "temperature", "top_k", "cfg", "history_cfg")
    return {name: getattr(arguments, name) for name in names}


def _see(source: Path, arguments: argparse.Namespace) -> tuple["Model", "Clip"]:
    """The model and its input; says what of that is used, and writes the preview."""
    _check_input(source, arguments)
    from fourdstar_jax import bars

    with bars.waiting("loading"):
        model = load_model(arguments.model)
        clip = model.read(source, **reading(arguments))
    say_input(source, clip.info, fit=arguments.fit)
    if arguments.preview is not None:
        from fourdstar_jax.export import pictures

        pictures.write_sheet(arguments.preview, clip.images)
        print(f"what the model will see: {arguments.preview}")
    return model, clip


def _check_input(source: Path, arguments: argparse.Namespace) -> None:
    """Refuses what cannot be used before anything large is imported."""
    there_is_a_bundle(arguments.model)
    if arguments.masks is not None and not arguments.masks.exists():
        raise ValueError(f"masks {arguments.masks} do not exist")
    check(
        source,
        timesteps=1 if arguments.image is not None else arguments.frames,
        fps=arguments.fps,
        start=arguments.start,
        folder_fps=arguments.folder_fps,
        max_frames=arguments.max_frames,
    )
    if arguments.rembg is not None:
        from fourdstar_jax.data import cutout

        cutout.load(arguments.rembg)  # once: it is kept


def _check_preview(path: Path, others: tuple[Path | None, ...], *, overwrite: bool) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"--preview {path} must end in .png")
    if not path.parent.is_dir():
        raise ValueError(f"--preview {path}: there is no folder {path.parent}")
    places = (path.resolve(), *path.resolve().parents)
    for other in others:  # it would replace the input, become a frame of it, or go with old output
        if other is not None and other.resolve() in places:
            raise ValueError(f"--preview {path} must lie outside {other}")
    if path.exists() and not (overwrite and path.is_file()):
        raise ValueError(f"--preview {path} exists (--overwrite replaces it)")
