"""Meshes and logical axes: one table maps the words that code uses to the mesh.

Mesh axes are always `data`, `fsdp`, `seq`, `tensor`. Weights name logical axes where they are
made (`nn.linear`), activations in `constrain`; changing a layout edits the rules only.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "seq", "tensor")

# logical axis -> mesh axis (or axes); None is replicated.
DEFAULT_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "seq": "seq",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
}


@contextlib.contextmanager
def use_mesh(
    mesh_shape: Mapping[str, int] | None = None,
    *,
    rules: Mapping[str, Any] | None = None,
    devices: Sequence[Any] | None = None,
) -> Iterator[Mesh]:
    """Makes a mesh and the logical-axis rules current.

    `mesh_shape` gives sizes of `data`, `fsdp`, `seq`, `tensor`; missing ones are 1, and one of
    them may be -1, for all devices that are left. Without it all devices go to `data`.

    Raises ValueError for an unknown axis, and for sizes that are not positive or whose product is
    not the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    mesh_shape = dict(mesh_shape if mesh_shape is not None else {"data": -1})
    if unknown := set(mesh_shape) - set(MESH_AXES):
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; there are {MESH_AXES}")
    sizes = [mesh_shape.get(axis, 1) for axis in MESH_AXES]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        shape = dict(zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"mesh {shape}: sizes must be positive, and one of them may be -1")
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    total = sizes[0] * sizes[1] * sizes[2] * sizes[3]
    if total != len(devices):
        shape = dict(zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"mesh {shape} needs {total} devices; there are {len(devices)}")
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)
    table = tuple({**DEFAULT_RULES, **(rules or {})}.items())
    with jax.set_mesh(mesh), nnx.logical_axis_rules(table):
        yield mesh


def spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of logical axes under the current rules."""
    table = dict(get_logical_axis_rules() or DEFAULT_RULES.items())
    return PartitionSpec(*(table[axis] if axis is not None else None for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation lies over the mesh; outside any mesh does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def parts(axis: str) -> int:
    """Among how many devices a logical axis is split; 1 outside any mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    names = spec(axis)[0]
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[name] for name in names if name is not None and not mesh.empty)


def map_batch(function: Callable[..., Any], *arrays: Any, heads: bool = False) -> Any:
    """`function(*arrays)` by each device on its part of the batch, with `jax.shard_map`.

    For kernels, which the compiler cannot split. The batch is the leading axis of every array and
    of every result, and with `heads` the last axis but one is that of the attention's heads. Where
    the mesh does not divide them, all devices do the whole.
    """
    number = {0: parts("batch")} | ({-2: parts("heads")} if heads else {})
    leaves = jax.tree.leaves(arrays)
    if math.prod(number.values()) == 1 or any(
        x.shape[axis] % n for x in leaves for axis, n in number.items()
    ):
        return function(*arrays)

    def place(x):
        return spec("batch", *(None,) * (x.ndim - 3), "heads", None)

    specs: Any = (spec("batch"),) * 2
    if heads:
        specs = tuple(jax.tree.map(place, x) for x in (arrays, jax.eval_shape(function, *arrays)))
    mesh = jax.sharding.get_abstract_mesh()
    placed, out = specs
    mapped = jax.shard_map(function, mesh=mesh, in_specs=placed, out_specs=out, check_vma=False)
    return mapped(*arrays)


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The NamedSharding of an array with these logical axes."""
    return NamedSharding(mesh, spec(*axes))
