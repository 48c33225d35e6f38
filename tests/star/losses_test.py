"""The loss: what is averaged, what is weighed, what is reported."""

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.star.losses import GroupLosses, group_losses, summarize


def test_group_losses_equal_plain_cross_entropy():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5, 2, 7))
    tokens = jax.random.randint(jax.random.key(1), (2, 3, 5, 2), 0, 7)
    got = group_losses(lambda x: x, logits, tokens)  # features that are the logits
    want = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(got.nll, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.correct, logits.argmax(-1) == tokens)


def test_the_input_view_is_weighed_and_reported_apart():
    nll = jnp.arange(2 * 3 * 5 * 2, dtype=jnp.float32).reshape(2, 3, 5, 2)
    losses = GroupLosses(nll, jnp.ones_like(nll), jnp.zeros_like(nll))
    kw = dict(num_known=2, by_group=True)
    plain, metrics = summarize(losses, known_weight=1.0, z_loss=0.0, **kw)
    np.testing.assert_allclose(plain, nll.mean())
    np.testing.assert_allclose(metrics["nll_ref"], nll[:, :, :2].mean())
    np.testing.assert_allclose(metrics["nll_novel"], nll[:, :, 2:].mean())
    np.testing.assert_allclose(metrics["nll_code2"], nll[..., 1].mean())
    np.testing.assert_allclose(metrics["nll_group3"], nll[:, 2].mean())
    novel_only, _ = summarize(losses, known_weight=0.0, z_loss=0.0, **kw)
    np.testing.assert_allclose(novel_only, nll[:, :, 2:].mean(), rtol=1e-6)
    with_z, metrics = summarize(losses, known_weight=1.0, z_loss=0.5, **kw)
    np.testing.assert_allclose(with_z - plain, 0.5)
    np.testing.assert_allclose(metrics["nll"], nll.mean())


def test_blank_or_not_by_the_first_code():
    logits = jax.random.normal(jax.random.key(0), (2, 1, 5, 2, 7))
    tokens = jax.random.randint(jax.random.key(1), (2, 1, 5, 2), 0, 7).at[:, :, 1].set(3)
    got = group_losses(lambda x: x, logits, tokens, blank_code=3)
    share = np.asarray(jax.nn.softmax(logits[..., 0, :]))[..., 3]
    is_blank = np.asarray(tokens[..., 0]) == 3
    want = -np.log(np.where(is_blank, share, 1 - share))
    np.testing.assert_allclose(got.blank, want, rtol=1e-5, atol=1e-6)
    kw = dict(num_known=0, known_weight=1.0, z_loss=0.0, by_group=True)
    np.testing.assert_allclose(summarize(got, **kw)[1]["nll_blank"], want.mean(), rtol=1e-6)
    assert "nll_blank" not in summarize(got._replace(blank=None), **kw)[1]
