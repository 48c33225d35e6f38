"""Stage 2: trains the 4D VQ-VAE's decoder on the codes of a frozen tokenizer."""

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fourdstar_jax import bundle, sharding
from fourdstar_jax.data import pipeline
from fourdstar_jax.data.resident import Frames
from fourdstar_jax.kernels.rasterize import pick_capacity
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.perceptual.ssim import ssim
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.tokenizer.measures import code_counts, code_use
from fourdstar_jax.train import adversarial, inputs, optim, pictures, work
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.checkpoint import Checkpoints
from fourdstar_jax.train.ending import Ending
from fourdstar_jax.train.metrics import Mean, MetricWriter, Watch
from fourdstar_jax.train.workdir import kept
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae import losses, measures, warm_start
from fourdstar_jax.vqvae.decoder import NUM_CHANNELS, activate
from fourdstar_jax.vqvae.losses import (
    Supervision,
    choose_supervision,
    psnr_in_mask,
    reconstruction_loss,
    temporal_error,
)
from fourdstar_jax.vqvae.model import VQVAE4D, Decoded

# Fewer pairs than these are left to the room that `rasterize` makes by itself.
FEW_PAIRS = 2**18
SPARE = 1.5  # room for so many times the pairs that were counted: to compile a step costs minutes


class Seen(NamedTuple):
    """What a loss was made of."""

    tokens: Int[Array, "B T V n K"]
    decoded: Decoded
    supervision: Supervision
    renders: dict[str, Float[Array, "B S Q h w 3"]]  # "" corrected, "coarse_" where there are any


class Frozen(NamedTuple):
    """What a step needs besides the model, and does not change."""

    tokenizer: Any
    lpips: perceptual.LPIPS | None = None
    near: Int[Array, "K vocab near"] | None = None  # the codes that each may be taken for
    frames: Frames | None = None  # that batches are gathered from


def maps_of(loss_config: Mapping[str, Any]) -> list[str]:
    """What of `pipeline.MAPS` the losses need."""
    needs = {
        "flow": (loss_config["flow_weight"], loss_config["warp_weight"]),
        "depth": (*loss_config["own_depth_weight"][:2], *loss_config["own_opacity_weight"][:2]),
    }
    return [name for name in pipeline.MAPS if any(needs[name])]


def loss_of(
    model,
    frozen: Frozen,
    batch,
    key,
    progress,
    *,
    render_config,
    loss_config,
    code_noise: float = 0.0,
    capacity=None,
):
    """Loss of a batch and its parts: tokens of everything in, a few pictures compared.

    The third value is a `Seen`.
    A share `code_noise` of the codes is wrong, at each timestep anew, as STAR's will be; those of
    view 0 are known and stay.
    """
    noise_key, draw_key = jax.random.split(key)
    tokens = frozen.tokenizer.encode(batch["images"])  # [B, T, V, n, K]
    if code_noise:
        assert frozen.near is not None
        noisy = quantize.corrupt(noise_key, tokens[:, :, 1:], frozen.near, code_noise)
        tokens = jnp.concatenate([tokens[:, :, :1], noisy], axis=2)
    codes = frozen.tokenizer.codes(tokens)  # [B, T, V, n, D]
    decoded = model(codes, Cameras(batch["viewmats"], batch["Ks"]), batch["times"])
    supervision = choose_supervision(draw_key, batch, **render_config)
    if capacity is not None:
        loss_config = {**loss_config, "capacity": capacity}
    loss, metrics = reconstruction_loss(
        decoded, supervision, progress=progress, lpips=frozen.lpips, **loss_config
    )
    renders: Any = metrics.pop("renders")
    return loss, metrics, Seen(tokens, decoded, supervision, renders)


def train_step(
    graphdef,
    state,
    frozen,
    batch,
    key,
    *,
    tx,
    steps,
    augment=None,
    adversary: adversarial.Adversary | None = None,
    accumulate: int = 1,
    **configs,
):
    """One optimizer step of `steps`. Pure; the randomness of step s is `key` folded with s.

    Its gradient is that of the batch, or the mean of those of `accumulate` parts of it.

    Then comes the turn of the discriminator, if there is one, on the same pictures. Where the
    Gaussians overflow the rasterizer's capacity nothing is learnt from the step.
    """

    def gradients(batch, key):
        augment_key, loss_key = jax.random.split(key)
        batch = inputs.prepare(batch, frozen.frames, augment_key, augment)

        def loss_fn(params):
            model = nnx.merge(graphdef, params, state.rest)
            progress = state.step / steps
            loss, metrics, seen = loss_of(model, frozen, batch, loss_key, progress, **configs)
            real, fake = seen.supervision.images, seen.renders[""]
            if adversary is not None:
                hinge = adversary.hinge(state.judge, state.step, fake)
                loss = loss + adversary.weight * hinge
                metrics |= {"adversarial": hinge, "loss": loss}
            return loss, (metrics, real, fake)

        return jax.grad(loss_fn, has_aux=True)(state.params)

    step_key = jax.random.fold_in(key, state.step)
    grads, (metrics, *judged) = train_state.gradients_in_parts(
        gradients, accumulate, batch, step_key
    )
    real, fake = (x.reshape(-1, *x.shape[2:]) for x in judged)
    overflow, pairs = jnp.any(metrics.pop("overflow")), jnp.max(metrics.pop("pairs"))
    metrics = jax.tree.map(jnp.mean, metrics) | {"pairs": pairs}
    grads = jax.tree.map(lambda g: jnp.where(overflow, 0.0, g), grads)
    if adversary is not None:
        judge, parts = adversary.learn(state.judge, state.step, real, fake, skip=overflow)
        state, metrics = state._replace(judge=judge), metrics | parts
    metrics |= {"grad_norm": train_state.norm(grads), "overflow": overflow.astype(jnp.float32)}
    return train_state.apply_gradients(state, grads, tx), metrics


def eval_step(graphdef, state, frozen, batch, key, *, steps, **configs):
    """Metrics of a batch, the same pictures each time for the same key; and counts of the codes."""
    model = nnx.merge(graphdef, state.params, state.rest)
    batch = inputs.prepare(batch)
    _, metrics, seen = loss_of(model, frozen, batch, key, state.step / steps, **configs)
    images, masks = (jnp.asarray(x) for x in (seen.supervision.images, seen.supervision.masks))
    for prefix, renders in seen.renders.items():
        metrics[f"{prefix}psnr_in_mask"] = psnr_in_mask(renders, images, masks)
        metrics[f"{prefix}ssim"] = jnp.mean(ssim(renders, images))
        if frozen.lpips is not None:
            metrics[f"{prefix}lpips"] = jnp.mean(frozen.lpips(renders, images))
        if renders.shape[1] > 1:
            error = temporal_error(renders, images, masks)
            metrics[f"{prefix}temporal_error"] = jnp.mean(error)
    if seen.supervision.own is not None:
        metrics |= measures.gaussian_statistics(
            seen.decoded.gaussians, seen.supervision.own, resolution=model.resolution
        )
    vocab_size = frozen.tokenizer.codebooks().shape[1]
    return jax.tree.map(jnp.float32, metrics), code_counts(seen.tokens, vocab_size)


def start_warm(
    graphdef: nnx.GraphDef,
    state: train_state.TrainState,
    folder: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    source: str | os.PathLike[str],
) -> train_state.TrainState:
    """A new state with the weights of bundle `folder`: of its 4D VQ-VAE, if it has one.

    That may have been trained without offsets, on the tokenizer of bundle `source`. Else with the
    decoder of its tokenizer (see `vqvae.warm_start`).
    """
    found = bundle.read(folder)
    if "vqvae" in found.stages:
        return train_state.start_from_stage(
            graphdef, state, found, "vqvae", workdir, source=source, may_lack=("offsets/",)
        )
    arrays, stage = found.arrays("tokenizer"), found.stage("tokenizer")

    def load(model):
        try:
            model, report = warm_start.load(model, arrays, stage.model)
        except ValueError as error:
            raise ValueError(f"config.warm_start: bundle {folder}: {error}") from error
        return model, [*report.lines(), f"  from {folder}, sha256 {stage.sha256}"]

    return train_state.start_warm(graphdef, state, load, workdir)


def first_capacity(config: Any, batch: Mapping[str, Any], devices: int = 1) -> int | None:
    """Room for the pairs of the first steps; None for few, which `rasterize` makes room for.

    Counted without the decoder and its compilation: before training its Gaussians lie about on a
    plane, each as large as its pixel (`decoder.activate` of zeros), and in training pairs become
    fewer. `batch` is one on the host, of whose rig's views they are counted: all processes find the
    same; `devices` share it.
    """
    sizes, render = config.model, config.render
    views, size = batch["Ks"].shape[1], sizes.resolution
    map_size = sizes.grid * 2 ** len(sizes.up_channels)
    objects = config.batch_size // (devices * config.accumulate)
    extra = batch["extra_Ks"].shape[1] if "extra_Ks" in batch else 0
    chosen = min(render.rig_views, views) + min(render.extra_views, extra)
    pictures = objects * min(render.num_timesteps, batch["times"].shape[1]) * chosen
    if 4 * pictures * views * map_size**2 < FEW_PAIRS:  # each of them is in 4 tiles at most
        return None
    rig = Cameras(batch["viewmats"][:1], batch["Ks"][:1])

    def count():
        raw = jnp.zeros((1, 1, views, map_size, map_size, NUM_CHANNELS))
        limits = sizes.get("scale_limits")
        gaussians = activate(raw, rig, resolution=size, scale_limits=limits)
        return losses.render(gaussians, rig, width=size, height=size).num_intersections

    pairs = int(jax.jit(count)()) * pictures / views
    return None if pairs < FEW_PAIRS else pick_capacity(int(SPARE * pairs))


def next_capacity(pairs, overflow, capacity: int | None) -> int | None:
    """The capacity for the next steps, given the count of a step and what it was made with."""
    if not overflow and (capacity is None or pairs <= capacity):
        return capacity
    return pick_capacity(int(SPARE * pairs))


@kept
def train(config: Any, workdir: str | os.PathLike[str]) -> None:
    """Trains by `config`, a ConfigDict (see configs/vqvae.py) and leaves `<workdir>/bundle`.

    The tokenizer comes from `config.bundle` and goes into the new bundle. Restarts from the newest
    checkpoint in `workdir`, with the batches it would have seen. A run that starts at step 0 begins
    with the 4D VQ-VAE in bundle `config.warm_start`, or its tokenizer's decoder, if given. Without
    `config.loss.capacity` the rasterizer's capacity follows the counts of the steps before; a step
    that overflows it learns nothing. Raises FloatingPointError when the loss is not finite, and
    RuntimeError when Gaussians overflow `config.loss.capacity`.
    """
    inputs.check_buckets(config.data.buckets, config.data.timesteps)
    key = jax.random.key(config.seed)
    tokenizer = bundle.read(config.bundle).load("tokenizer")
    with sharding.use_mesh(config.mesh.to_dict(), rules=config.rules.to_dict()) as mesh:
        train_state.check_parts(config.accumulate, config.batch_size, mesh)
        lpips = None
        if config.loss.lpips_weight > 0:
            lpips = perceptual.load(config.lpips, dtype=jnp.dtype(config.model.dtype))
        near = None
        if config.forcing.code_noise > 0:
            near = quantize.near_codes(
                tokenizer.codebooks(), config.forcing.near, has_blank=tokenizer.has_blank
            )
        loss_config = config.loss.to_dict()
        batches, held_out, frames = inputs.open_data(config, mesh, maps=maps_of(loss_config))
        frozen = train_state.replicate(Frozen(tokenizer, lpips, near, frames), mesh)
        schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
        tx = optim.make_optimizer(schedule, **config.optim)
        arguments = bundle.module_arguments("vqvae", config.model.to_dict())
        graphdef, state = train_state.create(VQVAE4D, arguments, tx, key, mesh)
        adversary, judge = adversarial.create(
            config.model.resolution,
            **config.adversarial,
            dtype=jnp.dtype(config.model.dtype),
            steps=config.steps,
            key=jax.random.split(key)[1],
            mesh=mesh,
        )
        state = state._replace(judge=judge)
        checkpoints = Checkpoints(workdir, every=config.checkpoint_every)
        if config.warm_start and checkpoints.latest_step() is None:
            state = start_warm(graphdef, state, config.warm_start, workdir, config.bundle)
        state, batches = checkpoints.restore(state, batches)
        checkpoints.reserve(state)

        configs: dict[str, Any] = dict(
            render_config=config.render.to_dict(),
            loss_config=loss_config,
            steps=config.steps,
        )
        step_fn = jax.jit(
            functools.partial(
                train_step,
                graphdef,
                tx=tx,
                adversary=adversary,
                augment=config.augment.to_dict(),
                accumulate=config.accumulate,
                code_noise=config.forcing.code_noise,
                **configs,
            ),
            donate_argnums=0,
            static_argnames="capacity",
        )
        eval_fn = jax.jit(
            functools.partial(eval_step, graphdef, **configs), static_argnames="capacity"
        )
        picture_fn = jax.jit(
            functools.partial(pictures.render_step, graphdef), static_argnames="capacity"
        )
        first = int(state.step)
        writer = MetricWriter(
            workdir, total_steps=config.steps, first_step=first, config=config,
            work=work.objects,
        )  # fmt: skip
        watch = Watch(config.nonfinite_steps)
        # By the timesteps of a batch, which decide how many pictures are rendered.
        capacities: dict[int, int | None] = {}
        timesteps = config.data.timesteps
        ending = Ending(mesh, times=config.watchdog)
        for step in range(first, config.steps):
            ending.begin()
            before = timesteps
            timesteps = inputs.timesteps_of(
                step, config.seed, config.data.buckets, config.data.timesteps
            )
            with writer.waiting():
                read = inputs.cut(next(batches), timesteps)
            done = step + 1
            if config.loss.capacity is None and timesteps not in capacities:
                capacities[timesteps] = first_capacity(config, read, train_state.sharers(mesh))
            batch = train_state.to_device(read, mesh)
            writer.count(batch)
            capacity = capacities.get(timesteps)
            state, metrics = step_fn(state, frozen, batch, key, capacity=capacity)
            seen = watch.add(done, read["clip"], metrics)
            if config.loss.capacity is None and seen is not None:
                capacities[before] = next_capacity(
                    seen["pairs"], seen["overflow"], capacities.get(before)
                )
            if done % config.log_every == 0 or done == config.steps:
                values = writer.write(done, {**watch.mean(), "learning_rate": schedule(step)})
                if values["overflow"] and config.loss.capacity is not None:
                    raise RuntimeError(
                        f"the Gaussians overflow the rasterizer: raise {config.loss.capacity=}"
                    )
            if number := ending.asked():
                watch.check()
                checkpoints.save_and_stop(number, done, state, batches)
            capacity = capacities.get(config.data.timesteps)
            if done % config.picture_every == 0 and jax.process_count() == 1:
                drawn = next(iter(held_out), read)
                drawn = picture_fn(
                    train_state.averaged(state),
                    frozen,
                    train_state.to_device(drawn, mesh),
                    capacity=capacity,
                )
                path = Path(workdir) / f"pictures/step_{done:08d}.png"
                pictures.save(path, pictures.sheet(drawn))
                writer.restart_clock()
            if held_out and (done % config.eval_every == 0 or done == config.steps):
                held, codes, average = Mean(), jnp.zeros(()), train_state.averaged(state)
                for batch in held_out:
                    batch = train_state.to_device(batch, mesh)
                    values, counts = eval_fn(average, frozen, batch, key, capacity=capacity)
                    if values["overflow"]:
                        room = pick_capacity(int(values["pairs"]))
                        values, counts = eval_fn(average, frozen, batch, key, capacity=room)
                    held.add(values)
                    codes = codes + counts
                use = code_use(codes, has_blank=tokenizer.has_blank)
                writer.write(done, held.result() | use, prefix="eval")
                writer.restart_clock()
            if done % config.checkpoint_every == 0 or done == config.steps:
                watch.check()
                checkpoints.save(done, state, batches, force=done == config.steps)
        checkpoints.close()
        writer.close()
        model = nnx.merge(graphdef, train_state.averaged(state).params, state.rest)
    if jax.process_index() == 0:
        target = Path(workdir) / "bundle"
        bundle.copy(config.bundle, target, stages=("tokenizer",))
        bundle.save_stage(
            target,
            "vqvae",
            model,
            config,
            storage=config.storage,
            rig={**pipeline.rig(config.data.dir).to_dict(), "max_timesteps": config.data.timesteps},
            **pipeline.provenance(config.data.dir),
            **(train_state.warm_info(workdir) if config.warm_start else {}),
        )
        print(f"{target}: the last weights, of step {int(state.step)}", file=sys.stderr, flush=True)
