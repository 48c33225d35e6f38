"""Linear maps with named axes, feed-forwards, and how modules are built, stacked and listed."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from fourdstar_jax import sharding

Dtype = jnp.dtype | type
SAVED = "attention"  # the name that `attend_groups` gives its results, for remat policies


class Common(TypedDict):
    """What nearly every layer is made with, to be handed on as `**kw`."""

    dtype: Dtype  # of the arithmetic; parameters are float32
    rngs: nnx.Rngs


class CommonInit(Common):
    """The same for layers whose weights start from a common distribution."""

    init: Initializer | None


def build(make: Callable[..., Any], key: jax.Array, **kwargs: Any) -> Any:
    """`make(**kwargs, rngs=...)` as a plain pytree: Flax NNX in tree mode, no shared references.

    Needs a current mesh (`sharding.use_mesh`), which annotated parameters are placed on.
    """
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        return make(**kwargs, rngs=nnx.Rngs(key))


def named_arrays(model: Any) -> dict[str, Any]:
    """All arrays of a module, parameters and other state, by their place in it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {n.removesuffix("/value"): leaf for n, (_, leaf) in zip(names, leaves, strict=True)}


def linear(
    din: int,
    dout: int,
    axes: tuple[str | None, str | None],
    *,
    use_bias: bool = False,
    init: Initializer | None = None,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """`nnx.Linear` with logical sharding axes (input, output) on its kernel and bias."""
    kernel_init = init if init is not None else nnx.initializers.lecun_normal()
    return nnx.Linear(
        din,
        dout,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nnx.with_partitioning(kernel_init, axes),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros, axes[1:]),
        rngs=rngs,
    )


def count_parameters(model: Any) -> int:
    """Number of trained parameters, of a model or of its shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def bias_of(layer: nnx.Linear) -> Float[Array, " D"]:
    """The bias of a layer that has one."""
    return layer.bias[...]  # pyright: ignore[reportOptionalSubscript]


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], number: int, rngs: nnx.Rngs) -> Any:
    """One module whose parameters have a leading axis of `number` layers, for `lax.scan`."""
    layers = jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), number))

    def annotate(x):
        if isinstance(x, nnx.Variable) and (axes := x.get_metadata().get("out_sharding")):
            return x.copy(out_sharding=("layers", *axes))
        return x

    return jax.tree.map(annotate, layers, is_leaf=lambda x: isinstance(x, nnx.Variable))


Saves = Literal["nothing", "attention", "products"]


def recomputed(
    function: Callable[..., Any], remat: bool, *, in_scan: bool = False, saves: Saves = "nothing"
) -> Callable[..., Any]:
    """`function`; if `remat`, the backward pass makes what lies between its ends again.

    Less memory for a third more arithmetic, or less more where it `saves` something in between: the
    results of attention (`attend_groups` and cuDNN's), or these and all products with weights, so
    that only what is cheap is made again. `in_scan` is for what runs in the body of a scan, where
    the compiler needs no barrier to keep from undoing it.
    """
    if not remat:
        return function
    policies = jax.checkpoint_policies
    policy = None
    if saves != "nothing":

        def cudnn(primitive, *args, **params):
            return primitive.name.startswith("dot_product_attention_fwd")

        named = policies.save_only_these_names(SAVED)
        policy = policies.save_from_both_policies(cudnn, named)
    if saves == "products":
        policy = policies.save_from_both_policies(policy, policies.dots_with_no_batch_dims_saveable)
    return jax.checkpoint(function, prevent_cse=not in_scan, policy=policy)


def product_of_all(x: Float[Array, "*b Din"], *layers: nnx.Linear) -> Float[Array, "*b D"] | None:
    """Linear maps of one input, without biases, as one product, side by side; None to take each.

    Where their weights outweigh the input, as in decoding, to join them costs more than it saves,
    and where several devices share a weight's outputs it would move them: then one by one.
    """
    few = math.prod(x.shape[:-1]) < sum(layer.out_features for layer in layers)
    if few or any(layer.bias is not None for layer in layers):
        return None
    if sharding.parts("heads") > 1 or sharding.parts("mlp") > 1:
        return None
    dtype = layers[0].dtype
    kernel = jnp.concatenate([layer.kernel[...].astype(dtype) for layer in layers], axis=-1)
    return jnp.matmul(x.astype(dtype), kernel)


def joined(x: Float[Array, "*b Din"], *layers: nnx.Linear) -> list[Float[Array, "*b Dout"]]:
    """The results of linear maps of one input, by one product where that pays."""
    y = product_of_all(x, *layers)
    if y is None:
        return [layer(x) for layer in layers]
    return jnp.split(y, np.cumsum([layer.out_features for layer in layers])[:-1], axis=-1)


@jax.custom_vjp
def silu_times(both: Float[Array, "*b D2"]) -> Float[Array, "*b D"]:
    """SiLU of the first half of the last axis times the second half.

    Its gradient is written in one piece, as the product behind it needs it: that of the two halves
    would be put together by a pass of its own. It has no forward-mode derivative.
    """
    gate, up = jnp.split(both, 2, axis=-1)
    return nnx.silu(gate) * up


def _silu_times_bwd(both, cotangent):
    half = cotangent.shape[-1]
    is_gate = jnp.arange(2 * half) < half
    swapped = jnp.roll(both, half, axis=-1)
    gate, up = jnp.where(is_gate, both, swapped), jnp.where(is_gate, swapped, both)
    slope = jax.nn.sigmoid(gate)
    of_gate = up * slope * (1 + gate * (1 - slope))
    given = jnp.concatenate([cotangent, cotangent], axis=-1)
    return (given * jnp.where(is_gate, of_gate, gate * slope),)


silu_times.defvjp(lambda both: (silu_times(both), both), _silu_times_bwd)


def host_weights(model: Any, seed: int = 0) -> Any:
    """A module of shapes, filled: floats N(0, 0.02), the scales of norms around one, the rest zero.

    Made on the host in seconds, for benchmarks; to compile the initialisation may take minutes.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        if "scale" in jax.tree_util.keystr(path):
            values += 1
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, model)


def cast_weights(model: Any) -> Any:
    """The copy of a model whose bfloat16 layers hold bfloat16 weights, for inference or a step.

    Half the memory and no conversion at each call, with the same numbers: `nnx.Linear` and
    `nnx.Conv` of `dtype` bfloat16 round their kernels and biases at every use anyway. (A layer that
    first sums its float32 weights, as `nn.conv.upsampled_conv`, then sums rounded ones.) Float32
    layers, norms and all else stay as they are.
    """

    def is_layer(x):
        return isinstance(x, nnx.Linear | nnx.Conv)

    def cast(x):
        if is_layer(x) and x.dtype == jnp.bfloat16:
            return jax.tree.map(lambda w: w.astype(jnp.bfloat16), x)
        return x

    return jax.tree.map(cast, model, is_leaf=is_layer)


class SwiGLU(nnx.Module):
    """SwiGLU feed-forward block (Shazeer 2020, arXiv:2002.05202), as in Llama."""

    def __init__(
        self, dim: int, hidden_dim: int, *, init=None, out_init=None, dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        make = functools.partial(linear, dtype=dtype, rngs=rngs)
        self.gate = make(dim, hidden_dim, ("embed", "mlp"), init=init)
        self.up = make(dim, hidden_dim, ("embed", "mlp"), init=init)
        self.down = make(hidden_dim, dim, ("mlp", "embed"), init=out_init or init)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        both = product_of_all(x, self.gate, self.up)
        hidden = nnx.silu(self.gate(x)) * self.up(x) if both is None else silu_times(both)
        return self.down(hidden)


class Mlp(nnx.Module):
    """Linear, GELU, Linear. `approximate=True` is the tanh form."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        out_dim: int,
        *,
        use_bias: bool = True,
        approximate: bool = True,
        init=None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(linear, use_bias=use_bias, init=init, dtype=dtype, rngs=rngs)
        self.up = make(dim, hidden_dim, ("embed", "mlp"))
        self.down = make(hidden_dim, out_dim, ("mlp", "embed"))
        self.approximate = approximate

    def __call__(self, x: Float[Array, "*b Din"]) -> Float[Array, "*b Dout"]:
        return self.down(nnx.gelu(self.up(x), approximate=self.approximate))
