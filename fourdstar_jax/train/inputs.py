"""From what the loader sends to what a step sees, on the device: gathered, augmented, as floats.

The loader sends pictures as uint8 (`pipeline.make_loader(form="uint8")`), a quarter of the bytes of
floats, or, for a dataset that lies on the device (`data.resident`), the numbers of frames alone.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from fourdstar_jax.data import pipeline, resident
from fourdstar_jax.data.resident import Frames
from fourdstar_jax.train import state as train_state
from fourdstar_jax.types import Array

# Axis of time of what has one; flow leads from a timestep to the next.
TIMED = ("rgba", "extra_rgba", "depth", "frames", "times", "tokens")
CHANCES = ("mirror", "colour", "reverse", "frozen")  # options of `draw`: with all 0 nothing changes


class Inputs(NamedTuple):
    """What a trainer reads."""

    batches: Any  # an iterator of host batches, without end, of the split "train"
    held_out: Any  # a loader of the split "unseen_clip", once through; () where there is none
    frames: Frames | None  # where the pictures of the split "train" lie on the devices


def open_data(config: Any, mesh: Mesh, *, maps: Sequence[str] = ()) -> Inputs:
    """The batches of a trainer's config; of `pipeline.MAPS` `maps` are read for training.

    With `config.data.on_device` every device holds all pictures of the training clips. Raises
    ValueError for a dataset that cannot be read or, then, does not fit.
    """
    loader = functools.partial(
        pipeline.make_loader,
        config.data.dir,
        timesteps=config.data.timesteps,
        batch_size=config.batch_size,
    )
    frames, source = on_device(config, mesh, maps=maps)
    form = "uint8" if source is None else "index"
    batches = loader(
        split="train", seed=config.seed, maps=maps, form=form, source=source, **reading(config)
    )
    held_out = ()  # a dataset of one's own objects has no unseen clips
    if "unseen_clip" in pipeline.read_manifest(config.data.dir)["splits"]:
        held_out = loader(split="unseen_clip", form="uint8")
    return Inputs(iter(batches), held_out, frames)


def reading(config: Any) -> dict[str, Any]:
    """How the training clips are read, for `pipeline.make_loader`."""
    return dict(worker_count=config.data.workers, cache_bytes=config.data.cache_bytes)


def on_device(
    config: Any, mesh: Mesh, *, maps: Sequence[str] = (), extra: bool = True
) -> tuple[Frames | None, resident.Clips | None]:
    """The training clips' pictures on every device and the clips, with `config.data.on_device`.

    Without `extra` the rig's alone. Raises ValueError for pictures that do not fit.
    """
    if not config.data.on_device:
        return None, None
    on_host, source = resident.read(config.data.dir, "train", maps=maps, extra=extra)
    return train_state.replicate(on_host, mesh), source


def timesteps_of(step: int, seed: int, buckets: Sequence[tuple[int, float]], most: int) -> int:
    """How many timesteps the batch of a step has; the same on every process.

    `buckets` are (timesteps, share of the batches); without any it is always `most`.
    """
    if not buckets:
        return most
    sizes, shares = zip(*buckets, strict=True)
    rng = np.random.default_rng((seed, step))
    return int(rng.choice(sizes, p=np.asarray(shares) / np.sum(shares)))


def check_buckets(buckets: Any, most: int) -> None:
    """Raises ValueError for buckets that are not pairs of 1 to `most` timesteps and a share."""
    for bucket in buckets:
        match bucket:
            case (int(timesteps), int() | float() as share) if 1 <= timesteps <= most and share > 0:
                continue
        raise ValueError(
            f"config.data.buckets has {bucket}: each must be (timesteps from 1 to "
            f"config.data.timesteps={most}, share above 0)"
        )


def cut(batch: Mapping[str, np.ndarray], timesteps: int) -> dict[str, np.ndarray]:
    """The first timesteps of a host batch `[B, T, ...]`."""
    out = {name: x[:, :timesteps] if name in TIMED else x for name, x in batch.items()}
    if "flow" in batch:
        out["flow"] = batch["flow"][:, : timesteps - 1]
    return out


def split(batch: Mapping[str, np.ndarray], timesteps: int) -> dict[str, np.ndarray]:
    """A host batch `[B, T, ...]` as clips of `timesteps`, as many of each as there are in it.

    So a step of shorter clips has as many timesteps as one of long ones, and takes as long; what is
    left of a clip is dropped. Each begins at time 0. Raises ValueError for a batch with flow.
    """
    if "flow" in batch:
        raise ValueError("flow leads over the ends of the clips that a batch is split into")
    pieces = len(batch["times"][0]) // timesteps
    out = {}
    for name, x in batch.items():
        if name in TIMED:
            x = x[:, : pieces * timesteps].reshape(len(x) * pieces, timesteps, *x.shape[2:])
        else:
            x = np.repeat(x, pieces, axis=0)
        out[name] = x
    out["times"] = out["times"] - out["times"][:, :1]
    return out


def prepare(
    batch: Mapping[str, Array],
    frames: Frames | None = None,
    key: Array | None = None,
    augment: Mapping[str, float] | None = None,
) -> dict[str, Array]:
    """The batch with float `images` and `masks`, and `extra_` ones, from whichever form it has.

    With a `key` clips are augmented by `augment`, the options of `draw`. A batch of the form
    "index" is gathered from `frames`; one that has images already is returned.
    """
    if "images" in batch:
        return dict(batch)
    out = dict(batch)
    if "frames" in batch:
        assert frames is not None
        out = gather(frames, batch)
    drawn = None
    if key is not None and augment is not None and any(augment.get(name) for name in CHANCES):
        drawn = draw(key, out["viewmats"].shape[0], **augment)
        out = retimed(out, drawn["reverse"], drawn["frozen"])
    colours = {}
    for prefix in ("", "extra_"):
        if f"{prefix}rgba" in out:
            rgba = out.pop(f"{prefix}rgba").astype(jnp.float32) / 255
            colours[f"{prefix}images"] = rgba[..., :3]
            out[f"{prefix}masks"] = rgba[..., 3:]
    for name in ("flow", "depth"):
        if name in out:
            out[name] = out[name].astype(jnp.float32)
    if drawn is not None:
        colours = {name: jitter(x, drawn) for name, x in colours.items()}
        out = mirrored(out | colours, drawn["mirror"])
        colours = {name: out[name] for name in colours}
    for name, x in colours.items():
        mask = out[name.replace("images", "masks")]
        out[name] = x * mask + (1 - mask)
    return out


def gather(frames: Frames, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch that the loader would have sent, from `frames` [B, T] and `view` [B]."""
    out = dict(batch)
    rows, view = out.pop("frames"), out.pop("view")
    order = (view[:, None] + jnp.arange(frames.rgba.shape[1])) % frames.rgba.shape[1]  # [B, V]

    def rig(x, rows):
        return x[rows[:, :, None], order[:, None]]

    out["rgba"] = rig(frames.rgba, rows)
    if frames.extra_rgba is not None:
        out["extra_rgba"] = frames.extra_rgba[rows]
    if frames.flow is not None:
        out["flow"] = rig(frames.flow, rows[:, :-1])
    if frames.depth is not None:
        out["depth"] = rig(frames.depth, rows)
    return out


def draw(
    key: Array,
    count: int,
    *,
    mirror: float,
    colour: float,
    hue: float,
    saturation: float,
    value: float,
    reverse: float = 0.0,
    frozen: float = 0.0,
) -> dict[str, Array]:
    """One draw a clip, for all its views and timesteps.

    Args:
      mirror: chance of the mirror image.
      colour: chance of other colours; then hue is turned by up to `hue` of a full circle either
        way (0.5: any), saturation and value are multiplied by up to exp(`saturation`) and
        exp(`value`) or divided by as much.
      reverse, frozen: chances that a clip is played backwards, and that it stands still.
    """
    keys = jax.random.split(key, 5)
    reverse_key, frozen_key = jax.random.split(jax.random.fold_in(key, 1))
    changed = jax.random.bernoulli(keys[0], colour, (count,))

    def spread(key, most):
        return jnp.where(changed, jax.random.uniform(key, (count,), minval=-most, maxval=most), 0.0)

    return {
        "mirror": jax.random.bernoulli(keys[1], mirror, (count,)),
        "reverse": jax.random.bernoulli(reverse_key, reverse, (count,)),
        "frozen": jax.random.bernoulli(frozen_key, frozen, (count,)),
        "turn": spread(keys[2], hue),
        "saturation": jnp.exp(spread(keys[3], saturation)),
        "value": jnp.exp(spread(keys[4], value)),
    }


def retimed(
    batch: Mapping[str, Array], reverse: Bool[Array, " B"], frozen: Bool[Array, " B"]
) -> dict[str, Array]:
    """The batch with some clips played backwards, and some held at the timestep they begin with.

    Frame times stay. How pixels move backwards is not known where it is known forwards, so
    `flow_known` [B] says of which clips `flow` still holds.
    """
    order = jnp.arange(batch["times"].shape[1])
    order = jnp.where(reverse[:, None], order[::-1], order)
    order = jnp.where(frozen[:, None], order[:, :1], order)  # [B, T]
    out = dict(batch)
    for name in ("rgba", "extra_rgba", "depth"):
        if name in batch:
            out[name] = jax.vmap(lambda x, i: x[i])(jnp.asarray(batch[name]), order)
    if "flow" in batch:
        held = frozen.reshape(-1, *(1,) * (batch["flow"].ndim - 1))
        out["flow"] = jnp.where(held, 0, batch["flow"])
        out["flow_known"] = (frozen | ~reverse).astype(jnp.float32)
    return out


def jitter(
    rgb: Float[Array, "B *s h w 3"], drawn: Mapping[str, Array]
) -> Float[Array, "B *s h w 3"]:
    """Colours in [0, 1] with hue, saturation and value (HSV) changed as drawn for each clip."""

    def clip(name):
        return drawn[name].reshape(-1, *(1,) * (rgb.ndim - 2))

    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    high, low = jnp.max(rgb, axis=-1), jnp.min(rgb, axis=-1)
    chroma = high - low
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixths = jnp.where(
        high == red,
        (green - blue) / safe,
        jnp.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * clip("turn")
    saturation = chroma / jnp.where(high > 0, high, 1.0)
    saturation = jnp.minimum(saturation * clip("saturation"), 1.0)
    value = jnp.minimum(high * clip("value"), 1.0)
    k = (jnp.array([5.0, 3.0, 1.0]) + sixths[..., None]) % 6
    share = jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)
    return value[..., None] * (1 - saturation[..., None] * share)


def mirrored(batch: Mapping[str, Array], which: Bool[Array, " B"]) -> dict[str, Array]:
    """The batch with the clips of `which` as a mirror would show them.

    The world's x changes sign, and so do the pictures' columns: what is left is a rigid camera. The
    views of a ring from azimuth 0 are put back in their order, 0, V - 1, ..., 1: its cameras are
    what they were.
    """
    sign = jnp.array([-1.0, 1.0, 1.0, 1.0])
    width = batch["images"].shape[-2]
    order = -jnp.arange(batch["viewmats"].shape[1]) % batch["viewmats"].shape[1]
    out = dict(batch)
    for name, x in batch.items():
        kind = name.removeprefix("extra_")
        if kind == "viewmats":
            flipped: Any = sign[:, None] * x * sign
        elif kind == "Ks":
            flipped = jnp.asarray(x).at[..., 0, 2].set(width - x[..., 0, 2])
        elif kind in ("images", "masks", "flow", "depth"):
            flipped = x[..., ::-1, :]
            if kind == "flow":
                flipped = flipped * sign[:2]
        else:
            continue
        if kind == name:  # of the rig
            flipped = jnp.take(flipped, order, axis=1 if kind in ("viewmats", "Ks") else 2)
        out[name] = jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), flipped, x)
    return out
