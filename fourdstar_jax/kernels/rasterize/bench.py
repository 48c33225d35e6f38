"""Times `rasterize` on random scenes, forward and forward + backward, if wanted beside gsplat.

    fourdstar bench rasterize A B --against gsplat --json results.json
    fourdstar bench rasterize --table results.json

Both sides get the same float32 Gaussians, cameras and cotangents, all arguments of the timed
program, and give colours and alphas, the backward pass also the gradients of means, quats, scales,
opacities and colors. gsplat runs in a process of its own right before ours (`bench_gsplat.py`), so
that neither holds the other's memory. Every figure is taken after warm-up calls:

- sync_ms: median time of one call with a wait for its results after each.
- back_to_back_ms: mean over as many calls with one wait after the last.
- program_bytes: arguments, outputs and temporaries of the forward + backward program, as compiled.
- allocator_peak_bytes: the device allocator's peak where this measurement raised it; it never
  falls, so after a larger scene there is none.
"""

import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.kernels.rasterize.api import (
    IMPLEMENTATIONS,
    default_implementation,
    rasterize,
)
from fourdstar_jax.kernels.rasterize.binning import pick_capacity
from fourdstar_jax.timing import allocator_peak, describe, program_bytes, time_calls
from fourdstar_jax.types import Cameras, Gaussians

WARM_UP = 5  # calls
RADIUS, FOV_DEG = 1.5, 49.1  # of the cameras; the field of view spans the shorter side


class Scene(NamedTuple):
    """`timesteps` objects of `num` Gaussians, each seen from `views` sides, in one call."""

    timesteps: int
    num: int
    views: int
    width: int
    height: int
    repeats: int = 30
    scale: tuple[float, float] = (0.002, 0.02)  # standard deviations are log-uniform in between


SCENES = {
    "tiny": Scene(4, 1024, 2, 64, 64, scale=(0.035, 0.052)),  # a training step at tiny size
    "small16k": Scene(1, 16384, 4, 128, 128),
    "S": Scene(2, 16384, 4, 128, 128),  # a training step at small size
    "A": Scene(1, 65536, 8, 256, 256),
    "B": Scene(1, 65536, 8, 512, 512),
    "C": Scene(1, 262144, 8, 256, 256),
    "D": Scene(1, 524288, 8, 512, 512),
    "E": Scene(1, 1000000, 1, 1920, 1080),
    "F": Scene(24, 65536, 8, 256, 256, repeats=20),  # every timestep of an object at medium size
    "H": Scene(4, 131072, 6, 256, 256),  # a training step at paper size
}
PASSES = ("forward", "forward_backward")


def make_object(num: int, seed: int, scale: tuple[float, float] = (0.002, 0.02)) -> Gaussians:
    """Gaussians uniform in a ball of radius 0.7, opacities sigmoid(1.5 normal); numpy arrays."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((num, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    means = directions * 0.7 * rng.random((num, 1)) ** (1 / 3)
    scales = np.exp(rng.uniform(np.log(scale[0]), np.log(scale[1]), (num, 3)))
    quats = rng.standard_normal((num, 4))
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    opacities = 1 / (1 + np.exp(-1.5 * rng.standard_normal(num)))
    arrays = (means, quats, scales, opacities, rng.random((num, 3)))
    return Gaussians(*(x.astype(np.float32) for x in arrays))


def make_cameras(views: int, width: int, height: int) -> Cameras:
    """Cameras around the z axis at equal angles, looking at the origin; numpy arrays."""
    focal = 0.5 * min(width, height) / np.tan(0.5 * np.deg2rad(FOV_DEG))
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    viewmats = []
    for view in range(views):
        angle = 2 * np.pi * view / views
        eye = RADIUS * np.array([np.cos(angle), np.sin(angle), 0.0])
        forward = -eye / np.linalg.norm(eye)
        right = np.cross(forward, [0, 0, 1.0])
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])
        viewmat = np.eye(4)
        viewmat[:3, :3], viewmat[:3, 3] = rotation, -rotation @ eye
        viewmats.append(viewmat)
    Ks = np.repeat(K[None], views, 0)
    return Cameras(np.stack(viewmats).astype(np.float32), Ks.astype(np.float32))


def make_scene(scene: Scene) -> tuple[Gaussians, Cameras]:
    """Gaussians and cameras of a scene, timestep t from seed t; numpy arrays.

    Gaussians have an axis of timesteps where there are several, cameras never have it.
    """
    objects = [make_object(scene.num, seed, scene.scale) for seed in range(scene.timesteps)]
    gaussians = Gaussians(*(np.stack(x) for x in zip(*objects, strict=True)))
    if scene.timesteps == 1:
        gaussians = objects[0]
    return gaussians, make_cameras(scene.views, scene.width, scene.height)


def make_cotangents(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal cotangents of colours and alphas; numpy arrays."""
    rng = np.random.default_rng(1)
    times = (scene.timesteps,) if scene.timesteps > 1 else ()
    shape = (*times, scene.views, scene.height, scene.width)
    colors = rng.standard_normal((*shape, 3), np.float32)
    return colors, rng.standard_normal((*shape, 1), np.float32)


def times_ms(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> dict[str, Any]:
    """The times of one call, as both sides report them."""
    times = time_calls(call, wait, warm_up=WARM_UP, repeats=repeats)
    return dict(
        sync_ms=times.sync_ms,
        sync_range_ms=[min(times.waited), max(times.waited)],
        back_to_back_ms=times.back_to_back_ms,
    )


def measure(name: str, implementation: str, repeats: int | None = None) -> dict[str, Any]:
    """Times, memory and counts of one implementation on one scene, and means to compare by."""
    scene = SCENES[name]
    repeats = repeats or scene.repeats
    gaussians, cameras = jax.device_put(make_scene(scene))
    cotangents = jax.device_put(make_cotangents(scene))
    peak_before = allocator_peak()
    render = functools.partial(
        rasterize,
        width=scene.width,
        height=scene.height,
        implementation=implementation,
        with_depths=False,
    )
    capacity = pick_capacity(int(render(gaussians, cameras).num_intersections))

    @jax.jit
    def forward(gaussians, cameras):
        result = render(gaussians, cameras, capacity=capacity)
        return (result.renders, result.alphas), (result.num_intersections, result.overflow)

    @jax.jit
    def forward_backward(gaussians, cameras, cotangents):
        images, pull, counts = jax.vjp(lambda g: forward(g, cameras), gaussians, has_aux=True)
        return images, counts, pull(cotangents)[0]

    args = (gaussians, cameras, cotangents)
    wait = jax.block_until_ready
    times = dict(
        forward=times_ms(lambda: forward(*args[:2]), wait, repeats),
        forward_backward=times_ms(lambda: forward_backward(*args), wait, repeats),
    )
    size = program_bytes(forward_backward.lower(*args).compile())
    assert size is not None, "XLA does not tell the program's memory on this device"
    (renders, alphas), (count, overflow), gradients = jax.device_get(forward_backward(*args))
    assert not overflow, f"{count} pairs exceed the {capacity=}"
    peak = allocator_peak()
    return dict(
        implementation=implementation,
        **times,
        program_bytes=size,
        allocator_peak_bytes=peak if peak is not None and peak > (peak_before or 0) else None,
        num_intersections=int(count),
        capacity=capacity,
        overflow=bool(overflow),
        **summary(renders, alphas, gradients),
    )


def summary(renders, alphas, gradients) -> dict[str, Any]:
    """Figures by which two renderers can be seen to compute the same."""
    norms = {k: np.linalg.norm(x.astype(np.float64)) for k, x in gradients._asdict().items()}
    return dict(
        mean_rgb=round(float(np.mean(renders, dtype=np.float64)), 6),
        mean_alpha=round(float(np.mean(alphas, dtype=np.float64)), 6),
        gradient_norms={k: float(f"{x:.6g}") for k, x in norms.items()},
    )


def measure_gsplat(name: str, repeats: int | None = None) -> dict[str, Any]:
    """gsplat's figures of a scene, measured in a process of its own (`bench_gsplat.py`)."""
    if missing := [x for x in ("torch", "gsplat") if importlib.util.find_spec(x) is None]:
        raise ValueError(f"gsplat needs torch with CUDA; not installed: {', '.join(missing)}")
    command = [sys.executable, "-m", "fourdstar_jax.kernels.rasterize.bench_gsplat", name]
    command += ["--repeats", str(repeats or SCENES[name].repeats)]
    child = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise ValueError(f"gsplat cannot run here: {lines[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def ratios(ours: dict[str, Any], gsplat: dict[str, Any]) -> dict[str, Any]:
    """Our figures over gsplat's; `kernels` is our back-to-back time over its kernels' times."""
    result: dict[str, Any] = {"memory": ours["program_bytes"] / gsplat["peak_bytes"]}
    for name in PASSES:
        mine, other = ours[name], gsplat[name]
        result[name] = dict(
            sync=mine["sync_ms"] / other["sync_ms"],
            back_to_back=mine["back_to_back_ms"] / other["back_to_back_ms"],
            kernels=mine["back_to_back_ms"] / other["kernels_ms"],
        )
    return result


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy on the device; the median of ten batches."""
    large = jax.devices()[0].platform != "cpu"
    x = jnp.zeros(2**28 if large else 2**24, jnp.float32)
    copy, copies = jax.jit(jnp.copy), 8
    rates = []
    for _ in range(11):
        start = time.perf_counter()
        y = None
        for _ in range(copies):
            y = copy(x)
        jax.block_until_ready(y)
        rates.append(copies * 2 * x.nbytes / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def run(
    scenes: list[str],
    *,
    implementations: list[str] | None = None,
    repeats: int | None = None,
    against: str | None = None,
    json_file: Path | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Measures, prints a line each, and writes the results so far after every scene."""
    if unknown := [name for name in scenes if name not in SCENES]:
        raise ValueError(f"there is no scene {unknown[0]!r}; there are {', '.join(SCENES)}")
    # Leaves the device's memory to gsplat's process too; heeded where JAX has not started yet.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    implementations = implementations or [default_implementation(jnp.zeros(()))]
    if unknown := [name for name in implementations if name not in IMPLEMENTATIONS]:
        raise ValueError(f"implementation {unknown[0]!r} must be one of {tuple(IMPLEMENTATIONS)}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"{repeats=} must be positive")
    results: dict[str, Any] = describe(commit) | dict(copy_bytes_per_s=None, scenes=[])

    def save():
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(results, indent=1) + "\n")

    for name in scenes:
        scene = SCENES[name]
        entry: dict[str, Any] = dict(scene=name, **scene._asdict(), results=[])
        entry["repeats"] = repeats or scene.repeats
        if against is not None:
            entry["gsplat"] = measure_gsplat(name, repeats)
            results["versions"] |= entry["gsplat"].pop("versions")
            _say(name, "gsplat", entry["gsplat"])
        for implementation in implementations:
            line = measure(name, implementation, repeats)
            if against is not None:
                line["ratios"] = ratios(line, entry["gsplat"])
            entry["results"].append(line)
            _say(name, implementation, line)
        results["scenes"].append(entry)
        save()
    results["copy_bytes_per_s"] = copy_bandwidth()  # last: it raises the allocator's peak
    print(f"copy on the device: {results['copy_bytes_per_s'] / 1e9:.0f} GB/s")
    save()
    return results


def _say(name: str, who: str, line: dict[str, Any]) -> None:
    words = [f"{name:8s} {who:10s}"]
    for part, label in zip(PASSES, ("forward", "forward+backward"), strict=True):
        words.append(
            f"{label} {line[part]['sync_ms']:.3f} / {line[part]['back_to_back_ms']:.3f} ms"
        )
        if "ratios" in line:
            words.append("(" + " / ".join(f"{x:.2f}" for x in line["ratios"][part].values()) + ")")
    peak = line["peak_bytes" if who == "gsplat" else "program_bytes"]
    words.append(f"{peak / 1e9:.3f} GB, {line['num_intersections']:,} pairs")
    words.append(f"alpha {line['mean_alpha']:.6f} rgb {line['mean_rgb']:.6f}")
    print("  ".join(words), flush=True)
