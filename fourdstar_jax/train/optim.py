"""The optimizer of all three stages: AdamW or Muon, warm-up, decay, clipping, averaged weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int

# Ends of the names of vectors, which have another axis where layers are stacked.
VECTORS = ("scale", "bias", "gate")


def learning_rate_schedule(
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    final_fraction: float = 0.1,
    decay: float | None = None,
) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to `final_fraction` of the peak.

    With `decay`, a share of all steps, the rate is flat instead and falls to 0 in the last of them:
    where it is flat, a run can be cut and another number of steps chosen.
    """
    if decay is None:
        return optax.warmup_cosine_decay_schedule(
            0.0,
            learning_rate,
            warmup_steps,
            max(total_steps, warmup_steps + 1),
            end_value=final_fraction * learning_rate,
        )
    if not 0 <= decay <= 1:
        raise ValueError(f"{decay=} must be a share of the steps, from 0 to 1")
    falling = max(round(decay * total_steps), 1)

    def schedule(step):
        rising = step / max(warmup_steps, 1)
        return learning_rate * jnp.clip(jnp.minimum(rising, (total_steps - step) / falling), 0, 1)

    return schedule


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


def name_of(path: Any) -> str:
    """A parameter's name, such as `static/blocks/0/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def scale_parts(factors: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies the updates of parts of a model; comes after AdamW, whose decay it scales as well.

    `factors` are (prefix of the parameters' names, factor); the longest prefix that fits counts, of
    whole words: `static/up` is not of `static/up_channels`. Making the state raises ValueError for
    a prefix that no parameter has.
    """

    def factor(name: str) -> tuple[str, float]:
        fitting = [f for f in factors if f"{name}/".startswith(f[0].rstrip("/") + "/")]
        return max(fitting, key=lambda f: len(f[0]), default=("", 1.0))

    def init(params):
        names = [name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
        for prefix, _ in factors:
            if not any(f"{name}/".startswith(prefix.rstrip("/") + "/") for name in names):
                parts = sorted({"/".join(name.split("/")[:2]) for name in names})
                raise ValueError(
                    f"config.optim.factors: no parameter is of {prefix!r}; there are "
                    f"{', '.join(parts)}"
                )
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        scaled = jax.tree.map_with_path(lambda path, u: factor(name_of(path))[1] * u, updates)
        return scaled, state

    return optax.GradientTransformation(init, update)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    muon: bool = False,
    factors: Sequence[tuple[str, float]] = (),
    average: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW; weight decay leaves vectors (norms, biases, learned tokens) alone.

    With `muon` the kernels of linear layers, of stacked ones each by itself, take orthogonalized
    updates (Jordan, Muon, 2024) of AdamW's usual size, 0.2 times the rate (Liu et al., 2025,
    section 2.2); tables, convolutions and vectors keep AdamW, with Nesterov's momentum.

    `factors` of the learning rate are (prefix of parameters' names, factor), see `scale_parts`.

    `average` is the decay of the weights' moving average, which evaluation and the bundle take; at
    0 none is kept.
    """

    def is_matrix(params):
        def decayed(path, x):
            return x.ndim >= 2 and not name_of(path).endswith(VECTORS)

        return jax.tree.map_with_path(decayed, params)

    def linear(params):
        def axes(path, x):
            name = name_of(path)
            # stacked layers have one axis more; kernels of convolutions have four
            if not name.endswith("kernel") or x.ndim not in (2, 3) or min(x.shape[-2:]) < 2:
                return None
            return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

        return jax.tree.map_with_path(axes, params)

    if muon:
        step = optax.contrib.muon(
            schedule,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=linear,
            consistent_rms=0.2,
        )
    else:
        step = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=is_matrix)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        step,
        *([scale_parts(factors)] if factors else []),
        *([keep_average(average)] if average else []),
    )
