"""`add_layer_norm` in Pallas on Mosaic GPU, its gradient and its vmap.

Tiling: a block of four warps owns four rows, a warp a row. All of a row lies in its warp's
registers, in vectors of 16 bytes a lane; sums over it are shuffles, and nothing touches shared
memory. Scales and biases come from the L2 cache.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fourdstar_jax.kernels.layer_norm import reference
from fourdstar_jax.kernels.layer_norm.reference import Norm

ROWS = 4  # of a block, one a warp
WARP = 32
WIDTHS = (128, 2048)  # of rows, powers of two: a row must fit into its warp's registers


def takes(shape: Sequence[int]) -> bool:
    """Tells whether the kernel takes arrays of this shape."""
    rows, width = math.prod(shape[:-1]), shape[-1]
    low, high = WIDTHS
    return low <= width <= high and not width & (width - 1) and rows > 0 and rows % ROWS == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fused(epsilons, interpret, x, y, bias, pairs):
    """Sum and normalised sum by the kernel; `pairs` are (scale, bias) of each norm.

    The gradient, and everything under vmap, is the definition's.
    """

    @jax.custom_batching.custom_vmap
    def call(x, y, bias, pairs):
        return launch(epsilons, interpret, x, y, bias, pairs)

    def in_batches(size, batched, *args):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)

        def one(x, y, bias, pairs):
            return reference.add_layer_norm(x, y, norms_of(epsilons, pairs), bias, jnp.bfloat16)

        return jax.vmap(one, axes, axis_size=size)(*args), (True, True)

    call.def_vmap(in_batches)
    return call(x, y, bias, pairs)


def norms_of(epsilons, pairs):
    """Norms from their epsilons and their (scale, bias)."""
    return tuple(Norm(a, b, epsilon) for (a, b), epsilon in zip(pairs, epsilons, strict=True))


def _forward(epsilons, interpret, x, y, bias, pairs):
    results: Any = fused(epsilons, interpret, x, y, bias, pairs)
    return results, (results[0], y is None, bias, pairs)


def _backward(epsilons, interpret, kept, gradients):
    total, alone, bias, pairs = kept

    def of_total(total, pairs):
        return reference.add_layer_norm(total, None, norms_of(epsilons, pairs), None, jnp.bfloat16)

    dtotal, dpairs = jax.vjp(of_total, total, pairs)[1](gradients)
    dy = dtotal.astype(jnp.bfloat16)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dy.reshape(-1, bias.size), 0, jnp.float32).astype(bias.dtype)
    return dtotal, None if alone else dy, dbias, dpairs


fused.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1))  # lowered once, however often it is called
def launch(epsilons, interpret, x, y, bias, pairs):
    """Runs the kernel over all rows, with `interpret=True` its body in plain JAX."""
    width = x.shape[-1]
    inputs = [v.reshape(-1, width) for v in (x, y) if v is not None]
    inputs += [v for v in (bias, *(v for pair in pairs for v in pair)) if v is not None]
    has_y, has_bias = y is not None, bias is not None
    number = inputs[0].shape[0]
    outputs = [jax.ShapeDtypeStruct((number, width), jnp.bfloat16)]
    if has_y:
        outputs.insert(0, jax.ShapeDtypeStruct((number, width), x.dtype))
    body = functools.partial(_rows, epsilons, has_y, has_bias, x.dtype == jnp.bfloat16)
    run = interpreted if interpret else mosaic
    results = run(body, inputs, outputs)
    total = results[0].reshape(x.shape) if has_y else x
    return total, results[-1].reshape(x.shape)


def _rows(epsilons, has_y, has_bias, half, arrays):
    """A block's work on its rows, all in float32: the sum, if there is a y, and its norms."""
    arrays = iter(arrays)
    x = next(arrays)
    results = []
    if has_y:
        y = next(arrays)
        x = x + (_round(y + _round(next(arrays))) if has_bias else y)
        x = _round(x) if half else x
        results.append(x)
    x = x if half else _round(x)
    for epsilon in epsilons:
        scale, bias = _round(next(arrays)), _round(next(arrays))
        mean = jnp.sum(x, axis=1) * (1 / x.shape[1])
        x = x - lax.broadcast_in_dim(mean, x.shape, (0,))
        variance = jnp.sum(x * x, axis=1) * (1 / x.shape[1])
        factor = lax.rsqrt(variance + epsilon)
        x = _round(x * (lax.broadcast_in_dim(factor, x.shape, (0,)) * scale) + bias)
    return [*results, x]


def _round(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def interpreted(body, inputs, outputs):
    """Runs the body on all rows at once, in plain JAX."""
    shape = inputs[0].shape
    wide = [jnp.broadcast_to(v.astype(jnp.float32), shape) for v in inputs]
    return [v.astype(out.dtype) for v, out in zip(body(wide), outputs, strict=True)]


def mosaic(body, inputs, outputs):
    """Runs the body as a Mosaic GPU kernel, a block for each `ROWS` rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    number, width = inputs[0].shape
    vector = min(8, width // WARP)  # numbers of a lane that lie together
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((ROWS, WARP * vector), (vector,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )

    def add_layer_norm(*refs):
        rows = pl.ds(lax.axis_index("block") * ROWS, ROWS)
        ins, outs = refs[: len(inputs)], refs[len(inputs) :]
        arrays = []
        for ref in ins:
            if len(ref.shape) == 2:
                value = plgpu.load(ref.at[rows, :], layout=layout, optimized=False)
                arrays.append(value.astype(jnp.float32))
            else:
                value = plgpu.load(ref, layout=layout.reduce(0), optimized=False)
                value = value.astype(jnp.float32)
                arrays.append(lax.broadcast_in_dim(value, (ROWS, width), (1,)))
        for ref, value in zip(outs, body(arrays), strict=True):
            ref[rows, :] = value.astype(ref.dtype)

    return plgpu.kernel(
        add_layer_norm,
        out_type=outputs,
        grid=(number // ROWS,),
        grid_names=("block",),
        # Nothing that is written is read, and there is no shared memory to order.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*inputs)
