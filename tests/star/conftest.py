"""One small STAR for all tests, its head randomised so that logits tell tokens apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import geometry, nn, sharding
from fourdstar_jax.star.forcing import Forcing
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.types import Cameras

SIZES = dict(
    num_codebooks=3, vocab_size=7, code_dim=6, resolution=10, grid=2,
    dim=24, num_layers=2, num_heads=3, head_dim=10, head_layers=1, head_heads=1,
    container_slots=5, container_neighbors=2, text_vocab=11, text_length=5, text_dim=6,
    time_features=8, spe_octaves=2, normalize=True, rope="axial", predict_input_view=False,
    inject="both", container_place=0.25,
)  # fmt: skip
# As the bundles of before: the input view stands in the groups, positions as they come, a state
# without places.
OLD = dict(
    normalize=False, rope="none", predict_input_view=True, inject="tokens", container_place=None,
    init_std=0.2,
)  # fmt: skip


def build(**changes):
    model = nn.build(STAR, jax.random.key(0), **(SIZES | changes))
    model.head.output[...] = jax.random.normal(jax.random.key(1), model.head.output.shape)
    return model


def example(batch=2, timesteps=3, views=3, key=2, sizes=SIZES):
    """Random tokens and a condition that shows their first view; some text slots are padded."""
    grid, codes = sizes["grid"], sizes["num_codebooks"]
    token_key, text_key = jax.random.split(jax.random.key(key))
    shape = (batch, timesteps, views * grid**2, codes)
    tokens = jax.random.randint(token_key, shape, 0, sizes["vocab_size"], jnp.int32)
    text_shape = (batch, sizes["text_length"])
    text = jax.random.randint(text_key, text_shape, 1, sizes["text_vocab"], jnp.int32)
    azimuths = list(np.arange(views) * 360 / views)
    size = sizes["resolution"]
    rig = geometry.orbit_cameras(azimuths, width=size, height=size)
    return tokens, Condition(
        text_ids=text.at[:, -2:].set(0),
        video_tokens=tokens[:, :, : grid**2],
        times=jnp.tile(jnp.arange(timesteps, dtype=jnp.float32), (batch, 1)),
        cameras=Cameras(*(jnp.tile(x, (batch, 1, 1, 1)) for x in rig)),
    )


@pytest.fixture(scope="session")
def model():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return build()


@pytest.fixture(scope="session")
def data():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return example()


@pytest.fixture(scope="session")
def logits():
    """`STAR.logits`, compiled once for all tests."""
    return jax.jit(
        lambda m, tokens, condition, history=None: m.logits(
            tokens, condition, Forcing(history_tokens=history)
        )
    )


@pytest.fixture(scope="session")
def make_model():
    return build


@pytest.fixture(scope="session")
def old_model():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return build(**OLD)


@pytest.fixture(scope="session")
def make_example():
    return example
