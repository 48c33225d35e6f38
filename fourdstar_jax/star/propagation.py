"""Whether generated objects remember themselves, from tokens alone.

What the conditions do not tell, each sample draws anew: an object without a past draws it anew at
every timestep. So one sample's likeness to its own timestep before is compared with its likeness to
another sample's, which conditions alone make, and with the truth's. Teacher-forced likelihoods
hardly show this: there, a group's own past tells what the state would.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fourdstar_jax.star import sample
from fourdstar_jax.star.model import STAR, Condition


class Propagation(NamedTuple):
    """Shares of codes that are those of the same place a timestep before, one of each clip."""

    own: Float[np.ndarray, " B"]  # of the same sample
    other: Float[np.ndarray, " B"]  # of another sample of the same clip
    truth: Float[np.ndarray, " B"]  # of the truth, within itself

    @property
    def share(self) -> float:
        """0 where a sample is no more like its own past than like another's, 1 as the truth is.

        NaN where the truth is no more like its past than samples are like each other's.
        """
        own, other, truth = (float(np.nanmean(x)) for x in self)
        return (own - other) / (truth - other) if truth > other else math.nan


def kept(
    tokens: Int[Array | np.ndarray, "B T N K"],
    before: Int[Array | np.ndarray, "B T N K"],
    blank_code: int | None = None,
) -> Float[np.ndarray, " B"]:
    """Share of the codes of timesteps 2 to T that `before` has at that place a timestep before.

    Tokens with `blank_code` in every codebook are left out; a clip without others is NaN.
    """
    now, then = np.asarray(tokens)[:, 1:], np.asarray(before)[:, :-1]
    counts = np.ones(now.shape[:3], bool)
    if blank_code is not None:
        counts = np.any(now != blank_code, axis=-1)
    same = np.where(counts, np.mean(now == then, axis=-1), 0).sum(axis=(1, 2))
    total = counts.sum(axis=(1, 2))
    return np.where(total > 0, same / np.maximum(total, 1), np.nan)


def propagation(
    samples: Int[Array | np.ndarray, "B T N K"],
    others: Int[Array | np.ndarray, "B T N K"],
    truth: Int[Array | np.ndarray, "B T N K"],
    *,
    blank_code: int | None = None,
) -> Propagation:
    """How much of what a sample chose at a timestep it has at the next.

    `samples` and `others` are of the same clips with two keys, all three of the novel views only.
    For a frozen video the truth is the first frame's tokens at every timestep. Raises ValueError
    for clips of one timestep.
    """
    if samples.shape[1] < 2:
        raise ValueError("propagation is from one timestep to the next; these clips have one")
    return Propagation(
        own=kept(samples, samples, blank_code),
        other=kept(samples, others, blank_code),
        truth=kept(truth, truth, blank_code),
    )


def history_following(
    model: STAR,
    condition: Condition,
    samples: Int[Array | np.ndarray, "B T A K"],
    others: Int[Array | np.ndarray, "B T A K"],
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Float[np.ndarray, "B T1"]:
    """How often a group is nearer to the past that it was given than to another sample's.

    Each group from the second on is decoded with the state of `samples` and, with the same key, of
    `others` (all views of both; sampled with two keys). 1 where the result has more codes of its
    own past's last group than of the other's, 0 where fewer, 1/2 where as many; the mean of both
    ways. Chance is 1/2. Raises ValueError for a model whose past is not the container's.
    """
    if model.container is None or model.window:
        raise ValueError("history following needs a model whose past is the container's state")
    pasts = [model.in_groups(jnp.asarray(x, jnp.int32)) for x in (samples, others)]
    prefix, start = sample.prefill(model, condition)
    memories, nearer = [start, start], []
    for t in range(1, samples.shape[1]):
        last = [past[:, t - 1] for past in pasts]
        memories = [
            _after(model, prefix, memory, jnp.int32(t - 1), tokens)
            for memory, tokens in zip(memories, last, strict=True)
        ]
        for own, memory in enumerate(memories):
            tokens, _ = sample.decode_group(
                model,
                prefix,
                memory,
                jnp.int32(t),
                condition.video_tokens[:, t, : model.num_known].astype(jnp.int32),
                jax.random.fold_in(key, t),
                sample.Sampling(*(jnp.float32(x) for x in (temperature or 1.0, 1, 1, 1))),
                top_k=top_k,
                use_top_p=False,
                greedy=temperature == 0,
            )
            novel = slice(model.num_known, None)
            likeness = [jnp.sum((tokens == x)[:, novel], axis=(1, 2)) for x in last]
            nearer.append((1 + jnp.sign(likeness[own] - likeness[1 - own])) / 2)
    values = jnp.stack(nearer, axis=1)  # [B, 2 (T - 1)]
    return np.asarray(values.reshape(len(values), -1, 2).mean(axis=-1))


_after = jax.jit(sample.end_group)
