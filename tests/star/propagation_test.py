"""Propagation: objects that remember, forget, and follow the past that they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import geometry, nn
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.star.propagation import history_following, kept, propagation
from fourdstar_jax.types import Cameras

B, T, N, K, VOCAB = 3, 4, 50, 2, 8


def draw(seed, *shape):
    return np.random.default_rng(seed).integers(1, VOCAB, (*shape, K))


def test_propagation_is_that_of_what_was_made():
    truth = np.broadcast_to(draw(0, B, 1, N), (B, T, N, K))  # still
    fixed, other = (np.broadcast_to(draw(seed, B, 1, N), (B, T, N, K)) for seed in (1, 2))
    forgetful, another = (draw(seed, B, T, N) for seed in (3, 4))
    assert propagation(fixed, other, truth).share == 1
    assert abs(propagation(forgetful, another, truth).share) < 0.1
    odd = np.arange(N)[:, None] % 2 == 1  # half of the places remember
    half, second = np.where(odd, fixed, forgetful), np.where(odd, other, another)
    assert abs(propagation(half, second, truth).share - 0.5) < 0.1
    with pytest.raises(ValueError, match="one timestep"):
        propagation(truth[:, :1], truth[:, :1], truth[:, :1])


def test_blank_tokens_do_not_count():
    tokens = draw(0, B, T, N)
    tokens[:, :, : N // 2] = 0
    assert kept(tokens, tokens).min() > 0.5 > kept(tokens, tokens, blank_code=0).max()
    assert np.isnan(kept(0 * tokens, tokens, blank_code=0)).all()


def test_a_group_follows_the_past_that_it_is_given():
    """A model made to say again what its place was told: its codes' mean directions add up."""
    grid, views, size = 2, 2, 8
    model = nn.build(
        STAR, jax.random.key(0), num_codebooks=1, vocab_size=VOCAB, code_dim=8, resolution=size,
        grid=grid, dim=24, num_layers=1, num_heads=1, head_dim=24, head_layers=1, head_heads=1,
        container_slots=4, container_neighbors=2, text_vocab=3, text_length=2, text_dim=4,
        normalize=True, predict_input_view=False, inject="aligned", init_std=1e-3,
    )  # fmt: skip
    n = grid**2
    rig = geometry.orbit_cameras([0.0, 180.0], width=size, height=size)
    condition = Condition(
        text_ids=jnp.ones((2, 2), jnp.int32),
        video_tokens=jnp.ones((2, 3, n, 1), jnp.int32),
        times=jnp.tile(jnp.arange(3.0), (2, 1)),
        cameras=Cameras(*(jnp.tile(x, (2, 1, 1, 1)) for x in rig)),
    )
    shape = (2, 3, views * n, 1)
    a, b = (jax.random.randint(jax.random.key(i), shape, 0, VOCAB, jnp.int32) for i in (1, 2))
    chance = history_following(model, condition, a, b, jax.random.key(3), temperature=1.0)
    assert chance.shape == (2, 2) and 0 < chance.mean() < 1

    # What the trunk's output is for each code at its place becomes the head's direction of it.
    def hidden(code):
        tokens = jnp.full(shape, code, jnp.int32)
        return model.hidden(tokens, condition)[0, 1].mean(axis=0)

    outputs = jnp.stack([hidden(code) for code in range(VOCAB)])
    inputs = model.head.input(outputs)
    inputs = inputs / jnp.linalg.norm(inputs, axis=-1, keepdims=True)
    model.head.output[...] = 100 * (inputs - inputs.mean(axis=0)).T[None]
    following = history_following(model, condition, a, b, jax.random.key(3), temperature=0)
    assert following.mean() > 0.9
    with pytest.raises(ValueError, match="container"):
        model.window = 1
        history_following(model, condition, a, b, jax.random.key(3))
