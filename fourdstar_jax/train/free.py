"""STAR left to itself: what it makes of a few unseen clips in training, beside the truth.

The truth in pictures is what the 4D VQ-VAE makes of the true tokens: the best that STAR can give.
Likelihoods of given tokens (`train.star.eval_step`) tell neither whether samples stay what they are
from one timestep to the next nor what they look like.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from fourdstar_jax.kernels.rasterize import pick_capacity
from fourdstar_jax.perceptual.lpips import LPIPS
from fourdstar_jax.sharding import constrain
from fourdstar_jax.star import sample
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.star.propagation import propagation
from fourdstar_jax.types import Array, Cameras
from fourdstar_jax.vqvae import losses

# What is sampled of each clip: twice with its video, twice with its first frame at every timestep.
SAMPLES = ("real", "other", "frozen", "other_frozen")


class Decoder(NamedTuple):
    """What turns tokens into pictures, on the device, and what compares these."""

    tokenizer: Any
    vqvae: Any
    lpips: LPIPS | None


def condition_of(batch: Mapping[str, Any]) -> Condition:
    """The condition that a batch of tokens comes with: its own caption and input view."""
    return Condition(
        text_ids=batch["text_ids"],
        video_tokens=batch["tokens"][:, :, 0],
        times=batch["times"],
        cameras=Cameras(batch["viewmats"], batch["Ks"]),
        text_features=batch.get("text_features"),
    )


def sampled(
    model: STAR, condition: Condition, key: jax.Array, mesh: Mesh | None, **settings: Any
) -> dict[str, Int[np.ndarray, "B T A K"]]:
    """The `SAMPLES` of each clip, all views of them; one batch, one compiled program a timestep."""
    first = condition.video_tokens[:, :1]
    frozen = condition._replace(video_tokens=jnp.broadcast_to(first, condition.video_tokens.shape))
    parts = [condition, condition, frozen, frozen]
    together = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    tokens = sample.generate(model, together, key, **settings)
    if mesh is not None:  # whole on every process
        tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec()))
    return dict(zip(SAMPLES, np.split(np.asarray(tokens), len(SAMPLES)), strict=True))


def accuracies(
    tokens: Int[np.ndarray, "B T V n K"],
    truth: Int[np.ndarray, "B T V n K"],
    blank_code: int | None = None,
) -> dict[str, float]:
    """Shares of the novel views' codes that are the truth's, and how much above copying.

    Copying says at t >= 2 what the truth says at that place a timestep before, and first what the
    video's view says at it. `over_copy_t1` and so on are by timestep, `over_copy_view1` by view, 1
    being the first of the novel ones. Tokens that are blank in the truth are left out.
    """
    copied = np.concatenate([np.repeat(truth[:, :1, :1], truth.shape[2], 2), truth[:, :-1]], axis=1)
    truth, tokens, copied = (x[:, :, 1:] for x in (truth, tokens, copied))
    counts = np.ones(truth.shape[:-1], bool)
    if blank_code is not None:
        counts = np.any(truth != blank_code, axis=-1)
    right, copying = (np.mean(x == truth, axis=-1) for x in (tokens, copied))

    def share(x: np.ndarray, where: Any = slice(None)) -> float:
        inside = counts[where]
        return float(np.sum(x[where] * inside) / max(np.sum(inside), 1))

    found = {"accuracy": share(right), "copy_accuracy": share(copying)}
    for t in range(truth.shape[1]):
        found[f"over_copy_t{t + 1}"] = share(right - copying, np.s_[:, t])
    for view in range(truth.shape[2]):
        found[f"over_copy_view{view + 1}"] = share(right - copying, np.s_[:, :, view])
    return found


def shares_of_the_past(
    found: Mapping[str, Int[np.ndarray, "B T V n K"]],
    truth: Int[np.ndarray, "B T V n K"],
    blank_code: int | None = None,
) -> dict[str, float]:
    """`propagation`'s share with the clips' videos and with frozen ones; none of one timestep."""
    if truth.shape[1] < 2:
        return {}

    def novel(x):
        return x[:, :, 1:].reshape(*x.shape[:2], -1, x.shape[-1])

    out = {}
    still = np.broadcast_to(truth[:, :1], truth.shape)
    for suffix, true in (("", truth), ("_frozen", still)):
        one, other = ("real", "other") if not suffix else ("frozen", "other_frozen")
        samples = novel(found[one]), novel(found[other])
        share = propagation(*samples, novel(true), blank_code=blank_code).share
        if np.isfinite(share):
            out[f"propagation{suffix}"] = share
    return out


@functools.partial(jax.jit, static_argnames=("capacity",))
def render_tokens(
    decoder: Decoder,
    tokens: Int[Array, "B T V n K"],
    cameras: Cameras,
    times: Float[Array, "B T"],
    *,
    capacity: int | None = None,
) -> losses.Rendered:
    """Pictures of tokens from the rig's own cameras, on white."""
    gaussians = decoder.vqvae(decoder.tokenizer.codes(tokens), cameras, times).gaussians
    size = decoder.vqvae.resolution
    rendered = losses.render(gaussians, cameras, width=size, height=size, capacity=capacity)
    # whole on every process
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), rendered)


@jax.jit
def compared(
    lpips: LPIPS | None,
    truth: Float[Array, "T V h w 3"],
    masks: Float[Array, "T V h w 1"],
    samples: Float[Array, "T V h w 3"],
    frozen: Float[Array, "T V h w 3"],
) -> dict[str, Array]:
    """Figures of one clip's novel views.

    changes: LPIPS(t, t+1), of the truth, the sample and that of the frozen video, which has none.
    """
    out = {"psnr_in_mask": losses.psnr_in_mask(samples, truth, masks)}
    if lpips is None:
        return out

    def by_view(x, y):  # a view at a time: the network's activations are large
        pairs = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(y, 1, 0))
        return jnp.mean(jax.lax.map(lambda pair: lpips(*pair), pairs))

    out["lpips"] = by_view(samples, truth)
    if truth.shape[0] > 1:
        names = ("true_change", "change", "frozen_change")
        for name, x in zip(names, (truth, samples, frozen), strict=True):
            out[name] = by_view(x[:-1], x[1:])
    return out


def pictures_of(
    decoder: Decoder,
    found: Mapping[str, Int[np.ndarray, "B T V n K"]],
    cameras: Cameras,
    times: Float[np.ndarray, "B T"],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Means over the clips of `compared`, and the pictures of `found` by its names.

    `flicker` is the sample's LPIPS(t, t+1) as a share of the truth's.
    """
    shown: dict[str, list[np.ndarray]] = {name: [] for name in ("truth", "real", "frozen")}
    rows, capacity = [], None
    for i in range(len(times)):
        where = jax.tree.map(lambda x, i=i: x[i : i + 1], (cameras, times))
        alphas = {}
        for name, pictures in shown.items():
            rendered = render_tokens(decoder, found[name][i : i + 1], *where, capacity=capacity)
            if rendered.overflow:
                capacity = pick_capacity(int(rendered.num_intersections), capacity)
                rendered = render_tokens(decoder, found[name][i : i + 1], *where, capacity=capacity)
            pictures.append(np.asarray(rendered.renders[0]))
            alphas[name] = np.asarray(rendered.alphas[0])
        truth, real, frozen = (pictures[i][:, 1:] for pictures in shown.values())
        masks = (alphas["truth"] > 0.5).astype(np.float32)[:, 1:]
        rows.append(jax.device_get(compared(decoder.lpips, truth, masks, real, frozen)))
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    if "true_change" in means:
        means["flicker"] = means.pop("change") / max(means.pop("true_change"), 1e-6)
    return means, {name: np.stack(pictures) for name, pictures in shown.items()}


class Sampler(NamedTuple):
    """Fixed clips, and how they are sampled."""

    batch: Mapping[str, np.ndarray]  # whole on every process
    condition: Condition  # theirs, on the device
    key: jax.Array
    mesh: Mesh | None
    decoder: Decoder | None
    blank_code: int | None
    settings: Mapping[str, Any]  # of `sample.generate`

    def __call__(self, model: STAR) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Figures of the clips' samples, and pictures by name where there is a decoder."""
        return self.measure(self.sample(model))

    def sample(self, model: STAR) -> dict[str, Int[np.ndarray, "B T V n K"]]:
        """Tokens of all views, by name of `SAMPLES`, and the `truth`."""
        truth = self.batch["tokens"]
        found = sampled(model, self.condition, self.key, self.mesh, **self.settings)
        return {name: x.reshape(truth.shape) for name, x in found.items()} | {"truth": truth}

    def measure(
        self, found: Mapping[str, Int[np.ndarray, "B T V n K"]]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Figures and pictures of what `sample` gave."""
        truth = found["truth"]
        figures = accuracies(found["real"], truth, self.blank_code)
        figures |= shares_of_the_past(found, truth, self.blank_code)
        if self.decoder is None:
            return figures, {}
        cameras = Cameras(self.batch["viewmats"], self.batch["Ks"])
        more, pictures = pictures_of(self.decoder, found, cameras, self.batch["times"])
        return figures | more, pictures
