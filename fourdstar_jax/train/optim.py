"""The optimizer of all three stages: AdamW, warm-up and decay, clipping, averaged weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

# Ends of the names of vectors, which have another axis where layers are stacked.
VECTORS = ("scale", "bias", "gate")


def learning_rate_schedule(
    *, learning_rate: float, warmup_steps: int, total_steps: int, final_fraction: float = 0.1
) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        learning_rate,
        warmup_steps,
        max(total_steps, warmup_steps + 1),
        end_value=final_fraction * learning_rate,
    )


class Average(NamedTuple):
    """State of `keep_average`: the number of updates, and the averaged parameters."""

    updates: Int[Array, ""]
    params: Any


def keep_average(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters; the last transformation of a chain.

    Early on the average is over the last tenth or so of the steps done: it decays by at most
    (1 + n) / (10 + n) after n of them.
    """

    def init(params):
        # copies: a step that donates its state may not get one buffer twice
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("keep_average needs the parameters: update(updates, state, params)")
        rate = jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
        new = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda m, p: m + (1 - rate) * (p - m), state.params, new)
        return updates, Average(state.updates + 1, mean)

    return optax.GradientTransformation(init, update)


def restart_average(opt_state: optax.OptState, params: Any) -> optax.OptState:
    """The state of an optimizer whose average, if it keeps one, starts from `params`."""

    def restarted(leaf):
        return leaf._replace(params=jax.tree.map(jnp.copy, params)) if is_average(leaf) else leaf

    def is_average(leaf):
        return isinstance(leaf, Average)

    return jax.tree.map(restarted, opt_state, is_leaf=is_average)


def averaged(opt_state: optax.OptState, params: Any) -> Any:
    """The averaged parameters, or `params` where the optimizer keeps no average."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Average))
    found = [leaf.params for leaf in leaves if isinstance(leaf, Average)]
    return found[0] if found else params


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    average: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW; weight decay leaves vectors (norms, biases, learned tokens) alone.

    `average` is the decay of the weights' moving average, which evaluation and the bundle take; at
    0 none is kept.
    """

    def is_matrix(params):
        def decayed(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            return x.ndim >= 2 and not name.endswith(VECTORS)

        return jax.tree.map_with_path(decayed, params)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=is_matrix),
        *([keep_average(average)] if average else []),
    )
