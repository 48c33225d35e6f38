"""Tile rasterizer in Pallas for TPUs, forward and backward. Compiles for TPUs; has not run on one.

Tiling: a program owns one tile of 32x32 pixels, so that a quantity of all its pixels is one vector
register [8, 128]; it walks the tile's list front to back, Gaussian by Gaussian. XLA gathers the
lists' rows (geometry and channels) into chunks of 128 Gaussians, every tile starting a new chunk.
They stay in HBM, and a program copies two chunks at a time to SMEM, one in use and one on its
way, so neither lists nor scenes have to fit anywhere; it stops after the chunk in which the last
of its pixels ended. In SMEM there are further the tile's first chunk and its list's length, in VMEM
its planes of pixels. The forward kernel accumulates a plane for each channel in registers.

The backward kernel walks front to back as `xla.py` does, with a running sum in place of what lies
behind. It leaves weights and gradients of sigma of a chunk in VMEM (1 MiB), and the MXU reduces
both over pixels: to moments about the tile's centre and to gradients of channels. Each (tile,
Gaussian) pair has a row of its own to write to, in the chunk it was read from, so nothing is added
up between programs. XLA then sorts the rows by Gaussian and adds them in that order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from fourdstar_jax.kernels.devices import vary_like
from fourdstar_jax.kernels.rasterize.projection import (
    ALPHA_MAX,
    ALPHA_MIN,
    TRANSMITTANCE_MIN,
    Projected,
)
from fourdstar_jax.kernels.rasterize.rows import Counts, blend_in_tiles
from fourdstar_jax.kernels.rasterize.tiles import Grid, geometry_gradient, tile_centres

TILE = 32  # pixels
PLANE = (8, 128)  # a tile's pixels in one register: pixel (x, y) is number 32 y + x
CHUNK = 128  # Gaussians that are copied together
UNROLL = 8  # Gaussians a step of the innermost loop
GEOMETRY = 6  # u, v, a, b, c, opacity
MOMENTS = 8  # 1, x, y, x^2, xy, y^2 and two of zeros


class _Settings(NamedTuple):
    """Sizes and options that the kernels are compiled for."""

    grid: Grid
    interpret: Any


def blend(
    projected: Projected,
    channels: Float[Array, "I G C"],
    *,
    width: int,
    height: int,
    capacity: int,
    interpret: Any = False,
) -> tuple[Float[Array, "I h w C+1"], Counts]:
    """Images of I cameras, each with its own projected Gaussians, computed in float32.

    The last channel is the transmittance that is left. `interpret` runs the kernels on any device:
    `True`, or a `pltpu.InterpretParams`, which also models memories and copies.
    """
    grid = Grid(TILE, width, height)

    def blend_tiles(geometry, channels, ids, offsets):
        geometry, channels = geometry.astype(jnp.float32), channels.astype(jnp.float32)
        planes = _blend_tiles(geometry, channels, ids, offsets, _Settings(grid, interpret))
        return jnp.asarray(planes).reshape(-1, channels.shape[1] + 1, TILE * TILE)

    images, counts = blend_in_tiles(blend_tiles, projected, channels, grid, capacity)
    return images.astype(channels.dtype), counts


def why_not() -> str | None:
    """The reason why these kernels do not run on the default device, to follow their name."""
    backend = jax.default_backend()
    return None if backend == "tpu" else f"needs a TPU, and this is a {backend}"


# Rows of pairs, cut into chunks


class _Chunks(NamedTuple):
    """The lists of `Bins` in chunks; tile t owns those from bounds[t, 0, 0] on."""

    ids: jax.Array  # [chunks, CHUNK]; the number of Gaussians where there is none
    tiles: jax.Array  # [chunks], the tile each chunk belongs to
    rows: jax.Array  # [chunks, CHUNK * R / 128, 128], R = GEOMETRY + C and padding
    bounds: jax.Array  # [tiles, 1, 2], first chunk and length of the list


def _make_chunks(geometry, channels, ids, offsets) -> _Chunks:
    num_tiles = offsets.shape[0] - 1
    num = geometry.shape[0]
    lengths = offsets[1:] - offsets[:-1]
    ends = jnp.cumsum(-(-lengths // CHUNK), dtype=jnp.int32)
    first = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    most = (ids.shape[0] + (CHUNK - 1) * num_tiles) // CHUNK
    chunk = jnp.arange(most, dtype=jnp.int32)
    tiles = jnp.searchsorted(ends, chunk, side="right").astype(jnp.int32)
    tiles = jnp.minimum(tiles, num_tiles - 1)
    within = (chunk - first[tiles])[:, None] * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
    slots = jnp.minimum(offsets[tiles][:, None] + within, ids.shape[0] - 1)
    listed = jnp.where(within < lengths[tiles][:, None], ids[slots], num)
    rows = jnp.concatenate([geometry, channels], axis=1)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % (128 // UNROLL))))
    rows = jnp.take(rows, listed, axis=0, mode="fill", fill_value=0)  # [chunks, CHUNK, R]
    rows = rows.reshape(most, -1, 128)
    bounds = jnp.stack([first, lengths], axis=-1)[:, None]
    return _Chunks(listed, tiles, rows, bounds)


# Kernels


def _pixel_centres(grid: Grid):
    """Pixel centres (x, y) of this program's tile, a plane each."""
    tile = jax.lax.rem(pl.program_id(0), jnp.int32(grid.rows * grid.columns))
    column = jax.lax.rem(tile, jnp.int32(grid.columns))
    row = jax.lax.div(tile, jnp.int32(grid.columns))
    sublane = jax.lax.broadcasted_iota(jnp.int32, PLANE, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, PLANE, 1)
    x = column * TILE + jax.lax.rem(lane, jnp.int32(TILE))
    y = row * TILE + sublane * (PLANE[1] // TILE) + jax.lax.div(lane, jnp.int32(TILE))
    return x.astype(jnp.float32) + 0.5, y.astype(jnp.float32) + 0.5


class _Hit(NamedTuple):
    """One Gaussian's effect on a tile's pixels, a plane for each number."""

    raw: jax.Array  # alpha before it is clamped
    visible: jax.Array
    alpha: jax.Array  # 0 where skipped
    after: jax.Array  # transmittance behind the Gaussian
    allowed: jax.Array
    weight: jax.Array


def _hit(geometry, x, y, before) -> _Hit:
    u, v, a, b, c, opacity = geometry
    dx, dy = u - x, v - y
    p, q = a * dx + b * dy, c * dy
    raw = opacity * jnp.exp(-0.5 * (p * p + q * q))
    visible = raw >= ALPHA_MIN
    alpha = jnp.where(visible, jnp.minimum(raw, ALPHA_MAX), 0.0)
    after = before * (1 - alpha)
    allowed = after > TRANSMITTANCE_MIN
    return _Hit(raw, visible, alpha, after, allowed, jnp.where(allowed, alpha * before, 0.0))


def _transmittance(x, y, grid: Grid):
    """Transmittance in front of all Gaussians; 0 outside of the image, where none counts."""
    return jnp.where((x < grid.width) & (y < grid.height), 1.0, 0.0).astype(jnp.float32)


def _walk(refs, settings: _Settings, one, init, finish=lambda k: None):
    """Walks the tile's list, `carry = one(row, j, carry)` for Gaussian j of a chunk.

    `row(i)` reads a number of that Gaussian's row, the first carry is the transmittance, and
    `finish(k)` comes after chunk k. Returns the number of chunks visited, that of all, and the
    carry.
    """
    bounds_ref, rows_ref, buffer_ref, semaphores = refs
    first, length = bounds_ref[0, 0, 0], bounds_ref[0, 0, 1]
    chunks = jax.lax.div(length + (CHUNK - 1), jnp.int32(CHUNK))

    def copy(k):
        slot = jax.lax.rem(k, jnp.int32(2))
        return pltpu.make_async_copy(
            rows_ref.at[first + k], buffer_ref.at[slot], semaphores.at[slot]
        )

    def pending(state):
        k, (transmittance, *_) = state
        return (k < chunks) & (jnp.max(transmittance) > TRANSMITTANCE_MIN)

    def chunk(state):
        k, carry = state
        copy(k).wait()
        pl.when(k + 1 < chunks)(lambda: copy(k + 1).start())
        slot = jax.lax.rem(k, jnp.int32(2))
        lines = buffer_ref.shape[1] * UNROLL // CHUNK  # that hold the rows of a step
        size = lines * 128 // UNROLL

        def several(step, carry):  # those past the list's end have opacity 0
            def body(i, carry):
                def row(column):
                    # Once unrolled, places within a step are constants, which makes reading cheap.
                    place = i * size + column
                    line, lane = (f(place, jnp.int32(128)) for f in (jax.lax.div, jax.lax.rem))
                    return buffer_ref[slot, step * lines + line, lane]

                return one(row, step * UNROLL + i, carry)

            unroll = settings.interpret is False  # an interpreter would gain nothing
            return jax.lax.fori_loop(0, UNROLL, body, carry, unroll=unroll)

        here = jnp.minimum(length - k * CHUNK, CHUNK)
        steps = jax.lax.div(here + (UNROLL - 1), jnp.int32(UNROLL))
        carry = jax.lax.fori_loop(jnp.int32(0), steps, several, carry)
        finish(k)
        return k + 1, carry

    pl.when(chunks > 0)(lambda: copy(jnp.int32(0)).start())
    visited, carry = jax.lax.while_loop(pending, chunk, (jnp.int32(0), init))
    pl.when(visited < chunks)(lambda: copy(visited).wait())
    return visited, chunks, carry


def _forward_kernel(bounds_ref, rows_ref, out_ref, buffer_ref, semaphores, *, settings):
    num_channels = out_ref.shape[1] - 1
    x, y = _pixel_centres(settings.grid)

    def one(row, j, carry):
        before, left, *totals = carry
        hit = _hit([row(i) for i in range(GEOMETRY)], x, y, before)
        totals = [t + hit.weight * row(GEOMETRY + i) for i, t in enumerate(totals)]
        return hit.after, jnp.where(hit.allowed, hit.after, left), *totals

    ones, zeros = jnp.ones(PLANE, jnp.float32), jnp.zeros(PLANE, jnp.float32)
    init = (_transmittance(x, y, settings.grid), ones, *[zeros] * num_channels)
    refs = (bounds_ref, rows_ref, buffer_ref, semaphores)
    _, _, (_, left, *totals) = _walk(refs, settings, one, init)
    for i, plane in enumerate((*totals, left)):
        out_ref[0, i] = plane


def _backward_kernel(
    bounds_ref,
    rows_ref,
    planes_ref,  # [1, C + 2, *PLANE]: cotangents of channels and transmittance, sum of w q
    monomials_ref,  # [8, MOMENTS, 128]
    out_ref,  # [chunks, MOMENTS + C and padding, CHUNK] in HBM
    buffer_ref,
    semaphores,
    sigmas_ref,  # [CHUNK * 8, 128], planes
    weights_ref,  # the same
    sums_ref,  # [MOMENTS + C and padding, CHUNK]
    written,
    *,
    settings,
):
    num_channels = planes_ref.shape[1] - 2
    first = bounds_ref[0, 0, 0]
    x, y = _pixel_centres(settings.grid)
    *dchannels, dleft, total = [planes_ref[0, i] for i in range(num_channels + 2)]

    def one(row, j, carry):
        before, blended = carry
        hit = _hit([row(i) for i in range(GEOMETRY)], x, y, before)
        # Transmittance is one minus the sum of the weights: a channel of ones, negative.
        q = -dleft
        for i, plane in enumerate(dchannels):
            q += row(GEOMETRY + i) * plane
        blended += hit.weight * q
        behind = total - blended
        dalpha = before * q - behind / (1 - hit.alpha)
        sensitive = hit.allowed & hit.visible & (hit.raw <= ALPHA_MAX)
        here = pl.ds(j * PLANE[0], PLANE[0])
        sigmas_ref[here] = jnp.where(sensitive, -dalpha * hit.raw, 0.0)
        weights_ref[here] = hit.weight
        return hit.after, blended

    def write(k):
        return pltpu.make_async_copy(sums_ref, out_ref.at[first + k], written)

    def over_pixels(lhs, values_ref):
        """Sums [rows, CHUNK] over pixels of lhs(s) [rows, 128] times values [CHUNK, 128]."""
        return sum(
            jax.lax.dot_general(
                lhs(s),
                values_ref[pl.ds(s, CHUNK, PLANE[0])],
                (((1,), (1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            for s in range(PLANE[0])
        )

    def finish(k):
        moments = over_pixels(lambda s: monomials_ref[s], sigmas_ref)
        sums = over_pixels(lambda s: planes_ref[0, :num_channels, s, :], weights_ref)
        pl.when(k > 0)(lambda: write(k - 1).wait())
        sums_ref[:MOMENTS] = moments
        sums_ref[MOMENTS : MOMENTS + num_channels] = sums
        write(k).start()

    init = (_transmittance(x, y, settings.grid), jnp.zeros(PLANE, jnp.float32))
    refs = (bounds_ref, rows_ref, buffer_ref, semaphores)
    visited, chunks = _walk(refs, settings, one, init, finish)[:2]
    pl.when(visited > 0)(lambda: write(visited - 1).wait())

    @pl.when(visited < chunks)
    def leave_zeros():
        sums_ref[...] = jnp.zeros_like(sums_ref)

        def skip(k, _):
            write(k).start()
            write(k).wait()
            return 0

        jax.lax.fori_loop(visited, chunks, skip, 0)


# Calls


def _call(kernel, arguments, specs, out_shape, out_spec, scratch, settings: _Settings):
    """Runs a kernel over all tiles; the first two arguments are bounds and rows."""
    arguments = vary_like(arguments, *arguments)
    bounds, rows = arguments[:2]
    run = pl.pallas_call(
        functools.partial(kernel, settings=settings),
        out_shape=jax.ShapeDtypeStruct(
            out_shape, jnp.float32, manual_axis_type=jax.typeof(rows).manual_axis_type
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(bounds.shape[0],),
            in_specs=[
                pl.BlockSpec((1, 1, 2), lambda t: (t, 0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec(memory_space=pl.ANY),
                *specs,
            ],
            out_specs=out_spec,
            scratch_shapes=[
                pltpu.SMEM((2, *rows.shape[1:]), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                *scratch,
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=settings.interpret,
    )
    with jax.enable_x64(False):  # the kernels' integers have 32 bits
        return run(*arguments)


def _plane_spec(planes):
    return pl.BlockSpec((1, planes, *PLANE), lambda t: (t, 0, 0, 0))


def _forward(bounds, rows, num_channels, settings):
    """Runs the forward kernel; returns [tiles, C + 1, *PLANE], transmittance last."""
    out_shape = (bounds.shape[0], num_channels + 1, *PLANE)
    spec = _plane_spec(num_channels + 1)
    return _call(_forward_kernel, (bounds, rows), [], out_shape, spec, [], settings)


def _backward(bounds, rows, planes, settings):
    """Moments of dsigma and dchannels of each pair, [chunks, MOMENTS + C and padding, CHUNK]."""
    num_planes = planes.shape[1]
    index = np.arange(TILE * TILE)
    x, y = (i + 0.5 - TILE / 2 for i in (index % TILE, index // TILE))
    monomials = np.stack([x**0, x, y, x * x, x * y, y * y, 0 * x, 0 * x])
    monomials = monomials.reshape(MOMENTS, *PLANE).swapaxes(0, 1).astype(np.float32)
    sums = (MOMENTS + (num_planes - 2) + (2 - num_planes) % 8, CHUNK)
    specs = [_plane_spec(num_planes), pl.BlockSpec(monomials.shape, lambda t: (0, 0, 0))]
    scratch = [
        pltpu.VMEM((PLANE[0] * CHUNK, PLANE[1]), jnp.float32),
        pltpu.VMEM((PLANE[0] * CHUNK, PLANE[1]), jnp.float32),
        pltpu.VMEM(sums, jnp.float32),
        pltpu.SemaphoreType.DMA,
    ]
    arguments = (bounds, rows, planes, jnp.asarray(monomials))
    out_shape, out_spec = (rows.shape[0], *sums), pl.BlockSpec(memory_space=pl.ANY)
    return _call(_backward_kernel, arguments, specs, out_shape, out_spec, scratch, settings)


def _folded(call, bounds, *arguments):
    """`call(bounds, rows, ...)` whose vmap makes the mapped axis part of tiles and of chunks."""
    run = jax.custom_batching.custom_vmap(call)

    def rule(axis_size, in_batched, *arguments):
        arguments = [
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip(arguments, in_batched, strict=True)
        ]
        bounds, rows = arguments[:2]
        shift = jnp.arange(axis_size, dtype=jnp.int32) * rows.shape[1]
        shift = jnp.stack([shift, jnp.zeros_like(shift)], axis=-1)[:, None, None]
        arguments[0] = bounds + shift  # first chunks; lengths stay
        out = _folded(call, *(x.reshape(-1, *x.shape[2:]) for x in arguments))
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    run.def_vmap(rule)
    return run(bounds, *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blend_tiles(geometry, channels, ids, offsets, settings):
    """Blends the lists of all tiles.

    Args are rows (u, v, a, b, c, opacity) and channel values of all images' Gaussians, the lists of
    `binning.Bins`, and settings. Returns [tiles, C + 1, *PLANE], transmittance last.
    """
    return _blend_tiles_fwd(geometry, channels, ids, offsets, settings)[0]


def _blend_tiles_fwd(geometry, channels, ids, offsets, settings):
    chunks = _make_chunks(geometry, channels, ids, offsets)
    call = functools.partial(_forward, num_channels=channels.shape[1], settings=settings)
    out = _folded(call, chunks.bounds, chunks.rows)
    return out, (geometry, channels, chunks, out)


def _blend_tiles_bwd(settings, residuals, cotangent):
    geometry, channels, chunks, out = residuals
    num, num_channels = channels.shape
    grid = settings.grid
    dchannels, dleft = cotangent[:, :-1], cotangent[:, -1]
    total = jnp.sum(dchannels * out[:, :-1], axis=1) - dleft * (1 - out[:, -1])
    planes = jnp.concatenate([cotangent, total[:, None]], axis=1)
    call = functools.partial(_backward, settings=settings)
    sums = _folded(call, chunks.bounds, chunks.rows, planes)
    sums = jnp.swapaxes(sums, 1, 2)  # [chunks, CHUNK, MOMENTS + C and padding]
    rows = chunks.rows.reshape(*chunks.ids.shape, -1)[..., :GEOMETRY]
    in_image = chunks.tiles % (grid.rows * grid.columns)
    centres = [x[in_image] for x in tile_centres(grid, jnp.float32)]
    dgeometry = geometry_gradient(rows, sums[..., :GEOMETRY], centres)
    pairs = jnp.concatenate([dgeometry, sums[..., MOMENTS : MOMENTS + num_channels]], axis=-1)
    # Places without a Gaussian may hold anything; they sort to the end and have no segment.
    places = jnp.arange(chunks.ids.size, dtype=jnp.int32)
    owners, places = jax.lax.sort((chunks.ids.reshape(-1), places), num_keys=1, is_stable=True)
    pairs = pairs.reshape(places.size, -1)[places]
    dense = jax.ops.segment_sum(pairs, owners, num, indices_are_sorted=True)
    return dense[:, :GEOMETRY], dense[:, GEOMETRY:], None, None


_blend_tiles.defvjp(_blend_tiles_fwd, _blend_tiles_bwd)
