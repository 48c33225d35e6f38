"""Times training steps of the 4D VQ-VAE and their parts, on random weights and made data.

    fourdstar bench train vqvae --size paper --json results.json

The step is the trainer's own, the discriminator's turn included where the config has one (it begins
at a share of the steps: `--config.adversarial.start=0` times it). Its parts are programs of their
own beside it, each with its gradient where the step takes one, so they need not add up to the step;
`losses` holds the rasterizer's part too, `discriminator` is without R1; `generation` is from tokens
to Gaussians, `views` all pictures of these, of every timestep and view of the rig. Weights are made
on the host; tokens and pictures are random, of the config's sizes.

- step_s: of steps that follow one another, as a trainer starts them. waited_s: the median where
  each is waited for, with what the host takes to start its kernels.
- compile_s, trace_s: to compile the program, and to trace it before.
- program_bytes, temporary_bytes: of the compiled program, and what of it is neither argument nor
  result. allocator_peak_bytes: the device's peak until after the step, where the device tells it.
- tflop: 3 x the multiplications and additions of the matrix products and convolutions in the
  decoder's forward pass (`timing.count_flops`), static half and offsets. The frozen tokenizer,
  LPIPS, the rasterizer and what the backward pass makes again are not counted.
- tflops: that, a second of the step.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fourdstar_jax import bundle, geometry, nn, sharding
from fourdstar_jax.kernels.rasterize import pick_capacity
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.timing import allocator_peak, count_flops, describe, program_bytes, time_calls
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.train import adversarial, inputs, optim, vqvae
from fourdstar_jax.train import state as train_state
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae import losses

VIEWS = {"paper": 8}  # of the rig; four at the other sizes
PARTS = ("generation", "views", "tokenizer", "decoder", "offsets", "losses", "rasterizer")
PARTS += ("discriminator", "optimizer", "data")


def make_batch(
    config: Any, *, objects: int, views: int, image_size: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random arrays as `data.pipeline` sends them to a trainer, in the form "uint8"."""
    rng = np.random.default_rng(seed)
    shape, pixels = (objects, config.data.timesteps), (image_size, image_size)
    batch: dict[str, np.ndarray] = {
        "times": np.broadcast_to(np.arange(shape[1], dtype=np.float32), shape).copy(),
        "clip": np.arange(objects, dtype=np.int32),
        "flow": rng.standard_normal((objects, shape[1] - 1, views, *pixels, 2), np.float32),
        "depth": np.full((*shape, views, *pixels, 1), 1.5, np.float16),
    }
    batch["flow"] = batch["flow"].astype(np.float16)
    for prefix, number, first in (("", views, 0), ("extra_", config.render.extra_views, 17)):
        if number:
            angles = [first + 360 * i / number for i in range(number)]
            rig = geometry.orbit_cameras(angles, width=image_size, height=image_size)
            for name, x in zip(("viewmats", "Ks"), rig, strict=True):
                batch[prefix + name] = np.broadcast_to(x, (objects, *x.shape)).copy()
            batch[f"{prefix}rgba"] = rng.integers(0, 256, (*shape, number, *pixels, 4), np.uint8)
    return batch


class Setting(NamedTuple):
    """What a step is made of, on the device."""

    graphdef: Any
    state: train_state.TrainState
    tx: Any
    adversary: adversarial.Adversary | None
    frozen: vqvae.Frozen
    batch: dict[str, jax.Array]
    host_batch: dict[str, np.ndarray]


def make_setting(config: Any, tokenizer_model: Mapping[str, Any], mesh, **sizes: int) -> Setting:
    """Model, optimizer, frozen networks and a batch. Needs the current mesh `mesh`."""
    schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
    tx = optim.make_optimizer(schedule, **config.optim)
    model = nn.host_weights(bundle.shapes("vqvae", config.model.to_dict()))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    step = jnp.zeros((), jnp.int32)
    state = train_state.TrainState(step, params, rest, jax.jit(tx.init)(params))
    dtype = jnp.dtype(config.model.dtype)
    adversary, judge = adversarial.create(
        config.model.resolution,
        **config.adversarial,
        dtype=dtype,
        steps=config.steps,
        key=jax.random.key(0),
        mesh=mesh,
    )

    tokenizer = nn.host_weights(bundle.shapes("tokenizer", tokenizer_model))
    lpips = near = None
    if config.loss.lpips_weight > 0:
        lpips = nn.host_weights(perceptual.shapes(dtype=dtype))
    if config.forcing.code_noise > 0:
        near = quantize.near_codes(
            tokenizer.codebooks(), config.forcing.near, has_blank=tokenizer.has_blank
        )
    host_batch = make_batch(config, image_size=config.model.resolution, **sizes)
    return Setting(
        graphdef=graphdef,
        state=state._replace(judge=judge),
        tx=tx,
        adversary=adversary,
        frozen=vqvae.Frozen(tokenizer, lpips, near),
        batch=train_state.to_device(host_batch, mesh),
        host_batch=host_batch,
    )


def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of all arguments, where that of the results is the results themselves."""

    def run(*args):
        results, pull = jax.vjp(function, *args)
        return pull(results)

    return run


def measure(program: Any, *args: Any, repeats: int) -> tuple[dict[str, Any], Any]:
    """Figures of a jitted function, and a result of it."""
    start = time.perf_counter()
    lowered = program.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    times = time_calls(lambda: compiled(*args), jax.block_until_ready, warm_up=1, repeats=repeats)
    memory = compiled.memory_analysis()
    line = dict(
        ms=times.sync_ms,
        trace_s=traced - start,
        compile_s=done - traced,
        program_bytes=program_bytes(compiled),
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
    )
    return line, compiled(*args)


def judged(
    adversary: adversarial.Adversary,
    judge: train_state.TrainState,
    real: jax.Array,
    fake: jax.Array,
) -> Any:
    """The gradient that the discriminator gives to `fake`, and its own turn."""
    step = jnp.asarray(adversary.first_step)
    gradient = jax.grad(functools.partial(adversary.hinge, judge, step))(fake)
    return gradient, adversary.learn(judge, step, real, fake)


def measure_step(
    step: Callable[..., Any], state: train_state.TrainState, args: Any, repeats: int
) -> tuple[dict[str, Any], train_state.TrainState, dict[str, jax.Array]]:
    """Figures of a trainer's step, the state after and metrics; the one before is given away."""
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, *args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    metrics, times = {}, []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, *args))
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    for _ in range(repeats):
        state, metrics = compiled(state, *args)
    jax.block_until_ready((state, metrics))
    following = (time.perf_counter() - begin) / repeats
    memory = compiled.memory_analysis()
    line = dict(
        step_s=following,
        waited_s=statistics.median(times[2:]),
        waited_range_s=[min(times[2:]), max(times[2:])],
        trace_s=traced - start,
        compile_s=done - traced,
        program_bytes=program_bytes(compiled),
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
        allocator_peak_bytes=allocator_peak(),
    )
    return line, state, metrics


def run(
    config: Any,
    tokenizer_model: Mapping[str, Any],
    *,
    size: str,
    objects: int = 1,
    views: int | None = None,
    repeats: int = 10,
    parts: Iterable[str] | None = None,
    json_file: Path | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Measures the step, then its `parts`; prints a line each and writes the results so far.

    `config` is the VQ-VAE's, `tokenizer_model` the arguments of the tokenizer it builds on.
    Raises ValueError for a part that there is not.
    """
    parts = PARTS if parts is None else tuple(parts)
    if unknown := [name for name in parts if name not in PARTS]:
        raise ValueError(f"there is no part {unknown[0]!r} of a step; there are {', '.join(PARTS)}")
    views = VIEWS.get(size, 4) if views is None else views
    sizes = dict(objects=objects, timesteps=config.data.timesteps, views=views)
    results: dict[str, Any] = describe(commit) | dict(
        stage="vqvae", size=size, **sizes, render=config.render.to_dict(), repeats=repeats
    )
    results |= dict(model=config.model.to_dict(), parameters=None, tflop=None, step={}, parts={})

    def save():
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(results, indent=1) + "\n")

    save()
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        setting = make_setting(config, tokenizer_model, mesh, objects=objects, views=views)
        model = nnx.merge(setting.graphdef, setting.state.params, setting.state.rest)
        batch, tokenizer = jax.jit(inputs.prepare)(setting.batch), setting.frozen.tokenizer
        cameras, times = Cameras(batch["viewmats"], batch["Ks"]), batch["times"]
        codes = jax.jit(lambda t, x: t.codes(t.encode(x)))
        print(f"{results['device']}, {size}, {', '.join(f'{v} {k}' for k, v in sizes.items())}")

        encoding, found = measure(codes, tokenizer, batch["images"], repeats=repeats)
        results["parameters"] = nn.count_parameters(model)
        forward = count_flops(lambda *args: model(*args), found, cameras, times)
        results["tflop"] = 3 * forward / 1e12
        supervision = jax.jit(
            functools.partial(losses.choose_supervision, **config.render.to_dict())
        )(jax.random.key(1), batch)
        decode = jax.jit(lambda m, *args: m(*args))
        generation, decoded = measure(
            decode, nn.cast_weights(model), found, cameras, times, repeats=repeats
        )
        height, width = batch["images"].shape[-3:-1]
        options: dict[str, Any] = dict(width=width, height=height)
        chosen = losses.take_timesteps(decoded.gaussians, supervision.timesteps)
        rendered = losses.render(chosen, supervision.cameras, **options)
        capacity = pick_capacity(int(rendered.num_intersections))

        del model
        step = functools.partial(
            vqvae.train_step,
            setting.graphdef,
            tx=setting.tx,
            adversary=setting.adversary,
            augment=config.augment.to_dict(),
            steps=config.steps,
            code_noise=config.forcing.code_noise,
            render_config=config.render.to_dict(),
            loss_config=config.loss.to_dict(),
            capacity=capacity,
        )
        rest = setting.frozen, setting.batch, jax.random.key(0)
        line, state, metrics = measure_step(step, setting.state, rest, repeats)
        line |= dict(pairs=int(metrics["pairs"]), overflow=bool(metrics["overflow"]))
        line |= dict(capacity=capacity, loss=float(metrics["loss"]))
        line["tflops"] = results["tflop"] / line["step_s"]
        results["step"] = line
        setting = setting._replace(state=state)
        print(
            f"step {line['step_s']:.3f} s, {results['tflop']:.3g} TFLOP, {line['tflops']:.3g} a "
            f"second; traced in {line['trace_s']:.0f} s, compiled in {line['compile_s']:.0f} s; "
            f"{(line['program_bytes'] or 0) / 1e9:.1f} GB, of which "
            f"{(line['temporary_bytes'] or 0) / 1e9:.1f} temporaries"
        )
        save()

        model = nnx.merge(setting.graphdef, state.params, state.rest)
        options["capacity"] = capacity

        def pictures(gaussians, capacity=None):
            out = losses.render(gaussians, cameras, width=width, height=height, capacity=capacity)
            return out.renders, out.num_intersections

        def rasterized(fine, coarse):
            out = [losses.render(g, supervision.cameras, **options) for g in (fine, coarse)]
            pictures = [(x.renders, x.alphas) for x in out]
            if config.loss.flow_weight and config.render.num_timesteps > 1:
                return pictures, losses.splatted_flow(fine, supervision.cameras, **options)[0]
            return pictures

        def loss(decoded):
            settings = config.loss.to_dict() | dict(capacity=capacity)
            lpips = setting.frozen.lpips
            return losses.reconstruction_loss(decoded, supervision, lpips=lpips, **settings)[0]

        def static(m):
            return m(found, cameras)

        def measured(name):
            match name:
                case "generation":
                    return generation
                case "views":
                    room = pick_capacity(int(pictures(decoded.gaussians)[1]))
                    program = functools.partial(pictures, capacity=room)
                    args = (decoded.gaussians,)
                case "tokenizer":
                    return encoding
                case "decoder":
                    program, args = with_gradient(static), (model.static,)
                case "offsets":
                    maps = jax.jit(static)(model.static)
                    program = with_gradient(lambda m, maps: m(maps, times))
                    args = (model.offsets, maps)
                case "losses":
                    program, args = jax.grad(loss), (decoded,)
                case "rasterizer":
                    coarse = losses.take_timesteps(decoded.coarse, supervision.timesteps)
                    program, args = with_gradient(rasterized), (chosen, coarse)
                case "discriminator":
                    assert setting.adversary is not None
                    program = functools.partial(judged, setting.adversary)
                    judge = state.judge._replace(step=jnp.ones_like(state.judge.step))
                    args = (judge, supervision.images, rendered.renders)
                case "optimizer":

                    def optimize(state, grads):
                        return train_state.apply_gradients(state, grads, setting.tx)

                    program, args = optimize, (state, state.params)
                case _:  # data: from the host's memory to the device
                    copy = functools.partial(train_state.to_device, setting.host_batch, mesh)
                    taken = time_calls(copy, jax.block_until_ready, warm_up=1, repeats=repeats)
                    return dict(ms=taken.sync_ms)
            return measure(jax.jit(program), *args, repeats=repeats)[0]

        for name in parts:
            missing = {"discriminator": setting.adversary, "offsets": model.offsets}
            if missing.get(name, model) is None:
                continue
            part = measured(name)
            part["share"] = part["ms"] / (1e3 * line["step_s"])
            results["parts"][name] = part
            print(f"{name:11s}{part['ms']:11.2f} ms {100 * part['share']:6.1f} %", flush=True)
            save()
    return results
