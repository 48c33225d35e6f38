"""Gates: a short training must make STAR look up what it is shown. Every step has other tokens.

The sizes are those that two CPU cores train in seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fourdstar_jax import geometry, nn
from fourdstar_jax.star.forcing import AS_GIVEN, Forcing
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.types import Cameras

B, T, V, K, VOCAB, SIZE, GRID = 32, 3, 2, 2, 8, 16, 2
n = GRID**2  # tokens of a view
KINDS = 4  # of tokens in a clip: as many as the container has slots
SIZES = dict(
    num_codebooks=K, vocab_size=VOCAB, code_dim=8, resolution=SIZE, grid=GRID, dim=32, num_layers=2,
    num_heads=2, head_dim=16, head_layers=1, head_heads=1, container_slots=KINDS,
    container_neighbors=2, text_vocab=4, text_length=2, text_dim=8, spe_octaves=4, normalize=True,
    rope="axial", predict_input_view=False, inject="both", container_place=0.25,
)  # fmt: skip


def train(draw, steps, **changes):
    """Metrics of a model after `steps` on `draw(key)`, tokens [B, T, V n, K], on tokens unseen.

    What comes back is called with the fields of the condition to change, and with a forcing.
    """
    azimuths = list(np.arange(V) * 360 / V)
    rig = geometry.orbit_cameras(azimuths, width=SIZE, height=SIZE)
    cameras = Cameras(*(jnp.tile(x, (B, 1, 1, 1)) for x in rig))
    model = nn.build(STAR, jax.random.key(0), **(SIZES | changes))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95))

    def condition_of(tokens):
        return Condition(
            text_ids=jnp.ones((B, 2), jnp.int32),
            video_tokens=tokens[:, :, :n],
            times=jnp.tile(jnp.arange(T, dtype=jnp.float32), (B, 1)),
            cameras=cameras,
        )

    @jax.jit
    def step(i, params, state):
        tokens = draw(jax.random.fold_in(jax.random.key(1), i))

        def loss(params):
            return nnx.merge(graph, params, rest).loss(tokens, condition_of(tokens))

        grads = jax.grad(loss, has_aux=True)(params)[0]
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(steps):
        params, state = step(i, params, state)

    @jax.jit
    def metrics(tokens, condition, forcing):
        return nnx.merge(graph, params, rest).loss(tokens, condition, forcing)[1]

    tokens = draw(jax.random.key(2))
    return lambda forcing=AS_GIVEN, **changes: metrics(
        tokens, condition_of(tokens)._replace(**changes), forcing
    )


def copies(key):
    """Every view has the tokens of the input view."""
    video = jax.random.randint(key, (B, T, n, K), 0, VOCAB, jnp.int32)
    return jnp.tile(video, (1, 1, V, 1))


def test_it_copies_the_frame_of_its_own_time():
    metrics = train(copies, 300)
    video = copies(jax.random.key(2))[:, :, :n]
    right = metrics()["nll"]
    assert right < 0.05
    assert metrics(video_tokens=video[:, ::-1])["nll"] > right + 1  # backwards
    assert metrics(times=jnp.zeros((B, T)))["nll"] > right + 0.5


def repeats(key):
    """The other views have random tokens of a few kinds, which stay as they are over time."""
    video, kinds, which = jax.random.split(key, 3)
    video = jax.random.randint(video, (B, T, n, K), 0, VOCAB, jnp.int32)
    kinds = jax.random.randint(kinds, (B, KINDS, K), 0, VOCAB, jnp.int32)
    which = jax.random.randint(which, (B, (V - 1) * n), 0, KINDS)
    novel = jnp.take_along_axis(kinds, which[..., None], axis=1)
    novel = jnp.broadcast_to(novel[:, None], (B, T, *novel.shape[1:]))
    return jnp.concatenate([video, novel], axis=2)


def test_it_propagates_what_no_condition_tells():
    metrics = train(repeats, 200)
    right = metrics()
    assert right["nll_group1"] > np.log(VOCAB) - 0.5  # there is nothing to know
    assert right["nll_group2"] < 0.3 and right["nll_group3"] < 0.3
    without = metrics(Forcing(drop_history=jnp.ones(B, bool)))
    assert without["nll_group2"] > right["nll_group2"] + 1


def moves(key):
    """The other views have random tokens, whose columns change places from frame to frame."""
    video, novel = jax.random.split(key)
    video = jax.random.randint(video, (B, T, n, K), 0, VOCAB, jnp.int32)
    novel = jax.random.randint(novel, (B, V - 1, GRID, GRID, K), 0, VOCAB, jnp.int32)
    frames = [jnp.roll(novel, t, axis=3).reshape(B, -1, K) for t in range(T)]
    return jnp.concatenate([video, jnp.stack(frames, axis=1)], axis=2)


@pytest.mark.slow
def test_it_finds_what_has_moved_beside_its_place():
    """With the places around it; of its own place alone it sees half: what is told to its left."""
    slots = dict(container_slots=n * (V - 1))  # a cluster for each token
    around, alone = (train(moves, 400, container_around=x, **slots)() for x in (True, False))
    assert around["nll_group2"] < 0.3 < 0.5 < alone["nll_group2"]
