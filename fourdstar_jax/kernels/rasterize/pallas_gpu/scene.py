"""From a scene to the planes that these kernels take, and from planes to images."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.kernels.rasterize.implementation import Images
from fourdstar_jax.kernels.rasterize.pallas_gpu.call import blend
from fourdstar_jax.kernels.rasterize.pallas_gpu.spec import Inputs
from fourdstar_jax.kernels.rasterize.projection import project_planes


def blend_scene(
    gaussians, cameras, features, usable, *, with_depths, capacity, interpret, **options
) -> Images:
    """An `Implementation.blend`; images share colours and features wherever the scene does."""
    # The projection is quick to compute again, and what autodiff would keep of it is large.
    projected = jax.checkpoint(functools.partial(project_planes, **options))(
        gaussians, cameras, usable
    )
    *batch, views, num = projected.depths.shape
    shared = [gaussians.colors]
    shared.append(jnp.zeros((*gaussians.colors.shape[:-1], 0)) if features is None else features)
    leading = np.broadcast_shapes(*(x.shape[:-2] for x in shared))
    sets = 1 if math.prod(leading) == 1 else math.prod(batch)
    leading = (1,) * len(batch) if sets == 1 else tuple(batch)
    shared = [
        jnp.broadcast_to(x, (*leading, num, x.shape[-1])).reshape(sets, num, x.shape[-1])
        for x in shared
    ]
    inputs = Inputs(*(x.reshape(-1, num) for x in projected[:7]), *shared)
    blended = blend(
        inputs,
        with_depths=with_depths,
        width=options["width"],
        height=options["height"],
        capacity=capacity,
        interpret=interpret,
    )

    def images(x):  # [C, I, h, w] to [..., V, h, w, C]
        return jnp.moveaxis(x, 0, -1).reshape(*batch, views, *x.shape[2:], x.shape[0])

    left = images(blended.left[None])
    first = 3 + with_depths
    return Images(
        colors=images(blended.channels[:3]),
        alphas=1 - left,
        depths=images(blended.channels[3:4]) if with_depths else None,
        features=None if features is None else images(blended.channels[first:]),
        left=left,
        num_pairs=blended.num_pairs,
        overflow=blended.overflow,
    )
