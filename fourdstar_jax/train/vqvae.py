"""Stage 2: trains the 4D VQ-VAE's decoder on the codes of a frozen tokenizer."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from fourdstar_jax import bundle, sharding
from fourdstar_jax.data import pipeline
from fourdstar_jax.kernels.rasterize import pick_capacity
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.train import optim
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.checkpoint import Checkpoints
from fourdstar_jax.train.metrics import Mean, MetricWriter
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae.losses import choose_supervision, reconstruction_loss
from fourdstar_jax.vqvae.model import VQVAE4D

# Fewer pairs than these are left to the room that `rasterize` makes by itself: to compile a step
# again costs more.
FEW_PAIRS = 2**18


class Frozen(NamedTuple):
    """What a step needs besides the model, and does not change."""

    tokenizer: Any
    lpips: perceptual.LPIPS | None = None
    near: Int[Array, "K vocab near"] | None = None  # the codes that each may be taken for


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
    """Loss and metrics of a batch: tokens of everything in, a few pictures compared.

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
    return reconstruction_loss(
        decoded, supervision, progress=progress, lpips=frozen.lpips, **loss_config
    )


def train_step(graphdef, state, frozen, batch, key, *, tx, steps, **configs):
    """One optimizer step of `steps`. Pure; the randomness of step s is `key` folded with s.

    Where the Gaussians overflow the rasterizer's capacity nothing is learnt from the step.
    """

    def loss_fn(params):
        model = nnx.merge(graphdef, params, state.rest)
        step_key = jax.random.fold_in(key, state.step)
        return loss_of(model, frozen, batch, step_key, state.step / steps, **configs)

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    overflow = metrics.pop("overflow")
    grads = jax.tree.map(lambda g: jnp.where(overflow, 0.0, g), grads)
    metrics["overflow"] = overflow.astype(jnp.float32)
    return train_state.apply_gradients(state, grads, tx), metrics


def eval_step(graphdef, state, frozen, batch, key, *, steps, **configs):
    """Metrics of a batch; the same pictures each time for the same key."""
    model = nnx.merge(graphdef, state.params, state.rest)
    _, metrics = loss_of(model, frozen, batch, key, state.step / steps, **configs)
    return jax.tree.map(jnp.float32, metrics)


def next_capacity(pairs, overflow, capacity: int | None) -> int | None:
    """The capacity for the next steps, given the count of a step and what it was made with."""
    if not overflow and pairs < FEW_PAIRS:
        return capacity
    return pick_capacity(int(pairs), capacity)


def train(config: Any, workdir: str | os.PathLike[str]) -> None:
    """Trains by `config`, a ConfigDict (see configs/vqvae.py) and leaves `<workdir>/bundle`.

    The tokenizer comes from `config.bundle` and goes into the new bundle. Restarts from the newest
    checkpoint in `workdir`, with the batches it would have seen. Without `config.loss.capacity` the
    rasterizer's capacity follows the counts of the steps before; a step that overflows it learns
    nothing. Raises FloatingPointError when the loss is not finite, and RuntimeError when Gaussians
    overflow `config.loss.capacity`.
    """
    key = jax.random.key(config.seed)
    tokenizer = bundle.read(config.bundle).load("tokenizer")
    with sharding.use_mesh(config.mesh.to_dict(), rules=config.rules.to_dict()) as mesh:
        lpips = None
        if config.loss.lpips_weight > 0:
            lpips = perceptual.load(config.lpips, dtype=jnp.dtype(config.model.dtype))
        near = None
        if config.forcing.code_noise > 0:
            near = quantize.near_codes(tokenizer.codebooks(), config.forcing.near)
        frozen = train_state.replicate(Frozen(tokenizer, lpips, near), mesh)
        loader = functools.partial(
            pipeline.make_loader, config.data.dir, timesteps=config.data.timesteps
        )
        batches = iter(loader(split="train", batch_size=config.batch_size, seed=config.seed))
        held_out = ()  # a dataset of one's own objects has no unseen clips
        if "unseen_clip" in pipeline.read_manifest(config.data.dir)["splits"]:
            held_out = loader(split="unseen_clip", batch_size=config.batch_size)

        schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
        tx = optim.make_optimizer(schedule, **config.optim)
        arguments = bundle.module_arguments("vqvae", config.model.to_dict())
        graphdef, state = train_state.create(VQVAE4D, arguments, tx, key, mesh)
        checkpoints = Checkpoints(workdir, every=config.checkpoint_every)
        state, batches = checkpoints.restore(state, batches)

        configs: dict[str, Any] = dict(
            render_config=config.render.to_dict(),
            loss_config=config.loss.to_dict(),
            steps=config.steps,
        )
        step_fn = jax.jit(
            functools.partial(
                train_step, graphdef, tx=tx, code_noise=config.forcing.code_noise, **configs
            ),
            donate_argnums=0,
            static_argnames="capacity",
        )
        eval_fn = jax.jit(
            functools.partial(eval_step, graphdef, **configs), static_argnames="capacity"
        )
        first = int(state.step)
        writer = MetricWriter(workdir, total_steps=config.steps, first_step=first)
        mean = Mean()
        capacity, before = None, None
        for step in range(first, config.steps):
            batch = train_state.to_device(next(batches), mesh)
            state, metrics = step_fn(state, frozen, batch, key, capacity=capacity)
            # The step before is done by now: to read its count keeps no device waiting.
            if config.loss.capacity is None and before is not None:
                pairs, overflow = jax.device_get(before)
                capacity = next_capacity(pairs, overflow, capacity)
            before = metrics["pairs"], metrics["overflow"]
            mean.add(metrics)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                values = writer.write(done, {**mean.result(), "learning_rate": schedule(step)})
                if values["overflow"] and config.loss.capacity is not None:
                    raise RuntimeError(
                        f"the Gaussians overflow the rasterizer: raise {config.loss.capacity=}"
                    )
                mean = Mean()
            if held_out and (done % config.eval_every == 0 or done == config.steps):
                held, average = Mean(), train_state.averaged(state)
                for batch in held_out:
                    batch = train_state.to_device(batch, mesh)
                    values = eval_fn(average, frozen, batch, key, capacity=capacity)
                    if values["overflow"]:
                        room = pick_capacity(int(values["pairs"]))
                        values = eval_fn(average, frozen, batch, key, capacity=room)
                    held.add(values)
                writer.write(done, held.result(), prefix="eval")
                writer.restart_clock()
            checkpoints.save(done, state, batches, force=done == config.steps)
        checkpoints.close()
        writer.close()
        model = nnx.merge(graphdef, train_state.averaged(state).params, state.rest)
    if jax.process_index() == 0:
        bundle.copy(config.bundle, f"{workdir}/bundle", stages=("tokenizer",))
        bundle.save_stage(
            f"{workdir}/bundle",
            "vqvae",
            model,
            config,
            storage=config.storage,
            rig={**pipeline.rig(config.data.dir).to_dict(), "max_timesteps": config.data.timesteps},
            **pipeline.provenance(config.data.dir),
        )
