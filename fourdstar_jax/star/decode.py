"""Cached decoding of STAR: the prefix once, then one jitted call per timestep.

A call builds the container, runs its tokens (and those of the input view, which are known) through
the trunk at once, and scans over the other positions with cache of fixed size. The timestep is
data, so it compiles once for a clip.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fourdstar_jax.kernels.dpc_knn import Clusters, Peaks
from fourdstar_jax.star.container import empty_container
from fourdstar_jax.star.head import filter_logits
from fourdstar_jax.star.transformer import KV, group_mask

if TYPE_CHECKING:
    from fourdstar_jax.star.model import STAR, Condition, Places


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
    places: "Places"


@functools.partial(jax.jit, static_argnames=("guided",))
def prefill(model: "STAR", condition: "Condition", *, guided: bool) -> tuple[Prefix, Memory]:
    """The prefix's cache and an empty memory. Guided: a second batch without the video follows."""
    drop = None
    if guided:
        batch = condition.times.shape[0]
        condition = jax.tree.map(lambda y: jnp.concatenate([y, y]), condition)
        drop = jnp.arange(2 * batch) >= batch
    places = model.places(condition)
    prefix, rotary = model.prefix_stream(condition, places, None, drop)
    batch, timesteps, size, dim = places.spe.shape
    slots = model.container.num_slots
    memory = Memory(
        peaks=empty_container(batch, timesteps * size, dim, model.num_codebooks),
        clusters=Clusters(
            centers=jnp.zeros((batch, slots), jnp.int32),
            valid=jnp.zeros((batch, slots), bool),
            assignment=jnp.full((batch, timesteps * size), -1, jnp.int32),
        ),
    )
    return Prefix(model.trunk.prefill(prefix, rotary), places), memory


@functools.partial(
    jax.jit, static_argnames=("top_k", "use_top_p", "greedy", "guided", "with_logits")
)
def decode_group(
    model: "STAR",
    prefix: Prefix,
    memory: Memory,
    t: Int[Array, ""],
    known: Int[Array, "B n K"],
    key: jax.Array,
    sampling: Sampling,
    forced: Int[Array, "B N K"] | None = None,
    *,
    top_k: int | None,
    use_top_p: bool,
    greedy: bool,
    guided: bool,
    with_logits: bool = False,
) -> tuple[Int[Array, "B N K"], Memory, Float[Array, "B R K vocab"] | None]:
    """Tokens of timestep t, the first ones being `known`.

    `forced` tokens replace the sampled ones, for tests of the logits, which are returned for the
    slots after the known ones on request (those with the condition, unscaled).
    """
    places = jax.tree.map(
        lambda y: jax.lax.dynamic_index_in_dim(y, t, axis=1, keepdims=False), prefix.places
    )
    batch, size, dim = places.spe.shape
    samples, num_known = known.shape[:2]
    spe, coordinates = (y.reshape(batch, -1, y.shape[-1]) for y in prefix.places)
    clusters = jax.tree.map(lambda y: y[:, None], memory.clusters)
    container, container_places = model.container(memory.peaks.x, spe, coordinates, clusters)
    container, container_places = container[:, 0], container_places[:, 0]
    slots = container.shape[1]
    rotary = model.group_rotary(container_places, places.coordinates)

    def twice(y):
        return jnp.concatenate([y, y]) if guided else y

    # Container and known tokens at once. Slot j holds token j - 1, so known token n - 1 waits.
    start = model.token_slots(
        jnp.pad(model.embed(twice(known)), ((0, 0), (0, size - num_known), (0, 0))), places.spe
    )[:, :num_known]
    block = jnp.concatenate([container, start], axis=1)
    mask = group_mask(prefix.cache.k.shape[2], slots, num_known)
    first = slots + num_known
    cache = model.trunk.block(
        block, prefix.cache, mask, jax.tree.map(lambda y: y[:, :first], rotary), slots + size
    )
    begin = model.start[...].astype(places.spe.dtype)
    if num_known:
        previous = model.embed(twice(known[:, -1]))
    else:
        previous = jnp.broadcast_to(begin, (batch, dim))

    def pick(position_key, wanted, k, logits):
        if guided:
            with_video, without = jnp.split(logits, 2)
            logits = without + sampling.cfg_scale * (with_video - without)
        if wanted is not None:
            tokens = wanted[:, k]
        elif greedy:
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            top_p = sampling.top_p if use_top_p else None
            logits = filter_logits(logits / sampling.temperature, top_k=top_k, top_p=top_p)
            tokens = jax.random.categorical(jax.random.fold_in(position_key, k), logits)
        return twice(tokens.astype(jnp.int32))

    def one(carry, slot):
        previous, cache = carry
        x = (previous + jax.lax.dynamic_index_in_dim(places.spe, slot, 1, keepdims=False))[:, None]
        turn = jax.tree.map(
            lambda y: jax.lax.dynamic_slice_in_dim(y, slots + slot, 1, axis=1), rotary
        )
        x, cache = model.trunk.step(x, prefix.cache, cache, slots + slot, turn)
        wanted = None if forced is None else jax.lax.dynamic_index_in_dim(forced, slot, 1, False)
        choose = functools.partial(pick, jax.random.fold_in(key, slot), wanted)
        tokens, logits = model.head.decode(x[:, 0], choose)
        out = (tokens[:samples], logits[:samples] if with_logits else None)
        return (model.embed(tokens), cache), out

    _, (tokens, logits) = jax.lax.scan(one, (previous, cache), jnp.arange(num_known, size))
    tokens = jnp.concatenate([known, jnp.moveaxis(tokens, 0, 1)], axis=1)
    x = model.container.normalize(model.embed(twice(tokens)))
    memory = Memory(*model.container.update(memory.peaks, x, twice(tokens)))
    return tokens, memory, None if logits is None else jnp.moveaxis(logits, 0, 1)


def generate(
    model: "STAR",
    condition: "Condition",
    key: jax.Array,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    cfg_scale: float,
    write_known: bool,
    on_group: Callable[[int, Int[Array, "B N K"]], None] | None,
) -> Int[Array, "B T N K"]:
    """See `STAR.generate`."""
    if temperature < 0:
        raise ValueError(f"{temperature=} must not be negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{top_k=} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must lie in (0, 1]")
    model.check(condition)
    guided = cfg_scale != 1
    sampling = Sampling(
        *(jnp.float32(x) for x in (temperature or 1.0, 1.0 if top_p is None else top_p, cfg_scale))
    )
    prefix, memory = prefill(model, condition, guided=guided)
    groups = []
    for t in range(condition.times.shape[1]):
        known = condition.video_tokens[:, t].astype(jnp.int32)
        tokens, memory, _ = decode_group(
            model, prefix, memory, jnp.int32(t), known if write_known else known[:, :0],
            jax.random.fold_in(key, t), sampling, top_k=top_k, use_top_p=top_p is not None,
            greedy=temperature == 0, guided=guided,
        )  # fmt: skip
        groups.append(tokens)
        if on_group is not None:
            on_group(t, tokens)
    return jnp.stack(groups, axis=1)


def forced_logits(
    model: "STAR", condition: "Condition", tokens: Int[Array, "B T N K"]
) -> Float[Array, "B T N K vocab"]:
    """What cached decoding computes on the way to these tokens; equals `STAR.logits`."""
    prefix, memory = prefill(model, condition, guided=False)
    one = jnp.float32(1)
    logits = []
    for t in range(tokens.shape[1]):
        _, memory, y = decode_group(
            model, prefix, memory, jnp.int32(t), tokens[:, t, :0], jax.random.key(0),
            Sampling(one, one, one), tokens[:, t], top_k=None, use_top_p=False, greedy=True,
            guided=False, with_logits=True,
        )  # fmt: skip
        logits.append(y)
    return jnp.stack(logits, axis=1)
