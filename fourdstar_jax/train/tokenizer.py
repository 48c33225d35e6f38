"""Stage 1: trains a tokenizer, local or of the UniTok family, on single views of the dataset."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fourdstar_jax import bundle, sharding, tokenizer
from fourdstar_jax.data import pipeline
from fourdstar_jax.tokenizer.losses import tokenizer_loss
from fourdstar_jax.tokenizer.measures import steadiness, steadiness_counts
from fourdstar_jax.train import optim
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.checkpoint import Checkpoints
from fourdstar_jax.train.metrics import Mean, MetricWriter


def all_views(batch: dict, name: str) -> jax.Array:
    """`images` or `masks` of a batch with those of the extra views, [B, T, V + E, h, w, c]."""
    return jnp.concatenate([batch[name], batch[f"extra_{name}"]], axis=2)


def pictures(batch: dict) -> dict:
    """All views of a batch, extra ones too, as single images in [0, 1] with their masks."""
    both = {name: all_views(batch, name) for name in ("images", "masks")}
    return {name: x.reshape(-1, *x.shape[-3:]) for name, x in both.items()}


def train_step(graphdef, state, batch, *, tx, loss_config):
    """One optimizer step; keeps the usage statistics of the codes. Pure."""
    batch = pictures(batch)

    def loss_fn(params):
        model = nnx.merge(graphdef, params, state.rest)
        output = model(batch["images"])
        loss, metrics = tokenizer_loss(output, batch["images"], batch["masks"], **loss_config)
        return loss, (metrics, output.stats)

    grads, (metrics, stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    state = train_state.apply_gradients(state, grads, tx)
    model = nnx.merge(graphdef, state.params, state.rest).with_stats(stats)
    return state._replace(rest=nnx.split(model, nnx.Param, ...)[2]), metrics


def repair_step(graphdef, state, batch, key, *, max_idle_steps):
    """Re-seeds codes that nothing has chosen for a while from this batch. Pure."""
    model = nnx.merge(graphdef, state.params, state.rest)
    model, count = model.repair(pictures(batch)["images"], key, max_idle_steps=max_idle_steps)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return state._replace(params=params, rest=rest), count


def eval_step(graphdef, state, batch, *, loss_config):
    """Metrics of a batch, and counts of its patches for `measures.steadiness`."""
    views, batch = all_views(batch, "images"), pictures(batch)
    output = nnx.merge(graphdef, state.params, state.rest)(batch["images"])
    _, metrics = tokenizer_loss(output, batch["images"], batch["masks"], **loss_config)
    tokens = output.tokens.reshape(*views.shape[:3], *output.tokens.shape[1:])
    return metrics, steadiness_counts(tokens, views)


def train(config: Any, workdir: str | os.PathLike[str]) -> None:
    """Trains by `config`, a ConfigDict (see configs/tokenizer.py) and leaves `<workdir>/bundle`.

    Restarts from the newest checkpoint in `workdir`, with the batches it would have seen.
    Raises FloatingPointError when the loss is not finite, and NotImplementedError for a tokenizer
    that cannot be trained here.
    """
    arguments = bundle.module_arguments("tokenizer", config.model.to_dict())
    family = arguments.get("family", "unitok")  # as in `tokenizer.make`
    if not hasattr(tokenizer.class_of(family), "repair"):
        raise NotImplementedError(
            f"there is no training of a tokenizer of the family {family!r}: its released weights "
            "are converted into a bundle, and the later stages train on that"
        )
    key = jax.random.key(config.seed)
    with sharding.use_mesh(config.mesh.to_dict(), rules=config.rules.to_dict()) as mesh:
        loader = functools.partial(
            pipeline.make_loader, config.data.dir, timesteps=config.data.timesteps
        )
        batches = iter(loader(split="train", batch_size=config.batch_size, seed=config.seed))
        held_out = ()  # a dataset of one's own objects has no unseen clips
        if "unseen_clip" in pipeline.read_manifest(config.data.dir)["splits"]:
            held_out = loader(split="unseen_clip", batch_size=config.batch_size)

        schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
        tx = optim.make_optimizer(schedule, **config.optim)
        graphdef, state = train_state.create(tokenizer.make, arguments, tx, key, mesh)
        checkpoints = Checkpoints(workdir, every=config.checkpoint_every)
        state, batches = checkpoints.restore(state, batches)

        loss_config = config.loss.to_dict()
        step_fn = jax.jit(
            functools.partial(train_step, graphdef, tx=tx, loss_config=loss_config),
            donate_argnums=0,
        )
        repair_fn = jax.jit(
            functools.partial(repair_step, graphdef), static_argnames="max_idle_steps"
        )
        eval_fn = jax.jit(functools.partial(eval_step, graphdef, loss_config=loss_config))
        first = int(state.step)
        writer = MetricWriter(workdir, total_steps=config.steps, first_step=first)
        mean = Mean()
        for step in range(first, config.steps):
            batch = train_state.to_device(next(batches), mesh)
            repair_key = jax.random.fold_in(key, step)
            if step == 0:  # the codebooks start from data
                state, _ = repair_fn(state, batch, repair_key, max_idle_steps=0)
            elif step % config.repair_every == 0 and step < config.repair_until * config.steps:
                state, count = repair_fn(
                    state, batch, repair_key, max_idle_steps=config.repair_every
                )
                writer.write(step, {"repaired_codes": count}, prefix="codes")
            state, metrics = step_fn(state, batch)
            mean.add(metrics)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                writer.write(done, {**mean.result(), "learning_rate": schedule(step)})
                mean = Mean()
            if held_out and (done % config.eval_every == 0 or done == config.steps):
                held, counts, average = Mean(), Mean(), train_state.averaged(state)
                for batch in held_out:
                    metrics, counted = eval_fn(average, train_state.to_device(batch, mesh))
                    held.add(metrics)
                    counts.add(counted)
                writer.write(done, held.result() | steadiness(counts.result()), prefix="eval")
                writer.restart_clock()
            checkpoints.save(done, state, batches, force=done == config.steps)
        checkpoints.close()
        writer.close()
        model = nnx.merge(graphdef, train_state.averaged(state).params, state.rest)
    if jax.process_index() == 0:
        bundle.save_stage(
            f"{workdir}/bundle",
            "tokenizer",
            model,
            config,
            storage=config.storage,
            **pipeline.provenance(config.data.dir),
        )
