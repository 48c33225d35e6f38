"""Teacher forcing: what a pass over given tokens sees otherwise than generation would."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, Shaped


class Forcing(NamedTuple):
    """Changes to a teacher-forced pass. None everywhere: all groups of the tokens, as they are."""

    history_tokens: Int[Array, "B T A K"] | None = None  # what the container is built from
    drop_text: Bool[Array, " B"] | None = None
    drop_video: Bool[Array, " B"] | None = None
    groups: Int[Array, "B G"] | None = None  # the timesteps to predict, in order
    dropout_key: Key[Array, ""] | None = None

    def chosen(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B G ..."]:
        """Those timesteps of an array that are predicted."""
        return x if self.groups is None else jax.vmap(lambda y, i: y[i])(x, self.groups)


AS_GIVEN = Forcing()


def corrupt(
    key: Key[Array, ""],
    tokens: Int[Array, "B T A K"],
    vocab_size: int,
    *,
    drop_text: float = 0.1,
    drop_video: float = 0.1,
    history_noise: float = 0.0,
    num_groups: int | None = None,
) -> Forcing:
    """What a training step draws at random.

    Text and video are dropped independently (for classifier-free guidance). A share `history_noise`
    of the container's tokens is replaced by random ones, as generation will make mistakes. Only
    `num_groups` random groups of each sample are predicted, where given; each container still comes
    from all groups before. Raises ValueError for more groups than there are.
    """
    batch, timesteps = tokens.shape[:2]
    if num_groups is not None and not 1 <= num_groups <= timesteps:
        raise ValueError(f"{num_groups=} must lie between 1 and the {timesteps} timesteps")
    text_key, video_key, group_key, noise_key, dropout_key = jax.random.split(key, 5)
    history_tokens = groups = None
    if history_noise:
        where_key, what_key = jax.random.split(noise_key)
        wrong = jax.random.bernoulli(where_key, history_noise, (*tokens.shape[:-1], 1))
        other = jax.random.randint(what_key, tokens.shape, 0, vocab_size, tokens.dtype)
        history_tokens = jnp.where(wrong, other, tokens)
    if num_groups is not None and num_groups < timesteps:
        order = jnp.argsort(jax.random.uniform(group_key, (batch, timesteps)), axis=1)
        groups = jnp.sort(order[:, :num_groups], axis=1)
    return Forcing(
        history_tokens=history_tokens,
        drop_text=jax.random.bernoulli(text_key, drop_text, (batch,)),
        drop_video=jax.random.bernoulli(video_key, drop_video, (batch,)),
        groups=groups,
        dropout_key=dropout_key,
    )
