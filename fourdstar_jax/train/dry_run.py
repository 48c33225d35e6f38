"""A training step looked at before it runs: sizes, memory and work, without a weight or a batch.

    fourdstar train --config=configs/star.py:paper --dry-run --topology v5p:4x4x4
    fourdstar train --config=configs/star.py:paper --plan --memory 78

The step is the trainer's own, traced with shapes over the config's mesh. Bytes of parameters,
optimizer, gradients and batch follow from the shapes and how they lie over the mesh; those of
temporaries only from compiling, which is done where the compiler of the devices is at hand: for
the GPUs or TPUs of this machine, and for any TPU topology where libtpu is installed. On simulated
devices, which are CPUs, the step is lowered only; `plan` compiles it there too, and says so: a
CPU's temporaries are not those of a GPU.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fourdstar_jax import bundle, nn, remote, sharding
from fourdstar_jax.data import pipeline, tokens
from fourdstar_jax.perceptual import lpips as perceptual
from fourdstar_jax.star.model import STAR
from fourdstar_jax.timing import count_flops, program_bytes
from fourdstar_jax.train import adversarial, bench, bench_star, optim, star, vqvae, work
from fourdstar_jax.train import state as train_state
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae.model import VQVAE4D

LARGE = 64 << 20  # bytes of an array that every device holds whole, from which on it is named
SAVES = ("products", "attention", "nothing")  # of `remat_saves`, the least recomputed first


class Step(NamedTuple):
    """A trainer's step with the shapes it takes, each with its place on the mesh."""

    function: Callable[..., Any]
    state: train_state.TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    more: tuple[Any, ...]  # arguments between state and batch, and after it
    tflop: float  # of the model, for the batch
    tokens: int  # that are predicted, or pictures' tokens that are decoded
    parameters: int

    def lower(self) -> Any:
        """The lowered program."""
        frozen, *rest = self.more
        between = () if frozen is None else (frozen,)
        step = jax.jit(self.function, donate_argnums=0)
        return step.lower(self.state, *between, self.batch, *rest)


def on_mesh(tree: Any, mesh: jax.sharding.Mesh, *axes: str | None) -> Any:
    """Shapes of arrays with a place, by default whole on every device."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        names = (*axes, *(None,) * (len(x.shape) - len(axes))) if axes else ()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh, *names))

    return jax.tree.map(place, tree)


def here() -> Any:
    """Around what is computed now: the mesh of a topology has no devices to do it."""
    return sharding.use_mesh(devices=jax.local_devices()[:1])


def key_shape(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    return on_mesh(jax.eval_shape(jax.random.key, 0), mesh)


def star_step(config: Any, mesh: jax.sharding.Mesh, views: int | None) -> Step:
    """STAR's, with the dataset's views and words where its folder is there."""
    sizes = config.model.to_dict()
    timesteps, objects = config.data.timesteps, config.batch_size
    folder = Path(config.data.dir)
    if remote.url_of(config.data.dir) or (folder / "spec.json").is_file():
        found = tokens.TokenFolder(config.data.dir)
        views = views or found.num_views
        if sizes["text_encoder"] == "words":
            sizes["text_vocab"] = found.word_tokenizer(sizes["text_length"]).vocab_size
    sizes.setdefault("text_vocab", 8)
    views = views or bench_star.VIEWS.get("paper" if timesteps == 24 else "", 4)
    schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
    tx = optim.make_optimizer(schedule, **config.optim)
    arguments = bundle.module_arguments("star", sizes)
    graphdef, state = train_state.abstract(STAR, arguments, tx, key_shape(mesh), mesh)
    model = nnx.merge(graphdef, state.params, state.rest)
    with here():
        host = bench_star.make_batch(sizes, objects=1, timesteps=timesteps, views=views)
    batch = {
        name: jax.ShapeDtypeStruct((objects, *x.shape[1:]), x.dtype) for name, x in host.items()
    }
    forcing = config.forcing.to_dict()
    near: Any = None
    num_near = forcing.pop("near")
    if forcing["code_noise"] > 0:
        shape = (sizes["num_codebooks"], sizes["vocab_size"], num_near)
        near = on_mesh(jax.ShapeDtypeStruct(shape, jnp.int32), mesh)

    def step(state, batch, key, near):
        return star.train_step(
            graphdef, state, batch, key, tx=tx, near=near, forcing_config=forcing,
            loss_config=config.loss.to_dict(), accumulate=config.accumulate,
        )  # fmt: skip

    counted = work.of_batches(model, groups=config.forcing.num_groups, text=sizes["text_length"])
    done = counted(batch)
    return Step(
        step,
        state,
        on_mesh(batch, mesh, "batch"),
        (None, key_shape(mesh), near),
        done["tflop"],
        int(done["tokens"]),
        nn.count_parameters(state.params),
    )


def vqvae_step(config: Any, mesh: jax.sharding.Mesh, views: int | None) -> Step:
    """The VQ-VAE's at its longest clips, with the rasterizer's first room."""
    try:
        tokenizer_model = bundle.read(config.bundle).stage("tokenizer").model
    except ValueError as error:
        raise ValueError(
            f"{error} (--config.bundle has the tokenizer that the step runs)"
        ) from error
    if remote.url_of(config.data.dir) or (Path(config.data.dir) / "manifest.json").is_file():
        views = views or pipeline.read_manifest(config.data.dir)["settings"]["views"]
    views = views or bench.VIEWS.get("paper" if config.data.timesteps == 24 else "", 4)
    schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
    tx = optim.make_optimizer(schedule, **config.optim)
    arguments = bundle.module_arguments("vqvae", config.model.to_dict())
    key = key_shape(mesh)
    graphdef, state = train_state.abstract(VQVAE4D, arguments, tx, key, mesh)
    dtype = jnp.dtype(config.model.dtype)
    adversary, judge = adversarial.create(
        config.model.resolution, **config.adversarial, dtype=dtype, steps=config.steps, key=key,
        mesh=mesh, make_state=train_state.abstract,
    )  # fmt: skip
    tokenizer = bundle.shapes("tokenizer", tokenizer_model)
    lpips = perceptual.shapes(dtype=dtype) if config.loss.lpips_weight > 0 else None
    near: Any = None
    if config.forcing.code_noise > 0:
        spec_shape = jax.eval_shape(lambda t: t.codebooks(), tokenizer).shape
        near = jax.ShapeDtypeStruct((*spec_shape[:2], config.forcing.near), jnp.int32)
    with here():
        host = bench.make_batch(config, objects=1, views=views, image_size=config.model.resolution)
    kept = vqvae.maps_of(config.loss.to_dict())
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
        for name, x in host.items()
        if name not in pipeline.MAPS or name in kept
    }
    capacity = config.loss.capacity
    if capacity is None:
        with here():
            capacity = vqvae.first_capacity(config, host, train_state.sharers(mesh))

    def step(state, frozen, batch, key):
        return vqvae.train_step(
            graphdef, state, frozen, batch, key, tx=tx, steps=config.steps, adversary=adversary,
            augment=config.augment.to_dict(), accumulate=config.accumulate,
            code_noise=config.forcing.code_noise, render_config=config.render.to_dict(),
            loss_config=config.loss.to_dict(), capacity=capacity,
        )  # fmt: skip

    shape = (1, config.data.timesteps, views, config.model.grid**2, config.model.code_dim)
    rig = Cameras(host["viewmats"], host["Ks"])
    model = nnx.merge(graphdef, state.params, state.rest)
    codes = jax.ShapeDtypeStruct(shape, jnp.float32)
    flops = count_flops(lambda m, c, r, t: m(c, r, t), model, codes, rig, host["times"])
    return Step(
        step,
        state._replace(judge=judge),
        on_mesh(batch, mesh, "batch"),
        (on_mesh(vqvae.Frozen(tokenizer, lpips, near), mesh), key),
        3 * config.batch_size * flops / 1e12,
        config.batch_size * math.prod(shape[1:4]),
        nn.count_parameters(state.params),
    )


STEPS = {"star": star_step, "vqvae": vqvae_step}


def local_bytes(tree: Any) -> int:
    """Bytes of shapes on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def replicated(state: train_state.TrainState) -> Iterator[tuple[str, Any]]:
    """Name and shape of every large array of a model that all devices hold whole.

    The optimizer's of the same names lie as they do.
    """
    for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.rest)):
        nbytes = math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        if nbytes >= LARGE and x.sharding.shard_shape(x.shape) == x.shape:
            yield jax.tree_util.keystr(path[1:], simple=True, separator="/"), x


def topology(name: str) -> Sequence[Any]:
    """The devices of a TPU topology such as "v5p:4x4x4", which need not be there.

    Raises ValueError without libtpu, and for a name that it does not know.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--topology {name}: {line} (such as v5p:4x4x4; needs `pip install "
            "'fourdstar-jax[tpu]'`)"
        ) from error


def look(
    config: Any, devices: Sequence[Any] | None = None, *, views: int | None = None,
    compile: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of a config's step on `devices`, by default those of this machine.

    It is compiled unless the devices are CPUs, or as `compile` says. Raises ValueError for a stage
    without `--dry-run`, a mesh that the devices do not fill, and parts that a batch does not have.
    """
    if config.stage not in STEPS:
        raise ValueError(f"--dry-run is for {' and '.join(STEPS)}, not {config.stage}")
    devices = list(jax.devices() if devices is None else devices)
    mesh_shape, rules = config.mesh.to_dict(), config.rules.to_dict()
    with sharding.use_mesh(mesh_shape, rules=rules, devices=devices) as mesh:
        train_state.check_parts(config.accumulate, config.batch_size, mesh)
        step = STEPS[config.stage](config, mesh, views)
        state, judge = step.state._replace(judge=None), step.state.judge
        found: dict[str, Any] = dict(
            stage=config.stage,
            device=devices[0].device_kind,
            devices=len(devices),
            mesh={name: size for name, size in mesh.shape.items() if size > 1},
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            remat_saves=config.model.get("remat_saves"),
            scan_layers=config.model.get("scan_layers"),
            parameters=step.parameters,
            tokens=step.tokens,
            tflop=step.tflop,
            bytes=dict(
                parameters=local_bytes(state.params),
                optimizer=local_bytes(state.opt_state),
                gradients=local_bytes(state.params),
                rest=local_bytes((state.rest, judge, step.more)),
                batch=local_bytes(step.batch),
            ),
            replicated={
                name: [str(x.dtype), *x.shape] for name, x in replicated(state) if len(devices) > 1
            },
        )
        begun = time.perf_counter()
        lowered = step.lower()
        found["lower_s"] = time.perf_counter() - begun
        if compile is None:
            compile = devices[0].platform != "cpu"
        if compile:
            begun = time.perf_counter()
            program = lowered.compile()
            found["compile_s"] = time.perf_counter() - begun
            memory = program.memory_analysis()
            if memory is not None:
                found["temporary_bytes"] = memory.temp_size_in_bytes
                found["program_bytes"] = program_bytes(program)
    return found


def told(found: dict[str, Any]) -> Iterator[str]:
    """The lines of what `look` found."""
    mesh = " ".join(f"{name}={size}" for name, size in found["mesh"].items()) or "one device"
    yield (
        f"{found['stage']}: {found['parameters'] / 1e6:,.1f} M parameters on {found['devices']} x "
        f"{found['device']} ({mesh})"
    )
    yield (
        f"a step: {found['batch_size']} objects in {found['accumulate']} parts, "
        f"{found['tokens']:,} tokens, {found['tflop']:,.3g} TFLOP (3 x forward), "
        f"{found['tflop'] / found['devices']:,.3g} a device"
    )
    parts = "  ".join(f"{name} {size / 1e9:.3g}" for name, size in found["bytes"].items())
    yield f"GB a device: {parts}"
    for name, (dtype, *shape) in found["replicated"].items():
        yield f"  whole on every device: {name} {dtype} {shape}"
    if "compile_s" not in found:
        yield (
            f"lowered in {found['lower_s']:.0f} s, not compiled: these devices are simulated, so "
            "that temporaries (activations) are not known"
        )
    elif "program_bytes" not in found:
        yield f"compiled in {found['compile_s']:.0f} s; the compiler tells no memory"
    else:
        yield (
            f"compiled for {found['device']} in {found['compile_s']:.0f} s: "
            f"{found['temporary_bytes'] / 1e9:.3g} GB of temporaries, "
            f"{found['program_bytes'] / 1e9:.3g} GB a device in all"
        )


def choices(config: Any, sharers: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """What may be recomputed, the least first, and for each the parts that a batch may have."""
    parts = [n for n in range(1, config.batch_size + 1) if config.batch_size % (n * sharers) == 0]
    if config.stage == "star":
        for saves in SAVES:
            change = {"model.remat": True, "model.remat_saves": saves}
            yield change, parts
            if not config.model.get("scan_layers", True):
                yield change | {"model.scan_layers": True}, parts
    else:
        for remat in (False, True):
            yield {"model.remat": remat}, parts


def plan(
    config: Any, memory_gb: float, devices: Sequence[Any] | None = None, *,
    views: int | None = None, log: Callable[[str], None] = print,
) -> dict[str, Any] | None:  # fmt: skip
    """The changes to a config with which its step fits; None if none does.

    Of those that fit, the one that recomputes least, in as few parts as it can: more parts cost
    less than recomputing, but not nothing. A step in the most parts is compiled first, and then the
    fewest that fit are searched for by halves.
    """
    devices = list(jax.devices() if devices is None else devices)
    with sharding.use_mesh(config.mesh.to_dict(), devices=devices) as mesh:
        sharers = train_state.sharers(mesh)

    def fits(change: dict[str, Any], accumulate: int) -> bool:
        tried = config.copy_and_resolve_references()
        with tried.unlocked():
            tried.update_from_flattened_dict(change | {"accumulate": accumulate})
        found = look(tried, devices, views=views, compile=True)
        if "program_bytes" not in found:
            raise ValueError(f"--plan: the compiler of {found['device']} tells no memory")
        needed = found["program_bytes"] / 1e9
        log(f"{_words(change)} accumulate={accumulate}: {needed:.3g} GB a device")
        return needed <= memory_gb

    for change, parts in choices(config, sharers):
        if not parts or not fits(change, parts[-1]):
            continue
        low, high = 0, len(parts) - 1  # that with `high` fits
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(change, parts[middle]) else (middle + 1, high)
        return change | {"accumulate": parts[high]}
    return None


def _words(change: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in change.items())
