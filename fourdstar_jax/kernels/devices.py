"""Facts about devices that kernels need: is there Mosaic GPU, do arrays differ over a mesh."""

import functools

import jax


@functools.cache
def why_no_mosaic_gpu() -> str | None:
    """The reason why Mosaic GPU kernels do not run on the default device, None if they do.

    A verb phrase, to be read after the name of what was asked for.
    """
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    needs = "needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer"
    if device.platform != "gpu" or capability is None:
        return f"{needs}, and this is a {device.platform}"
    try:
        new_enough = float(capability) >= 9
    except ValueError:  # another maker's
        new_enough = False
    return None if new_enough else f"{needs}, and this {device.device_kind} has {capability}"


def vary_like(like, *arrays):
    """Marks arrays as differing between devices where any of `like` does, inside shard_map."""
    names = set().union(*(jax.typeof(x).manual_axis_type.varying for x in like))
    out = []
    for x in arrays:
        axes = tuple(sorted(names - jax.typeof(x).manual_axis_type.varying))
        out.append(jax.lax.pcast(x, axes, to="varying") if axes else x)
    return tuple(out)
