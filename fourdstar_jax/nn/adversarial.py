"""Losses of a decoder and of the discriminator that judges its pictures.

Both parts train in turns, each with its own optimizer. The step of the decoder adds a weight times
`generator_hinge(discriminator(decoded))` and differentiates by the decoder's parameters alone; the
step of the discriminator takes `discriminator_loss` of the same decoded pictures.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Judge = Callable[[Array], Array]  # logits [...] of pictures [..., h, w, c], each by its own


def only_if[T](wanted: Bool[Array, ""], function: Callable[[], T]) -> T:
    """`function()`, or zeros in its place where it is not wanted, and then it costs nothing.

    On a CPU it is computed all the same: there XLA runs a convolution inside of a conditional by
    plain loops, which is eighty times as slow.
    """
    if jax.default_backend() == "cpu":
        return jax.tree.map(lambda x: jnp.where(wanted, x, jnp.zeros_like(x)), function())
    shapes = jax.eval_shape(function)

    def zeros():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond(wanted, function, zeros)


def discriminator_hinge(
    real_logits: Float[Array, "*b"], fake_logits: Float[Array, "*b"]
) -> Float[Array, ""]:
    """Hinge loss of a discriminator (Lim & Ye 2017, arXiv:1705.02894), margin 1."""
    real = jnp.mean(jax.nn.relu(1 - real_logits))
    return real + jnp.mean(jax.nn.relu(1 + fake_logits))


def generator_hinge(fake_logits: Float[Array, "*b"]) -> Float[Array, ""]:
    """What the decoder adds to its loss: minus the mean logit of its pictures."""
    return -jnp.mean(fake_logits)


def r1_penalty(discriminator: Judge, images: Float[Array, "*b h w c"]) -> Float[Array, ""]:
    """Mean over pictures of the squared length of the logit's gradient by the picture's pixels.

    Mescheder et al. 2018 (arXiv:1801.04406), without its factor gamma/2. Pixels count in the unit
    of `images`. The sum is in float32 whatever type the discriminator computes in.
    """
    grads = jax.grad(lambda x: jnp.sum(discriminator(x)))(images)
    grads = grads.astype(jnp.promote_types(grads.dtype, jnp.float32))
    return jnp.mean(jnp.sum(grads**2, axis=(-3, -2, -1)))


def discriminator_loss(
    discriminator: Judge,
    real: Float[Array, "B *b h w c"],
    fake: Float[Array, "B *b h w c"],
    step: Int[Array, ""] | int,
    *,
    r1_weight: float = 1.25,
    r1_every: int = 16,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of one discriminator step and its parts before weighting; `fake` gets no gradient.

    The penalty is lazy as in StyleGAN2: computed in every `r1_every`-th step, counted from 0, and
    `r1_every` times as heavy there; the part `r1` is zero in between. Pixels lie in [0, 1], so that
    `r1_weight` is an eighth of StyleGAN's gamma, which is for [-1, 1] and halved: 1.25 is its 10.

    Raises ValueError for an `r1_every` below 1 or a negative weight.
    """
    if r1_every < 1 or r1_weight < 0:
        raise ValueError(f"{r1_every=} must be at least 1 and {r1_weight=} at least 0")
    # One call for both, beside each other so that the batch keeps its sharding.
    logits = discriminator(jnp.stack([real, jax.lax.stop_gradient(fake)], axis=1))
    real_logits, fake_logits = logits[:, 0], logits[:, 1]
    loss = hinge = discriminator_hinge(real_logits, fake_logits)
    metrics = {
        "discriminator": hinge,
        "real_logit": jnp.mean(real_logits),
        "fake_logit": jnp.mean(fake_logits),
    }
    if r1_weight > 0:
        metrics["r1"] = only_if(
            jnp.asarray(step) % r1_every == 0, lambda: r1_penalty(discriminator, real)
        )
        loss = hinge + r1_weight * r1_every * metrics["r1"]
    return loss, metrics
