"""Stage 3: trains STAR, on a folder of tokens or on pictures that each step tokenises."""

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fourdstar_jax import bundle, nn, remote, sharding
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.star import sample, warm_start
from fourdstar_jax.star.forcing import corrupt
from fourdstar_jax.star.model import STAR
from fourdstar_jax.text.words import WordTokenizer
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.train import free, inputs, optim, pictures, views, work
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.best import Best
from fourdstar_jax.train.checkpoint import Checkpoints
from fourdstar_jax.train.ending import Ending
from fourdstar_jax.train.free import condition_of
from fourdstar_jax.train.metrics import Mean, MetricWriter, Watch
from fourdstar_jax.train.workdir import kept

# Those that the best weights can be kept by, by their name in the log; whether more is better.
METRICS = {
    "eval/nll": False,
    "eval/nll_novel": False,
    "free/accuracy": True,
    "free/propagation": True,
    "free/psnr_in_mask": True,
    "free/lpips": False,
}


WORDS = "text/table"  # of STAR's arrays: a row a word


def all_views(batch: Mapping[str, Any]) -> jax.Array:
    """Tokens [B, T, V, n, K] of a batch as [B, T, V n, K], view after view."""
    views = batch["tokens"]
    return views.reshape(*views.shape[:2], -1, views.shape[-1])


def train_step(
    graphdef,
    state,
    batch,
    key,
    *,
    tx,
    forcing_config,
    loss_config,
    near=None,
    eyes=None,
    augment=None,
    accumulate: int = 1,
):
    """One optimizer step. Pure; the randomness of step s is `key` folded with s.

    Its gradient is that of the batch, or the mean of those of `accumulate` parts of it. `near`, of
    `quantize.near_codes`, is needed where `forcing_config` has noise; `eyes` where the batch has
    pictures, which are augmented by `augment` (`inputs.draw`).
    """

    def gradients(batch, key):
        batch = in_order(views.see(eyes, batch, jax.random.fold_in(key, 1), augment))

        def loss_fn(params):
            model = nn.cast_weights(nnx.merge(graphdef, params, state.rest))  # once a part
            tokens = all_views(batch)
            wrong_key, forcing_key = jax.random.split(key)
            wrong = None if near is None else quantize.corrupt(wrong_key, tokens, near, 1.0)
            forcing = corrupt(forcing_key, tokens, wrong=wrong, **forcing_config)
            return model.loss(tokens, condition_of(batch), forcing, **loss_config)

        return jax.grad(loss_fn, has_aux=True)(state.params)

    step_key = jax.random.fold_in(key, state.step)
    grads, metrics = train_state.gradients_in_parts(gradients, accumulate, batch, step_key)
    metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
    metrics |= {"grad_norm": train_state.norm(grads)}
    return train_state.apply_gradients(state, grads, tx), metrics


def eval_step(graphdef, state, batch, eyes=None):
    """Metrics of the tokens and conditions as they are."""
    model, batch = nnx.merge(graphdef, state.params, state.rest), views.see(eyes, batch)
    return model.loss(all_views(batch), condition_of(batch))[1]


def reordered(batch: dict, seed: int, step: int) -> dict:
    """A batch whose novel views are to come in another order, by seed and step: `in_order`."""
    count, num_views = batch["viewmats"].shape[:2]
    order = np.r_[0, 1 + np.random.default_rng((seed, step, 1)).permutation(num_views - 1)]
    return batch | {"order": np.tile(order.astype(np.int32), (count, 1))}


def in_order(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with its views in their `order` [B, V], where it has one; view 0 stays the first."""
    out = dict(batch)
    order = out.pop("order", None)
    if order is None:
        return out
    for name, axis in (("viewmats", 1), ("Ks", 1), ("tokens", 2)):
        x = jnp.asarray(out[name])
        at = order.reshape(len(order), *(1,) * (axis - 1), -1, *(1,) * (x.ndim - axis - 1))
        out[name] = jnp.take_along_axis(x, at, axis=axis)
    return out


def start_warm(
    graphdef: nnx.GraphDef,
    state: train_state.TrainState,
    folder: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    words: WordTokenizer,
    source: str | os.PathLike[str],
) -> train_state.TrainState:
    """A new state with the weights of bundle `folder`: of its STAR, if it has one.

    That must have been trained on the tokenizer of bundle `source`. The rows of words go with the
    words; new ones start anew. Else with what fits of its trunk (see `star.warm_start`).
    """
    found = bundle.read(folder)

    def by_word(arrays, ours):
        if WORDS not in arrays or WORDS not in ours:
            return None
        about = found.info("star").part("words")
        old = WordTokenizer.from_dict(about.values, f"{about.where}: {about.path}").rows()
        new = words.rows()
        table, rows = np.array(ours[WORDS]), arrays[WORDS]
        if table.shape[1:] != rows.shape[1:]:
            return None  # `start_from_stage` tells
        both = [word for word in new if word in old]
        table[[new[word] for word in both]] = rows[[old[word] for word in both]]
        arrays[WORDS] = table
        return f"words: {len(both)} of {len(new)} rows were known"

    if "star" in found.stages:
        return train_state.start_from_stage(
            graphdef, state, found, "star", workdir, source=source, change=by_word
        )
    arrays, trunk = found.arrays("trunk"), found.stage("trunk")

    def load(model):
        model, report = warm_start.load(model, arrays, trunk.model)
        return model, [*report.lines(), f"  from {folder}, sha256 {trunk.sha256}"]

    return train_state.start_warm(graphdef, state, load, workdir)


def open_sampler(config: Any, source: views.Source, mesh: Any) -> free.Sampler | None:
    """What samples unseen clips in training; None without any, and with `config.free.clips` 0.

    Pictures are drawn where `config.bundle` has a 4D VQ-VAE, and compared by LPIPS where its
    weights are at `config.lpips`.
    """
    settings = config.sampling.to_dict()
    sample.check_settings(**settings)
    if config.free.clips == 0 or "unseen_clip" not in source.splits:
        return None
    batch = source.first_windows("unseen_clip", config.free.clips)
    decoder, found = None, bundle.read(config.bundle)
    if "vqvae" in found.stages:
        lpips = None
        if remote.fetched(config.lpips).is_file():
            lpips = perceptual.load(config.lpips, dtype=jnp.dtype(config.model.dtype))
        decoder = free.Decoder(found.load("tokenizer"), found.load("vqvae"), lpips)
    return free.Sampler(
        batch=batch,
        condition=train_state.replicate(condition_of(batch), mesh),
        key=jax.random.key(config.seed),
        mesh=mesh,
        decoder=None if decoder is None else train_state.replicate(decoder, mesh),
        blank_code=config.model.get("blank_code"),
        settings=settings,
    )


def check_codebooks(config: Any, found: tuple[int, ...]) -> None:
    """Raises ValueError unless codebooks of shape `found`, K x vocab x d, are the config's."""
    model = config.model
    wanted = model.num_codebooks, model.vocab_size, model.code_dim // model.num_codebooks
    if found != wanted:
        raise ValueError(
            f"config.bundle={config.bundle}: its tokenizer has codebooks of shape {found}, and the "
            f"config's has {wanted}; is it another one? --config=configs/star.py:SCALE,TOKENIZER"
        )


def best_metric(config: Any, sampler: free.Sampler | None, held_out: Any) -> str | None:
    """The metric that the best weights are kept by; None without unseen clips.

    By default LPIPS of free samples where it is measured, else the likelihood. Raises ValueError
    for a metric of `config.best` that there is not, or that this run does not measure.
    """
    decoder = None if sampler is None else sampler.decoder
    measured = [name for name in METRICS if name.startswith("eval/") and held_out]
    if sampler is not None:
        measured += ["free/accuracy"]
        measured += ["free/propagation"] if config.data.timesteps > 1 else []
    if decoder is not None:
        measured += ["free/psnr_in_mask"] + (["free/lpips"] if decoder.lpips is not None else [])
    if config.best is None:
        return next((name for name in ("free/lpips", "eval/nll") if name in measured), None)
    if config.best not in measured:
        raise ValueError(
            f"config.best={config.best!r}: this run measures {measured}; free/lpips needs LPIPS' "
            f"weights at config.lpips={config.lpips!r} (docs/WEIGHTS.md)"
        )
    return config.best


@kept
def train(config: Any, workdir: str | os.PathLike[str]) -> None:
    """Trains by `config`, a ConfigDict (see configs/star.py) and leaves `<workdir>/bundle`.

    `config.data.dir` is a folder of tokens, or a dataset, whose pictures are then tokenised in each
    step (`train.views`). The bundle takes over the stages of `config.bundle`, whose tokenizer must
    be the one that made the tokens. Its weights are the best by `config.best`, which
    `<workdir>/best` keeps meanwhile; the last ones where there are no unseen clips. Restarts from
    the newest checkpoint in `workdir`, with the batches it would have seen. A run that starts at
    step 0 begins with the weights of `config.warm_start`, if given.
    Raises FloatingPointError when the loss is not finite.
    """
    inputs.check_buckets(config.data.buckets, config.data.timesteps)
    key = jax.random.key(config.seed)
    with sharding.use_mesh(config.mesh.to_dict(), rules=config.rules.to_dict()) as mesh:
        train_state.check_parts(config.accumulate, config.batch_size, mesh)
        source, features = views.open_source(config, mesh)
        batches = source.loader(
            split="train",
            batch_size=config.batch_size,
            seed=config.seed,
            max_stride=config.data.max_stride,
            **inputs.reading(config),
        )
        batches = iter(batches)
        held_out = ()  # a dataset of one's own objects has no unseen clips
        if "unseen_clip" in source.splits:
            held_out = source.loader(split="unseen_clip", batch_size=config.batch_size)
        sampler = open_sampler(config, source, mesh)
        metric = best_metric(config, sampler, held_out)

        schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
        tx = optim.make_optimizer(schedule, **config.optim)
        sizes = config.model.to_dict()
        if features is None:
            sizes["text_vocab"] = source.words.vocab_size
        arguments = bundle.module_arguments("star", sizes)
        check_codebooks(config, source.codebooks.shape)
        arguments["codebooks"] = jnp.asarray(source.codebooks)
        graphdef, state = train_state.create(STAR, arguments, tx, key, mesh)
        checkpoints = Checkpoints(workdir, every=config.checkpoint_every)
        if config.warm_start is not None and checkpoints.latest_step() is None:
            state = start_warm(
                graphdef, state, config.warm_start, workdir, source.words, config.bundle
            )
        state, batches = checkpoints.restore(state, batches)
        checkpoints.reserve(state)

        forcing, near = config.forcing.to_dict(), None
        num_near = forcing.pop("near")
        if forcing["code_noise"] > 0:
            blank_code = arguments.get("blank_code")
            assert blank_code in (None, quantize.BLANK)
            near = quantize.near_codes(
                arguments["codebooks"], num_near, has_blank=blank_code is not None
            )
        step_fn = jax.jit(
            functools.partial(
                train_step,
                graphdef,
                tx=tx,
                forcing_config=forcing,
                loss_config=config.loss.to_dict(),
                near=near,
                augment=config.augment.to_dict(),
                accumulate=config.accumulate,
            ),
            donate_argnums=0,
        )
        eval_fn = jax.jit(functools.partial(eval_step, graphdef))
        first = int(state.step)

        def write(target: Path, state: train_state.TrainState, **info: Any) -> None:
            """The averaged weights as a bundle, by the first process."""
            params = train_state.replicate(train_state.averaged(state).params, mesh)
            rest = train_state.replicate(state.rest, mesh)
            if jax.process_index() == 0:
                bundle.copy(config.bundle, target, stages=stages)
                model = nnx.merge(graphdef, params, rest)
                bundle.save_stage(
                    target,
                    "star",
                    model,
                    {**config.to_dict(), "model": sizes},
                    storage=config.storage,
                    trained={"timesteps": config.data.timesteps, "views": source.num_views},
                    sampling=config.sampling.to_dict(),
                    **info,
                    **(
                        {"words": source.words.to_dict()}
                        if features is None
                        else {"text": features.provenance}
                    ),
                    **(train_state.warm_info(workdir) if config.warm_start is not None else {}),
                    **source.hashes,
                )

        # A bundle without a 4D VQ-VAE does for training, and makes one that cannot generate yet.
        wanted = ["tokenizer", "vqvae", *(["text"] if features is not None else [])]
        stages = [name for name in wanted if name in bundle.read(config.bundle).stages]
        best = None
        if metric is not None:
            best = Best(workdir, metric, write, higher=METRICS[metric], first_step=first)
        counted = work.of_batches(
            nnx.merge(graphdef, *jax.eval_shape(lambda: (state.params, state.rest))),
            groups=config.forcing.num_groups,
            text=config.model.text_length,
        )
        writer = MetricWriter(
            workdir, total_steps=config.steps, first_step=first, config=config,
            work=counted,
        )  # fmt: skip
        watch = Watch(config.nonfinite_steps)
        ending = Ending(mesh, times=config.watchdog)
        for step in range(first, config.steps):
            ending.begin()
            with writer.waiting():
                read = next(batches)
            timesteps = inputs.timesteps_of(
                step, config.seed, config.data.buckets, config.data.timesteps
            )
            batch = inputs.split(read, timesteps)
            if config.data.shuffle_views:
                batch = reordered(batch, config.seed, step)
            batch = train_state.to_device(batch, mesh)
            writer.count(batch)
            state, metrics = step_fn(state, batch, key, eyes=source.eyes)
            done = step + 1
            last = done == config.steps
            watch.add(done, read["clip"], metrics)
            if done % config.log_every == 0 or last:
                writer.write(done, {**watch.mean(), "learning_rate": schedule(step)})
            if number := ending.asked():
                watch.check()
                checkpoints.save_and_stop(number, done, state, batches)
            measured = {}
            if held_out and (done % config.eval_every == 0 or last):
                held, average = Mean(), train_state.averaged(state)
                for batch in held_out:
                    batch = train_state.to_device(batch, mesh)
                    held.add(eval_fn(average, batch, source.eyes))
                values = writer.write(done, held.result(), prefix="eval")
                measured |= {f"eval/{name}": value for name, value in values.items()}
            if sampler is not None and (done % config.free.every == 0 or last):
                average = train_state.averaged(state).params
                values, drawn = sampler(nnx.merge(graphdef, average, state.rest))
                values = writer.write(done, values, prefix="free")
                measured |= {f"free/{name}": value for name, value in values.items()}
                if drawn and jax.process_index() == 0:
                    sheet = pictures.samples_sheet(drawn["truth"], drawn["real"])
                    pictures.save(Path(workdir) / f"pictures/step_{done:08d}.png", sheet)
            if measured:
                if best is not None:
                    best.offer(done, measured, state)
                writer.restart_clock()
            if done % config.checkpoint_every == 0 or last:
                watch.check()
                checkpoints.save(done, state, batches, force=last)
        checkpoints.close()
        writer.close()
        target, told = Path(workdir) / "bundle", ""
        if best is None or best.value is None:
            write(target, state)
            told = f"the last weights, of step {int(state.step)}"
        elif jax.process_index() == 0:
            told = best.copy(target, [*stages, "star"])
        if jax.process_index() == 0:
            print(f"{target}: {told}", file=sys.stderr, flush=True)
