"""How the 4D VQ-VAE's trainer makes room for the rasterizer."""

from fourdstar_jax.train import vqvae


def test_capacity_follows_the_counts():
    few = vqvae.FEW_PAIRS
    assert vqvae.next_capacity(few - 1, False, None) is None  # rasterize makes room by itself
    first = vqvae.next_capacity(few - 1, True, None)  # unless that was too little
    assert first is not None and first >= 1.1 * (few - 1)
    assert vqvae.next_capacity(few, False, first) == first  # no step is compiled for nothing
    more = vqvae.next_capacity(2 * first, True, first)
    assert more is not None and more >= 2.2 * first
    less = vqvae.next_capacity(few, False, 8 * few)
    assert less is not None and few < less < 2 * few
