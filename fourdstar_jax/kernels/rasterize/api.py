"""`rasterize`: differentiable rendering of 3D Gaussians, the call that models and users make."""

import functools
import math
import typing
import warnings
from typing import Any, SupportsIndex

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.kernels.arguments import as_array, whole_number, widest_float
from fourdstar_jax.kernels.rasterize import binning, pallas_gpu, pallas_tpu, reference, xla
from fourdstar_jax.kernels.rasterize.binning import pick_capacity
from fourdstar_jax.kernels.rasterize.implementation import Implementation
from fourdstar_jax.kernels.rasterize.projection import usable_mask
from fourdstar_jax.kernels.rasterize.rows import Counts, from_rows
from fourdstar_jax.kernels.rasterize.tiles import Grid
from fourdstar_jax.types import Cameras, Gaussians, Rendered

MAX_FEATURES = 16


def _blend_reference(projected, channels, *, width, height, capacity):
    """The definition, which needs no room for pairs; they are counted as for "xla"."""
    del capacity
    count = binning.count_pairs(projected, Grid(xla.TILE, width, height))
    images = reference.blend(projected, channels, width=width, height=height)
    return images, Counts(count, jnp.zeros((), bool))


IMPLEMENTATIONS = {
    "reference": Implementation(xla.TILE, from_rows(_blend_reference)),
    "xla": Implementation(xla.TILE, from_rows(xla.blend)),
    "pallas_gpu": Implementation(
        pallas_gpu.TILE,
        pallas_gpu.blend_scene,
        pallas_gpu.why_not,
        float32_only=True,
        under_check_vma=False,
        default_on="gpu",
    ),
    "pallas_tpu": Implementation(
        pallas_tpu.TILE, from_rows(pallas_tpu.blend), pallas_tpu.why_not, float32_only=True
    ),
}
FALLBACK = "xla"  # by default, where no kernel of its own runs


@typing.no_type_check  # arguments are checked below, in the tests as elsewhere
def rasterize(
    gaussians: Gaussians,
    cameras: Cameras,
    *,
    width: SupportsIndex,
    height: SupportsIndex,
    features: Any = None,
    background: Any = None,
    near: float = 0.01,
    far: float = math.inf,
    eps2d: float = 0.3,
    antialiased: bool = False,
    with_depths: bool = True,
    capacity: SupportsIndex | None = None,
    implementation: str | None = None,
) -> Rendered:
    """Renders 3D Gaussians into every camera (3D Gaussian Splatting, Kerbl et al. 2023).

    Values follow gsplat 1.5.3 in its classic mode: EWA projection; alpha = min(opacity *
    exp(-sigma), 0.999), skipped below 1/255; front to back by camera z, equal depths by index; a
    pixel ends before the Gaussian that would leave it a transmittance of 1e-4 or less. Pixel
    centres lie at +0.5.

    Leading axes of Gaussians `[..., G, *]` and cameras `[..., V, *]` broadcast against each other:
    `[B, T]` Gaussians and `[B, 1]` cameras give renders `[B, T, V, h, w, 3]`.

    Differentiable in means, quats, scales, opacities, colors, features, viewmats, Ks and
    background: first derivatives in reverse mode (jax.grad, jax.vjp). Forward mode (jax.jvp,
    jax.jacfwd) raises JAX's TypeError, a second derivative NotImplementedError. jit, vmap and
    shard_map work (on GPUs with `check_vma=False`).

    A Gaussian with a NaN or an infinity anywhere is dropped whole (`usable_mask` finds those), and
    so is one whose projection leaves the range of the type (a scale of 1e30); a zero quaternion is
    the identity, the sign of a scale is ignored. Computes in float64 if any array is that, else in
    float32; lists and numbers stand for arrays of their shape.

    Args:
      gaussians, cameras: intrinsics are [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] and viewmats end in a
        row of 0, 0, 0, 1: checked where they are not traced.
      width, height: image size in pixels.
      features: up to 16 further channels `[..., G, F]`, blended as colours are, over zero.
      background: colour behind everything, broadcastable to `[..., V, 3]`; black by default.
      near, far: camera z outside of which Gaussians are dropped; scene units.
      eps2d: added to the diagonal of the 2D covariance, pixels squared.
      antialiased: scales opacities by sqrt(det / det_blurred) (Mip-Splatting, Yu et al. 2024).
      with_depths: also render expected depth; `depths` is None without.
      capacity: room for (Gaussian, tile) pairs over the whole call; memory and time follow it. By
        default there is room for every pair there could be if those are at most 4,194,304, so that
        nothing can overflow, and above that for 16 pairs for each Gaussian and image, at least
        1,048,576; a call with concrete arrays renders again with room for all where that was too
        little. Where pairs do not fit under a trace (jit, grad, vmap) or in a capacity that was
        given, `overflow` is set and the images are not to be used; `pick_capacity` chooses a
        capacity from a count. A count that does not fit int32 is the largest one, and
        overflows. `reference` ignores it.
      implementation: "reference" (dense), "xla" (tiles, any device), "pallas_gpu" (kernels for
        Hopper or newer GPUs, float32), "pallas_tpu" (kernels for TPUs; they have not run on one
        yet). By default "pallas_gpu" where it runs, else "xla".

    Raises:
      ValueError: an argument has a wrong shape, type or size; the message names it.
      NotImplementedError: this implementation does not run here; the message says which do.
    """
    if implementation is not None and implementation not in tuple(IMPLEMENTATIONS):
        raise ValueError(f"{implementation=} must be one of {tuple(IMPLEMENTATIONS)}")
    width, height = whole_number("width", width, 1), whole_number("height", height, 1)
    if capacity is not None:
        capacity = whole_number("capacity", capacity, 1, binning.MAX_PAIRS)
    near, far, eps2d = _check_options(
        near, far, eps2d, antialiased=antialiased, with_depths=with_depths
    )
    gaussians, cameras, features, background, batch = _check_arrays(
        gaussians, cameras, features, background
    )
    arrays = (gaussians, cameras, features, background)
    if implementation is None:
        implementation = default_implementation(arrays)
    elif reason := _why_not(implementation, arrays):
        others = [repr(name) for name in reversed(IMPLEMENTATIONS) if not _why_not(name, arrays)]
        raise NotImplementedError(
            f"implementation {implementation!r} {reason}; {' and '.join(others)} run here"
        )
    options: dict[str, Any] = dict(
        width=width,
        height=height,
        near=near,
        far=far,
        eps2d=eps2d,
        antialiased=bool(antialiased),
        with_depths=bool(with_depths),
        implementation=implementation,
    )
    images, num = math.prod(batch) * cameras.Ks.shape[-3], max(gaussians.means.shape[-2], 1)
    grid = Grid(IMPLEMENTATIONS[implementation].tile, width, height)
    if images * max(num, grid.columns * grid.rows) > binning.MAX_PAIRS:
        raise ValueError(
            f"{images} images of {width}x{height} pixels with {num} gaussians each are too many "
            "for a call: neither their tiles nor gaussians fit int32"
        )
    if images * width * height > np.iinfo(np.int32).max:
        raise ValueError(f"{images} images of {width}x{height} pixels are too many for a call")
    if capacity is not None:
        return _rasterize(*arrays, **options, capacity=capacity)
    capacity = binning.default_capacity(images, num, grid)
    result = _rasterize(*arrays, **options, capacity=capacity)
    if isinstance(result.overflow, jax.core.Tracer) or not result.overflow:
        return result
    count = int(result.num_intersections)
    if count == np.iinfo(np.int32).max:
        raise ValueError(
            "the gaussians touch more than 2**31 tiles in all: render fewer images or "
            "gaussians in a call, or smaller scales"
        )
    return _rasterize(*arrays, **options, capacity=pick_capacity(count))


def default_implementation(arrays: Any) -> str:
    """The implementation that runs best here on a tree of arrays; warns if a better one cannot."""
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.default_on != jax.default_backend():
            continue
        if implementation.float32_only and _dtype(arrays) != jnp.float32:
            continue
        reason = _why_not(name, arrays)
        if reason is None:
            return name
        warnings.warn(f"rasterize takes {FALLBACK!r}, for {name!r} {reason}", stacklevel=3)
    return FALLBACK


def _why_not(name: str, arrays: Any) -> str | None:
    """The reason why an implementation does not run here on these arrays, to follow its name."""
    implementation = IMPLEMENTATIONS[name]
    if implementation.float32_only and _dtype(arrays) != jnp.float32:
        return f"takes float32, not {_dtype(arrays)}"
    varying = any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays))
    if varying and not implementation.under_check_vma:
        return "runs within jax.shard_map with check_vma=False only"
    return implementation.why_not()


def _dtype(arrays):
    return jax.tree.leaves(arrays)[0].dtype


def _check_options(near, far, eps2d, **flags) -> tuple[float, float, float]:
    numbers = []
    for name, value in (("near", near), ("far", far), ("eps2d", eps2d)):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):  # JAX's error for a traced number is a TypeError
            raise ValueError(f"{name}={value!r} must be a number, known when compiling") from None
    near, far, eps2d = numbers
    if not 0 < near < far:
        raise ValueError(f"near={near} and far={far} must satisfy 0 < near < far")
    if not 0 <= eps2d < math.inf:
        raise ValueError(f"eps2d={eps2d} must be finite and not negative")
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}={value!r} must be True or False")
    return near, far, eps2d


def _check_values(viewmats, Ks, background):
    """Checks what cameras and background hold, where that is known: tracers are taken as they are.

    All others may be anything: what is not finite of a Gaussian hides that Gaussian.
    """
    for name, x, axes, check, wanted in (
        ("cameras.viewmats", viewmats, 2, _is_rigid, "finite, with a last row of 0, 0, 0, 1"),
        (
            "cameras.Ks",
            Ks,
            2,
            _is_pinhole,
            "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]], finite, fx and fy above 0",
        ),
        ("background", background, 1, lambda c: np.isfinite(c).all(1), "finite"),
    ):
        if x is None or isinstance(x, jax.core.Tracer):
            continue
        if not getattr(x, "is_fully_addressable", True):
            continue
        rows = np.atleast_1d(np.asarray(x)).astype(np.float64)
        rows = rows.reshape(-1, *rows.shape[rows.ndim - axes :])
        good = check(rows)
        if not good.all():
            raise ValueError(f"{name} must be {wanted}, not {rows[np.argmin(good)].tolist()}")


def _is_rigid(m):
    return np.isfinite(m).all((1, 2)) & (np.abs(m[:, 3] - [0, 0, 0, 1]) <= 1e-4).all(1)


def _is_pinhole(K):
    entries = K[:, [0, 1, 2, 2, 2], [1, 0, 0, 1, 2]]  # skew, and the last row
    zeros = (np.abs(entries - [0, 0, 0, 0, 1]) <= 1e-4).all(1)
    return np.isfinite(K).all((1, 2)) & zeros & (K[:, 0, 0] > 0) & (K[:, 1, 1] > 0)


def _check_arrays(gaussians, cameras, features, background):
    """Checks types and shapes; returns all as arrays of one float type, and the leading axes."""
    if not isinstance(gaussians, Gaussians):
        raise ValueError(f"gaussians must be a Gaussians, not {type(gaussians).__name__}")
    if not isinstance(cameras, Cameras):
        raise ValueError(f"cameras must be a Cameras, not {type(cameras).__name__}")
    named = {f"gaussians.{k}": v for k, v in gaussians._asdict().items()}
    named |= {f"cameras.{k}": v for k, v in cameras._asdict().items()}
    if features is not None:
        named["features"] = features
    if background is not None:
        named["background"] = background
    given = {name: as_array(name, x, "floats") for name, x in named.items()}
    dtype = widest_float(given)
    named = {name: jnp.asarray(x, dtype) for name, x in given.items()}

    means = named["gaussians.means"]
    if means.ndim < 2 or means.shape[-1] != 3:
        raise ValueError(f"gaussians.means must be [..., G, 3], not {means.shape}")
    leading, num = means.shape[:-2], means.shape[-2]
    for field, tail in (("quats", (4,)), ("scales", (3,)), ("opacities", ()), ("colors", (3,))):
        shape, wanted = named[f"gaussians.{field}"].shape, (*leading, num, *tail)
        if shape != wanted:
            raise ValueError(f"gaussians.{field} must be {wanted} as the means are, not {shape}")
    viewmats, Ks = named["cameras.viewmats"], named["cameras.Ks"]
    if viewmats.ndim < 3 or viewmats.shape[-2:] != (4, 4):
        raise ValueError(f"cameras.viewmats must be [..., V, 4, 4], not {viewmats.shape}")
    if Ks.shape != (*viewmats.shape[:-2], 3, 3):
        wanted = (*viewmats.shape[:-2], 3, 3)
        raise ValueError(f"cameras.Ks must be {wanted} as the viewmats are, not {Ks.shape}")
    views = viewmats.shape[-3]
    if views == 0:
        raise ValueError(f"cameras.viewmats hold no camera: {viewmats.shape}")
    try:
        batch = np.broadcast_shapes(leading, viewmats.shape[:-3])
    except ValueError:
        raise ValueError(
            f"leading axes of gaussians {leading} and cameras {viewmats.shape[:-3]} "
            "must broadcast against each other"
        ) from None
    if 0 in batch:
        raise ValueError(f"leading axes {batch} of gaussians and cameras must not be empty")
    features = named.get("features")
    if features is not None:
        if features.ndim < 2 or features.shape[-2] != num:
            raise ValueError(f"features must be [..., G, F] with G={num}, not {features.shape}")
        if not 0 < features.shape[-1] <= MAX_FEATURES:
            raise ValueError(
                f"features must have 1 to {MAX_FEATURES} channels, not {features.shape[-1]}"
            )
        try:
            fits = np.broadcast_shapes(batch, features.shape[:-2]) == batch
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"features {features.shape} must broadcast to {(*batch, num)} + (F,)")
    background = named.get("background")
    if background is None:
        background = jnp.zeros(3, dtype)
    try:
        fits = np.broadcast_shapes((*batch, views, 3), background.shape) == (*batch, views, 3)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"background must broadcast to {(*batch, views, 3)}, not {background.shape}"
        )
    _check_values(given["cameras.viewmats"], given["cameras.Ks"], given.get("background"))
    gaussians = Gaussians(*(named[f"gaussians.{field}"] for field in Gaussians._fields))
    background = jnp.broadcast_to(background, (*background.shape[:-1], 3))
    return gaussians, Cameras(viewmats, Ks), features, background, batch


@functools.partial(
    jax.jit,
    static_argnames=(
        "width",
        "height",
        "near",
        "far",
        "eps2d",
        "antialiased",
        "with_depths",
        "capacity",
        "implementation",
        "interpret",
    ),
)
def _rasterize(
    gaussians,
    cameras,
    features,
    background,
    *,
    implementation,
    interpret=False,
    **options,
) -> Rendered:
    gaussians, features, usable = _drop_unusable(gaussians, features)
    images = IMPLEMENTATIONS[implementation].blend(
        gaussians, cameras, features, usable, interpret=interpret, **options
    )
    pictures = (images.colors, images.alphas, images.depths, images.features, images.left)
    inputs = (gaussians, cameras, features)
    colors, alphas, depths, blended_features, left = _differentiable_once(pictures, inputs)
    if depths is not None:
        hit = alphas > 0
        depths = jnp.where(hit, depths / jnp.where(hit, alphas, 1.0), 0.0)
    return Rendered(
        renders=colors + left * background[..., None, None, :],
        alphas=alphas,
        depths=depths,
        features=blended_features,
        num_intersections=images.num_pairs,
        overflow=images.overflow,
    )


@jax.custom_vjp
def _differentiable_once(pictures, inputs):
    """The pictures; a derivative of their gradient is refused in words."""
    del inputs
    return pictures


def _differentiable_once_fwd(pictures, inputs):
    return pictures, inputs


def _differentiable_once_bwd(inputs, cotangents):
    return _no_further(cotangents, inputs), None


_differentiable_once.defvjp(_differentiable_once_fwd, _differentiable_once_bwd)


@jax.custom_vjp
def _no_further(cotangents, inputs):
    del inputs
    return cotangents


def _refuse(*_):
    raise NotImplementedError(
        "rasterize has first derivatives in reverse mode only (jax.grad, jax.vjp, jax.jacrev): no "
        "gradients of its gradients, and no hessians"
    )


_no_further.defvjp(_refuse, _refuse)


def _drop_unusable(gaussians, features):
    """Makes unusable Gaussians harmless, and gives an empty scene one of them."""
    if gaussians.means.shape[-2] == 0:
        batch = gaussians.opacities.shape[:-1]
        unusable = jnp.full((*batch, 1), jnp.nan, gaussians.means.dtype)
        gaussians = Gaussians(
            *(
                jnp.broadcast_to(unusable[(..., *(None,) * len(tail))], (*batch, 1, *tail))
                for tail in ((3,), (4,), (3,), (), (3,))
            )
        )
        if features is not None:
            features = jnp.zeros((1, features.shape[-1]), features.dtype)
    usable = usable_mask(gaussians, features)
    gaussians = Gaussians(
        *(
            jnp.where(
                usable.reshape(*usable.shape, *(1,) * (x.ndim - gaussians.opacities.ndim)), x, 0.0
            )
            for x in gaussians
        )
    )
    if features is not None:
        features = jnp.where(usable[..., None], features, 0.0)
    return gaussians, features, usable
