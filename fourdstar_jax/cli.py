"""The `fourdstar` command: each subcommand parses its flags and calls one function.

Only argparse is imported here; every subcommand imports what it needs when it runs. Input that
cannot be used ends with one line on stderr and exit code 2.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import fourdstar_jax

# The model that comes with the package, and the demo's video beside it.
BUNDLED_MODEL = Path(__file__).parent / "models" / "tiny"
NOT_YET = {
    "view": "show a result in the browser",
    "export": "write a result in other splat formats",
}
TRAINING_PACKAGES = {
    *("optax", "orbax", "grain", "array_record", "tensorflow_datasets", "importlib_resources"),
    *("transformers", "tensorboardX", "moderngl"),
}
EXIT_BAD_INPUT = 2


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    arguments, extra = parser.parse_known_args(argv)
    if extra and not getattr(arguments, "takes_overrides", False):
        arguments.parser.error(f"unrecognized arguments: {' '.join(extra)}")
    arguments.overrides = extra
    try:
        arguments.run(arguments)
    except (ValueError, NotImplementedError) as error:
        if not _ours(error):
            raise
        line = " ".join(str(error).split())
        print(f"fourdstar: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAINING_PACKAGES:
            raise
        print(
            f"fourdstar: {error.name} is missing, which training needs: "
            "pip install 'fourdstar-jax[train]' (in a checkout: launch/setup.sh dev)",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("fourdstar: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _ours(error: BaseException) -> bool:
    """Whether this package raised it as a check, rather than some library by surprise."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return name.split(".")[0] in ("fourdstar_jax", "__main__") or name.endswith("_config")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fourdstar",
        description="4DSTAR in JAX: a video goes in, 3D Gaussians that move come out.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"fourdstar_jax {fourdstar_jax.__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run, summary: str, to=commands, **kwargs: Any) -> argparse.ArgumentParser:
        command = to.add_parser(
            name,
            help=summary,
            description=kwargs.pop("description", summary[0].upper() + summary[1:] + "."),
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=run, parser=command, **kwargs)
        return command

    command = add("generate", _generate, "turn a video or picture into a moving 3D object")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--video", type=Path, metavar="PATH", help="mp4, webm, gif, or a folder of frames"
    )
    source.add_argument("--image", type=Path, metavar="PATH", help="a picture: a static 3D object")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    _model_flag(command)
    command.add_argument("--text", help="what the object is and does; default a neutral prompt")
    command.add_argument("--seed", type=int, default=0, help="of the sampling")
    command.add_argument(
        "--frames", type=int, metavar="T", help="timesteps; default all of the video that fit"
    )
    command.add_argument("--fps", type=float, default=8.0, help="of a folder of frames")
    command.add_argument(
        "--fit",
        choices=["object", "none"],
        default="object",
        help="cut the object out and scale it as in training, or only resize",
    )
    command.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest")
    command.add_argument(
        "--top_k", type=int, help="sample from the k likeliest; default the model's"
    )
    command.add_argument("--cfg", type=float, default=1.0, help="classifier-free guidance scale")
    command.add_argument("--max_frames", type=int, default=10_000, help="longer inputs are refused")
    _output_flags(command)

    command = add(
        "reconstruct",
        _reconstruct,
        "encode and decode a clip of a dataset, or pictures and videos, beside the truth",
        description="Encode and decode a clip of a dataset (--data) into a moving 3D object, or "
        "with --tokenizer pictures and videos (--input) by the bundle's 2D tokenizer alone.",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset")
    source.add_argument("--input", type=Path, metavar="PATH", help="folder of pictures and videos")
    command.add_argument(
        "--tokenizer", choices=["unitok", "vq16"], help="of the bundle, which must have this one"
    )
    command.add_argument(
        "--fit",
        choices=["none", "crop", "object"],
        default="none",
        help="pictures to squares: pad, take the middle, or cut the object out (--input)",
    )
    command.add_argument("--fps", type=float, default=8.0, help="sampling of videos (--input)")
    command.add_argument("--batch", type=int, default=16, help="pictures at a time (--input)")
    command.add_argument("--split", default="unseen_clip", help="train, unseen_clip, unseen_object")
    command.add_argument("--clip", type=int, default=0, metavar="N", help="which clip of the split")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    _model_flag(command)
    _output_flags(command)

    command = add(
        "train",
        _train,
        "train one stage: tokenizer, vqvae or star",
        description="Train one stage. Any value of the config can be overridden: "
        "--config=configs/star.py:tiny --config.optim.lr=1e-3. A config is Python code that is "
        "run: use your own.",
        takes_overrides=True,
    )
    command.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="configs/star.py:tiny"
    )
    command.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="checkpoints and metrics; a run that finds its checkpoints there continues",
    )

    command = add(
        "prepare",
        _prepare,
        "render animated GLB files into a dataset, or encode a dataset: tokens, text features",
    )
    command.add_argument("--assets", type=Path, metavar="DIR", help="folder of GLB files")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    command.add_argument("--image_size", type=int, default=64, help="pixels a side")
    command.add_argument("--views", type=int, default=4, help="rig views, equally around")
    command.add_argument("--extra_views", type=int, default=2, help="random views, for losses")
    command.add_argument("--max_frames", type=int, default=8, help="of a clip; the rest is cut")
    command.add_argument("--fps", type=float, default=8.0, help="sampling of the animations")
    command.add_argument("--licence", help="only assets of this licence, such as CC0")
    command.add_argument("--limit", type=int, help="only so many assets")
    command.add_argument(
        "--flow", action=argparse.BooleanOptionalAction, default=True, help="optical flow"
    )
    command.add_argument(
        "--depth", action=argparse.BooleanOptionalAction, default=False, help="depth maps"
    )
    command.add_argument(
        "--workers", type=int, help="processes; 0 works in this one, default one a core"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing output")
    command.add_argument(
        "--tokens",
        action="store_true",
        help="encode the dataset --data with the tokenizer --bundle",
    )
    command.add_argument(
        "--text_features",
        "--text-features",
        action="store_true",
        help="encode the captions of the dataset --data with the text encoder of --bundle",
    )
    command.add_argument("--data", type=Path, metavar="DIR", help="dataset to encode")
    command.add_argument("--bundle", type=Path, metavar="DIR", help="has the encoder")
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float16"],
        default="bfloat16",
        help="in which text features are kept",
    )
    command.add_argument("--batch", type=int, default=8, help="captions at once (--text_features)")

    command = add(
        "evaluate", _evaluate, "measure a bundle on the unseen clips of a dataset, with intervals"
    )
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared dataset")
    command.add_argument("--split", default="unseen_clip", help="unseen_clip or unseen_object")
    command.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    _model_flag(command)

    command = add(
        "convert",
        _convert,
        "turn released PyTorch weights into a bundle, or a bundle's back",
        description="Turn a released file into a stage of a bundle: unitok and vq16 into its "
        "tokenizer, t5 into its text encoder, llamagen and mvar into weights that star can start "
        "from. Nothing in the file is run, PyTorch is not needed, and every tensor is accounted "
        "for. --reverse writes a stage as safetensors with the original's names.",
    )
    command.add_argument("kind", choices=["unitok", "vq16", "t5", "llamagen", "mvar"])
    command.add_argument(
        "file", type=Path, metavar="FILE", help=".pth .pt .bin .safetensors .index.json; or BUNDLE"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="bundle; or FILE.safetensors")
    command.add_argument("--reverse", action="store_true", help="from the bundle FILE to OUT")
    command.add_argument("--storage", choices=["float32", "float16"], default="float32")
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the arithmetic; bfloat16 is made for GPUs and TPUs",
    )

    command = add("inspect", _inspect, "tell what a model bundle holds")
    command.add_argument("bundle", type=Path, nargs="?", default=BUNDLED_MODEL)

    command = add("bench", None, "measure the speed of an operation")
    operations = command.add_subparsers(metavar="OPERATION", required=True)
    command = add(
        "rasterize",
        _bench_rasterize,
        "time the rasterizer on random scenes, forward and backward",
        to=operations,
    )
    command.add_argument(
        "scenes", nargs="*", default=["tiny"], metavar="SCENE", help="tiny small16k S A B C D E F H"
    )
    command.add_argument(
        "--implementations",
        nargs="+",
        metavar="NAME",
        help="of rasterize; by default the best here",
    )
    command.add_argument("--against", choices=["gsplat"], help="the same scenes with this, too")
    command.add_argument("--repeats", type=int, metavar="N", help="calls; default the scene's")
    command.add_argument("--json", type=Path, metavar="FILE", help="the results as JSON")
    command.add_argument("--commit", help="of the code, for the results; default git's")
    command.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing, print results as Markdown"
    )

    command = add(
        "tokenizer",
        _bench_tokenizer,
        "time UniTok on random images, images to tokens and back",
        to=operations,
    )
    command.add_argument(
        "--size", choices=["released", "tiny"], help="of random weights; default released"
    )
    command.add_argument("--bundle", type=Path, metavar="DIR", help="its tokenizer instead")
    command.add_argument("--batch", type=int, default=64, metavar="N", help="images; default 64")
    command.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default bfloat16, or as in the bundle"
    )
    command.add_argument(
        "--against", type=Path, metavar="DIR", help="a checkout of the original UniTok, timed too"
    )
    command.add_argument(
        "--python", type=Path, metavar="FILE", help="that runs the original; default this one"
    )
    command.add_argument(
        "--layouts",
        nargs="+",
        metavar="NAME",
        help="of the original's arrays, the fastest is reported; default contiguous channels_last",
    )
    command.add_argument("--repeats", type=int, default=20, metavar="N", help="calls; default 20")
    command.add_argument("--json", type=Path, metavar="FILE", help="the results as JSON")
    command.add_argument("--commit", help="of the code, for the results; default git's")

    add("doctor", _doctor, "tell versions, devices and what is missing")

    for name, summary in NOT_YET.items():
        command = add(name, _not_yet, f"{summary} (not there yet)", takes_overrides=True)
        command.set_defaults(name=name)
    return parser


def _model_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", type=Path, default=BUNDLED_MODEL, metavar="BUNDLE", help="model bundle"
    )


def _output_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", type=int, default=256, help="of the videos, pixels a side")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier output")


def _load_model(folder: Path):
    from fourdstar_jax import generate

    if folder == BUNDLED_MODEL and not folder.exists():
        raise ValueError(f"this installation has no bundled model ({folder}): give --model BUNDLE")
    if not folder.exists():
        raise ValueError(f"model bundle {folder} does not exist")
    return generate.load(folder)


def _say_device() -> None:
    import jax

    device = jax.devices()[0]
    print(f"device: {device.platform} ({device.device_kind}), {jax.device_count()} there")


def _generate(arguments: argparse.Namespace) -> None:
    source = arguments.video if arguments.video is not None else arguments.image
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if not 16 <= arguments.size <= 2048:
        raise ValueError(f"--size {arguments.size} must be from 16 to 2048")
    from fourdstar_jax import export
    from fourdstar_jax.folders import OBJECT, output_folder

    with output_folder(arguments.out, OBJECT, overwrite=arguments.overwrite) as folder:
        model = _load_model(arguments.model)
        _say_device()
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


def _reconstruct_pictures(arguments: argparse.Namespace) -> None:
    if arguments.tokenizer is None:
        raise ValueError("--input needs --tokenizer unitok or vq16")
    if arguments.batch < 1:
        raise ValueError(f"--batch {arguments.batch} must be positive")
    from fourdstar_jax import bundle
    from fourdstar_jax.export import pictures
    from fourdstar_jax.folders import PICTURES, output_folder

    spec = bundle.read(arguments.model).spec
    if spec.name != arguments.tokenizer:
        raise ValueError(
            f"the tokenizer of {arguments.model} is {spec.name}, not {arguments.tokenizer}: "
            f"`fourdstar convert {arguments.tokenizer} FILE BUNDLE` makes one, for --model BUNDLE"
        )
    with output_folder(arguments.out, PICTURES, overwrite=arguments.overwrite) as folder:
        tokenizer = bundle.read(arguments.model).load("tokenizer")
        _say_device()
        result = pictures.reconstruct(
            tokenizer,
            arguments.input,
            folder,
            fit=arguments.fit,
            fps=arguments.fps,
            batch_size=arguments.batch,
        )
    line = f"{len(result['files'])} files, mean PSNR {result['mean_psnr']:.2f} dB"
    print(f"{line}: {arguments.out}")


def _reconstruct(arguments: argparse.Namespace) -> None:
    if arguments.input is not None:
        return _reconstruct_pictures(arguments)
    if arguments.tokenizer is not None:
        raise ValueError("--tokenizer goes with --input: --data needs the whole bundle")
    if not 16 <= arguments.size <= 2048:
        raise ValueError(f"--size {arguments.size} must be from 16 to 2048")
    import numpy as np

    from fourdstar_jax import export
    from fourdstar_jax.data import pipeline, transforms
    from fourdstar_jax.evaluate import metrics
    from fourdstar_jax.folders import OBJECT, output_folder

    with output_folder(arguments.out, OBJECT, overwrite=arguments.overwrite) as folder:
        model = _load_model(arguments.model)
        clips = pipeline.ClipSource(arguments.data, arguments.split)
        if not 0 <= arguments.clip < len(clips):
            raise ValueError(f"--clip {arguments.clip}: the split has {len(clips)} clips")
        clip = clips[arguments.clip]
        timesteps = min(model.max_timesteps, len(clip["frame_times"]))
        images, masks = transforms.on_white(clip["rig_rgba"][:timesteps])
        _say_device()
        object4d = model.reconstruct(
            images, clip=clip["clip_id"], split=arguments.split, licence=clip["licence"]
        )
        size = model.resolution
        renders = np.asarray(object4d.render(model.rig.cameras(size), width=size, height=size))
        psnr = {
            "whole": metrics.psnr(renders, images),
            "inside": metrics.psnr(renders, images, masks),
        }
        object4d.meta["psnr"] = psnr
        export.write(object4d, folder, size=arguments.size, truth=images, progress=True)
    line = f"PSNR {psnr['whole']:.2f} dB, inside the mask {psnr['inside']:.2f} dB"
    print(f"{line}: {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config, arguments.overrides)
    import importlib

    if config.get("stage") not in ("tokenizer", "vqvae", "star"):
        raise ValueError(f"config.stage {config.get('stage')!r} is not tokenizer, vqvae or star")
    trainer = importlib.import_module(f"fourdstar_jax.train.{config.stage}")
    trainer.train(config, arguments.workdir)


def read_config(config: str, overrides: list[str]) -> Any:
    """The locked ConfigDict of `file.py[:argument]` with `--config.key=value` overrides.

    A file that is not below the current folder is looked for in the package's checkout. Raises
    ValueError, in one line, for what ml_collections refuses.
    """
    name, colon, argument = config.partition(":")
    if "://" in config:
        raise ValueError(f"--config {config}: configs are code and are not read from the network")
    path = Path(name)
    if not path.is_file() and not path.is_absolute():
        path = Path(__file__).resolve().parents[1] / name
    if not path.is_file():
        raise ValueError(f"config file {name} does not exist")
    wrong = [word for word in overrides if word.startswith("-") and "config." not in word]
    wrong = [word for word in wrong if not word[1:].replace(".", "").isdigit()]
    if wrong:
        raise ValueError(f"unrecognized arguments: {' '.join(wrong)}")

    from absl import flags
    from ml_collections import config_flags

    # configs import each other as `configs.common`
    sys.path.insert(0, str(path.resolve().parents[1]))
    argv = ["fourdstar", f"--config={path}{colon}{argument}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    try:
        left = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).strip().strip('"').splitlines()]
        # after a traceback, which ml_collections puts into its message, the error itself
        line = lines[-1] if lines and "whilst parsing" in lines[0] else " ".join(lines)
        raise ValueError(f"--config {config}: {line}") from error
    finally:
        sys.path.pop(0)
    if left[1:]:
        raise ValueError(f"unrecognized arguments: {' '.join(left[1:])}")
    return values["config"].value


def _prepare(arguments: argparse.Namespace) -> None:
    if arguments.tokens and arguments.text_features:
        raise ValueError("give --tokens or --text_features, not both")
    if arguments.tokens:
        if arguments.data is None or arguments.bundle is None:
            raise ValueError("--tokens needs --data DIR and --bundle DIR")
        from fourdstar_jax.train import encode

        encode.prepare_tokens(
            arguments.data, arguments.bundle, arguments.out, overwrite=arguments.overwrite
        )
        return
    if arguments.text_features:
        if arguments.data is None or arguments.bundle is None:
            raise ValueError("--text_features needs --data DIR and --bundle DIR")
        from fourdstar_jax.train import encode

        encode.prepare_features(
            arguments.data,
            arguments.bundle,
            arguments.out,
            dtype=arguments.dtype,
            batch=arguments.batch,
            overwrite=arguments.overwrite,
        )
        return
    if arguments.assets is None:
        raise ValueError("--assets DIR is needed")
    if not arguments.assets.is_dir():
        raise ValueError(f"{arguments.assets} is not a folder")
    from fourdstar_jax.data import prepare

    prepare.prepare(
        arguments.assets,
        arguments.out,
        image_size=arguments.image_size,
        views=arguments.views,
        extra_views=arguments.extra_views,
        max_frames=arguments.max_frames,
        fps=arguments.fps,
        licence=arguments.licence,
        limit=arguments.limit,
        flow=arguments.flow,
        depth=arguments.depth,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    import json

    from fourdstar_jax.evaluate import unseen

    _load_model(arguments.model)  # says what is wrong with it before the data is read
    text = json.dumps(unseen.evaluate(arguments.model, arguments.data, arguments.split), indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


def _convert(arguments: argparse.Namespace) -> None:
    from fourdstar_jax.convert import command

    if arguments.reverse:
        shapes = command.reverse(arguments.kind, arguments.file, arguments.out)
        print(f"{len(shapes)} tensors with {arguments.kind}'s names: {arguments.out}")
        return
    info = command.convert(
        arguments.kind,
        arguments.file,
        arguments.out,
        storage=arguments.storage,
        dtype=arguments.dtype,
    )
    skipped = f", {info['not_needed']} not needed" if info["not_needed"] else ""
    print(f"{info['tensors']} tensors{skipped}: {arguments.out}")


def _inspect(arguments: argparse.Namespace) -> None:
    from fourdstar_jax import bundle

    found = bundle.read(arguments.bundle)
    print(f"bundle {arguments.bundle}")
    if found.tokenizer is not None:
        print("  tokens: " + ", ".join(f"{k} {v}" for k, v in found.tokenizer.to_dict().items()))
    star = found.stages.get("star")
    takes_features = star is not None and star.model.get("text_encoder") == "t5"
    for name in (*bundle.STAGES, *bundle.RAW_STAGES):
        stage = found.stages.get(name)
        if stage is None:
            needed = name != "text" or takes_features
            if needed and name not in bundle.RAW_STAGES:
                print(f"  {name}: not there yet")
            continue
        print(f"  {name}: {stage.num_parameters or 0:,} numbers as {stage.storage}")
        print(f"    sha256 {stage.sha256}")
        for key, value in sorted(stage.info.items()):
            print(f"    {key}: {str(value)[:200]}")
    print("  written by " + ", ".join(f"{k} {v}" for k, v in found.packages.items()))


def _bench_rasterize(arguments: argparse.Namespace) -> None:
    if arguments.table is not None and not arguments.table.is_file():
        raise ValueError(f"{arguments.table} does not exist")
    from fourdstar_jax.kernels.rasterize import bench, bench_table

    if arguments.table is not None:
        print(bench_table.table(arguments.table), end="")
        return
    bench.run(
        arguments.scenes,
        implementations=arguments.implementations,
        repeats=arguments.repeats,
        against=arguments.against,
        json_file=arguments.json,
        commit=arguments.commit,
    )


def _bench_tokenizer(arguments: argparse.Namespace) -> None:
    if arguments.bundle is not None:
        if not arguments.bundle.exists():
            raise ValueError(f"model bundle {arguments.bundle} does not exist")
        for name in ("size", "dtype"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is what --bundle says: give one of the two")
    from fourdstar_jax import bundle
    from fourdstar_jax.tokenizer import bench

    def load():
        return bundle.read(arguments.bundle).load("tokenizer")

    bench.run(
        size=arguments.size or "released",
        load=None if arguments.bundle is None else load,
        batch=arguments.batch,
        dtype=arguments.dtype or "bfloat16",
        repeats=arguments.repeats,
        against=arguments.against,
        python=arguments.python,
        layouts=arguments.layouts,
        json_file=arguments.json,
        commit=arguments.commit,
    )


def _doctor(arguments: argparse.Namespace) -> None:
    import ctypes
    import importlib.metadata
    import platform
    import shutil

    print(f"fourdstar_jax {fourdstar_jax.__version__}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    needed = ("jax", "jaxlib", "flax", "numpy", "av", "pillow", "safetensors")
    training = ("optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "moderngl")
    for kind, names in (("", needed), (" (for training)", training)):
        for name in names:
            try:
                print(f"{name} {importlib.metadata.version(name)}{kind}")
            except importlib.metadata.PackageNotFoundError:
                print(f"{name} missing{kind}")
    try:
        ctypes.CDLL("libEGL.so.1")
        print("libEGL there (for prepare)")
    except OSError:
        print("libEGL missing (for prepare): apt-get install libegl1 libgl1-mesa-dri")
    print(f"bundled model {'there' if BUNDLED_MODEL.exists() else 'missing'}: {BUNDLED_MODEL}")
    free = shutil.disk_usage(".").free / 2**30
    print(f"{os.cpu_count()} processors, {free:.0f} GiB free here")
    import jax

    for device in jax.devices():
        print(f"device {device.id}: {device.platform} ({device.device_kind})")


def _not_yet(arguments: argparse.Namespace) -> None:
    raise NotImplementedError(f"`fourdstar {arguments.name}` is not there yet")


if __name__ == "__main__":
    sys.exit(main())
