"""Sampling from STAR with caches: the prefix once, then one jitted call per timestep.

A call builds the container, runs its tokens (and those of the input view, where the groups have
them: they are known) through the trunk at once, and scans over the other positions with a cache of
fixed size. The timestep is data, so it compiles once for a clip.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.kernels.dpc_knn import Clusters, Peaks
from fourdstar_jax.star import container
from fourdstar_jax.star.head import filter_logits
from fourdstar_jax.star.model import STAR, Condition, Places
from fourdstar_jax.star.transformer import KV, Rotary, group_mask


class Sampling(NamedTuple):
    """Numbers of the sampler that are data; what changes the program is static."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    cfg_scale: Float[Array, ""]


class Memory(NamedTuple):
    """What one group leaves to the next."""

    peaks: Peaks
    clusters: Clusters


class Prefix(NamedTuple):
    """What all groups share."""

    cache: KV  # of all layers
    places: Places  # of the groups' tokens
    drop_video: Bool[Array, " B"] | None


class Group(NamedTuple):
    """A group that has been begun: its container and its known tokens are in the cache."""

    previous: Float[Array, "B D"]  # embedding of the token before the first one to be decoded
    cache: KV
    spe: Float[Array, "B N D"]
    rotary: Rotary | None


@functools.partial(jax.jit, static_argnames=("guided",))
def prefill(model: STAR, condition: Condition, *, guided: bool = False) -> tuple[Prefix, Memory]:
    """The prefix's cache and an empty memory. Guided: a second batch without the video follows."""
    drop = None
    if guided:
        batch = condition.times.shape[0]
        condition = jax.tree.map(lambda y: jnp.concatenate([y, y]), condition)
        drop = jnp.arange(2 * batch) >= batch
    places = model.places(condition)
    prefix, rotary = model.prefix_stream(condition, places, None, drop)
    places = jax.tree.map(model.in_groups, places)
    batch, timesteps, size, dim = places.spe.shape
    slots = model.container.num_slots
    memory = Memory(
        peaks=container.empty_container(batch, timesteps * size, dim, model.num_codebooks),
        clusters=Clusters(
            centers=jnp.zeros((batch, slots), jnp.int32),
            valid=jnp.zeros((batch, slots), bool),
            assignment=jnp.full((batch, timesteps * size), -1, jnp.int32),
        ),
    )
    return Prefix(model.trunk.prefill(prefix, rotary), places, drop), memory


def begin_group(
    model: STAR, prefix: Prefix, memory: Memory, t: Int[Array, ""], known: Int[Array, "B n K"]
) -> Group:
    """Timestep t with its container, and the first tokens, `known`, in the cache at once."""
    places = jax.tree.map(
        lambda y: jax.lax.dynamic_index_in_dim(y, t, axis=1, keepdims=False), prefix.places
    )
    batch, size, dim = places.spe.shape
    num_known = known.shape[1]
    spe, coordinates = (y.reshape(batch, -1, y.shape[-1]) for y in prefix.places)
    clusters = jax.tree.map(lambda y: y[:, None], memory.clusters)
    state, state_places = model.container(memory.peaks.x, spe, coordinates, clusters)
    state, state_places = state[:, 0], state_places[:, 0]
    slots = state.shape[1]
    rotary = model.group_rotary(state_places, places.coordinates)

    # Slot j holds token j - 1, so the last known token waits.
    features = model.past(known, model.visible(known, prefix.drop_video))
    start = model.token_slots(
        jnp.pad(features, ((0, 0), (0, size - num_known), (0, 0))), places.spe
    )[:, :num_known]
    block = jnp.concatenate([state, start], axis=1)
    mask = group_mask(prefix.cache.k.shape[2], slots, num_known)
    first = slots + num_known
    cache = model.trunk.block(
        block, prefix.cache, mask, jax.tree.map(lambda y: y[:, :first], rotary), slots + size
    )
    if num_known:
        previous = features[:, -1]
    else:
        previous = jnp.broadcast_to(model.start[...].astype(places.spe.dtype), (batch, dim))
    return Group(previous, cache, places.spe, rotary)


def decode_slots(
    model: STAR,
    prefix: Prefix,
    group: Group,
    first: int,
    choose: Callable[[Int[Array, ""], Float[Array, "B D"]], tuple[Int[Array, "B K"], Any]],
) -> tuple[Int[Array, "B R K"], Any]:
    """The tokens of a begun group from slot `first` on, one after the other.

    `choose(slot, hidden)` gives a slot's token, and anything else, which is stacked.
    """
    size = group.spe.shape[1]
    slots = group.cache.k.shape[2] - size  # of the container

    def one(carry, slot):
        previous, cache = carry
        x = (previous + jax.lax.dynamic_index_in_dim(group.spe, slot, 1, keepdims=False))[:, None]
        turn = jax.tree.map(
            lambda y: jax.lax.dynamic_slice_in_dim(y, slots + slot, 1, axis=1), group.rotary
        )
        x, cache = model.trunk.step(x, prefix.cache, cache, slots + slot, turn)
        tokens, more = choose(slot, x[:, 0])
        return (model.embed(tokens), cache), (tokens, more)

    start = (group.previous, group.cache)
    _, found = jax.lax.scan(one, start, jnp.arange(first, size))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), found)


def end_group(model: STAR, prefix: Prefix, memory: Memory, tokens: Int[Array, "B N K"]) -> Memory:
    """The memory with a whole group in it."""
    visible = model.visible(tokens, prefix.drop_video)
    x = model.container.normalize(model.past(tokens, visible))
    return Memory(*model.container.update(memory.peaks, container.Group(x, tokens, visible)))


@functools.partial(jax.jit, static_argnames=("top_k", "use_top_p", "greedy", "guided"))
def decode_group(
    model: STAR,
    prefix: Prefix,
    memory: Memory,
    t: Int[Array, ""],
    known: Int[Array, "B n K"],
    key: jax.Array,
    sampling: Sampling,
    *,
    top_k: int | None,
    use_top_p: bool,
    greedy: bool,
    guided: bool,
) -> tuple[Int[Array, "B N K"], Memory]:
    """Tokens of timestep t, the first ones being `known`, and the memory with them."""

    def twice(y):
        return jnp.concatenate([y, y]) if guided else y

    def choose(slot, hidden):
        slot_key = jax.random.fold_in(key, slot)

        def pick(k, logits):
            if guided:
                with_video, without = jnp.split(logits, 2)
                logits = without + sampling.cfg_scale * (with_video - without)
            if greedy:
                tokens = jnp.argmax(logits, axis=-1)
            else:
                top_p = sampling.top_p if use_top_p else None
                logits = filter_logits(logits / sampling.temperature, top_k=top_k, top_p=top_p)
                tokens = jax.random.categorical(jax.random.fold_in(slot_key, k), logits)
            return twice(tokens.astype(jnp.int32))

        return model.head.decode(hidden, pick)[0], None

    samples, num_known = known.shape[:2]
    group = begin_group(model, prefix, memory, t, twice(known))
    tokens, _ = decode_slots(model, prefix, group, num_known, choose)
    tokens = jnp.concatenate([known, tokens[:samples]], axis=1)
    return tokens, end_group(model, prefix, memory, twice(tokens))


def check_settings(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 1.0,
) -> None:
    """Raises ValueError for settings of `generate` that are outside their range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{temperature=} must be finite and at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{top_k=} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must lie in (0, 1]")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"{cfg_scale=} must be finite")


def generate(
    model: STAR,
    condition: Condition,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 1.0,
    write_known: bool = True,
    on_group: Callable[[int, Int[Array, "B A K"]], None] | None = None,
) -> Int[Array, "B T A K"]:
    """Samples an object, all views of it; the same key and condition give the same tokens.

    `temperature=0` takes the most probable code each time. `top_k` and `top_p` restrict the choice.
    `cfg_scale` other than 1 guides: logits move from those without the video (text kept, as MVAR)
    towards and beyond those with it, at twice the cost. `write_known` writes the input view's
    tokens instead of sampling them, where the groups have them. `on_group(t, tokens)` is called
    after each timestep. Raises ValueError for settings outside their range and for a condition that
    does not fit the model.
    """
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p, cfg_scale=cfg_scale)
    model.check(condition)
    guided = cfg_scale != 1
    sampling = Sampling(
        *(jnp.float32(x) for x in (temperature or 1.0, 1.0 if top_p is None else top_p, cfg_scale))
    )
    prefix, memory = prefill(model, condition, guided=guided)
    groups = []
    for t in range(condition.times.shape[1]):
        known = condition.video_tokens[:, t].astype(jnp.int32)
        tokens, memory = decode_group(
            model,
            prefix,
            memory,
            jnp.int32(t),
            known[:, : model.num_known] if write_known else known[:, :0],
            jax.random.fold_in(key, t),
            sampling,
            top_k=top_k,
            use_top_p=top_p is not None,
            greedy=temperature == 0,
            guided=guided,
        )
        if not model.num_known:  # the input view goes in front
            tokens = jnp.concatenate([known, tokens], axis=1)
        groups.append(tokens)
        if on_group is not None:
            on_group(t, tokens)
    return jnp.stack(groups, axis=1)
