"""TrainState, how it is made over a mesh, and the batches that go with it."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fourdstar_jax import bundle, nn, sharding
from fourdstar_jax.train import optim

WARM_START = "warm_start.txt"  # in the workdir: what a warm start took and left


class TrainState(NamedTuple):
    """All that a checkpoint must hold of a model in training (a pytree)."""

    step: jax.Array  # [] int32, optimizer steps done
    params: nnx.State  # nnx.Param
    rest: nnx.State  # every other variable: frozen codebooks, usage statistics
    opt_state: optax.OptState
    judge: Any = None  # the same of the discriminator, where a stage trains with one


def create(
    make: Callable[..., nnx.Module], kwargs: dict[str, Any], tx, key: jax.Array, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Builds a model and its optimizer state inside `jit`, every array placed by its axes.

    The optimizer's moments lie over the mesh as their parameters do. No host ever holds the
    whole state.
    """
    graphdef, init_state, shapes = _described(make, kwargs, tx, key, mesh)
    # It runs once: optimising hundreds of little random-number loops costs more than it gains.
    options = {"xla_backend_optimization_level": 0}
    places = jax.tree.map(lambda x: x.sharding, shapes)
    return graphdef, jax.jit(init_state, out_shardings=places, compiler_options=options)(key)


def abstract(
    make: Callable[..., nnx.Module], kwargs: dict[str, Any], tx, key: Any, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """What `create` would make, as shapes with their places; `key` may be a shape, too."""
    graphdef, _, shapes = _described(make, kwargs, tx, key, mesh)
    return graphdef, shapes


def _described(make, kwargs, tx, key, mesh) -> tuple[nnx.GraphDef, Callable[..., Any], TrainState]:
    """A new state's graph, what makes its arrays, and their shapes with their places."""

    def init(key):
        model = nn.build(make, key, **kwargs)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        state = TrainState(jnp.zeros((), jnp.int32), params, rest, tx.init(params))
        return graphdef, state

    graphdefs = []

    def init_state(key):
        graphdef, state = init(key)
        graphdefs.append(graphdef)
        return state

    shapes = jax.eval_shape(init_state, key)
    places = shardings(shapes.params, shapes.rest, tx, mesh)
    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    return graphdefs[0], init_state, placed


def shardings(params: nnx.State, rest: nnx.State, tx, mesh: Mesh) -> TrainState:
    """Where the arrays of a state lie, as a state of shardings; arguments may be shapes."""

    def is_masked(x):  # in place of the moments of what another optimizer has
        return isinstance(x, optax.MaskedNode)

    replicated = NamedSharding(mesh, PartitionSpec())

    def place(tree: nnx.State):
        shardings = jax.tree.leaves(
            nnx.get_named_sharding(tree, mesh), is_leaf=lambda x: isinstance(x, NamedSharding)
        )
        leaves, structure = jax.tree.flatten(tree)
        pairs = zip(leaves, shardings, strict=True)
        return jax.tree.unflatten(structure, [_divisible(x.shape, s) for x, s in pairs])

    placed, moments = place(params), jax.eval_shape(tx.init, params)
    # optax makes counts while it looks, which a mesh that is only described has no device for
    with sharding.use_mesh(devices=jax.local_devices()[:1]):
        opt_state = optax.tree_map_params(
            tx,
            lambda moment, place: moment if is_masked(moment) else place,
            moments,
            placed,
            transform_non_params=lambda _: replicated,
            is_leaf=is_masked,
        )
    return TrainState(
        step=replicated,  # pyright: ignore[reportArgumentType] the same tree, of shardings
        params=placed,
        rest=place(rest),
        opt_state=opt_state,
    )


def _divisible(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """The sharding without the mesh axes that do not divide their dimension: a vocabulary's size,
    say, comes from the data."""
    mesh, spec = sharding.mesh, tuple(sharding.spec)
    kept = []
    for size, axes in zip(shape, spec + (None,) * (len(shape) - len(spec)), strict=True):
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        parts = math.prod(mesh.shape[name] for name in names)
        kept.append(axes if size % parts == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*kept))


def start_warm(
    graphdef: nnx.GraphDef,
    state: TrainState,
    load: Callable[[Any], tuple[Any, list[str]]],
    workdir: str | os.PathLike[str],
) -> TrainState:
    """A new state with the weights that `load` fills a model with.

    `load` also returns the lines of its report, which is printed and written to
    `<workdir>/warm_start.txt`.
    """
    model, lines = load(nnx.merge(graphdef, state.params, state.rest))
    if jax.process_index() == 0:
        print("warm start: " + "\n".join(lines), flush=True)
        path = Path(workdir) / WARM_START
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    _, params, rest = nnx.split(model, nnx.Param, ...)
    opt_state = optim.restart_average(state.opt_state, params)
    return state._replace(params=params, rest=rest, opt_state=opt_state)


def start_from_stage(
    graphdef: nnx.GraphDef,
    state: TrainState,
    found: bundle.Bundle,
    stage: str,
    workdir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    may_lack: tuple[str, ...] = (),
    change: Callable[[dict[str, Any], dict[str, Any]], str | None] = lambda arrays, ours: None,
) -> TrainState:
    """A new state with the weights of a stage of a bundle, by name (see `start_warm`).

    The tokenizer of bundle `source`, if given, must be the one that the stage was trained on.
    Arrays whose names begin with one of `may_lack` may be missing there: all of them, and they
    start anew. `change(arrays, ours)`, both by name, may fit `arrays` to the model before, and then
    returns what it did. Raises ValueError with names and shapes that differ.
    """

    if source is not None:
        try:
            bundle.read(source).spec.check(found.spec)
        except ValueError as error:
            raise ValueError(f"config.warm_start: bundle {found.folder}: {error}") from error

    def load(model):
        arrays, ours = found.arrays(stage), nn.named_arrays(model)
        changed = change(arrays, ours)
        anew = [n for n in ours if n.startswith(may_lack) and may_lack and n not in arrays]
        if anew and len(anew) < sum(n.startswith(may_lack) for n in ours):
            anew = []
        differing = [
            f"{name} is {_shape(arrays, name)} there and {_shape(ours, name)} here"
            for name in sorted(set(arrays) | set(ours))
            if _shape(arrays, name) != _shape(ours, name) and name not in anew
        ]
        if differing:
            more = f", and {len(differing) - 4} more" if len(differing) > 4 else ""
            raise ValueError(
                f"config.warm_start: {stage} of bundle {found.folder} is another model: "
                f"{'; '.join(differing[:4])}{more}"
            )

        def filled(name, leaf):
            if name in anew:
                return leaf
            array = arrays[name].astype(leaf.dtype)
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: array[index]
            )

        leaves = [filled(name, leaf) for name, leaf in ours.items()]
        model = jax.tree.unflatten(jax.tree.structure(model), leaves)
        lines = [f"loaded {len(leaves) - len(anew)} arrays of {stage}; {len(anew)} start anew"]
        lines += [f"  {changed}"] if changed else []
        return model, [*lines, f"  from {found.folder}, sha256 {found.stage(stage).sha256}"]

    return start_warm(graphdef, state, load, workdir)


def _shape(arrays: dict[str, Any], name: str) -> str:
    return "x".join(map(str, arrays[name].shape)) or "()" if name in arrays else "missing"


def warm_info(workdir: str | os.PathLike[str]) -> dict[str, str]:
    """What a bundle tells of its run's warm start: the report's first line, if there was one."""
    report = Path(workdir) / WARM_START
    return {"warm_start": report.read_text().splitlines()[0]} if report.is_file() else {}


def apply_gradients(state: TrainState, grads: nnx.State, tx) -> TrainState:
    """One optimizer step. Gradients that are not finite change nothing but its number."""
    finite = jnp.isfinite(norm(grads))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    learnt = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), learnt, (state.params, state.opt_state)
    )
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state)


def gradients_in_parts(
    grad_fn: Callable[[Any, jax.Array], tuple[Any, Any]], parts: int, batch: Any, key: jax.Array
) -> tuple[Any, Any]:
    """Gradients of a batch from `parts` of it, one after another, in the memory of one.

    `grad_fn` of a part `[B / parts, ...]` and a key returns gradients and what else there is. Comes
    back with the mean of the gradients and the rest, stacked `[parts, ...]`; with one part it gets
    `key` itself. Object i is of part i % parts, so that every device keeps its own.
    """
    if parts == 1:
        grads, rest = grad_fn(batch, key)
        return grads, jax.tree.map(lambda x: x[None], rest)

    def split(x):
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def add(total, part):
        grads, rest = grad_fn(*part)
        return jax.tree.map(jnp.add, total, grads), rest

    parted = jax.tree.map(split, batch), jax.random.split(key, parts)
    shapes = jax.eval_shape(grad_fn, *jax.tree.map(lambda x: x[0], parted))[0]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, rest = jax.lax.scan(add, nothing, parted)
    return jax.tree.map(lambda x: x / parts, total), rest


def sharers(mesh: Mesh) -> int:
    """How many devices, or groups of them, share a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_parts(accumulate: int, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError for a batch that `accumulate` parts do not divide evenly over the mesh."""
    devices = sharers(mesh)
    if accumulate < 1 or batch_size % (accumulate * devices):
        raise ValueError(
            f"config.accumulate={accumulate} must be 1 or more parts of config.batch_size="
            f"{batch_size}, each a multiple of the {devices} devices that share a batch"
        )


def norm(grads: nnx.State) -> jax.Array:
    """Length of all gradients together: not finite where any of them is not."""
    return optax.tree.norm(grads)


def averaged(state: TrainState) -> TrainState:
    """The state with the moving average of its parameters, where the optimizer keeps one."""
    return state._replace(params=optim.averaged(state.opt_state, state.params))


def to_device(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A process's share of a batch as global arrays, first axis over the mesh's batch axes.

    Rows that the devices do not divide, as the last ones of unseen clips may be, are whole on every
    device. Raises ValueError for such rows of several processes.
    """
    rows = len(next(iter(batch.values()))) * jax.process_count()
    if rows % sharers(mesh) == 0:
        first = "batch"
    elif jax.process_count() == 1:
        first = None
    else:
        raise ValueError(
            f"{rows} clips do not go evenly to {sharers(mesh)} devices of {jax.process_count()} "
            "processes"
        )

    def place(x):
        axes = (first, *(None,) * (x.ndim - 1))
        return jax.make_array_from_process_local_data(sharding.named(mesh, *axes), x)

    return {name: place(x) for name, x in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree of arrays, whole on every device: a frozen model."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
