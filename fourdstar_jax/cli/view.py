"""`fourdstar view`: objects in a browser, side by side."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import whole

MAX_OBJECTS = 16  # browsers draw no more pictures by WebGL at a time
SUMMARY = "show objects in a browser, side by side"
DESCRIPTION = """Serve a page that plays the objects of output folders of `generate` or
`reconstruct`, side by side, until it is interrupted. Only this machine can reach it, unless --host
says otherwise. One object needs no server: open the viewer.html in its folder."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve; 0.0.0.0 is open to the whole network"
    )
    parser.add_argument("--port", type=whole(0, 65535), default=8484, help="0 takes a free one")


def run(arguments: argparse.Namespace) -> None:
    if len(arguments.folders) > MAX_OBJECTS:
        raise ValueError(f"{len(arguments.folders)} folders: a page shows at most {MAX_OBJECTS}")
    from fourdstar_jax import bars
    from fourdstar_jax.folders import check_object
    from fourdstar_jax.serve import Server

    for folder in arguments.folders:
        check_object(folder)
    with Server(b"", host=arguments.host, port=arguments.port) as server:
        with bars.waiting("loading"):
            from fourdstar_jax.export import page

            objects = [page.object_of(folder) for folder in arguments.folders]
            server.page = page.page(objects).encode()
        names = ", ".join(each["name"] for each in objects)
        print(f"{names}: {server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
