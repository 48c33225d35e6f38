"""Teacher forcing: what a pass over given tokens sees otherwise than generation would."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, Shaped


class Forcing(NamedTuple):
    """Changes to a teacher-forced pass. None everywhere: all groups of the tokens, as they are."""

    past_tokens: Int[Array, "B T A K"] | None = None  # what is seen of tokens before the predicted
    history_tokens: Int[Array, "B T A K"] | None = None  # what the container is built from instead
    drop_text: Bool[Array, " B"] | None = None
    drop_video: Bool[Array, " B"] | None = None
    drop_history: Bool[Array, " B"] | None = None  # the container's state
    groups: Int[Array, "B G"] | None = None  # the timesteps to predict, in order
    dropout_key: Key[Array, ""] | None = None

    def chosen(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B G ..."]:
        """Those timesteps of an array that are predicted."""
        return x if self.groups is None else jax.vmap(lambda y, i: y[i])(x, self.groups)


AS_GIVEN = Forcing()


def corrupt(
    key: Key[Array, ""],
    tokens: Int[Array, "B T A K"],
    *,
    wrong: Int[Array, "B T A K"] | None = None,
    drop_text: float = 0.1,
    drop_video: float = 0.1,
    drop_history: float = 0.0,
    code_noise: float = 0.0,
    num_groups: int | None = None,
) -> Forcing:
    """What a training step draws at random.

    Text, video and the container's state are dropped independently (for guidance). As generation
    will make mistakes, each code of what is seen of the past, in the container and in the group
    itself, is that of `wrong` with a probability that is drawn from 0 to `code_noise` for each
    sample; what is predicted stays true. Only `num_groups` random groups of each sample are
    predicted, where given and where there are more; each container still comes from all groups
    before. Raises ValueError for less than one group, and for noise without `wrong`.
    """
    batch, timesteps = tokens.shape[:2]
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"{num_groups=} must be at least 1")
    text_key, video_key, history_key, group_key, noise_key, dropout_key = jax.random.split(key, 6)
    past_tokens = groups = None
    if code_noise:
        if wrong is None:
            raise ValueError(f"{code_noise=} needs the codes that are wrong")
        rate_key, where_key = jax.random.split(noise_key)
        rate = jax.random.uniform(rate_key, (batch, 1, 1, 1), maxval=code_noise)
        past_tokens = jnp.where(jax.random.bernoulli(where_key, rate, tokens.shape), wrong, tokens)
    if num_groups is not None and num_groups < timesteps:
        order = jnp.argsort(jax.random.uniform(group_key, (batch, timesteps)), axis=1)
        groups = jnp.sort(order[:, :num_groups], axis=1)
    return Forcing(
        past_tokens=past_tokens,
        drop_text=jax.random.bernoulli(text_key, drop_text, (batch,)),
        drop_video=jax.random.bernoulli(video_key, drop_video, (batch,)),
        drop_history=jax.random.bernoulli(history_key, drop_history, (batch,)),
        groups=groups,
        dropout_key=dropout_key,
    )
