"""Learning: STAR on one object until greedy decoding returns exactly its tokens."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from fourdstar_jax import nn
from fourdstar_jax.star import sample
from fourdstar_jax.star.model import STAR

TINY = dict(
    num_codebooks=4, vocab_size=64, code_dim=16, resolution=64, grid=4, dim=128, num_layers=4,
    num_heads=4, hidden_dim=352, head_dim=64, head_layers=1, head_heads=4, container_slots=8,
    container_neighbors=3, text_vocab=256, text_length=8, spe_octaves=4, rope="axial",
)  # fmt: skip


def overfit(make_example, steps, **changes):
    """Trains on one random object; the model, its tokens and its condition."""
    sizes = TINY | changes
    tokens, condition = make_example(batch=1, timesteps=4, views=4, sizes=sizes)
    model = nn.build(STAR, jax.random.key(0), **sizes)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(2e-3, weight_decay=0.01)

    @jax.jit
    def step(params, state):
        def loss(params):
            model = nnx.merge(graph, params, rest)
            return model.loss(tokens, condition)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    state = optimizer.init(params)
    for i in range(steps):
        params, state, metrics = step(params, state)
        if i % 25 == 24 and metrics["nll"] < 0.02:
            break
    return nnx.merge(graph, params, rest), tokens, condition, metrics


def test_greedy_decoding_returns_the_object(make_example):
    model, tokens, condition, metrics = overfit(make_example, 1500)
    assert metrics["nll"] < 0.1
    out = sample.generate(model, condition, jax.random.key(0), temperature=0, write_known=False)
    np.testing.assert_array_equal(out, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("rope, octaves", [("none", 0), ("none", 4), ("axial", 0)])
def test_it_does_so_with_every_positional_encoding(make_example, rope, octaves):
    model, tokens, condition, metrics = overfit(make_example, 1500, rope=rope, spe_octaves=octaves)
    assert metrics["nll"] < 0.1
    out = sample.generate(model, condition, jax.random.key(0), temperature=0, write_known=False)
    np.testing.assert_array_equal(out, tokens)
