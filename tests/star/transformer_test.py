"""Masks, rotary embeddings and the two ways through the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax.star.transformer import axial_angles, dropout, group_mask, rotate


def test_mask_of_a_group():
    mask = group_mask(2, 3, 3)
    want = """
        11 111 000
        11 111 000
        11 111 000
        11 111 100
        11 111 110
        11 111 111
    """
    want = [[c == "1" for c in line if c != " "] for line in want.strip().splitlines()]
    np.testing.assert_array_equal(mask, want)


def test_rotary_products_depend_on_differences_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 16))
    a, b, shift = jax.random.uniform(jax.random.key(1), (3, 1, 1, 4), maxval=9.0)

    def product(a, b):
        return jnp.sum(rotate(q, axial_angles(a, 16)) * rotate(k, axial_angles(b, 16)), axis=-1)

    np.testing.assert_allclose(product(a, b), product(a + shift, b + shift), atol=1e-4)
    assert jnp.abs(product(a, b) - product(a, b + shift)).max() > 0.1
    with pytest.raises(ValueError, match="axial"):
        axial_angles(a, 6)


def test_dropout_keeps_the_mean():
    x = jnp.ones((300, 301))
    y = dropout(x, 0.25, jax.random.key(0))
    np.testing.assert_allclose(y.mean(), 1, atol=0.01)
    np.testing.assert_allclose((y == 0).mean(), 0.25, atol=0.01)
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)
