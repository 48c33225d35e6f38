"""Cached decoding: the same numbers as teacher forcing, and the sampler's options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax.star import sample
from fourdstar_jax.star.forcing import Forcing

n = 4  # tokens of a view


@jax.jit
def forced_group(model, prefix, memory, t, tokens):
    """The logits on the way to given tokens of timestep t, slot by slot, and the memory after."""
    group = sample.begin_group(model, prefix, memory, t, tokens[:, :0])

    def choose(slot, hidden):
        return model.head.decode(hidden, lambda k, logits: tokens[:, slot, k])

    found, logits, cache = sample.decode_slots(model, group, 0, choose)
    return logits, sample.end_group(model, prefix, memory, t, found, cache)


def forced_logits(model, condition, tokens):
    """What cached decoding computes on the way to these tokens; equals `STAR.logits`."""
    prefix, memory = sample.prefill(model, condition)
    tokens = model.in_groups(tokens)
    logits = []
    for t in range(tokens.shape[1]):
        y, memory = forced_group(model, prefix, memory, jnp.int32(t), tokens[:, t])
        logits.append(y)
    return jnp.stack(logits, axis=1)


@pytest.mark.central
def test_cached_decoding_equals_teacher_forcing(model, data, logits):
    """All three groups, so that the container is rebuilt twice."""
    tokens, condition = data
    want = logits(model, tokens, condition, tokens)
    got = forced_logits(model, condition, tokens)
    assert jnp.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(predict_input_view=True, inject="tokens"),
        dict(num_kv_heads=1, rope="none", prefix="causal", qk_norm=True, inject="aligned"),
        dict(history="full", inject="none"),
        dict(container_update="recursive", container_density="global"),
        dict(history="window:1", num_layers=4, blank_code=2),
        dict(container_merge="mean"),
        dict(container_merge="learned", inject="aligned", container_around=True),
        dict(container_around=True),
        dict(container_merge="last"),
    ],
)
def test_it_does_so_with_other_options(data, logits, make_model, changes):
    tokens, condition = data
    model = make_model(**changes)
    got = forced_logits(model, condition, tokens)
    np.testing.assert_allclose(got, logits(model, tokens, condition, tokens), atol=1e-4)


def test_one_timestep(model, logits, make_example):
    tokens, condition = make_example(timesteps=1)
    want = logits(model, tokens, condition, tokens)
    np.testing.assert_allclose(forced_logits(model, condition, tokens), want, atol=1e-4)
    out = sample.generate(model, condition, jax.random.key(0), temperature=0)
    assert out.shape == (2, 1, 3 * n, 3)


def test_greedy_tokens_are_the_most_probable_of_their_own_logits(model, data, logits):
    _, condition = data
    out = sample.generate(model, condition, jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(out[:, :, :n], condition.video_tokens)
    best = logits(model, out, condition, out).argmax(-1)
    np.testing.assert_array_equal(out[:, :, n:], best)


def test_an_input_view_in_the_groups_is_written_or_sampled(old_model, data, logits):
    """Written, its parallel pass gives what one slot after the other gives."""
    _, condition = data
    out = sample.generate(old_model, condition, jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(out[:, :, :n], condition.video_tokens)
    best = logits(old_model, out, condition, out).argmax(-1)
    np.testing.assert_array_equal(out[:, :, n:], best[:, :, n:])
    sampled = sample.generate(
        old_model, condition, jax.random.key(0), temperature=0, write_known=False
    )
    best = logits(old_model, sampled, condition, sampled).argmax(-1)
    np.testing.assert_array_equal(sampled, best)


def test_the_key_decides(model, data):
    _, condition = data
    seen = []
    kw = dict(top_k=5, top_p=0.9, temperature=1.3)
    a = sample.generate(model, condition, jax.random.key(0), **kw)
    b = sample.generate(
        model,
        condition,
        jax.random.key(0),
        on_group=lambda t, tokens: seen.append((t, tokens)),
        **kw,
    )
    np.testing.assert_array_equal(a, b)
    assert [t for t, _ in seen] == [0, 1, 2]
    np.testing.assert_array_equal(jnp.stack([x for _, x in seen], axis=1), a)
    assert (a != sample.generate(model, condition, jax.random.key(1), **kw)).any()
    assert a.dtype == jnp.int32 and 0 <= a.min() and a.max() < 7
    # Next to no mass left: the same as greedy.
    one = sample.generate(model, condition, jax.random.key(0), **(kw | dict(top_p=1e-6)))
    greedy = sample.generate(model, condition, jax.random.key(1), temperature=0)
    np.testing.assert_array_equal(one, greedy)


@pytest.mark.slow
def test_samples_follow_the_probabilities(model, data, logits, make_example):
    """The first sampled code of 700 objects that differ in their random numbers only."""
    tokens, condition = make_example(batch=1, timesteps=1)
    many = jax.tree.map(lambda x: jnp.repeat(x, 700, axis=0), condition)
    out = np.asarray(sample.generate(model, many, jax.random.key(0)))[:, 0, n, 0]
    want = jax.nn.softmax(logits(model, tokens, condition, tokens)[0, 0, n, 0])
    share = np.bincount(out, minlength=7) / 700
    np.testing.assert_allclose(share, want, atol=4 * np.sqrt(0.25 / 700))


@pytest.mark.parametrize("inside", [False, True])
def test_guidance_moves_away_from_the_model_without_video(make_model, old_model, data, inside):
    _, condition = data
    # Untrained, it says some tokens again and again: side by side these are equally dense but for
    # the rounding, which a batch of twice the size does otherwise. Without places, they are one.
    model = old_model if inside else make_model(container_place=None)
    key = jax.random.key(0)

    def novel(condition, scale):
        out = sample.generate(model, condition, key, temperature=0, cfg_scale=scale)
        return out[:, :, n:]

    plain = novel(condition, 1.0)
    np.testing.assert_array_equal(novel(condition, 1.0 + 1e-6), plain)
    # Scale 0 is the model that does not see the video; it must not depend on it.
    other = condition._replace(video_tokens=(condition.video_tokens + 1) % 7)
    blind = novel(condition, 0.0)
    np.testing.assert_array_equal(novel(other, 0.0), blind)
    assert (blind != plain).any()


def test_guidance_by_history_moves_away_from_the_model_that_forgets(
    model, make_model, data, logits
):
    """Scale 0 is the model without the state, as training drops it; scale 1 is no guidance."""
    tokens, condition = data
    key = jax.random.key(0)

    def made(model, **scales):
        return sample.generate(model, condition, key, temperature=0, **scales)

    plain = sample.generate(model, condition, key)
    np.testing.assert_array_equal(sample.generate(model, condition, key, history_scale=1.0), plain)
    forgetful = made(model, history_scale=0.0)
    without = Forcing(drop_history=jnp.ones(len(tokens), bool))
    best = jax.jit(lambda m, t: m.logits(t, condition, without))(model, forgetful).argmax(-1)
    np.testing.assert_array_equal(forgetful[:, :, n:], best)
    remembers = made(model)
    assert (forgetful[:, 0] == remembers[:, 0]).all() and (forgetful != remembers).any()
    # Both ways at once are what each is alone where the other's scale is next to 1.
    both = made(model, cfg_scale=0.0, history_scale=1 + 1e-6)
    np.testing.assert_array_equal(both, made(model, cfg_scale=0.0))
    with pytest.raises(ValueError, match="history_scale=2.0 needs a container"):
        made(make_model(inject="none", history="full"), history_scale=2.0)


@pytest.mark.parametrize(
    "bad", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(history_scale=jnp.inf)]
)
def test_bad_settings_are_named(model, data, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sample.generate(model, data[1], jax.random.key(0), **bad)
