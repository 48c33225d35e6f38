"""Operations counted in traced programs."""

import jax
import jax.numpy as jnp

from fourdstar_jax.timing import count_flops


def test_matrix_products_and_convolutions_are_counted():
    x, w = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert count_flops(lambda x, w: jnp.sin(x) @ w + 1, x, w) == 2 * 3 * 5 * 7
    assert count_flops(
        lambda q: jax.nn.dot_product_attention(q, q, q), jnp.ones((2, 11, 3, 4))
    ) == (4 * 2 * 3 * 11 * 11 * 4)
    picture, kernel = jnp.ones((2, 6, 7, 4)), jnp.ones((3, 3, 2, 8))  # two groups

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )  # fmt: skip

    assert count_flops(conv, picture, kernel) == 2 * (2 * 6 * 7 * 8) * (3 * 3 * 2)


def test_loops_count_as_often_as_they_run():
    x, w = jnp.ones((3, 5)), jnp.ones((4, 5, 5))

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def layers(x, w):
        x = jax.jit(lambda x: jax.lax.scan(layer, x, w)[0])(x)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w[0], lambda x: x, x)

    assert count_flops(layers, x, w) == 5 * 2 * 3 * 5 * 5
    shapes = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
    assert count_flops(layers, *shapes) == 5 * 2 * 3 * 5 * 5
