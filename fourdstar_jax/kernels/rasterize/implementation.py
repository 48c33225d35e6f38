"""`Implementation`: all that `rasterize` knows of a way to render, and what it gets from one."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class Images(NamedTuple):
    """Blended images of a scene, before the background is put behind them."""

    colors: Float[Array, "*b V h w 3"]
    alphas: Float[Array, "*b V h w 1"]
    depths: Float[Array, "*b V h w 1"] | None  # expected depth times alpha
    features: Float[Array, "*b V h w F"] | None
    left: Float[Array, "*b V h w 1"]  # transmittance
    num_pairs: Int[Array, ""]  # (Gaussian, tile), whether or not they fitted
    overflow: Bool[Array, ""]


class Implementation(NamedTuple):
    """One way to render. `api.IMPLEMENTATIONS` names them all.

    `blend(gaussians, cameras, features, usable, *, width, height, near, far, eps2d, antialiased,
    with_depths, capacity, interpret)` gives `Images`, differentiable and under jit and vmap;
    `features` may be None, Gaussians that are not `usable` show nothing. `interpret` asks for
    kernels in plain JAX, on any device.

    `why_not()` tells why it does not run on the default device, to be read after its name.
    """

    tile: int  # pixels; capacities count pairs of a Gaussian and a tile of this size
    blend: Callable[..., Images]
    why_not: Callable[[], str | None] = lambda: None
    float32_only: bool = False
    # jax.shard_map with check_vma=True marks arrays in a way that not every kernel can follow.
    under_check_vma: bool = True
    default_on: str | None = None  # the backend where it is the default, if it runs there
