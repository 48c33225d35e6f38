"""Convolutions against their definitions, and the quick form of a convolution after doubling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import sharding
from fourdstar_jax.nn import conv


def test_stride_two_pads_evenly():
    layer = conv.conv(1, 1, 3, stride=2, axis=None, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...])[..., 0, 0]
    image = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    padded = np.pad(image, 1)
    wanted = [
        [np.sum(kernel * padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]) for j in range(3)]
        for i in range(3)
    ]
    got = layer(jnp.asarray(image)[None, ..., None])[0, ..., 0]
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_average_pool_does_not_count_padding():
    np.testing.assert_allclose(conv.average_pool(jnp.ones((1, 6, 6, 2))), 1, rtol=1e-6)


def test_blur_pool_against_numpy():
    """Also of the picture moved by a pixel: the other phase of the same blurred picture."""
    x = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    x[-1], x[:, -1] = 0, 0
    taps = np.array([1, 3, 3, 1]) / 8
    padded = np.pad(x, 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4))
    blurred = np.einsum("ijkl,k,l->ij", windows, taps, taps)  # at every place, [11, 9]

    def pooled(x):
        return conv.blur_pool(jnp.asarray(x)[None, ..., None])[0, ..., 0]

    np.testing.assert_allclose(pooled(x), blurred[1::2, 1::2], atol=1e-6)
    np.testing.assert_allclose(pooled(padded[1:-3, 1:-3]), blurred[:-1:2, :-1:2], atol=1e-6)
    # The finest stripes, which plain subsampling would show as black or white, vanish.
    stripes = np.tile([0.0, 1.0], (8, 4)).astype(np.float32)
    np.testing.assert_allclose(pooled(stripes)[1:-1, 1:-1], 0.5, atol=1e-6)
    with pytest.raises(ValueError, match="3x2 pixels"):
        conv.blur_pool(jnp.zeros((1, 2, 3, 1)))


def test_depth_to_space_and_upsample():
    x = jnp.arange(8.0).reshape(1, 1, 2, 4)
    np.testing.assert_array_equal(conv.depth_to_space(x)[0, ..., 0], [[0, 1, 4, 5], [2, 3, 6, 7]])
    np.testing.assert_array_equal(
        conv.upsample(x[..., :1])[0, ..., 0], [[0, 0, 4, 4], [0, 0, 4, 4]]
    )


def test_upsampled_conv_is_the_convolution_of_the_large_picture():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        layer = conv.conv(5, 7, 3, bias=range(7), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (2, 3, 4, 5))

    def direct(layer, x):
        return jnp.sum(jnp.sin(layer(conv.upsample(x))))

    def ours(layer, x):
        return jnp.sum(jnp.sin(conv.upsampled_conv(layer, x)))

    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(
            conv.upsampled_conv(layer, x), layer(conv.upsample(x)), atol=2e-6
        )
        wanted = jax.grad(direct, argnums=(0, 1))(layer, x)
        found = jax.grad(ours, argnums=(0, 1))(layer, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kind", [conv.PointConv, conv.DepthwiseConv])
def test_convolutions_in_other_words(kind):
    """As the library's, values and gradients; in half precision within its rounding."""
    deep = kind is conv.DepthwiseConv
    layer = conv.conv(6, 6 if deep else 5, 3 if deep else 1, depthwise=deep, rngs=nnx.Rngs(0))
    assert type(layer) is kind
    assert layer.bias is not None
    layer.bias[...] = jnp.arange(layer.bias.size, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 5, 7, 6))

    def both(call):
        def loss(layer, x):
            y = call(layer, x)
            return jnp.sum(jnp.sin(y)), y

        grads, y = jax.grad(loss, (0, 1), has_aux=True)(layer, x)
        return [y, *jax.tree.leaves(grads)]

    for a, b in zip(both(kind.__call__), both(nnx.Conv.__call__), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    layer.dtype = jnp.bfloat16
    half = layer(x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, nnx.Conv.__call__(layer, x), atol=0.05)
