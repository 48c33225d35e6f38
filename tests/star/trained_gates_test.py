"""Gates of STAR at `tiny`, trained on made clips that it sees once each: it uses all it is told.

21 minutes on two processor cores. Seen there, over drawn tokens: NLL 0.69, rises 1.74 with another
past, 1.09 with another video, 1.11 with a reversed one, 1.63 with exchanged cameras; a group
follows the past it is given in 97 % of the cases. Short of what is wanted (0.5): propagation 0.50,
with a frozen video 0.41. The likeliest codes after the true past are right in 0.60 of the cases,
copies of the timestep before in 0.59, and at t = 2 copies are right more often: that is no gate
here yet.
"""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import figures
from helpers.compiling import AS_USERS

from fourdstar_jax import bundle, sharding
from fourdstar_jax.evaluate import unseen
from fourdstar_jax.star.model import STAR
from fourdstar_jax.star.propagation import history_following
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.train import free, optim, star
from fourdstar_jax.train import state as train_state

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, CLIPS = 1500, 24
# Nats a code at t >= 2, over the tokens that are drawn: blank ones cost nothing.
LEAST_RISE = {"container": 0.3, "video": 0.3, "reversed": 0.3, "cameras": 0.1}


def tiny_config(steps):
    spec = importlib.util.spec_from_file_location("star", CONFIGS / "star.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.steps = steps
    config.optim.muon = True  # as at `small`
    return config


def batch_of(config, key, clips):
    """Clips as `data.tokens` sends them to the trainer."""
    timesteps, sizes = config.data.timesteps, config.model
    rig = figures.cameras(clips, sizes.resolution)
    return {
        "tokens": figures.tokens(key, clips, timesteps, sizes.num_codebooks),
        "times": jnp.tile(jnp.arange(timesteps, dtype=jnp.float32), (clips, 1)),
        "text_ids": jnp.ones((clips, sizes.text_length), jnp.int32),
        **rig._asdict(),
    }


def trained(config, mesh):
    """A model after the config's steps, each on clips of its own."""
    arguments = bundle.module_arguments("star", config.model.to_dict() | {"text_vocab": 3})
    schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
    tx = optim.make_optimizer(schedule, **config.optim)
    graph, state = train_state.create(STAR, arguments, tx, jax.random.key(config.seed), mesh)
    forcing = config.forcing.to_dict()
    books = nnx.merge(graph, state.params, state.rest).codebook[...]
    near = quantize.near_codes(books, forcing.pop("near"), has_blank=True)
    draw = jax.jit(functools.partial(batch_of, config), static_argnums=1)
    step = jax.jit(
        functools.partial(
            star.train_step, graph, tx=tx, near=near, forcing_config=forcing,
            loss_config=config.loss.to_dict(),
        ),
        donate_argnums=0,
        compiler_options=AS_USERS,
    )  # fmt: skip

    for i in range(config.steps):
        batch = draw(jax.random.fold_in(jax.random.key(1), i), config.batch_size)
        state, _ = step(state, batch, jax.random.key(0))
    return nnx.merge(graph, train_state.averaged(state).params, state.rest)


@pytest.fixture(scope="module")
def setting():
    """The trained model, its config, unseen clips, and which novel tokens at t >= 2 are drawn."""
    config = tiny_config(STEPS)
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        model = trained(config, mesh)
    clips = jax.device_get(batch_of(config, jax.random.key(2), CLIPS))
    clips["object"] = np.arange(CLIPS)  # each is of another
    drawn = np.any(clips["tokens"] != quantize.BLANK, axis=-1)[:, 1:, 1:]
    return model, config, clips, drawn


@pytest.fixture(scope="module")
def samples(setting):
    """What samples the clips as the config says, and the tokens of all views by name."""
    model, config, clips, _ = setting
    batch = {name: x for name, x in clips.items() if name != "object"}
    sampler = free.Sampler(
        batch=batch,
        condition=jax.tree.map(jnp.asarray, free.condition_of(batch)),
        key=jax.random.key(0),
        mesh=None,
        decoder=None,
        blank_code=quantize.BLANK,
        settings=config.sampling.to_dict(),
    )
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return sampler, sampler.sample(model)


@pytest.mark.parametrize("swap", LEAST_RISE)
def test_what_it_is_told_counts(setting, swap):
    """NLL of drawn tokens at t >= 2 rises with another's or a wrong condition, in nats a code."""
    model, _, clips, drawn = setting
    right, wrong = (unseen.novel_nlls(model, clips, x)[:, 1:] for x in (None, swap))
    rise = wrong - right
    print(
        f"{swap}: NLL {right[drawn].mean():.3f}, rise {rise[drawn].mean():.3f}; "
        f"of all tokens {right.mean():.3f}, {rise.mean():.3f}"
    )
    assert rise[drawn].mean() > LEAST_RISE[swap]


def test_samples_keep_what_they_chose(samples):
    sampler, found = samples
    shares = sampler.measure(found)[0]
    print(shares)
    assert shares["propagation"] > 0.4 and shares["propagation_frozen"] > 0.3


@pytest.mark.parametrize("names", [("real", "other"), ("frozen", "other_frozen")])
def test_a_group_follows_the_past_that_it_is_given(setting, samples, names):
    model, config, clips, _ = setting
    sampler, found = samples
    in_groups = (*clips["tokens"].shape[:2], -1, clips["tokens"].shape[-1])
    own, other = (found[name].reshape(in_groups) for name in names)
    condition = sampler.condition
    if names[0] == "frozen":
        first = condition.video_tokens[:, :1]
        still = jnp.broadcast_to(first, condition.video_tokens.shape)
        condition = condition._replace(video_tokens=still)
    following = history_following(
        model, condition, own, other, jax.random.key(3), temperature=config.sampling.temperature
    )
    print(names, following.mean(axis=0))
    assert following.mean() > 0.8
