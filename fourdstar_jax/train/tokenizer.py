"""Stage 1: trains a tokenizer, local or of the UniTok family, on single views of the dataset."""

import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fourdstar_jax import bundle, sharding, tokenizer
from fourdstar_jax.data import pipeline
from fourdstar_jax.data.resident import Frames
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.perceptual.ssim import ssim
from fourdstar_jax.tokenizer.losses import tokenizer_loss
from fourdstar_jax.tokenizer.measures import code_counts, code_use, steadiness, steadiness_counts
from fourdstar_jax.train import adversarial, inputs, optim, reach, work
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.checkpoint import Checkpoints
from fourdstar_jax.train.ending import Ending
from fourdstar_jax.train.metrics import Mean, MetricWriter, Watch
from fourdstar_jax.train.workdir import kept
from fourdstar_jax.vqvae.losses import all_views


class Frozen(NamedTuple):
    """What a step needs besides the model, and does not change."""

    lpips: perceptual.LPIPS | None = None
    frames: Frames | None = None  # that batches are gathered from


def pictures(batch: dict) -> dict:
    """All views of a batch, extra ones too, as single images in [0, 1] with their masks."""
    both = {name: all_views(batch, name) for name in ("images", "masks")}
    return {name: x.reshape(-1, *x.shape[-3:]) for name, x in both.items()}


def train_step(
    graphdef,
    state,
    frozen,
    batch,
    key,
    *,
    tx,
    loss_config,
    augment=None,
    adversary: adversarial.Adversary | None = None,
):
    """One optimizer step; keeps the usage statistics of the codes. Pure.

    The randomness of step s is `key` folded with s. Last comes the turn of the discriminator, if
    there is one, on the same pictures.
    """
    step_key = jax.random.fold_in(key, state.step)
    batch = pictures(inputs.prepare(batch, frozen.frames, step_key, augment))
    images = batch["images"]

    def loss_fn(params):
        model = nnx.merge(graphdef, params, state.rest)
        output = model(images)
        loss, metrics = tokenizer_loss(
            output, images, batch["masks"], lpips=frozen.lpips, **loss_config
        )
        if adversary is not None:
            hinge = adversary.hinge(state.judge, state.step, output.images)
            loss = loss + adversary.weight * hinge
            metrics |= {"adversarial": hinge, "loss": loss}
        return loss, (metrics, output)

    grads, (metrics, output) = jax.grad(loss_fn, has_aux=True)(state.params)
    if adversary is not None:
        judge, parts = adversary.learn(state.judge, state.step, images, output.images)
        state, metrics = state._replace(judge=judge), metrics | parts
    metrics["grad_norm"] = train_state.norm(grads)
    state = train_state.apply_gradients(state, grads, tx)
    model = nnx.merge(graphdef, state.params, state.rest).with_stats(output.stats)
    return state._replace(rest=nnx.split(model, nnx.Param, ...)[2]), metrics


def repair_step(graphdef, state, frozen, batch, key, *, max_idle_steps):
    """Re-seeds codes that nothing has chosen for a while from this batch. Pure."""
    model = nnx.merge(graphdef, state.params, state.rest)
    images = pictures(inputs.prepare(batch, frozen.frames))["images"]
    model, count = model.repair(images, key, max_idle_steps=max_idle_steps)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return state._replace(params=params, rest=rest), count


def eval_step(graphdef, state, frozen, batch, *, loss_config):
    """Metrics of a batch, and counts of its patches and codes for `tokenizer.measures`."""
    batch = inputs.prepare(batch)
    views, batch = all_views(batch, "images"), pictures(batch)
    output = nnx.merge(graphdef, state.params, state.rest)(batch["images"])
    _, metrics = tokenizer_loss(
        output, batch["images"], batch["masks"], lpips=frozen.lpips, **loss_config
    )
    decoded, images, masks = jnp.clip(output.images, 0, 1), batch["images"], batch["masks"]
    square = (decoded - images) ** 2
    for name, weight in (("psnr", jnp.ones_like(masks)), ("psnr_in_mask", masks)):
        mse = jnp.sum(weight * square) / 3 / jnp.maximum(jnp.sum(weight), 1.0)
        metrics[name] = -10 * jnp.log10(jnp.maximum(mse, 1e-10))
    metrics["ssim"] = jnp.mean(ssim(decoded, images))
    tokens = output.tokens.reshape(*views.shape[:3], *output.tokens.shape[1:])
    vocab_size = output.stats.usage.shape[1]
    return metrics, steadiness_counts(tokens, jnp.asarray(views)), code_counts(tokens, vocab_size)


@kept
def train(config: Any, workdir: str | os.PathLike[str]) -> None:
    """Trains by `config`, a ConfigDict (see configs/tokenizer.py) and leaves `<workdir>/bundle`.

    Restarts from the newest checkpoint in `workdir`, with the batches it would have seen. A run
    that starts at step 0 begins with the tokenizer in bundle `config.warm_start`, if given, and
    its codebooks, else with codebooks from the data.
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
    has_blank = tokenizer.class_of(family).has_blank
    key = jax.random.key(config.seed)
    with sharding.use_mesh(config.mesh.to_dict(), rules=config.rules.to_dict()) as mesh:
        dtype = jnp.dtype(config.model.get("dtype", "float32"))  # as in the constructors
        lpips = None
        if config.loss.lpips_weight > 0:
            lpips = perceptual.load(config.lpips, dtype=dtype)
        batches, held_out, frames = inputs.open_data(config, mesh)
        frozen = train_state.replicate(Frozen(lpips, frames), mesh)
        schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
        tx = optim.make_optimizer(schedule, **config.optim)
        graphdef, state = train_state.create(tokenizer.make, arguments, tx, key, mesh)
        adversary, judge = adversarial.create(
            config.model.resolution,
            **config.adversarial,
            dtype=dtype,
            steps=config.steps,
            key=jax.random.split(key)[1],
            mesh=mesh,
        )
        state = state._replace(judge=judge)
        checkpoints = Checkpoints(workdir, every=config.checkpoint_every)
        if config.warm_start is not None and checkpoints.latest_step() is None:
            found = bundle.read(config.warm_start)
            state = train_state.start_from_stage(graphdef, state, found, "tokenizer", workdir)
        state, batches = checkpoints.restore(state, batches)
        checkpoints.reserve(state)

        loss_config = config.loss.to_dict()
        step_fn = jax.jit(
            functools.partial(
                train_step,
                graphdef,
                tx=tx,
                adversary=adversary,
                augment=config.augment.to_dict(),
                loss_config=loss_config,
            ),
            donate_argnums=0,
        )
        repair_fn = jax.jit(
            functools.partial(repair_step, graphdef), static_argnames="max_idle_steps"
        )
        eval_fn = jax.jit(functools.partial(eval_step, graphdef, loss_config=loss_config))
        first = int(state.step)
        writer = MetricWriter(
            workdir, total_steps=config.steps, first_step=first, config=config,
            work=work.objects,
        )  # fmt: skip
        watch = Watch(config.nonfinite_steps)
        ending = Ending(mesh, times=config.watchdog)
        for step in range(first, config.steps):
            ending.begin()
            with writer.waiting():
                read = next(batches)
            done = step + 1
            batch = train_state.to_device(read, mesh)
            writer.count(batch)
            repair_key = jax.random.fold_in(key, step)
            if step == 0 and config.warm_start is None:  # the codebooks start from data
                state, _ = repair_fn(state, frozen, batch, repair_key, max_idle_steps=0)
            elif (
                step
                and step % config.repair_every == 0
                and step < config.repair_until * config.steps
            ):
                state, count = repair_fn(
                    state, frozen, batch, repair_key, max_idle_steps=config.repair_every
                )
                writer.write(step, {"repaired_codes": count}, prefix="codes")
            state, metrics = step_fn(state, frozen, batch, key)
            watch.add(done, read["clip"], metrics)
            if done % config.log_every == 0 or done == config.steps:
                writer.write(done, {**watch.mean(), "learning_rate": schedule(step)})
            if number := ending.asked():
                watch.check()
                checkpoints.save_and_stop(number, done, state, batches)
            if held_out and (done % config.eval_every == 0 or done == config.steps):
                held, counts, codes = Mean(), Mean(), jnp.zeros(())
                average = train_state.averaged(state)
                for batch in held_out:
                    batch = train_state.to_device(batch, mesh)
                    metrics, counted, used = eval_fn(average, frozen, batch)
                    held.add(metrics)
                    counts.add(counted)
                    codes = codes + used
                shares = steadiness(counts.result()) | code_use(codes, has_blank=has_blank)
                writer.write(done, held.result() | shares, prefix="eval")
                writer.restart_clock()
            if done % config.checkpoint_every == 0 or done == config.steps:
                watch.check()
                checkpoints.save(done, state, batches, force=done == config.steps)
        checkpoints.close()
        writer.close()
        model = nnx.merge(graphdef, train_state.averaged(state).params, state.rest)
    if jax.process_index() == 0:
        target = Path(workdir) / "bundle"
        bundle.save_stage(
            target,
            "tokenizer",
            model,
            config,
            storage=config.storage,
            **pipeline.provenance(config.data.dir),
            **(train_state.warm_info(workdir) if config.warm_start is not None else {}),
        )
        reach.measure(target, config.data.dir)
        print(f"{target}: the last weights, of step {int(state.step)}", file=sys.stderr, flush=True)
