"""STAR's loss: cross-entropy over the codes, one group at a time (paper Eq. 3 and 4)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fourdstar_jax import nn
from fourdstar_jax.star.head import DepthHead


class GroupLosses(NamedTuple):
    """Of every code of every token."""

    nll: Float[Array, "B G N K"]  # nats
    lse_squared: Float[Array, "B G N K"]  # squared log-sum-exp of the logits
    correct: Float[Array, "B G N K"]  # 1 where the most probable code is the true one
    # Of a token being blank or not, nats, by its first code; None without a code for blank.
    blank: Float[Array, "B G N"] | None = None


def group_losses(
    logits_of: Callable[[Float[Array, "R K E"]], Float[Array, "R K vocab"]],
    features: Float[Array, "B G N K E"],
    tokens: Int[Array, "B G N K"],
    *,
    blank_code: int | None = None,
) -> GroupLosses:
    """Scans over the groups, rematerialised, so that one group's logits exist at a time."""
    codes = tokens.shape[-1]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(group):
        x, targets = group
        targets = targets.reshape(-1, codes)
        logits = logits_of(x.reshape(-1, *x.shape[-2:]))
        lse = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        blank = None
        if blank_code is not None:
            others = jnp.arange(logits.shape[-1]) != blank_code
            drawn = jax.nn.logsumexp(logits[:, 0], axis=-1, where=others)
            chosen_side = jnp.where(targets[:, 0] == blank_code, logits[:, 0, blank_code], drawn)
            blank = lse[:, 0] - chosen_side
        parts = GroupLosses(lse - chosen, lse**2, correct, blank)
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), parts)

    groups = (jnp.moveaxis(features, 1, 0), jnp.moveaxis(tokens, 1, 0))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), jax.lax.map(one, groups))


def code_losses(
    head: DepthHead,
    hidden: Float[Array, "B G N D"],
    tokens: Int[Array, "B G N K"],
    *,
    saves: nn.Saves,
    blank_code: int | None = None,
) -> GroupLosses:
    """Of the head's predictions: its layers run once over all groups, then a group's logits each.

    What lies between is made again in the backward pass, but for what `saves` says.
    """
    features = nn.recomputed(head.features, True, saves=saves)(
        hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1, tokens.shape[-1])
    )
    features = features.reshape(*tokens.shape, -1)
    return group_losses(head.all_logits, features, tokens, blank_code=blank_code)


def summarize(
    losses: GroupLosses,
    *,
    num_known: int,
    known_weight: float,
    z_loss: float,
    by_group: bool,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The training loss and what to report.

    The first `num_known` tokens of a group, if any, are those of the input view, which the prefix
    already shows; they count `known_weight` times in the loss and are reported apart, as in MVAR.
    `z_loss` weighs the squared log-sum-exp (PaLM).
    """
    nll = losses.nll
    weights = jnp.where(jnp.arange(nll.shape[2]) < num_known, known_weight, 1.0)
    per_token = jnp.mean(nll + z_loss * losses.lse_squared, axis=(0, 1, 3))
    loss = jnp.sum(per_token * weights) / jnp.sum(weights)
    metrics = {"loss": loss, "nll": jnp.mean(nll), "accuracy": jnp.mean(losses.correct)}
    if losses.blank is not None:
        metrics["nll_blank"] = jnp.mean(losses.blank)
    if num_known > 0:
        metrics["nll_ref"] = jnp.mean(nll[:, :, :num_known])
    if num_known < nll.shape[2]:
        metrics["nll_novel"] = jnp.mean(nll[:, :, num_known:])
    for k in range(nll.shape[3]):
        metrics[f"nll_code{k + 1}"] = jnp.mean(nll[..., k])
    if by_group:
        for t in range(nll.shape[1]):
            metrics[f"nll_group{t + 1}"] = jnp.mean(nll[:, t])
    return loss, metrics
