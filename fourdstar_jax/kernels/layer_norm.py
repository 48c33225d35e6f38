"""Sum, bias and one or two LayerNorms of rows in one pass over memory.

What stands between the matrix products of a pre-norm transformer block only moves memory: a
projection's bias, the residual sum, a LayerNorm, in UniTok a second one right behind it. The plain
form of that, a few lines of jnp, is its definition. On a GPU of Hopper or newer, for bfloat16, a
Pallas kernel on Mosaic GPU does it with every row read once and every result written once.

Tiling: a block of four warps owns four rows, a warp a row. All of a row lies in its warp's
registers, in vectors of 16 bytes a lane; sums over it are shuffles, and nothing touches shared
memory. Scales and biases come from the L2 cache.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

ROWS = 4  # of a block, one a warp
WARP = 32
WIDTHS = (128, 2048)  # of rows, powers of two: a row must fit into its warp's registers


class Norm(NamedTuple):
    """A LayerNorm's parameters; `epsilon` is a number, not an array."""

    scale: Float[Array, " D"]
    bias: Float[Array, " D"]
    epsilon: float


def add_layer_norm(
    x: Float[Array, "*b D"],
    y: Float[Array, "*b D"] | None,
    norms: Sequence[Norm],
    *,
    bias: Float[Array, " D"] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "*b D"], Float[Array, "*b D"]]:
    """`s = x + (y + bias)`, and the LayerNorms of s, one after the other: (s, normalised).

    Without `y` the sum is `x` itself. The norms are of type `dtype` (x's if not given): their input
    and results are rounded to it, as are their scales and biases; statistics are float32. Sums are
    rounded as jnp rounds them, `bias` to y's type first.

    The kernel runs where `fits` says so: its results differ from the plain form's by their float32
    rounding, and its gradient is the plain form's. The compiler cannot split it over devices, so
    with more than one device in the current mesh, or visible where there is no mesh, the plain form
    runs; likewise under `jax.vmap`.
    """
    norms = tuple(norms)
    if not 1 <= len(norms) <= 2:
        raise ValueError(f"{len(norms)=} must be 1 or 2")
    if y is None and bias is not None:
        raise ValueError("there is a bias of y, but y is None")
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if not fits(x, y, dtype):
        return plain(x, y, norms, bias, dtype)
    epsilons = tuple(norm.epsilon for norm in norms)
    pairs = tuple((norm.scale, norm.bias) for norm in norms)
    results: Any = _fused(epsilons, False, x, y, bias, pairs)
    return results


def plain(x, y, norms, bias, dtype):
    """The definition, of any types."""
    if y is not None:
        x = x + (y if bias is None else y + bias.astype(y.dtype))
    z = x.astype(dtype)
    for norm in norms:
        z = layer_norm(z, norm)
    return x, z


def layer_norm(x: Float[Array, "*b D"], norm: Norm) -> Float[Array, "*b D"]:
    """As `nnx.LayerNorm` of x's type computes it."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    variance = jnp.maximum(0.0, square - mean * mean)
    factor = lax.rsqrt(variance + norm.epsilon) * norm.scale.astype(x.dtype)
    return ((x - mean) * factor + norm.bias.astype(x.dtype)).astype(x.dtype)


def fits(x: Array, y: Array | None, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes these, here and now: bfloat16, but x may be float32."""
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16:
        return False
    types = x.dtype in (jnp.bfloat16, jnp.float32) and (y is None or y.dtype == jnp.bfloat16)
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    return types and devices == 1 and _takes(x.shape) and _is_hopper()


def _takes(shape):
    rows, width = math.prod(shape[:-1]), shape[-1]
    low, high = WIDTHS
    return low <= width <= high and not width & (width - 1) and rows > 0 and rows % ROWS == 0


@functools.cache
def _is_hopper():
    capability = getattr(jax.devices()[0], "compute_capability", None)
    try:
        return capability is not None and float(capability) >= 9
    except ValueError:  # another maker's
        return False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(epsilons, interpret, x, y, bias, pairs):
    @jax.custom_batching.custom_vmap
    def call(x, y, bias, pairs):
        return _launch(epsilons, interpret, x, y, bias, pairs)

    def in_batches(size, batched, *args):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)

        def one(x, y, bias, pairs):
            return plain(x, y, _norms(epsilons, pairs), bias, jnp.bfloat16)

        return jax.vmap(one, axes, axis_size=size)(*args), (True, True)

    call.def_vmap(in_batches)
    return call(x, y, bias, pairs)


def _norms(epsilons, pairs):
    return tuple(Norm(a, b, epsilon) for (a, b), epsilon in zip(pairs, epsilons, strict=True))


def _forward(epsilons, interpret, x, y, bias, pairs):
    results: Any = _fused(epsilons, interpret, x, y, bias, pairs)
    return results, (results[0], y is None, bias, pairs)


def _backward(epsilons, interpret, kept, gradients):
    total, alone, bias, pairs = kept

    def of_total(total, pairs):
        return plain(total, None, _norms(epsilons, pairs), None, jnp.bfloat16)

    dtotal, dpairs = jax.vjp(of_total, total, pairs)[1](gradients)
    dy = dtotal.astype(jnp.bfloat16)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dy.reshape(-1, bias.size), 0, jnp.float32).astype(bias.dtype)
    return dtotal, None if alone else dy, dbias, dpairs


_fused.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1))  # lowered once, however often it is called
def _launch(epsilons, interpret, x, y, bias, pairs):
    """The kernel over all rows. `interpret=True` runs its body with plain JAX."""
    width = x.shape[-1]
    inputs = [v.reshape(-1, width) for v in (x, y) if v is not None]
    inputs += [v for v in (bias, *(v for pair in pairs for v in pair)) if v is not None]
    has_y, has_bias = y is not None, bias is not None
    number = inputs[0].shape[0]
    outputs = [jax.ShapeDtypeStruct((number, width), jnp.bfloat16)]
    if has_y:
        outputs.insert(0, jax.ShapeDtypeStruct((number, width), x.dtype))
    body = functools.partial(_rows, epsilons, has_y, has_bias, x.dtype == jnp.bfloat16)
    run = _interpret if interpret else _mosaic
    results = run(body, inputs, outputs)
    total = results[0].reshape(x.shape) if has_y else x
    return total, results[-1].reshape(x.shape)


def _rows(epsilons, has_y, has_bias, half, arrays):
    """What a block does with its rows, all in float32: the sum, if there is a y, and its norms."""
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


def _interpret(body, inputs, outputs):
    """The body on all rows at once."""
    shape = inputs[0].shape
    wide = [jnp.broadcast_to(v.astype(jnp.float32), shape) for v in inputs]
    return [v.astype(out.dtype) for v, out in zip(body(wide), outputs, strict=True)]


def _mosaic(body, inputs, outputs):
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
