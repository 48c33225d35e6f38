"""Sampling from STAR with caches: the prefix once, then one jitted call per timestep.

A call builds the container, runs its tokens (and those of the input view, where the groups have
them: they are known) through the trunk at once, and scans over the other positions with a cache of
fixed size. The timestep is data, so it compiles once for a clip.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.star.container import State
from fourdstar_jax.star.head import cooled, likeliest
from fourdstar_jax.star.model import STAR, Condition, Places
from fourdstar_jax.star.transformer import KV, Rotary, concatenate, group_mask

# Settings of `generate` where a bundle says nothing else. Of a tiny model, over six unseen
# clips (`fourdstar bench sampling`), these flicker 30 % less than temperature 1 with the 16
# likeliest, at equal LPIPS and 0.6 dB less in the mask.
DEFAULTS: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": None,
    "cfg_scale": 1.0,
    "history_scale": 1.0,
}
Without = Literal["video", "history"]  # what guidance moves away from the lack of


class Sampling(NamedTuple):
    """Numbers of the sampler that are data; what changes the program is static."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    cfg_scale: Float[Array, ""]
    history_scale: Float[Array, ""]


class Memory(NamedTuple):
    """What one group leaves to the next."""

    container: Any  # a `container.Carry` or `pooling.Past`; None
    past: KV | None  # the slots of the window of groups before it, the latest last, of all layers


class Prefix(NamedTuple):
    """What all groups share."""

    cache: KV  # of all layers
    places: Places  # of the groups' tokens
    drop_video: Bool[Array, " B"] | None
    drop_history: Bool[Array, " B"] | None


class Group(NamedTuple):
    """A group that has been begun: its container and its known tokens are in the cache."""

    previous: Float[Array, "B D"]  # embedding of the token before the first one to be decoded
    before: KV  # the prefix and, with a window, the groups before
    seen: Bool[Array, " S"] | None  # which slots of `before` there are; None: all
    cache: KV
    spe: Float[Array, "B N D"]
    rotary: Rotary | None
    aligned: list[Float[Array, "B N D"]]  # the container's state by place


@functools.partial(jax.jit, static_argnames=("without",))
def prefill(
    model: STAR, condition: Condition, *, without: tuple[Without, ...] = ()
) -> tuple[Prefix, Memory]:
    """The prefix's cache and an empty memory.

    For guidance the batch follows again for each of `without`, without what it names.
    """
    batch = condition.times.shape[0]
    condition = jax.tree.map(lambda y: jnp.concatenate([y] * (1 + len(without))), condition)
    part = np.repeat(("", *without), batch)
    drop_video, drop_history = (
        jnp.asarray(part == name) if name in without else None for name in ("video", "history")
    )
    places = model.places(condition)
    prefix, rotary = model.prefix_stream(condition, places, None, drop_video)
    places = jax.tree.map(model.in_groups, places)
    cache = model.trunk.prefill(prefix, rotary)
    batch, timesteps, size, _ = places.spe.shape
    state = past = None
    if model.container is not None:
        state = model.container.start(batch, timesteps, size, model.num_codebooks)
    if window := min(model.window, timesteps - 1):
        past = jax.tree.map(
            lambda y: jnp.zeros((*y.shape[:2], window * size, *y.shape[3:]), y.dtype), cache
        )
    return Prefix(cache, places, drop_video, drop_history), Memory(state, past)


def recall(model: STAR, prefix: Prefix, memory: Memory, t: Int[Array, ""]) -> State | None:
    """The container's state for timestep t, as the only one of its groups."""
    if model.container is None or memory.container is None:
        return None
    merged = model.container.read(memory.container, prefix.places.positions, t)
    begun = jnp.broadcast_to(t > 0, (prefix.places.spe.shape[0], 1))
    if prefix.drop_history is not None:
        begun = begun & ~prefix.drop_history[:, None]
    return model.container.tell(merged, begun, prefix.places.spe.dtype)


def begin_group(
    model: STAR, prefix: Prefix, memory: Memory, t: Int[Array, ""], known: Int[Array, "B n K"]
) -> Group:
    """Timestep t with its container, and the first tokens, `known`, in the cache at once."""
    places = jax.tree.map(
        lambda y: jax.lax.dynamic_slice_in_dim(y, t, 1, axis=1), prefix.places
    )  # [B, 1, N, ...]
    batch, _, size, dim = places.spe.shape
    num_known = known.shape[1]
    # Slot j holds token j - 1, so the last known token waits.
    features = model.past(known, model.visible(known, prefix.drop_video))
    room = ((0, 0), (0, 0), (0, size - num_known), (0, 0))
    start = model.token_slots(jnp.pad(features[:, None], room), places.spe)
    state = recall(model, prefix, memory, t)
    stream, rotary = model.group_stream(state, start, places)
    rotary = jax.tree.map(lambda y: y[:, 0], rotary)
    slots = stream.shape[2] - size
    aligned = [] if state is None else [y[:, 0] for y in state.aligned]

    before, seen, first = prefix.cache, None, slots + num_known
    length = before.k.shape[2]
    mask: Any = group_mask(length, slots, num_known)
    if memory.past is not None:
        before = concatenate(before, memory.past)
        age = (before.k.shape[2] - 1 - jnp.arange(before.k.shape[2])) // size  # 0: the group t - 1
        seen = (jnp.arange(before.k.shape[2]) < length) | (age < t)
        rows = (np.arange(first) >= slots)[:, None]  # the container sees none
        mask = jnp.concatenate([mask[:, :length], rows & seen[length:], mask[:, length:]], axis=1)
    cache = model.trunk.block(
        stream[:, 0, :first],
        before,
        mask,
        jax.tree.map(lambda y: y[:, :first], rotary),
        slots + size,
        [y[:, :num_known] for y in aligned],
    )
    if num_known:
        previous = features[:, -1]
    else:
        previous = jnp.broadcast_to(model.start[...].astype(places.spe.dtype), (batch, dim))
    return Group(previous, before, seen, cache, places.spe[:, 0], rotary, aligned)


def decode_slots(
    model: STAR,
    group: Group,
    first: int,
    choose: Callable[[Int[Array, ""], Float[Array, "B D"]], tuple[Int[Array, "B K"], Any]],
) -> tuple[Int[Array, "B R K"], Any, KV]:
    """The tokens of a begun group from slot `first` on, one after the other.

    `choose(slot, hidden)` gives a slot's token, and anything else, which is stacked. The group's
    whole cache comes last.
    """
    size = group.spe.shape[1]
    slots = group.cache.k.shape[2] - size  # of the container

    def one(carry, slot):
        previous, cache = carry
        spe, *aligned = (
            jax.lax.dynamic_slice_in_dim(y, slot, 1, axis=1) for y in (group.spe, *group.aligned)
        )
        x = previous[:, None] + spe
        turn = jax.tree.map(
            lambda y: jax.lax.dynamic_slice_in_dim(y, slots + slot, 1, axis=1), group.rotary
        )
        x, cache = model.trunk.step(x, group.before, cache, slots + slot, turn, aligned, group.seen)
        tokens, more = choose(slot, x[:, 0])
        return (model.embed(tokens), cache), (tokens, more)

    start = (group.previous, group.cache)
    (_, cache), found = jax.lax.scan(one, start, jnp.arange(first, size))
    return *jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1), found), cache


def end_group(
    model: STAR,
    prefix: Prefix,
    memory: Memory,
    t: Int[Array, ""],
    tokens: Int[Array, "B N K"],
    cache: KV | None = None,
) -> Memory:
    """The memory with timestep t in it; its cache is needed with a window of groups only."""
    state, past, size = memory.container, memory.past, tokens.shape[1]
    if model.container is not None and state is not None:
        visible = model.visible(tokens, prefix.drop_video)
        rays, positions = (
            jax.lax.dynamic_index_in_dim(y, t, axis=1, keepdims=False)
            for y in (prefix.places.rays, prefix.places.positions)
        )
        group = model.container.group(model.past(tokens, visible), tokens, rays, visible)
        state = model.container.update(state, group, positions)
    if past is not None:
        assert cache is not None
        past = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b[:, :, -size:]], axis=2)[:, :, size:], past, cache
        )
    return Memory(state, past)


def _folded(key: jax.Array, number: Any) -> jax.Array:
    """A key, or each of several, folded with a number."""
    if key.ndim:
        return jax.vmap(lambda one: jax.random.fold_in(one, number))(key)
    return jax.random.fold_in(key, number)


def _drawn(key: jax.Array, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """A draw of each row, by one key or by a key each: of one row by either the same."""
    draw = jax.random.categorical
    return jax.vmap(draw)(key, logits) if key.ndim else draw(key, logits)


@functools.partial(jax.jit, static_argnames=("top_k", "use_top_p", "greedy", "without"))
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
    without: tuple[Without, ...] = (),
) -> tuple[Int[Array, "B N K"], Memory]:
    """Tokens of timestep t, the first ones being `known`, and the memory with them.

    `without` is that of `prefill`.
    """
    scales = dict(video=sampling.cfg_scale, history=sampling.history_scale)

    def again(y):  # for each part of the batch
        return jnp.concatenate([y] * (1 + len(without)))

    def choose(slot, hidden):
        slot_key = _folded(key, slot)

        def pick(k, logits):
            logits, *others = jnp.split(logits, 1 + len(without))
            beyond = [scales[name] - 1 for name in without]
            logits = (1 + sum(beyond)) * logits
            for scale, other in zip(beyond, others, strict=True):
                logits -= scale * other
            keep = model.blank_code if k == 0 else None
            if greedy:
                tokens = likeliest(logits, keep)
            else:
                top_p = sampling.top_p if use_top_p else None
                logits = cooled(logits, sampling.temperature, top_k=top_k, top_p=top_p, keep=keep)
                tokens = _drawn(_folded(slot_key, k), logits)
            return again(tokens.astype(jnp.int32))

        return model.head.decode(hidden, pick)[0], None

    samples, num_known = known.shape[:2]
    group = begin_group(model, prefix, memory, t, again(known))
    tokens, _, cache = decode_slots(model, group, num_known, choose)
    tokens = jnp.concatenate([known, tokens[:samples]], axis=1)
    return tokens, end_group(model, prefix, memory, t, again(tokens), cache)


def check_settings(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 1.0,
    history_scale: float = 1.0,
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
    if not math.isfinite(history_scale):
        raise ValueError(f"{history_scale=} must be finite")


def generate(
    model: STAR,
    condition: Condition,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cfg_scale: float = 1.0,
    history_scale: float = 1.0,
    write_known: bool = True,
    on_group: Callable[[int, Int[Array, "B A K"]], None] | None = None,
) -> Int[Array, "B T A K"]:
    """Samples an object, all views of it; the same key and condition give the same tokens.

    `key` is one for the batch, or `[B]` of them: then an object does not depend on those beside it,
    and is what its key gives it alone.
    `temperature=0` takes the most probable code each time. `top_k` and `top_p` restrict the choice.
    Whether a token is blank is drawn by the (guided) odds at any temperature and filter; at 0 it is
    where that is likelier than all other codes together.
    `cfg_scale` other than 1 guides: logits move from those without the video (text kept, as MVAR)
    towards and beyond those with it. `history_scale` does so with the container's state, as that is
    dropped in training. Both add up, and each costs as much again as sampling does without.
    `write_known` writes the input view's tokens instead of sampling them, where the groups have
    them. `on_group(t, tokens)` is called after each timestep.

    Raises ValueError for settings outside their range, for a condition that does not fit the model,
    and for `history_scale` where it has no container.
    """
    check_settings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        cfg_scale=cfg_scale,
        history_scale=history_scale,
    )
    model.check(condition)
    if history_scale != 1 and model.container is None:
        raise ValueError(f"{history_scale=} needs a container; this model has none, so it is 1")
    scales: dict[Without, float] = {"video": cfg_scale, "history": history_scale}
    without = tuple(name for name, scale in scales.items() if scale != 1)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # of jax.random.PRNGKey
        key = jax.random.wrap_key_data(key)
    numbers = (temperature or 1.0, 1.0 if top_p is None else top_p, cfg_scale, history_scale)
    sampling = Sampling(*(jnp.float32(x) for x in numbers))
    prefix, memory = prefill(model, condition, without=without)
    groups = []
    for t in range(condition.times.shape[1]):
        known = condition.video_tokens[:, t].astype(jnp.int32)
        tokens, memory = decode_group(
            model,
            prefix,
            memory,
            jnp.int32(t),
            known[:, : model.num_known] if write_known else known[:, :0],
            _folded(key, t),
            sampling,
            top_k=top_k,
            use_top_p=top_p is not None,
            greedy=temperature == 0,
            without=without,
        )
        if not model.num_known:  # the input view goes in front
            tokens = jnp.concatenate([known, tokens], axis=1)
        groups.append(tokens)
        if on_group is not None:
            on_group(t, tokens)
    return jnp.stack(groups, axis=1)
