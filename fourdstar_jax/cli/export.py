"""`fourdstar export`: an object in the files of other programs."""

import argparse
import shutil
from pathlib import Path

from fourdstar_jax.arguments import SIDE
from fourdstar_jax.cli.common import whole

SUMMARY = "write an object in other formats"
DESCRIPTION = """Write the object of an output folder of `generate` or `reconstruct` in other
formats: files of 3D Gaussians, one a timestep (ply, splat, spz, compressed_ply, glb), all of
them in one (splat4d, where the program of that name is installed), the compact form that
viewer.html holds (4dg), that page (viewer), where every Gaussian goes (tracks), a turn around it
(mp4, gif, webp), and a picture of all views over time (sheet)."""
# As in export.outputs, which is slow to import; a test compares them.
FORMATS = (
    *("ply", "splat", "spz", "compressed_ply", "glb", "splat4d", "4dg", "viewer"),
    *("tracks", "mp4", "gif", "webp", "sheet"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder to read")
    parser.add_argument(
        "--to", nargs="+", required=True, choices=FORMATS, metavar="FORMAT", help=" ".join(FORMATS)
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--size", type=whole(*SIDE), default=256, help="of pictures, pixels a side")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run(arguments: argparse.Namespace) -> None:
    from fourdstar_jax import bars
    from fourdstar_jax.folders import EXPORT, check_object, output_folder

    check_object(arguments.folder)
    if "splat4d" in arguments.to and shutil.which("splat4d") is None:
        raise ValueError("--to splat4d needs the program splat4d: pip install splats4d")
    out = output_folder(arguments.out, EXPORT, overwrite=arguments.overwrite)
    with out as folder, bars.waiting("writing"):
        from fourdstar_jax.export import outputs

        outputs.export(arguments.folder, folder, arguments.to, size=arguments.size)
    print(f"{' '.join(arguments.to)}: {arguments.out}")
