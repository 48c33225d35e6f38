"""Attention of many groups over slots that they share and over their own, in parts, fused on GPUs.

Every group of a sample sees the same shared slots (STAR: text and video); of its own, the first
`num_open` are seen by all of the group (the container), the others by what comes after them. So
the softmax is over three parts, none of which needs a mask but the diagonal:

    all groups' queries, as one long sequence   over the shared slots
    a group's queries                           over its open slots
    a group's queries behind the open ones      over themselves, causally

and shared keys exist once, not once a group. Each part gives its output and log-sum-exp; the whole
is their mean with weights exp(lse_part - lse). Backward, a part is handed the *whole* output and
log-sum-exp instead of its own: exp(score - lse) is then the true probability, and its gradients
add up (FlashAttention-2, arXiv:2307.08691, eq. 13 f.).

A part runs in cuDNN where it can: on a GPU, in half precision, with heads of a multiple of 8 and at
most 128 channels. JAX's public call rounds the log-sum-exp to the inputs' type and does not take
another in the backward pass, hence the two private primitives. On a TPU it runs in `splash`.
Elsewhere scores lie in memory, as many queries' at a time as `MOST_SCORES` allows.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fourdstar_jax import sharding
from fourdstar_jax.nn import attention, splash
from fourdstar_jax.nn.linear import SAVED
from fourdstar_jax.nn.splash import Part

Implementation = Literal["cudnn", "splash", "plain"]


def attend_groups(
    q: Float[Array, "B G Q H E"],
    shared: tuple[Float[Array, "B P Hk E"], Float[Array, "B P Hk E"]],
    own: tuple[Float[Array, "B G Q Hk E"], Float[Array, "B G Q Hk E"]],
    num_open: int,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B G Q H E"]:
    """Softmax attention of groups over shared keys and values and over their own.

    A group's first `num_open` slots see the shared ones and each other; the others those, too, and
    their own past. Several heads of queries may share those of keys (H a multiple of Hk).
    `implementation` is the best there is by default; see above.
    """
    if implementation is None:
        implementation = "splash" if splash.fits(q, shared[0]) else "plain"
        implementation = "cudnn" if attention.fits_cudnn(q) else implementation
    return _attend(q, *shared, *own, num_open, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, shared_k, shared_v, k, v, num_open: int, implementation: Implementation):
    return _forward(q, shared_k, shared_v, k, v, num_open, implementation)[0]


def _forward(q, shared_k, shared_v, k, v, num_open: int, implementation: Implementation):
    run = functools.partial(_whole, num_open=num_open, implementation=implementation)
    out, lse = sharding.map_batch(run, q, shared_k, shared_v, k, v, heads=True)
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (q, shared_k, shared_v, k, v, out, lse)


def _backward(num_open: int, implementation: Implementation, residuals, dout):
    run = functools.partial(_gradients, num_open=num_open, implementation=implementation)
    return sharding.map_batch(run, *residuals, dout, heads=True)


_attend.defvjp(_forward, _backward)


def _whole(
    q, shared_k, shared_v, k, v, *, num_open: int, implementation: Implementation
) -> tuple[Float[Array, "B G Q H E"], Float[Array, "B G H Q"]]:
    """The merged output and log-sum-exp."""
    forward = PARTS[implementation][0]
    batch, groups, slots, heads, _ = q.shape
    part = forward(q.reshape(batch, -1, *q.shape[3:]), shared_k, shared_v, causal=False)
    lse = jnp.moveaxis(part.lse.reshape(batch, heads, groups, slots), 2, 1)
    parts = [Part(part.out.reshape(q.shape), lse)]

    def add(first: int, keys: slice, causal: bool):
        one = forward(_flat(q[:, :, first:]), _flat(k[:, :, keys]), _flat(v[:, :, keys]), causal)
        out, lse = (x.reshape(batch, groups, *x.shape[1:]) for x in one)
        out = jnp.pad(out, ((0, 0), (0, 0), (first, 0), (0, 0), (0, 0)))
        lse = jnp.pad(lse, ((0, 0), (0, 0), (0, 0), (first, 0)), constant_values=-jnp.inf)
        parts.append(Part(out, lse))

    if num_open:
        add(0, slice(None, num_open), False)
    if num_open < slots:
        add(num_open, slice(num_open, None), True)
    lse = functools.reduce(jnp.logaddexp, [part.lse for part in parts])

    def weighed(part: Part):
        return jnp.moveaxis(jnp.exp(part.lse - lse), -1, -2)[..., None] * part.out

    return sum(weighed(part) for part in parts).astype(q.dtype), lse  # pyright: ignore


def _gradients(
    q, shared_k, shared_v, k, v, out, lse, dout, *, num_open: int, implementation: Implementation
):
    """Those of the five inputs."""
    backward = PARTS[implementation][1]
    batch, slots = q.shape[0], q.shape[2]

    def long(x):  # [B, G, Q, H, E] to [B, G Q, H, E]
        return x.reshape(batch, -1, *x.shape[3:])

    rows = jnp.moveaxis(lse, 1, 2).reshape(batch, q.shape[3], -1)  # [B, H, G Q]
    dq, dshared_k, dshared_v = backward(
        long(q), shared_k, shared_v, long(out), rows, long(dout), causal=False
    )
    dq, dk, dv = dq.reshape(q.shape), [], []

    def add(first: int, keys: slice, causal: bool):
        nonlocal dq
        queries = [_flat(x[:, :, first:]) for x in (q, out, dout)]
        some = _flat(k[:, :, keys]), _flat(v[:, :, keys]), _flat(lse[..., first:])
        more = backward(queries[0], *some[:2], queries[1], some[2], queries[2], causal=causal)
        more = [x.reshape(*q.shape[:2], *x.shape[1:]) for x in more]
        dq = dq + jnp.pad(more[0], ((0, 0), (0, 0), (first, 0), (0, 0), (0, 0)))
        dk.append(more[1])
        dv.append(more[2])

    if num_open:
        add(0, slice(None, num_open), False)
    if num_open < slots:
        add(num_open, slice(num_open, None), True)
    return dq, dshared_k, dshared_v, jnp.concatenate(dk, axis=2), jnp.concatenate(dv, axis=2)


def _flat(x: Float[Array, "B G ..."]) -> Float[Array, "BG ..."]:
    return x.reshape(-1, *x.shape[2:])


# ---------------------------------------------------------------- a part in plain JAX


def _chunks(q: Float[Array, "B L H E"], num_keys: int) -> int:
    """In how many parts queries go for the scores of one to lie in memory."""
    least = math.ceil(math.prod(q.shape[:3]) * num_keys / attention.MOST_SCORES)
    return min(
        n for n in range(1, q.shape[1] + 1) if q.shape[1] % n == 0 and n >= least or n == q.shape[1]
    )


def _scores(q, k, first, causal: bool) -> Float[Array, "B Hk R L S"]:
    """Of queries [B, L, Hk, R, E] that begin at `first`; minus infinity where nothing is seen."""
    scores = jnp.einsum("blhre,bshe->bhrls", q, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5
    if not causal:
        return scores
    rows = first + jnp.arange(q.shape[1])
    return jnp.where(rows[:, None] >= jnp.arange(k.shape[1]), scores, -jnp.inf)


def _split(
    x: Float[Array, "B L H ..."], chunks: int, kv_heads: int
) -> Float[Array, "C B l Hk R ..."]:
    batch, length, heads = x.shape[:3]
    x = x.reshape(batch, chunks, length // chunks, kv_heads, heads // kv_heads, *x.shape[3:])
    return jnp.moveaxis(x, 1, 0)


def _joined(x: Float[Array, "C B L Hk R ..."]) -> Float[Array, "B CL H ..."]:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])


def _plain_part(q, k, v, causal: bool) -> Part:
    chunks = _chunks(q, k.shape[1])
    size = q.shape[1] // chunks

    def one(number_and_q):
        number, q = number_and_q
        scores = _scores(q, k, number * size, causal)
        lse = jax.nn.logsumexp(scores, axis=-1)  # [B, Hk, R, L]
        weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)
        return jnp.einsum("bhrls,bshe->blhre", weights, v), jnp.moveaxis(lse, -1, 1)

    parts = _split(q, chunks, k.shape[2])
    out, lse = jax.lax.map(one, (jnp.arange(chunks), parts))
    return Part(_joined(out), jnp.moveaxis(_joined(lse), 1, 2))


def _plain_gradients(q, k, v, out, lse, dout, causal: bool):
    chunks = _chunks(q, k.shape[1])
    size = q.shape[1] // chunks

    def one(carry, part):
        dk, dv = carry
        number, q, out, lse, dout = part
        scores = _scores(q, k, number * size, causal)
        weights = jnp.exp(scores - jnp.moveaxis(lse, 1, -1)[..., None])
        kw = dict(preferred_element_type=jnp.float32)
        dv = dv + jnp.einsum("bhrls,blhre->bshe", weights.astype(v.dtype), dout, **kw)
        dweights = jnp.einsum("blhre,bshe->bhrls", dout, v, **kw)
        delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        dscores = weights * (dweights - jnp.moveaxis(delta, 1, -1)[..., None])
        dscores = (dscores * q.shape[-1] ** -0.5).astype(q.dtype)
        dk = dk + jnp.einsum("bhrls,blhre->bshe", dscores, q, **kw)
        return (dk, dv), jnp.einsum("bhrls,bshe->blhre", dscores, k)

    rows = [_split(x, chunks, k.shape[2]) for x in (q, out, jnp.moveaxis(lse, 1, 2), dout)]
    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(one, zeros, (jnp.arange(chunks), *rows))
    return _joined(dq), dk.astype(k.dtype), dv.astype(v.dtype)


# ---------------------------------------------------------------- a part in cuDNN


def _cudnn(primitive: str, *arrays, q, causal: bool, **more):
    """One of the two primitives behind `jax.nn.dot_product_attention`."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    none = jnp.zeros(0, q.dtype)  # bias, lengths, offsets and pages, of which there are none
    return getattr(fused, f"_dot_product_attention_{primitive}_p_wrapper").bind(
        *arrays[:3],
        *[none] * 7,
        *arrays[3:],
        scale=q.shape[-1] ** -0.5,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=None,
        **more,
    )


def _cudnn_part(q, k, v, causal: bool) -> Part:
    return Part(*_cudnn("fwd", q, k, v, q=q, causal=causal, is_training=True))


def _cudnn_gradients(q, k, v, out, lse, dout, causal: bool):
    return tuple(_cudnn("bwd", q, k, v, lse, out, dout, q=q, causal=causal))


PARTS = {
    "cudnn": (_cudnn_part, _cudnn_gradients),
    "splash": (splash.part, splash.gradients),
    "plain": (_plain_part, _plain_gradients),
}
