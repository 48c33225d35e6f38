"""`fourdstar reconstruct`: through the tokenizer and back, beside the truth."""

import argparse
import functools
import time
from pathlib import Path

from fourdstar_jax.arguments import BATCH, FITS, FPS, START_S, counted
from fourdstar_jax.cli.common import (
    load_model,
    model_flag,
    output_flags,
    real,
    say_device,
    say_input,
    say_viewer,
    there_is_a_bundle,
    whole,
)
from fourdstar_jax.tokenizer import FAMILIES

SUMMARY = "encode and decode a clip of a dataset, or pictures and videos, beside the truth"
DESCRIPTION = """Encode and decode a clip of a dataset (--data) into a moving 3D object, or with
--tokenizer pictures and videos (--input) by the bundle's 2D tokenizer alone."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset")
    source.add_argument("--input", type=Path, metavar="PATH", help="folder of pictures and videos")
    parser.add_argument(
        "--tokenizer", choices=list(FAMILIES), help="of the bundle, which must have this one"
    )
    parser.add_argument(
        "--fit",
        choices=FITS,
        default="none",
        help="pictures to squares: pad, take the middle, or cut the object out (--input)",
    )
    parser.add_argument(
        "--start",
        type=real(*START_S),
        default=0.0,
        metavar="SECONDS",
        help="where in the videos (--input)",
    )
    parser.add_argument("--fps", type=real(*FPS), default=8.0, help="sampling of videos (--input)")
    parser.add_argument(
        "--batch", type=whole(*BATCH), default=16, help="pictures at a time (--input)"
    )
    parser.add_argument("--split", default="unseen_clip", help="train, unseen_clip, unseen_object")
    parser.add_argument(
        "--clip", type=whole(0, 10**9), default=0, metavar="N", help="which clip of the split"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    model_flag(parser)
    output_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.input is not None:
        return _pictures(arguments)
    if arguments.tokenizer is not None:
        raise ValueError("--tokenizer goes with --input: --data needs the whole bundle")
    from fourdstar_jax import bars
    from fourdstar_jax.folders import OBJECT, check_dataset, output_folder

    check_dataset(arguments.data)
    there_is_a_bundle(arguments.model)

    with output_folder(arguments.out, OBJECT, overwrite=arguments.overwrite) as folder:
        with bars.waiting("loading"):
            import numpy as np

            from fourdstar_jax import export, timing
            from fourdstar_jax.data import pipeline, transforms
            from fourdstar_jax.evaluate import metrics

            model = load_model(arguments.model)
            clips = pipeline.ClipSource(arguments.data, arguments.split)
        if not 0 <= arguments.clip < len(clips):
            raise ValueError(
                f"--clip {arguments.clip}: the split has {counted(len(clips), 'clips')}"
            )
        clip = clips[arguments.clip]
        timesteps = min(model.max_timesteps, len(clip["frame_times"]))
        images, masks = transforms.on_white(clip["rig_rgba"][:timesteps])
        say_device()
        start = time.perf_counter()
        with bars.waiting("decoding"):
            object4d = model.reconstruct(
                images, clip=clip["clip_id"], split=arguments.split, licence=clip["licence"]
            )
        if arguments.timing:
            object4d.meta["generation"] = timing.of_generation(start)
        size = model.resolution
        with bars.waiting("PSNR"):
            cameras = model.rig.cameras(size)
            renders = np.asarray(object4d.render(cameras, width=size, height=size))
        psnr = {
            "whole": metrics.psnr(renders, images),
            "inside": metrics.psnr(renders, images, masks),
        }
        object4d.meta["psnr"] = psnr
        export.write(object4d, folder, size=arguments.size, truth=images, progress=True)
    line = f"PSNR {psnr['whole']:.2f} dB, inside the mask {psnr['inside']:.2f} dB"
    print(f"{line}: {arguments.out}")
    say_viewer(arguments.out)


def _pictures(arguments: argparse.Namespace) -> None:
    if arguments.tokenizer is None:
        raise ValueError("--input needs --tokenizer unitok or vq16")
    from fourdstar_jax import bars
    from fourdstar_jax.data.decode import check
    from fourdstar_jax.folders import PICTURES, output_folder
    from fourdstar_jax.lists import pictures_and_videos

    _check_tokenizer(arguments.model, arguments.tokenizer)
    check(pictures_and_videos(arguments.input)[0], start=arguments.start, fps=arguments.fps)
    with output_folder(arguments.out, PICTURES, overwrite=arguments.overwrite) as folder:
        with bars.waiting("loading"):
            from fourdstar_jax import bundle
            from fourdstar_jax.export import pictures

            tokenizer = bundle.read(arguments.model).load("tokenizer")
        say_device()
        result = pictures.reconstruct(
            tokenizer,
            arguments.input,
            folder,
            fit=arguments.fit,
            start=arguments.start,
            fps=arguments.fps,
            batch_size=arguments.batch,
            on_input=functools.partial(say_input, fit=arguments.fit),
        )
    line = f"{counted(len(result['files']), 'files')}, mean PSNR {result['mean_psnr']:.2f} dB"
    print(f"{line}: {arguments.out}")


def _check_tokenizer(model: Path, wanted: str) -> None:
    """Refuses a bundle with another tokenizer, before anything large is imported."""
    there_is_a_bundle(model)
    from fourdstar_jax import outside

    found = outside.read(model / "model.json").part("tokenizer").text("name")
    if found != wanted:
        raise ValueError(
            f"the tokenizer of {model} is {found}, not {wanted}: "
            f"`fourdstar convert {wanted} FILE BUNDLE` makes one, for --model BUNDLE"
        )
