"""How fast viewer.html draws 65,536 Gaussians in Chromium without a GPU: a lower bound.

PYTHONPATH=tests python tests/export/page_speed.py docs/results/viewer_chromium.json
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from helpers import browser

from fourdstar_jax.export import page
from fourdstar_jax.geometry import Rig
from fourdstar_jax.types import Gaussians

NUM, TIMESTEPS, SIZES, REPEATS = 65_536, 24, (256, 512), 12


def shell() -> Gaussians:
    """Opaque Gaussians all over a sphere of 0.4 that turns and breathes."""
    i = np.arange(NUM)
    z = 1 - (2 * i + 1) / NUM
    radius, angle = np.sqrt(1 - z * z), np.pi * (1 + 5**0.5) * i
    t = np.arange(TIMESTEPS)[:, None]
    turned, size = angle + 2 * np.pi * t / TIMESTEPS, 0.4 + 0.02 * np.sin(2 * np.pi * t / TIMESTEPS)
    ball = [radius * np.sin(turned), np.broadcast_to(z, turned.shape), radius * np.cos(turned)]
    shape = (TIMESTEPS, NUM)
    return Gaussians(
        means=(size[..., None] * np.stack(ball, axis=-1)).astype(np.float32),
        quats=np.broadcast_to(np.float32([1, 0, 0, 0]), (*shape, 4)).copy(),
        scales=np.full((*shape, 3), 0.4 * 2 * (np.pi / NUM) ** 0.5 * 0.7, np.float32),
        opacities=np.full(shape, 0.9, np.float32),
        colors=np.broadcast_to((0.5 + 0.5 * np.stack([z, -z, np.sin(angle)], -1)), (*shape, 3))
        .astype(np.float32)
        .copy(),
    )


# A frame that is new each time, the camera turned, and the picture read back, so that it is there.
DRAW = """(() => {
  const pane = viewer.panes[0], gl = pane.canvas.getContext("webgl2");
  const changed = [], drawn = [];
  for (let i = 0; i < REPEATS; i++) {
    const begun = performance.now();
    viewer.state.azimuth = 15 * i;
    pane.timestep = (i + 1) % pane.gaussians.timesteps;
    pane.drawing.load(pane.gaussians.frame(pane.timestep, pane.drawing.floats));
    const loaded = performance.now();
    pane.draw(pane.timestep / pane.gaussians.fps);
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4));
    changed.push(loaded - begun), drawn.push(performance.now() - begun);
  }
  return [changed, drawn];
})()""".replace("REPEATS", str(REPEATS))


def main(out: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "what": f"viewer.html, {NUM:,} Gaussians of a sphere's surface, {TIMESTEPS} timesteps: "
        "each picture another timestep from another side, sorted, drawn and read back; medians",
        "how": "tests/export/page_speed.py",
        "date": str(datetime.date.today()),
        "device": f"{os.cpu_count()} processor cores, no GPU (SwiftShader)",
        "machine": platform.machine(),
        "commit": commit.stdout.strip(),
        "gaussians": NUM,
        "sizes": {},
    }
    with tempfile.TemporaryDirectory() as folder, browser.page() as page_:
        path = Path(folder) / "viewer.html"
        rig = Rig((0.0, 90.0), fps=8.0)
        assert page.write_page(path, [page.describe("shell", shell(), rig)])
        result["page_bytes"] = path.stat().st_size
        version = page_.call("Browser.getVersion")
        result["browser"] = version["product"]
        for size in SIZES:
            page_.open("about:blank", width=size, height=size)
            page_.open(f"file://{path}#ui=0&input=0&play=0", width=size, height=size)
            page_.until("window.viewer && viewer.ready", timeout_s=120)
            changed, drawn = page_.eval(DRAW, timeout_s=300)
            result["sizes"][str(size)] = {
                "load_ms": float(np.median(changed)),
                "picture_ms": float(np.median(drawn)),
                "pictures_per_s": float(1e3 / np.median(drawn)),
            }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
