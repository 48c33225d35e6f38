"""`fourdstar generate`: a video or picture to a moving 3D object."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import (
    FPS,
    load_model,
    model_flag,
    output_flags,
    real,
    say_device,
    whole,
)
from fourdstar_jax.outside import MAX_SEED

SUMMARY = "turn a video or picture into a moving 3D object"


def add_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--video", type=Path, metavar="PATH", help="mp4, webm, gif, or a folder of frames"
    )
    source.add_argument("--image", type=Path, metavar="PATH", help="a picture: a static 3D object")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    model_flag(parser)
    parser.add_argument("--text", help="what the object is and does; default a neutral prompt")
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="of the sampling")
    parser.add_argument(
        "--frames",
        type=whole(1, 1 << 16),
        metavar="T",
        help="timesteps; default all of the video that fit",
    )
    parser.add_argument("--fps", type=FPS, default=8.0, help="of a folder of frames")
    parser.add_argument(
        "--fit",
        choices=["object", "none"],
        default="object",
        help="cut the object out and scale it as in training, or only resize",
    )
    parser.add_argument(
        "--temperature", type=real(0, 1000), default=1.0, help="0 takes the likeliest"
    )
    parser.add_argument(
        "--top_k", type=whole(1, 1 << 20), help="sample from the k likeliest; default the model's"
    )
    parser.add_argument(
        "--cfg", type=real(-1000, 1000), default=1.0, help="classifier-free guidance scale"
    )
    parser.add_argument(
        "--max_frames", type=whole(1, 10**7), default=10_000, help="longer inputs are refused"
    )
    output_flags(parser)


def run(arguments: argparse.Namespace) -> None:
    source = arguments.video if arguments.video is not None else arguments.image
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    from fourdstar_jax import export
    from fourdstar_jax.folders import OBJECT, output_folder

    with output_folder(arguments.out, OBJECT, overwrite=arguments.overwrite) as folder:
        model = load_model(arguments.model)
        say_device()
        object4d = model.generate(
            source,
            text=arguments.text,
            seed=arguments.seed,
            timesteps=1 if arguments.image is not None else arguments.frames,
            folder_fps=arguments.fps,
            fit=arguments.fit,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            cfg=arguments.cfg,
            max_frames=arguments.max_frames,
            progress=True,
        )
        export.write(object4d, folder, size=arguments.size, progress=True)
    print(f"{len(object4d.gaussians.means)} timesteps of 3D Gaussians: {arguments.out}")
