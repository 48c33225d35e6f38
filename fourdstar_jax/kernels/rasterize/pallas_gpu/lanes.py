"""Lane-level operations for Mosaic GPU kernels, and a twin of each in plain JAX.

Pallas on Mosaic GPU speaks of warpgroups: 128 lanes that hold an array of shape (128,), one element
each. It has no gathers, no votes and no control flow of a single warp of 32 lanes. The methods of
`GpuLanes` add those, each a few lines of `plgpu.inline_mgpu`; everything else in a kernel stays
plain Pallas. No other file reaches below Pallas.

`Lockstep` gives the same methods their meaning in plain JAX, so that `launch(..., interpret=True)`
runs the same kernel bodies on any device, all four warps of a block in step. There the value of
`uniform` is the largest of the block's, so a loop may go on for warps that are through: bodies are
written such that those turns change nothing.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fourdstar_jax.kernels.devices import vary_like

LANES = 128
WARP = 32


def _as_list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


class Lockstep:
    """The operations on arrays of (128,) in plain JAX; refs are `jax.new_ref`s.

    `faults` counts accesses outside of a ref, which on a GPU would be illegal.
    """

    def __init__(self, faults, like):
        self.faults = faults
        self.like = like  # within shard_map, loops begin with arrays that differ as these do

    def lanes(self):
        """The index of each lane, 0 to 127."""
        return jnp.arange(LANES, dtype=jnp.int32)

    def full(self, value, dtype=jnp.float32):
        """One value in all lanes, as an array that loops may change."""
        return vary_like(self.like, jnp.full(LANES, value, dtype))[0]

    def gather(self, ref, index, width=1):
        """`ref[index]` for each lane, or `width` numbers from there on, a multiple of width."""
        self._check(ref, index, width, jnp.ones(LANES, bool))
        out = [ref[jnp.clip(index + i, 0, ref.shape[0] - 1)] for i in range(width)]
        return out if width > 1 else out[0]

    def scatter(self, ref, index, values, where):
        """Writes one value of each lane, or several to neighbouring places, where `where` holds."""
        values = _as_list(values)
        self._check(ref, index, len(values), where)
        for i, value in enumerate(values):
            safe = jnp.clip(index + i, 0, ref.shape[0] - 1)
            # One lane after the other: lanes that do not write must not undo what others wrote.
            new = (
                ref[...]
                .at[jnp.where(where, safe, ref.shape[0])]
                .set(jnp.broadcast_to(value, (LANES,)).astype(ref.dtype), mode="drop")
            )
            ref[...] = new

    def _check(self, ref, index, width, where):
        bad = where & ((index < 0) | (index + width > ref.shape[0]))
        self.faults[0] = self.faults[0] + jnp.sum(bad, dtype=jnp.int32)

    def _warps(self, combine, x):
        """A reduction over each warp, for all its lanes."""
        x = combine(x.reshape(-1, WARP))
        return jnp.repeat(x, WARP)

    def ballot(self, condition):
        """Bit i of the result says whether the warp's lane i meets the condition."""
        bits = jnp.where(condition, jnp.uint32(1) << (self.lanes() % WARP).astype(jnp.uint32), 0)
        bits = self._warps(lambda x: jnp.sum(x, axis=1, dtype=jnp.uint32), bits)
        return lax.bitcast_convert_type(bits, jnp.int32)

    def count_bits(self, x):
        """How many bits of each lane's int32 are set."""
        return lax.population_count(x)

    def warp_max(self, x):
        """The largest int32 in each warp, for all its lanes."""
        return self._warps(lambda x: jnp.max(x, axis=1), x)

    def warp_or(self, x):
        """The bitwise or of each warp's int32, for all its lanes."""
        return self._warps(lambda x: lax.reduce(x, np.int32(0), lax.bitwise_or, (1,)), x)

    def uniform(self, x):
        """An int32 that is equal within each warp as a scalar, for control flow of that warp."""
        return jnp.max(x)

    def some(self, condition):
        """1 if any lane of the warp meets the condition, else 0: a scalar, as `uniform` gives."""
        return self.uniform(_int(condition))

    def warp_barrier(self):
        """Orders the warp's accesses to shared memory."""

    def block_barrier(self):
        """Orders the block's accesses to shared memory."""


def while_less(bound, body, init):
    """Runs `init = body(k, init)` for k = 0, 1, ... below a bound that only the warp knows."""
    _, out = lax.while_loop(
        lambda x: x[0] < bound, lambda x: (x[0] + 1, body(x[0], x[1])), (jnp.int32(0), init)
    )
    return out


def when(condition, body):
    """Runs `body()`, for what it writes, where a condition of the warp holds."""
    lax.cond(condition, lambda: (body(), None)[1], lambda: None)


def launch(body, inputs, *, outputs, grid, scratch=(), refs=(), interpret=False, static=()):
    """Runs `body(lanes, block, *static, *inputs, *refs, *outputs, *scratch)` for `grid` blocks.

    `inputs` are arrays of any shape, which bodies see flat, `refs` are refs (`jax.new_ref`) that
    are written in place, `outputs` and `scratch` (shared memory) shapes and types. Returns the
    outputs, which hold anything where no lane wrote.
    """
    inputs = vary_like(inputs, *(x.reshape(-1) for x in inputs))
    if interpret:
        return _launch_lockstep(body, inputs, outputs, grid, scratch, refs, static)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(*args):
        body(GpuLanes(), lax.axis_index("block"), *static, *args)

    kernel.__name__ = body.__name__.strip("_")  # what profilers show
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(
                x.shape, x.dtype, manual_axis_type=jax.typeof(inputs[0]).manual_axis_type
            )
            for x in outputs
        ],
        scratch_types=[plgpu.SMEM(x.shape, x.dtype) for x in scratch],
        grid=(grid,),
        grid_names=("block",),
        # Barriers are placed by hand: most of the code needs none, for warps work on their own.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*inputs, *refs)


def _launch_lockstep(body, inputs, outputs, grid, scratch, refs, static):
    def poison(x):
        value = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else np.iinfo(x.dtype).max // 3
        return jax.new_ref(vary_like(inputs, jnp.full(x.shape, value, x.dtype))[0])

    faults = jax.new_ref(vary_like(inputs, jnp.zeros(1, jnp.int32))[0])
    made = [poison(x) for x in outputs]
    reads = [jax.new_ref(x) for x in inputs]

    def block(index, _):
        shared = [poison(x) for x in scratch]
        body(Lockstep(faults, inputs), index, *static, *reads, *refs, *made, *shared)
        return _

    lax.fori_loop(0, grid, block, 0)
    wrong = jax.freeze(faults)[0] > 0
    results = []
    for ref in made:
        x = jax.freeze(ref)
        results.append(jnp.where(wrong, jnp.asarray(-1, x.dtype) * 10**4, x))
    return results


class GpuLanes:
    """The operations that `Lockstep` documents, inlined into a Mosaic GPU kernel."""

    def lanes(self):
        plgpu, _ = _mosaic()
        return plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=_lane_layout())

    def full(self, value, dtype=jnp.float32):
        return _spread(jnp.full(LANES, value, dtype))

    def gather(self, ref, index, width=1):
        plgpu, m = _mosaic()
        dtype = ref.dtype
        out = plgpu.ShapeDtypeStruct((LANES,), dtype, layout=_lane_layout())

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _lane_layout()), return_type=[out] * width)
        def inline(_, ref, index):
            element = m.mutils.dtype_to_ir_type(dtype)
            pointer = m.address(ref, m.get(index), element)
            if width == 1:
                return [m.put(m.llvm.load(element, pointer))]
            vector = m.ir.VectorType.get((width,), element)
            size = width * math.ceil(jnp.dtype(dtype).itemsize)
            x = m.llvm.load(vector, pointer, alignment=size)
            return [m.put(m.extract(x, i)) for i in range(width)]

        result = inline(ref, _spread(index))
        return result if width > 1 else result[0]

    def scatter(self, ref, index, values, where):
        plgpu, m = _mosaic()
        values = [_spread(v) for v in _as_list(values)]
        layouts = (_lane_layout(),) * (2 + len(values))
        dtype = jnp.dtype(ref.dtype)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *layouts))
        def inline(_, ref, index, where, *values):
            element = m.mutils.dtype_to_ir_type(dtype)
            branch = m.scf.IfOp(m.nonzero(m.get(where)))
            with m.ir.InsertionPoint(branch.then_block):
                pointer = m.address(ref, m.get(index), element)
                values = [m.get(v) for v in values]
                if dtype.itemsize == 2:
                    values = [m.arith.trunci(element, v) for v in values]
                size = len(values) * dtype.itemsize
                if len(values) > 1:
                    kind = m.ir.VectorType.get((len(values),), element)
                    m.llvm.store(m.vector.from_elements(kind, values), pointer, alignment=size)
                else:
                    m.llvm.store(values[0], pointer)
                m.scf.yield_([])

        inline(ref, _spread(index), _spread(_int(where)), *values)

    def ballot(self, condition):
        def inline(m, x):
            ballot = m.nvvm.VoteSyncKind.ballot
            return m.nvvm.vote_sync(m.constant(-1), m.nonzero(x), ballot, results=[m.i32])

        return _per_lane(inline, _int(condition))

    def count_bits(self, x):
        return _per_lane(lambda m, x: m.llvm.intr_ctpop(x), x)

    def warp_max(self, x):
        return _per_lane(lambda m, x: m.redux(x, "MAX"), x)

    def warp_or(self, x):
        return _per_lane(lambda m, x: m.redux(x, "OR"), x)

    def uniform(self, x):
        plgpu, m = _mosaic()
        scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

        @plgpu.inline_mgpu(arg_types=(_lane_layout(),), return_type=scalar)
        def inline(_, x):
            # Called a splat over the warpgroup, but each warp sees its own: that is the point.
            return m.mgpu.FragmentedArray.splat(m.get(x), (), is_signed=True)

        return inline(_spread(x))

    def some(self, condition):
        return self.uniform(_per_lane(lambda m, x: m.any(x), _int(condition)))

    def warp_barrier(self):
        plgpu, m = _mosaic()
        plgpu.inline_mgpu()(lambda _: m.mutils.warp_barrier())()

    def block_barrier(self):
        plgpu, m = _mosaic()
        plgpu.inline_mgpu()(lambda _: m.mutils.warpgroup_barrier())()


def _int(condition):
    return jnp.where(condition, jnp.int32(1), jnp.int32(0))


def _lane_layout():
    plgpu, _ = _mosaic()
    return plgpu.Layout.WG_STRIDED((LANES,), 1)


def _spread(x):
    """Gives each lane an element, also of what is equal in all and Pallas holds as one number."""
    plgpu, _ = _mosaic()
    return plgpu.layout_cast(jnp.broadcast_to(x, (LANES,)), _lane_layout())


def _per_lane(operation, x):
    """Applies a function of MLIR values, int32 to int32, in every lane."""
    plgpu, m = _mosaic()
    out = plgpu.ShapeDtypeStruct((LANES,), jnp.int32, layout=_lane_layout())

    @plgpu.inline_mgpu(arg_types=(_lane_layout(),), return_type=out)
    def inline(_, x):
        return m.put(operation(m, m.get(x)))

    return inline(_spread(x))


class _Mlir:
    """MLIR's builders and the few moves that the operations above share."""

    def __init__(self):
        from jax.experimental.mosaic import gpu as mgpu
        from jax.experimental.mosaic.gpu import utils as mutils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

        self.mgpu, self.mutils, self.ir = mgpu, mutils, ir
        self.arith, self.llvm, self.nvvm, self.scf, self.vector = arith, llvm, nvvm, scf, vector

    @property
    def i32(self):
        return self.ir.IntegerType.get_signless(32)

    def constant(self, value):
        return self.arith.constant(self.i32, value)

    def nonzero(self, x):
        return self.arith.cmpi(self.arith.CmpIPredicate.ne, x, self.constant(0))

    def any(self, x):
        kind = self.nvvm.VoteSyncKind.any
        vote = self.nvvm.vote_sync(
            self.constant(-1), self.nonzero(x), kind, results=[self.ir.IntegerType.get_signless(1)]
        )
        return self.arith.extui(self.i32, vote)

    def redux(self, x, kind):
        return self.nvvm.redux_sync(x, getattr(self.nvvm.ReductionKind, kind), self.constant(-1))

    def extract(self, x, i):
        return self.vector.extract(x, dynamic_position=[], static_position=[i])

    def get(self, array):
        """This lane's element of a lane array."""
        return self.extract(array.registers.flat[0], 0)

    def put(self, value):
        """A lane array from each lane's element."""
        kind = self.ir.VectorType.get((1,), value.type)
        register = self.vector.from_elements(kind, [value])
        registers = np.array([register], dtype=object)
        signed = True if isinstance(value.type, self.ir.IntegerType) else None
        layout = self.mgpu.WGStridedFragLayout((LANES,), 1)
        return self.mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

    def address(self, ref, index, element):
        base = self.mutils.memref_ptr(ref)
        dynamic = -(2**31)
        flags = self.llvm.GEPNoWrapFlags.none
        return self.llvm.getelementptr(base.type, base, [index], [dynamic], element, flags)


def _mosaic():
    """Pallas for Mosaic GPU and MLIR's builders, imported where a kernel for a GPU is traced."""
    global _MLIR
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if _MLIR is None:
        _MLIR = _Mlir()
    return plgpu, _MLIR


_MLIR = None
