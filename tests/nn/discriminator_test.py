"""The discriminator and its losses: finite differences, R1 against nested derivatives, a batch's
sharding, and a few steps of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fourdstar_jax import nn, sharding
from fourdstar_jax.nn import adversarial
from fourdstar_jax.nn.discriminator import Discriminator, activate, channels_at
from fourdstar_jax.train import state as train_state

SMALL = dict(resolution=16, multiplier=1 / 64)  # 8 channels


def pictures(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


@functools.cache
def small(dtype=jnp.float32):
    """A discriminator of 16x16 pixels and 8 channels."""
    with sharding.use_mesh(devices=jax.devices()[:1]):
        make = functools.partial(nn.build, Discriminator, **SMALL, dtype=dtype)
        return jax.jit(make)(jax.random.key(0))


@jax.jit
def logits_of(model, images):
    return model(images)


@pytest.mark.parametrize("resolution, side", [(16, 4), (24, 6), (28, 7), (64, 4), (256, 4)])
@pytest.mark.parametrize("channels", [3, 4])
def test_sizes(resolution, side, channels):
    def logits(images):
        kwargs = dict(resolution=resolution, channels=channels, multiplier=0.25)
        return nn.build(Discriminator, jax.random.key(0), **kwargs, dtype=jnp.bfloat16)(images)

    shape = (2, 3, resolution, resolution, channels)
    found = jax.eval_shape(logits, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert (found.shape, found.dtype) == ((2, 3), jnp.float32)
    model = jax.eval_shape(
        lambda key: nn.build(Discriminator, key, resolution=resolution, channels=channels),
        jax.random.key(0),
    )
    assert model.hidden.kernel.shape == (side * side * 512, 512)
    assert model.stem.kernel.shape == (1, 1, channels, {256: 64, 64: 256}.get(resolution, 512))


def test_channels_are_stylegan2s():
    assert [channels_at(2**i, 1.0) for i in range(2, 9)] == [512, 512, 512, 512, 256, 128, 64]
    assert channels_at(256, 0.01) == 8


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(resolution=8), "resolution=8 must be 4, 5, 6 or 7 times"),
        (dict(resolution=36), "resolution=36 must be"),
        (dict(resolution=16, channels=2), "channels=2 must be 3"),
        (dict(resolution=16, multiplier=0), "multiplier=0 must be positive"),
    ],
)
def test_wrong_sizes_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        nn.build(Discriminator, jax.random.key(0), **wrong)


def test_wrong_pictures_and_settings_are_named():
    with pytest.raises(ValueError, match=r"pictures \(16, 16, 4\); .* sees \(16, 16, 3\)"):
        small()(jnp.zeros((2, 16, 16, 4)))
    x = jnp.zeros((1, 16, 16, 3))
    for every, weight in ((0, 1.0), (1, -1.0)):
        with pytest.raises(ValueError, match=f"r1_every={every} .* r1_weight={weight}"):
            adversarial.discriminator_loss(small(), x, x, 0, r1_every=every, r1_weight=weight)


def test_activations_keep_their_size():
    x = jax.random.normal(jax.random.key(0), (10_000,))
    assert abs(jnp.mean(activate(x) ** 2) - 1.04) < 0.05
    logits = logits_of(small(), jnp.asarray(squares(0, sharp=True)))
    assert 0.1 < jnp.sqrt(jnp.mean(logits**2)) < 3


def test_a_logit_is_its_own_pictures():
    x = pictures(1, 5, 16, 16, 3)
    whole = logits_of(small(), x)
    np.testing.assert_allclose(logits_of(small(), x[::-1]), whole[::-1], rtol=1e-5, atol=1e-6)
    others = logits_of(small(), x.at[2:].set(0.5))
    np.testing.assert_allclose(others[:2], whole[:2], rtol=1e-5, atol=1e-6)
    assert np.min(np.abs(others[2:] - whole[2:])) > 1e-3


def test_hinge_by_hand():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.25, -0.5])
    # (0 + 0.5 + 2) / 3 + (0 + 1.25 + 0.5) / 3
    np.testing.assert_allclose(adversarial.discriminator_hinge(real, fake), 4.25 / 3)
    np.testing.assert_allclose(adversarial.generator_hinge(fake), 3.25 / 3)
    d_real, d_fake = jax.grad(adversarial.discriminator_hinge, argnums=(0, 1))(real, fake)
    np.testing.assert_allclose(d_real, [0, -1 / 3, -1 / 3])
    np.testing.assert_allclose(d_fake, [0, 1 / 3, 1 / 3])


def along_a_direction(function, x, eps=1e-6):
    """The derivative of a pytree's function along a random direction, and its differences."""
    function = jax.jit(jax.value_and_grad(function))
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), x)

    def value(moved):
        return float(function(jax.tree.map(lambda a, d: a + moved * d, x, direction))[0])

    _, grads = function(x)
    products = jax.tree.map(lambda g, d: float(jnp.sum(g * d)), grads, direction)
    return sum(jax.tree.leaves(products)), (value(eps) - value(-eps)) / (2 * eps)


def test_losses_against_finite_differences():
    """By the discriminator's parameters, R1 included, and by the decoder's pictures.

    In float64; biases, which start at zero, get values.
    """
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        model = small(jnp.float64)
        model = jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape)), model)
        real, fake = (jnp.asarray(rng.uniform(size=(2, 16, 16, 3))) for _ in range(2))

        def whole(model):
            return adversarial.discriminator_loss(model, real, fake, 0, r1_every=3)[0]

        def generator(fake):
            return adversarial.generator_hinge(model(fake))

        for function, x in ((whole, model), (generator, fake)):
            ours, differences = along_a_direction(function, x)
            assert abs(ours) > 1e-3
            np.testing.assert_allclose(ours, differences, rtol=1e-5)


def test_no_gradient_reaches_the_decoder_from_the_discriminators_loss():
    def loss(fake):
        return adversarial.discriminator_loss(lambda x: x.sum((-3, -2, -1)), real, fake, 0)[0]

    real, fake = jnp.zeros((2, 4, 4, 3)), jnp.ones((2, 4, 4, 3))
    assert loss(fake) > 1
    np.testing.assert_array_equal(jax.grad(loss)(fake), 0)


def test_r1_of_a_linear_net():
    """The gradient is the weights themselves: |w|^2, and 2 w by the weights."""
    w = jnp.asarray(pictures(5, 3, 5, 2))
    x = jnp.asarray(pictures(6, 7, 2, 3, 5, 2))

    def penalty(w):
        return adversarial.r1_penalty(lambda x: jnp.einsum("...hwc,hwc->...", x, w), x)

    np.testing.assert_allclose(penalty(w), jnp.sum(w**2), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(penalty))(w), 2 * w, rtol=1e-6)


def test_r1_against_derivatives_of_derivatives():
    """A net of two layers: forward mode over reverse, picture by picture, summed by hand."""
    rng = np.random.default_rng(7)
    h, w, c, d, n = 2, 3, 2, 5, 3
    net = dict(up=rng.normal(size=(h * w * c, d)), down=rng.normal(size=d))
    net = jax.tree.map(jnp.asarray, net)
    x = jnp.asarray(rng.normal(size=(n, h, w, c)))

    def logit(net, x):  # of one picture
        return jnp.tanh(x.reshape(-1) @ net["up"]) @ net["down"]

    def penalty(net):
        return adversarial.r1_penalty(jax.vmap(functools.partial(logit, net)), x)

    value, grads = jax.jit(jax.value_and_grad(penalty))(net)
    by_hand, grads_by_hand = 0.0, jax.tree.map(jnp.zeros_like, net)
    by_pixels = jax.jacrev(logit, argnums=1)
    for one in x:
        g = by_pixels(net, one)  # [h, w, c]
        mixed = jax.jacfwd(by_pixels)(net, one)  # [h, w, c, ...] of each parameter
        by_hand += jnp.sum(g**2) / n
        part = jax.tree.map(functools.partial(jnp.tensordot, 2 / n * g, axes=3), mixed)
        grads_by_hand = jax.tree.map(jnp.add, grads_by_hand, part)
    # And without any autodiff: d logit / dx = up (down (1 - tanh^2)).
    slope = np.asarray(net["down"]) * (1 - np.tanh(np.asarray(x).reshape(n, -1) @ net["up"]) ** 2)
    np.testing.assert_allclose(value, np.mean(np.sum((slope @ net["up"].T) ** 2, 1)), rtol=1e-5)
    np.testing.assert_allclose(value, by_hand, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, grads_by_hand
    )


def test_the_penalty_is_lazy():
    """Every third step it counts three times; in between it is left out."""
    w, real, fake = pictures(8, 4, 4, 3), pictures(9, 2, 3, 4, 4, 3), pictures(10, 2, 3, 4, 4, 3)

    def judge(x):
        return jnp.sum(jnp.tanh(x * w) - 0.4, axis=(-3, -2, -1))

    @jax.jit
    def at(step):
        loss = adversarial.discriminator_loss
        return loss(judge, real, fake, step, r1_weight=0.7, r1_every=3)

    hinge = adversarial.discriminator_hinge(judge(real), judge(fake))
    penalty = adversarial.r1_penalty(judge, real)
    assert hinge > 0.1 and penalty > 0.1
    for step in (0, 1, 2, 3):
        loss, parts = at(jnp.asarray(step))
        np.testing.assert_allclose(parts["discriminator"], hinge, rtol=1e-5)
        np.testing.assert_allclose(parts["r1"], penalty if step % 3 == 0 else 0, rtol=1e-5)
        np.testing.assert_allclose(loss, hinge + 2.1 * parts["r1"], rtol=1e-5)
    np.testing.assert_allclose(parts["real_logit"], jnp.mean(judge(real)), rtol=1e-5)
    np.testing.assert_allclose(parts["fake_logit"], jnp.mean(judge(fake)), rtol=1e-5)
    assert "r1" not in adversarial.discriminator_loss(judge, real, fake, 0, r1_weight=0.0)[1]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_only_what_is_wanted(backend, monkeypatch):
    """Values and gradients are the function's or zeros, computed always or under a condition."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def run(x, wanted):
        found = adversarial.only_if(wanted, lambda: {"sum": jnp.sum(x**2), "x": 3 * x})
        return found["sum"] + jnp.sum(found["x"]), found

    x = jnp.arange(5.0)
    both = jax.jit(jax.value_and_grad(run, has_aux=True))
    (value, found), gradient = both(x, jnp.array(True))
    assert value == 30 + 30 and np.all(found["x"] == 3 * x) and np.all(gradient == 2 * x + 3)
    (value, found), gradient = both(x, jnp.array(False))
    assert value == 0 and not np.any(found["x"]) and not np.any(gradient)
    assert ("cond" in str(jax.make_jaxpr(run)(x, jnp.array(True)))) == (backend == "gpu")


def test_r1_in_bfloat16():
    """Its gradient points where float32's does; 8 bits of fraction leave some 2 %."""
    real = pictures(10, 2, 16, 16, 3)

    def flat(model):
        value, grads = jax.jit(jax.value_and_grad(adversarial.r1_penalty))(model, real)
        leaves = jax.tree.leaves(grads)
        assert value.dtype == jnp.float32 and all(leaf.dtype == jnp.float32 for leaf in leaves)
        return float(value), np.concatenate([np.ravel(leaf) for leaf in leaves])

    (value, grad), (value_low, grad_low) = flat(small()), flat(small(jnp.bfloat16))
    np.testing.assert_allclose(value_low, value, rtol=0.03)
    cosine = grad @ grad_low / np.linalg.norm(grad) / np.linalg.norm(grad_low)
    assert cosine > 0.995
    np.testing.assert_allclose(np.linalg.norm(grad_low), np.linalg.norm(grad), rtol=0.03)


def squares(i, sharp):
    """Eight pictures of a square on white, with edges or without."""
    images = np.ones((8, 16, 16, 3))
    rng = np.random.default_rng(i)
    for image in images:
        y, x = rng.integers(2, 7, 2)
        image[y : y + 7, x : x + 7] = rng.uniform(0, 0.3, 3)
    if not sharp:
        for axis in (1, 2):
            images = (np.roll(images, 1, axis) + images + np.roll(images, -1, axis)) / 3
    return images.astype(np.float32)


def test_it_learns_to_tell_sharp_from_blurred():
    """A trainer's state and steps; in 50 of them, on new pictures each, it knows the two kinds."""
    tx = optax.adam(3e-3, b2=0.99)
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        graphdef, state = train_state.create(Discriminator, SMALL, tx, jax.random.key(0), mesh)

    def loss(params, rest, real, fake, step):
        model = nnx.merge(graphdef, params, rest)
        return adversarial.discriminator_loss(model, real, fake, step, r1_weight=0.01, r1_every=4)

    @jax.jit
    def step(state, real, fake):
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, parts), grads = grad(state.params, state.rest, real, fake, state.step)
        return train_state.apply_gradients(state, grads, tx), (value, parts)

    seen = []
    for i in range(50):
        state, found = step(state, squares(i, sharp=True), squares(i + 1000, sharp=False))
        seen.append(found)
    losses = [float(value) for value, _ in seen]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]  # 2 is chance
    parts = seen[-1][1]
    assert parts["real_logit"] > 0 > parts["fake_logit"]


def test_eight_devices_agree_with_one():
    """Data x fsdp x tensor, R1 included: the loss, and its gradient by every parameter."""

    def loss(model, real, fake):
        return adversarial.discriminator_loss(model, real, fake, 0, r1_every=3)[0]

    batch = dict(real=np.asarray(squares(0, True)), fake=np.asarray(squares(1, False)))
    one, grads_one = jax.jit(jax.value_and_grad(loss))(small(), **batch)
    with sharding.use_mesh({"data": 2, "fsdp": 2, "tensor": 2}) as mesh:
        model = jax.tree.map(np.asarray, small())
        model = jax.device_put(model, nnx.get_named_sharding(model, mesh))
        assert not model.blocks[0].conv2.kernel[...].sharding.is_fully_replicated
        batch = train_state.to_device(batch, mesh)
        eight, grads = jax.jit(jax.value_and_grad(loss))(model, **batch)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_one), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5)
