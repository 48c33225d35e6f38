"""Kernels and sorts put together, their gradient and their vmap."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fourdstar_jax.kernels import devices
from fourdstar_jax.kernels.devices import vary_like
from fourdstar_jax.kernels.rasterize.binning import saturating_sum
from fourdstar_jax.kernels.rasterize.pallas_gpu.backward import backward_kernel
from fourdstar_jax.kernels.rasterize.pallas_gpu.forward import forward_kernel
from fourdstar_jax.kernels.rasterize.pallas_gpu.gather import gather_kernel
from fourdstar_jax.kernels.rasterize.pallas_gpu.intersect import expand, pack
from fourdstar_jax.kernels.rasterize.pallas_gpu.lanes import LANES, launch
from fourdstar_jax.kernels.rasterize.pallas_gpu.spec import (
    GEOMETRY,
    I32,
    PITCH,
    TILE,
    WARPS,
    Blended,
    Inputs,
    Spec,
    shape_of,
)


def blend(inputs: Inputs, *, with_depths, width, height, capacity, interpret=False) -> Blended:
    """Blends projected Gaussians front to back; differentiable, works under jit and vmap.

    Inputs are float32. `capacity` is the number of (tile, Gaussian) pairs there is room for; where
    `overflow` is set there were more, and the images are not to be used.
    """
    inputs = Inputs(*vary_like(inputs, *inputs))
    images, gaussians = inputs.u.shape
    spec = Spec(
        images=images,
        gaussians=gaussians,
        sets=inputs.colors.shape[0],
        features=inputs.features.shape[-1],
        with_depths=with_depths,
        width=width,
        height=height,
        capacity=capacity,
        interpret=interpret,
    )
    if images % spec.sets:
        raise ValueError(f"{images=} must be a multiple of the number of sets {spec.sets}")
    if spec.tiles >= 2**31 or spec.total >= 2**31 // 4:
        raise ValueError(f"{images=} of {width}x{height} with {gaussians=} are too many at once")
    blended: Any = _blend(inputs, spec)
    return blended._replace(num_pairs=saturating_sum(blended.num_pairs, axis=-1))


@functools.cache
def why_not() -> str | None:
    """The reason why these kernels do not run on the default device, to follow their name."""
    if reason := devices.why_no_mosaic_gpu():
        return reason
    inputs = [shape_of(1, 1)] * 7 + [shape_of(1, 1, 3), shape_of(1, 1, 0)]
    spec = Spec(1, 1, 1, 0, False, TILE, TILE, 128, False)
    try:
        jax.jit(lambda *x: _pack_all(Inputs(*x), spec)).trace(*inputs).lower(
            lowering_platforms=("cuda",)
        )
    except Exception as error:  # whatever another version of Pallas may say
        return f"does not fit the Pallas of jax {jax.__version__} ({error!r})"
    return None


class Kept(NamedTuple):
    """Residuals for the backward pass: flat arrays, the length of each a multiple of the images."""

    rows: Any
    counts: Any
    begins: Any  # first place of each Gaussian's pairs
    owners: Any
    places: Any  # in order of tiles
    tile_begins: Any
    reached: Any
    planes: Any


def _cumsum(x):
    return jnp.cumsum(x, dtype=I32)


def _pack_all(inputs: Inputs, spec: Spec):
    return launch(
        pack,
        list(inputs if spec.features else inputs[:-1]),
        outputs=[shape_of(spec.total * spec.words), shape_of(spec.total, dtype=I32)],
        grid=-(-spec.total // LANES),
        static=(spec,),
        interpret=spec.interpret,
    )


def _run_forward(inputs: Inputs, spec: Spec) -> tuple[Blended, Kept]:
    run = functools.partial(launch, interpret=spec.interpret)
    blocks = -(-spec.total // LANES)
    rows, counts = _pack_all(inputs, spec)
    # Depths are positive, so their bits are in their order.
    depths = lax.bitcast_convert_type(inputs.depths.reshape(-1), jnp.uint32)
    depths = jnp.where(counts > 0, depths, jnp.uint32(2**32 - 1))
    (index,) = vary_like(inputs, lax.iota(I32, spec.total))
    _, order = lax.sort((depths, index), num_keys=1, is_stable=True)
    ordered = counts[order]
    stops = _cumsum(ordered)
    num_pairs = saturating_sum(counts.reshape(spec.images, -1), axis=-1)

    key_type = jnp.uint16 if spec.tiles < 2**16 - 1 else jnp.uint32
    keys = jnp.full(spec.capacity, jnp.iinfo(key_type).max, key_type)
    keys = jax.new_ref(vary_like(inputs, keys)[0])
    owners, begins = run(
        expand,
        [rows, order, stops - ordered, stops],
        refs=[keys],
        outputs=[shape_of(spec.capacity, dtype=I32), shape_of(spec.total, dtype=I32)],
        scratch=[shape_of(LANES * 8), shape_of(LANES, dtype=I32), shape_of(LANES * 4, dtype=I32)],
        grid=blocks,
        static=(spec,),
    )
    (slots,) = vary_like(inputs, lax.iota(I32, spec.capacity))
    keys, places = lax.sort((jax.freeze(keys), slots), num_keys=1, is_stable=True)
    tile_ids = lax.iota(key_type, spec.tiles)
    tile_begins = jnp.searchsorted(keys, tile_ids, method="scan_unrolled").astype(I32)
    end = jnp.minimum(stops[-1:], spec.capacity)
    # Not slices of one array: kernels take aligned buffers only.
    tile_ends = jnp.concatenate([tile_begins[1:], end])
    pixels = spec.images * spec.height * spec.width
    planes, reached = run(
        forward_kernel,
        [rows, places, owners, tile_begins, tile_ends],
        outputs=[shape_of((spec.channels + 1) * pixels), shape_of(spec.tiles * WARPS, dtype=I32)],
        scratch=[shape_of(LANES * spec.words)],
        grid=spec.tiles,
        static=(spec,),
    )
    kept = Kept(rows, counts, begins, owners, places, tile_begins, reached, planes)
    planes = planes.reshape(-1, spec.images, spec.height, spec.width)
    overflow = saturating_sum(num_pairs, axis=-1) > spec.capacity
    return Blended(planes[:-1], planes[-1], num_pairs, overflow), kept


def _run_backward(kept: Kept, cotangent: Blended, spec: Spec) -> Inputs:
    run = functools.partial(launch, interpret=spec.interpret)
    planes = kept.planes.reshape(spec.channels + 1, spec.images, spec.height, spec.width)
    rest = jnp.sum(cotangent.channels * planes[:-1], axis=0) + cotangent.left * planes[-1]
    longest = jnp.max(kept.reached.reshape(-1, WARPS), axis=1)
    ends = _cumsum(longest)
    bases = ends - longest
    lows = jnp.arange(spec.passes, dtype=I32) * spec.window
    firsts = jnp.min(jnp.where(bases >= lows[:, None], bases, ends[-1]), axis=1)
    lasts = jnp.concatenate([firsts[1:], ends[-1:]])
    # A tile's list holds a Gaussian once at most.
    room = spec.window + min(spec.gaussians, spec.capacity)
    owners = jax.new_ref(kept.owners)

    @jax.jit  # passes share one kernel
    def sums_of(low):
        return run(
            backward_kernel,
            [
                low,
                kept.rows,
                kept.places,
                kept.tile_begins,
                kept.reached,
                bases,
                cotangent.channels,
                rest,
            ],
            refs=[owners],
            outputs=[shape_of(room * spec.sums)],
            scratch=[
                shape_of(LANES * spec.words),
                shape_of(LANES, dtype=I32),
                shape_of(LANES * PITCH),
                shape_of(2 * LANES * spec.sums),
                shape_of(2 * WARPS, dtype=I32),
            ],
            grid=spec.tiles,
            static=(spec,),
        )[0]

    def gather(number, sums, refs, outputs):
        window = jnp.stack([firsts[number], lasts[number], lows[number]])
        return run(
            gather_kernel,
            [kept.rows, kept.counts, kept.begins, window, sums],
            refs=refs,
            outputs=outputs,
            grid=-(-spec.total // LANES),
            static=(spec, number == 0),
        )

    # The first pass writes the gradients, the others add to them.
    shape = shape_of(spec.sums * spec.total)
    (gradients,) = gather(0, sums_of(jnp.zeros(1, I32)), [owners], [shape])
    gradients = jax.new_ref(gradients)
    for number in range(1, spec.passes):
        low = jnp.full(1, number * spec.window, I32)
        gather(number, sums_of(low), [owners, gradients], [])
    planes = jax.freeze(gradients).reshape(spec.sums, spec.images, spec.gaussians)
    geometry, channels = planes[:GEOMETRY], planes[GEOMETRY:]
    depths = channels[3] if spec.with_depths else jnp.zeros_like(geometry[0])
    channels = channels.reshape(-1, spec.sets, spec.images // spec.sets, spec.gaussians)
    shared = jnp.moveaxis(jnp.sum(channels, axis=2), 0, -1)  # [S, G, C]
    u, v, a, b, c, opacities = geometry
    colors, features = shared[..., :3], shared[..., 3 + spec.with_depths :]
    return Inputs(u, v, a, b, c, opacities, depths, colors, features)


def _folding(run):
    """`run(*arrays, spec)` with a vmap rule: the mapped axis becomes more images of one call."""

    @functools.cache
    def for_spec(spec):
        mapped = jax.custom_batching.custom_vmap(lambda *arrays: run(*arrays, spec))

        @mapped.def_vmap
        def rule(size, batched, *arrays):
            def join(x, is_batched):
                x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
                axis = _images_axis(x.ndim - 1)
                x = jnp.moveaxis(x, 0, axis)
                return x.reshape(
                    *x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]
                )

            def split(x):
                if not x.ndim:
                    return jnp.broadcast_to(x, (size,))
                axis = _images_axis(x.ndim)
                x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
                return jnp.moveaxis(x, axis, 0)

            more = spec._replace(
                images=size * spec.images, sets=size * spec.sets, capacity=size * spec.capacity
            )
            joined = jax.tree.map(join, arrays, tuple(batched))
            out = jax.tree.map(split, for_spec(more)(*joined))
            return out, jax.tree.map(lambda _: True, out)

        return mapped

    return lambda *arrays_and_spec: for_spec(arrays_and_spec[-1])(*arrays_and_spec[:-1])


def _images_axis(ndim):
    """The axis of images in an array of `Inputs`, `Kept` or `Blended`; channels come before it."""
    return 1 if ndim == 4 else 0


_forward, _backward = _folding(_run_forward), _folding(_run_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _blend(inputs: Inputs, spec: Spec) -> Blended:
    return _forward(inputs, spec)[0]


def _blend_fwd(inputs, spec):
    return _forward(inputs, spec)


def _blend_bwd(spec, kept, cotangent):
    floats = cotangent._replace(num_pairs=None, overflow=None)
    return (_backward(kept, floats, spec),)


_blend.defvjp(_blend_fwd, _blend_bwd)
