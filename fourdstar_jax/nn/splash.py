"""Attention on TPUs by JAX's splash kernel (Pallas), whole or as a part of a larger softmax.

The public kernel gives the log-sum-exp but has no gradient with it, so the backward pass calls its
private function, which takes any output and log-sum-exp: those of the whole softmax, too (see
`group_attention`). Lengths are filled up to whole blocks, and the keys that this adds are hidden by
segment numbers. Compared with plain attention in interpreted mode on a CPU; never run on a TPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fourdstar_jax import sharding

LANES = 128  # the least block
BLOCKS = (512, 256, LANES)
WASTE = 1.1  # of a length filled up to blocks, where there are smaller ones


class Part(NamedTuple):
    """What a part of the softmax gives: outputs as if it were all, log-sum-exp of its scores."""

    out: Float[Array, "B L H E"]
    lse: Float[Array, "B H L"]  # float32


def fits(q: Float[Array, "*b L H E"], k: Float[Array, "*c S Hk E"]) -> bool:
    """Whether the kernel is for this: on a TPU, with at least a block of queries and of keys."""
    return jax.default_backend() == "tpu" and min(q.shape[-3], k.shape[-3]) >= LANES


def part(q, k, v, causal: bool) -> Part:
    """Of queries [B, L, H, E] over keys [B, S, Hk, E], of which there are as many if `causal`."""
    kernel, segments, padded = _prepared(q, k, causal, backward=False)
    out, (lse,) = jax.vmap(kernel, in_axes=(0, 0, 0, None))(*padded(q, k, v), segments)
    return Part(jnp.moveaxis(out, 1, 2)[:, : q.shape[1]], lse[:, :, : q.shape[1]])


def gradients(q, k, v, out, lse, dout, causal: bool):
    """Those of queries, keys and values, given output and log-sum-exp of the whole softmax."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    kernel, segments, padded = _prepared(q, k, causal, backward=True)
    arrays: Any = padded(q, k, v)
    out, dout = (_filled(jnp.moveaxis(x, 1, 2), arrays[0].shape[2]) for x in (out, dout))
    room = arrays[0].shape[2] - lse.shape[2]
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, room)), constant_values=1e30)  # of no weight
    settings = {name: x for name, x in kernel.kwargs.items() if name != "save_residuals"}

    def one(q, k, v, out, lse, dout):
        infos = kernel.dq_mask_info, kernel.dkv_mask_info
        residuals = (q, k, v, segments, None, out, lse, *infos)
        call = functools.partial(splash._splash_attention_bwd, save_residuals=False, **settings)
        return call(res=residuals, do=dout)[3:6]

    each: Any = jax.vmap(one)
    dq, dk, dv = each(*arrays, out, lse, dout.astype(q.dtype))
    dq, dk, dv = (jnp.moveaxis(x, 1, 2) for x in (dq, dk, dv))
    length = k.shape[1]
    return dq[:, : q.shape[1]] * q.shape[-1] ** -0.5, dk[:, :length], dv[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B S Hk E"],
    v: Float[Array, "B S Hk E"],
    causal: bool,
) -> Float[Array, "B L H E"]:
    """Softmax attention, each device on its part of batch and heads."""
    return _attend(q, k, v, causal)[0]


def _attend(q, k, v, causal):
    found = sharding.map_batch(functools.partial(part, causal=causal), q, k, v, heads=True)
    return found.out, (q, k, v, *found)


attend.defvjp(
    _attend,
    lambda causal, residuals, dout: sharding.map_batch(
        functools.partial(gradients, causal=causal), *residuals, dout, heads=True
    ),
)


def _block(length: int) -> int:
    return next(n for n in BLOCKS if n == LANES or -(-length // n) * n <= WASTE * length)


def _filled(x: Float[Array, "B H L E"], length: int) -> Float[Array, "B H L2 E"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def _prepared(q, k, causal: bool, *, backward: bool) -> tuple[Any, Any, Any]:
    """The kernel, the segments (None: all is seen), and what lays out queries, keys and values."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    blocks = _block(q.shape[1]), _block(k.shape[1])
    lengths = tuple(-(-x.shape[1] // n) * n for x, n in zip((q, k), blocks, strict=True))
    mask = masks.CausalMask(lengths) if causal else masks.FullMask(lengths)
    more: dict[str, Any] = {}
    if backward:
        more = dict(block_q_dkv=blocks[0], block_kv_dkv=blocks[1], block_kv_dkv_compute=blocks[1])
        more |= dict(block_q_dq=blocks[0], block_kv_dq=blocks[1])
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=splash.BlockSizes(block_q=blocks[0], block_kv=blocks[1], **more),
        save_residuals=True,
        interpret=jax.default_backend() != "tpu",
    )
    segments = None
    if lengths[1] > k.shape[1] and not causal:
        beyond = (jnp.arange(lengths[1]) >= k.shape[1]).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros(lengths[0], jnp.int32), kv=beyond)

    def padded(q, k, v):
        """The axes as the kernel wants them; it does not scale the scores."""
        arrays = zip((q * q.shape[-1] ** -0.5, k, v), (lengths[0], *[lengths[1]] * 2), strict=True)
        return tuple(_filled(jnp.moveaxis(x, 1, 2), n) for x, n in arrays)

    return kernel, segments, padded
