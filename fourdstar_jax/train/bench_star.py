"""Times training steps of STAR and their parts, on random weights and tokens.

    fourdstar bench train star --size paper --json results.json
    fourdstar bench train star --ablations --json docs/results/ablations_cpu.json

The step is the trainer's own, over `--devices` by the config's mesh. Its parts are programs of
their own beside it, so they need not add up to the step: all but `clustering`, `optimizer` and
`data` with their gradients. Weights are made on the host; no token is blank.

- step_s, waited_s, compile_s, trace_s, program_bytes, temporary_bytes, allocator_peak_bytes: as for
  the VQ-VAE.
- tokens_per_s: tokens that are predicted; slots_per_s: all that go through the trunk, the prefix's
  and the container's, too.
- tflop: 3 x what the forward pass multiplies and adds; `work` says what counts.
- tflops: that, a second of the step. mfu: tflops / (devices x the card's dense bfloat16 peak),
  where it is in `work.PEAK_TFLOPS`.
"""

import functools
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from fourdstar_jax import bundle, geometry, nn, sharding
from fourdstar_jax.star.container import Container
from fourdstar_jax.star.losses import code_losses
from fourdstar_jax.star.model import STAR
from fourdstar_jax.star.transformer import Rotary, axial_angles
from fourdstar_jax.timing import describe, time_calls
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.train import optim, star
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.bench import measure, measure_step, with_gradient
from fourdstar_jax.train.work import container_slots, forward_flops, peak_tflops

VIEWS = {"paper": 8}  # four at the other sizes
PARTS = ("clustering", "container", "trunk", "head", "optimizer", "data")


def make_batch(
    sizes: dict[str, Any], *, objects: int, timesteps: int, views: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random arrays as `data.tokens` sends them to the trainer."""
    rng = np.random.default_rng(seed)
    codes, n = sizes["num_codebooks"], sizes["grid"] ** 2
    size, length = sizes["resolution"], sizes["text_length"]
    rig = geometry.orbit_cameras([360 * i / views for i in range(views)], width=size, height=size)
    tokens = rng.integers(1, sizes["vocab_size"], (objects, timesteps, views, n, codes), np.int32)
    batch = {name: np.tile(x, (objects, 1, 1, 1)) for name, x in rig._asdict().items()}
    batch |= dict(
        tokens=tokens,
        times=np.tile(np.arange(timesteps, dtype=np.float32), (objects, 1)),
        text_ids=np.ones((objects, length), np.int32),
    )
    if sizes["text_encoder"] == "t5":
        shape = (objects, length, sizes["text_dim"])
        batch["text_features"] = rng.standard_normal(shape, np.float32)
    return batch


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """The trainer's."""
    schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
    return optim.make_optimizer(schedule, **config.optim)


def make_step(config: Any, shapes: STAR, host_batch: dict[str, np.ndarray], mesh: Mesh):
    """The trainer's step, a state with random weights for it, and the batch on the devices.

    `shapes` is the model of the config. Needs the current mesh `mesh`.
    """
    tx = make_optimizer(config)
    graphdef, params, rest = nnx.split(shapes, nnx.Param, ...)
    host = nnx.split(nn.host_weights(shapes), nnx.Param, ...)[1:]
    places = train_state.shardings(params, rest, tx, mesh)
    host = jax.device_put(host, (places.params, places.rest))
    zero = jnp.zeros((), jnp.int32)
    state = jax.jit(
        lambda params, rest: train_state.TrainState(zero, params, rest, tx.init(params)),
        out_shardings=places,
    )(*host)

    forcing, near = config.forcing.to_dict(), None
    num_near = forcing.pop("near")
    if forcing["code_noise"] > 0:
        books = nnx.merge(graphdef, state.params, state.rest).codebook[...]
        has_blank = config.model.get("blank_code") is not None
        near = quantize.near_codes(books, num_near, has_blank=has_blank)
    step = functools.partial(
        star.train_step, graphdef, tx=tx, near=near,
        forcing_config=forcing, loss_config=config.loss.to_dict(),
        accumulate=config.accumulate,
    )  # fmt: skip
    return step, state, train_state.to_device(host_batch, mesh)


def compare(
    configs: Mapping[str, Any],
    *,
    size: str,
    objects: int = 1,
    views: int | None = None,
    repeats: int = 10,
    json_file: Path | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Measures a step of each config of STAR, one after another and again, on one device.

    So what else the machine does meanwhile slows all alike. Prints a line each and writes the
    results, of which `rows` has one by each name: parameters, GFLOP of a forward pass, seconds a
    step (the median, and the least and most).
    """
    views = VIEWS.get(size, 4) if views is None else views
    results: dict[str, Any] = describe(commit) | dict(
        stage="star", size=size, objects=objects, views=views, repeats=repeats, rows={}
    )
    programs: dict[str, tuple[Any, Any, Any]] = {}
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        for name, config in configs.items():
            dims = dict(objects=objects, timesteps=config.data.timesteps, views=views)
            groups = min(config.forcing.num_groups or dims["timesteps"], dims["timesteps"])
            sizes = config.model.to_dict()
            sizes.setdefault("text_vocab", 8)
            shapes = bundle.shapes("star", sizes)
            flops = forward_flops(shapes, groups=groups, text=sizes["text_length"], **dims)
            results["timesteps"], results["groups"] = dims["timesteps"], groups
            results["rows"][name] = dict(
                parameters=nn.count_parameters(shapes), forward_gflop=sum(flops.values()) / 1e9
            )
            step, state, batch = make_step(config, shapes, make_batch(sizes, **dims), mesh)
            rest = batch, jax.random.key(0)
            compiled = jax.jit(step, donate_argnums=0).lower(state, *rest).compile()
            state, _ = jax.block_until_ready(compiled(state, *rest))
            programs[name] = compiled, state, rest
        times: dict[str, list[float]] = {name: [] for name in configs}
        for _ in range(repeats):
            for name, (compiled, state, rest) in programs.items():
                begin = time.perf_counter()
                state, _ = jax.block_until_ready(compiled(state, *rest))
                times[name].append(time.perf_counter() - begin)
                programs[name] = compiled, state, rest
    for name, taken in times.items():
        row = results["rows"][name]
        row["waited_s"], row["waited_range_s"] = statistics.median(taken), [min(taken), max(taken)]
        print(f"{name:9s} {row['forward_gflop']:8.3g} GFLOP forward, step {row['waited_s']:.4f} s")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def run(
    config: Any,
    *,
    size: str,
    objects: int = 1,
    views: int | None = None,
    devices: int = 1,
    repeats: int = 10,
    parts: Iterable[str] | None = None,
    json_file: Path | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Measures the step, then its `parts`; prints a line each and writes the results so far.

    `config` is STAR's. Raises ValueError for a part that there is not, and for more devices than
    there are.
    """
    parts = PARTS if parts is None else tuple(parts)
    if unknown := [name for name in parts if name not in PARTS]:
        raise ValueError(f"there is no part {unknown[0]!r} of a step; there are {', '.join(PARTS)}")
    if devices > len(jax.devices()):
        raise ValueError(f"--devices {devices}: there are {len(jax.devices())}")
    views = VIEWS.get(size, 4) if views is None else views
    dims = dict(objects=objects, timesteps=config.data.timesteps, views=views)
    sizes = config.model.to_dict()
    sizes.setdefault("text_vocab", 8)
    groups = min(config.forcing.num_groups or dims["timesteps"], dims["timesteps"])
    results: dict[str, Any] = describe(commit) | dict(
        stage="star", size=size, **dims, groups=groups, devices=devices,
        mesh=config.mesh.to_dict(), repeats=repeats, model=sizes, parameters=None, tflop=None,
        step={}, parts={},
    )  # fmt: skip

    def save():
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(results, indent=1) + "\n")

    save()
    host_batch = make_batch(sizes, **dims)
    print(
        f"{results['device']} x {devices}, {size}, {', '.join(f'{v} {k}' for k, v in dims.items())}"
    )
    chosen_devices = jax.devices()[:devices]
    with sharding.use_mesh(
        config.mesh.to_dict(), rules=config.rules.to_dict(), devices=chosen_devices
    ) as mesh:
        shapes = bundle.shapes("star", sizes)
        results["parameters"] = nn.count_parameters(shapes)
        flops = forward_flops(shapes, groups=groups, text=sizes["text_length"], **dims)
        results["forward_tflop"] = {name: x / 1e12 for name, x in flops.items()}
        results["tflop"] = 3 * sum(flops.values()) / 1e12

        step, state, batch = make_step(config, shapes, host_batch, mesh)
        line, state, metrics = measure_step(step, state, (batch, jax.random.key(0)), repeats)
        per_second = 1 / line["step_s"]
        n = sizes["grid"] ** 2
        tokens = views * n - n + shapes.num_known
        slots = groups * (container_slots(shapes, tokens) + tokens)
        slots += sizes["text_length"] + dims["timesteps"] * n
        line["tokens_per_s"] = objects * groups * tokens * per_second
        line["slots_per_s"] = objects * slots * per_second
        line["tflops"] = results["tflop"] * per_second
        peak = peak_tflops(results["device"])
        line["mfu"] = line["tflops"] / (devices * peak) if peak else None
        line["loss"] = float(metrics["loss"])
        results["step"] = line
        share = "" if line["mfu"] is None else f" ({100 * line['mfu']:.1f} %)"
        print(
            f"step {line['step_s']:.4f} s, {line['tokens_per_s']:.0f} tokens a second; "
            f"{results['tflop']:.3g} TFLOP, {line['tflops']:.3g} a second{share}; traced in "
            f"{line['trace_s']:.0f} s, compiled in {line['compile_s']:.0f} s; "
            f"{(line['program_bytes'] or 0) / 1e9:.1f} GB, of which "
            f"{(line['temporary_bytes'] or 0) / 1e9:.1f} temporaries",
            flush=True,
        )
        save()
        graphdef, tx = nnx.split(shapes)[0], make_optimizer(config)
        model = nn.cast_weights(nnx.merge(graphdef, state.params, state.rest))
        for name in parts:
            if name in ("clustering", "container") and not isinstance(model.container, Container):
                continue
            if name == "data":
                copy = functools.partial(train_state.to_device, host_batch, mesh)
                taken = time_calls(copy, jax.block_until_ready, warm_up=1, repeats=repeats)
                part = dict(ms=taken.sync_ms)
            else:
                program, args = part_of(name, model, state, tx, batch, groups)
                part = measure(jax.jit(program), *args, repeats=repeats)[0]
            part["share"] = part["ms"] / (1e3 * line["step_s"])
            results["parts"][name] = part
            print(f"{name:11s}{part['ms']:11.2f} ms {100 * part['share']:6.1f} %", flush=True)
            save()
    return results


def part_of(name: str, model: STAR, state, tx, batch: dict[str, jax.Array], groups: int):
    """A part of the step as a function, and its arguments."""
    if name == "optimizer":

        def optimize(state, grads):
            return train_state.apply_gradients(state, grads, tx)

        return optimize, (state, state.params)

    condition, tokens = star.condition_of(batch), model.in_groups(star.all_views(batch))
    number, timesteps = tokens.shape[:2]
    steps = np.linspace(0, timesteps - 1, groups).round().astype(int)  # those that are predicted

    def random(shape):
        x = jax.random.normal(jax.random.key(1), shape, model.dtype)
        return jax.device_put(x, batch["times"].sharding)

    if name in ("clustering", "container"):
        assert isinstance(model.container, Container)

        @jax.jit
        def given(model):
            places = jax.tree.map(model.in_groups, model.places(condition))
            visible = model.visible(tokens, None)
            return model.past(tokens, visible), visible, places

        features, visible, places = given(model)

        def grouped(container, features):
            return container.group(features, tokens, places.rays, visible)

        if name == "clustering":
            return (
                lambda container, x: container.cluster_history(
                    grouped(container, x), lambda y: y[:, steps]
                ),
                (model.container, features),
            )

        def told(container, features):
            merged = container.over_time(
                grouped(container, features), places.positions, lambda y: y[:, steps]
            )
            begun = jnp.broadcast_to(steps > 0, (number, groups))
            return container.tell(merged, begun, model.dtype)

        return with_gradient(told), (model.container, features)

    dim = model.head.input.in_features
    if name == "head":
        targets = tokens[:, steps]

        def losses(head, hidden):
            return code_losses(head, hidden, targets, saves=model.head_saves).nll

        return with_gradient(losses), (model.head, random((*targets.shape[:-1], dim)))

    box, size = model.container, tokens.shape[2]
    open_slots = container_slots(model, size)
    prefix = random((number, batch["text_ids"].shape[1] + timesteps * model.grid**2, dim))
    stream = random((number, groups, open_slots + size, dim))
    aligned = []
    if box is not None and box.by_place:
        aligned = [stream[:, :, open_slots:]] * len(box.aligned)
    rotaries: list[Rotary | None] = [None, None]
    if model.rotary_dim is not None:
        angles = [
            axial_angles(jnp.ones((*x.shape[:-1], 4)), model.rotary_dim) for x in (prefix, stream)
        ]
        rotaries = [Rotary(x, x) for x in angles]

    def trunk(trunk, prefix, stream, aligned):
        window = min(model.window, timesteps - 1)
        key = jax.random.key(0) if model.dropout else None
        return trunk(prefix, stream, open_slots, *rotaries, key, aligned=aligned, window=window)

    return with_gradient(trunk), (model.trunk, prefix, stream, aligned)
