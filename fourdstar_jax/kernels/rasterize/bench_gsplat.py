"""gsplat's side of `bench.py`, one scene in a process of its own.

    python -m fourdstar_jax.kernels.rasterize.bench_gsplat A --repeats 30

Prints one line of JSON. Beside what our side measures: `sync_events_ms`, the median between CUDA
events around one call; `kernels_ms`, the sum of the times of all CUDA kernels of one call (the
profiler's; copies and fills are not counted); `peak_bytes`, the allocator's peak of one forward +
backward with its inputs. The forward alone runs without autograd.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import gsplat  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.autograd import DeviceType  # pyright: ignore[reportMissingImports]
from torch.profiler import ProfilerActivity, profile  # pyright: ignore[reportMissingImports]

from fourdstar_jax.kernels.rasterize import bench
from fourdstar_jax.types import Gaussians


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Times, memory and counts of gsplat on one scene, and means to compare by."""
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device")
    scene = bench.SCENES[name]
    gaussians, cameras = bench.make_scene(scene)
    if scene.timesteps > 1:
        cameras = [np.repeat(x[None], scene.timesteps, 0) for x in cameras]

    def on_device(arrays, **options):
        return [torch.tensor(x, device="cuda", **options) for x in arrays]

    leaves = on_device(gaussians, requires_grad=True)
    cameras = on_device(cameras)
    cotangents = on_device(bench.make_cotangents(scene))

    def render():
        size = (scene.width, scene.height)
        return gsplat.rasterization(*leaves, *cameras, *size, packed=False, render_mode="RGB")

    def forward():
        with torch.no_grad():
            return render()

    def forward_backward():
        renders, alphas, meta = render()
        return renders, alphas, meta, torch.autograd.grad((renders, alphas), leaves, cotangents)

    calls = dict(forward=forward, forward_backward=forward_backward)
    times = {part: _times_ms(call, repeats) for part, call in calls.items()}

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    renders, alphas, meta, gradients = forward_backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    for part, call in calls.items():  # after the timing, which the profiler would disturb
        times[part]["kernels_ms"] = _kernels_ms(call)
    renders, alphas, *gradients = (x.detach().cpu().numpy() for x in (renders, alphas, *gradients))
    return dict(
        **times,
        peak_bytes=peak,
        num_intersections=meta["flatten_ids"].numel(),
        **bench.summary(renders, alphas, Gaussians(*gradients)),
        device=torch.cuda.get_device_name(),
        versions=dict(gsplat=gsplat.__version__, torch=torch.__version__),
    )


def _times_ms(call, repeats: int) -> dict[str, Any]:
    times = bench.times_ms(call, lambda _: torch.cuda.synchronize(), repeats)
    return dict(**times, sync_events_ms=_events_ms(call, repeats))


def _events_ms(call, repeats: int) -> float:
    between = []
    for _ in range(repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
        call()
        events[1].record()
        torch.cuda.synchronize()
        between.append(events[0].elapsed_time(events[1]))
    return statistics.median(between)


def _kernels_ms(call, calls: int = 5) -> float:
    def events():
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
        return profiler.events()

    events()  # the first profile pays for the profiler's start
    total = sum(
        event.self_device_time_total
        for event in events()
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    )
    if total == 0:
        raise ValueError("torch's profiler saw no CUDA kernel")
    return total / calls / 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scene", choices=bench.SCENES)
    parser.add_argument("--repeats", type=int, required=True)
    arguments = parser.parse_args()
    try:
        print(json.dumps(measure(arguments.scene, arguments.repeats)))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
