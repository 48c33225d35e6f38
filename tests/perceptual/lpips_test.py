"""LPIPS against values of the official package (lpips 0.1.4, torch 2.14, on a CPU)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax.perceptual import lpips
from fourdstar_jax.perceptual.weights import Conv

y, x = np.mgrid[0:40, 0:48]
A = np.stack([np.sin(x / 5) * 0.5 + 0.5, np.cos(y / 7) * 0.5 + 0.5, (x + y) / 88], -1)
A = A.astype(np.float32)
B = np.clip(A + 0.2 * np.sin(x * y / 9)[..., None], 0, 1).astype(np.float32)
WHITE = np.ones_like(A)


@pytest.fixture(scope="module")
def random_model():
    """The seeded weights that the official module got, too."""
    rng = np.random.default_rng(0)
    empty = lpips.shapes()
    convs = []
    for kernel, bias in empty.convs:
        values = rng.standard_normal(kernel.shape, np.float32) * np.sqrt(2 / (9 * kernel.shape[2]))
        shift = rng.standard_normal(bias.shape, np.float32) * 0.1
        convs.append(Conv(jnp.asarray(values, jnp.float32), jnp.asarray(shift, jnp.float32)))
    heads = tuple(jnp.asarray(rng.random(head.shape, np.float32)) for head in empty.heads)
    return empty.replace(convs=tuple(convs), heads=heads)


def test_distances_are_the_official_ones(random_model):
    found = random_model(jnp.stack([A, A]), jnp.stack([B, WHITE]))
    np.testing.assert_allclose(found, [0.1999357, 0.8429379], atol=1e-4)
    alike = random_model(jnp.asarray(A)[None, None], jnp.asarray(A)[None, None])
    assert alike.shape == (1, 1) and alike == 0


def test_gradients_are_the_official_ones_and_go_to_the_first_picture(random_model):
    def both(a, b):
        return random_model(a, b)

    to_first, to_truth = jax.grad(both, argnums=(0, 1))(jnp.asarray(B), jnp.asarray(A))
    np.testing.assert_allclose(jnp.linalg.norm(to_first), 0.04965541, rtol=1e-3)
    np.testing.assert_allclose(to_first[20, 24], [0.00027099, 0.00040772, -0.00085295], atol=1e-6)
    assert not to_truth.any()


def test_blank_pictures_have_finite_gradients(random_model):
    gradient = jax.grad(lambda x: random_model(x, jnp.asarray(WHITE)))(jnp.asarray(WHITE))
    assert np.isfinite(gradient).all()


def test_pictures_that_do_not_fit_are_refused(random_model):
    with pytest.raises(ValueError, match="against pictures"):
        random_model(jnp.asarray(A), jnp.asarray(A)[:32])
    with pytest.raises(ValueError, match="8x8 pixels; LPIPS needs 16"):
        random_model(jnp.zeros((8, 8, 3)), jnp.zeros((8, 8, 3)))


def test_the_released_weights(lpips_weights):
    model = lpips.load(lpips_weights)
    found = model(jnp.stack([A, A]), jnp.stack([B, WHITE]))
    np.testing.assert_allclose(found, [0.4495529, 0.8573925], atol=1e-4)


def test_the_released_weights_of_alexnet(released_weights):
    model = lpips.load(released_weights("lpips_alexnet"))
    assert model.network == "AlexNet"
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model)
    assert jax.tree.leaves(lpips.shapes("AlexNet")) == jax.tree.leaves(shapes)
    found = model(jnp.stack([A, A]), jnp.stack([B, WHITE]))
    np.testing.assert_allclose(found, [0.1551233, 0.6874930], atol=1e-4)
    with pytest.raises(ValueError, match="30x30 pixels; LPIPS needs 31"):
        model(jnp.zeros((30, 30, 3)), jnp.zeros((30, 30, 3)))


def test_only_the_pinned_weights_are_loaded(tmp_path):
    with pytest.raises(ValueError, match="missing.npz does not exist: .*fourdstar convert lpips"):
        lpips.load(tmp_path / "missing.npz")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\3\4 nothing")
    with pytest.raises(ValueError, match="broken.npz: no .npz of arrays"):
        lpips.load(broken)
    np.savez(broken, a=np.zeros(3))
    with pytest.raises(
        ValueError,
        match="broken.npz: not the weights of LPIPS with VGG16 or LPIPS with AlexNet: digest",
    ):
        lpips.load(broken)
