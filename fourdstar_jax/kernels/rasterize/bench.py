"""Times implementations of `rasterize` on random scenes, forward and forward + backward.

    python -m fourdstar_jax.kernels.rasterize.bench tiny small16k --implementations xla

Prints a line a scene and implementation: median of repeated calls with a wait after each, in
milliseconds, after compiling; `--json FILE` writes the same. Scenes are objects of random
anisotropic Gaussians in a ball that fills most of the picture.
"""

import argparse
import functools
import json
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.geometry import orbit_cameras
from fourdstar_jax.kernels.rasterize.api import rasterize
from fourdstar_jax.kernels.rasterize.binning import pick_capacity
from fourdstar_jax.types import Cameras, Gaussians


class Scene(NamedTuple):
    """`timesteps` objects of `num` Gaussians, each seen from `views` sides."""

    timesteps: int
    num: int
    views: int
    width: int
    height: int
    scale: tuple[float, float]  # standard deviations are log-uniform between these, scene units


SCENES = {
    "tiny": Scene(4, 1024, 2, 64, 64, (0.035, 0.052)),  # a training step at tiny size
    "small16k": Scene(1, 16384, 4, 128, 128, (0.002, 0.02)),
    "S": Scene(2, 16384, 4, 128, 128, (0.002, 0.02)),  # a training step at small size
    "A": Scene(1, 65536, 8, 256, 256, (0.002, 0.02)),
    "B": Scene(1, 65536, 8, 512, 512, (0.002, 0.02)),
    "C": Scene(1, 262144, 8, 256, 256, (0.002, 0.02)),
    "D": Scene(1, 524288, 8, 512, 512, (0.002, 0.02)),
    "E": Scene(1, 1000000, 1, 1920, 1080, (0.002, 0.02)),
    "F": Scene(24, 65536, 8, 256, 256, (0.002, 0.02)),
    "H": Scene(4, 131072, 6, 256, 256, (0.002, 0.02)),
}


def make_gaussians(scene: Scene, seed: int = 0) -> Gaussians:
    """Centres uniform in a ball of radius 0.7, opacities sigmoid(1.5 normal)."""
    rng = np.random.default_rng(seed)
    shape = (scene.timesteps, scene.num)
    directions = rng.standard_normal((*shape, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    low, high = np.log(scene.scale)
    arrays = (
        directions * 0.7 * rng.random((*shape, 1)) ** (1 / 3),
        rng.standard_normal((*shape, 4)),
        np.exp(rng.uniform(low, high, (*shape, 3))),
        1 / (1 + np.exp(-1.5 * rng.standard_normal(shape))),
        rng.random((*shape, 3)),
    )
    return Gaussians(*(jnp.asarray(x, jnp.float32) for x in arrays))


def make_cameras(scene: Scene) -> Cameras:
    azimuths = [360 * i / scene.views for i in range(scene.views)]
    cameras = orbit_cameras(azimuths, width=scene.width, height=scene.height)
    return Cameras(*(jnp.asarray(x) for x in cameras))


def median_ms(run, *args, repeats: int) -> float:
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(name: str, implementation: str, repeats: int = 10) -> dict:
    """One line of the benchmark: times in milliseconds, pairs, and means to compare runs by."""
    scene = SCENES[name]
    gaussians, cameras = make_gaussians(scene), make_cameras(scene)

    def render_with(capacity, gaussians):
        return rasterize(
            gaussians,
            cameras,
            width=scene.width,
            height=scene.height,
            capacity=capacity,
            implementation=implementation,
        )

    first = jax.jit(render_with, static_argnums=0)(1, gaussians)
    render = functools.partial(render_with, pick_capacity(int(first.num_intersections)))
    shape = (*first.renders.shape[:-1], 4)
    cotangent = jax.random.normal(jax.random.key(1), shape)

    def loss(gaussians):
        result = render(gaussians)
        return jnp.sum(jnp.concatenate([result.renders, result.alphas], axis=-1) * cotangent)

    result = render(gaussians)
    return dict(
        scene=name,
        implementation=implementation,
        device=jax.devices()[0].device_kind,
        forward_ms=median_ms(jax.jit(render), gaussians, repeats=repeats),
        forward_backward_ms=median_ms(jax.jit(jax.grad(loss)), gaussians, repeats=repeats),
        num_intersections=int(result.num_intersections),
        overflow=bool(result.overflow),
        mean_color=float(jnp.mean(result.renders)),
        mean_alpha=float(jnp.mean(result.alphas)),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times implementations of rasterize.")
    parser.add_argument("scenes", nargs="*", default=["tiny"], metavar="SCENE")
    parser.add_argument("--implementations", nargs="+", default=["reference", "xla"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := set(args.scenes) - set(SCENES):
        parser.error(f"unknown scenes {sorted(unknown)}; there are {', '.join(SCENES)}")
    lines = []
    for name in args.scenes:
        for implementation in args.implementations:
            line = measure(name, implementation, args.repeats)
            lines.append(line)
            print(
                "{scene:10s} {implementation:10s} forward {forward_ms:9.2f} ms   "
                "forward + backward {forward_backward_ms:9.2f} ms   "
                "{num_intersections} pairs".format(**line),
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(lines, file, indent=2)


if __name__ == "__main__":
    main()
