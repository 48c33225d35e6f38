"""How the 4D VQ-VAE's trainer makes room for the rasterizer, and goes through a batch in parts."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import bundle, geometry, nn, sharding
from fourdstar_jax import tokenizer as tokenizers
from fourdstar_jax.train import optim, vqvae
from fourdstar_jax.train import state as train_state
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae import losses
from fourdstar_jax.vqvae.model import VQVAE4D

SIZE, B, T, V = 32, 4, 2, 2
SIZES = dict(
    resolution=SIZE, grid=4, code_dim=4, dim=8, num_blocks=1, num_heads=1, hidden_dim=8,
    view_attention_every=1, up_channels=(8, 4), offset_dim=4, offset_heads=1, unet_channels=(4, 4),
    offsets=False,
)  # fmt: skip
TOKENIZER = dict(
    family="local", resolution=SIZE, stem_channels=(4, 4), tail_channels=(4, 4), dim=4,
    num_decoder_blocks=1, num_codebooks=2, vocab_size=8, code_dim=4,
)  # fmt: skip


def config_of():
    path = Path(__file__).parents[2] / "configs/vqvae.py"
    spec = importlib.util.spec_from_file_location("vqvae_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.model.update(SIZES)
    config.render = dict(num_timesteps=T, rig_views=V, extra_views=0)  # all there is
    config.batch_size = B
    config.forcing.code_noise = 0.0
    config.loss.update(flow_weight=0.05, warp_weight=0.05, temporal_weight=0.1)
    config.loss.foreground_weight = 2.0
    return config


def batch_of():
    """Objects of different sizes, so that weights by masks differ between parts."""
    rng = np.random.default_rng(0)
    rig = geometry.orbit_cameras([0.0, 90.0], width=SIZE, height=SIZE)
    rgba = rng.integers(0, 256, (B, T, V, SIZE, SIZE, 4), np.uint8)
    rgba[..., 3] = 0
    depth = np.zeros((B, T, V, SIZE, SIZE, 1), np.float16)
    for i in range(B):
        inside = np.s_[i, :, :, 4 : 10 + 5 * i, 6:20]
        rgba[(*inside, 3)] = 255
        depth[inside] = 1.4
    return dict(
        rgba=rgba,
        depth=depth,
        flow=rng.uniform(0, 1, (B, T - 1, V, SIZE, SIZE, 2)).astype(np.float16),
        viewmats=np.stack([rig.viewmats] * B),
        Ks=np.stack([rig.Ks] * B),
        times=np.tile(np.arange(T, dtype=np.float32), (B, 1)),
    )


def test_a_batch_in_parts_is_the_batch():
    """Gradients and metrics of 4 objects at once and two by two; nothing is drawn at random."""
    config, batch = config_of(), batch_of()
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        tokenizer = jax.jit(lambda key: nn.build(tokenizers.make, key, **TOKENIZER))(
            jax.random.key(1)
        )
        tx = optim.make_optimizer(lambda _: 1e-3, b1=0.9, b2=0.9, weight_decay=0, clip_norm=1e9)
        arguments = bundle.module_arguments("vqvae", config.model.to_dict())
        graphdef, state = train_state.create(VQVAE4D, arguments, tx, jax.random.key(0), mesh)
        found = []
        for parts in (1, 2):
            step = functools.partial(
                vqvae.train_step,
                graphdef,
                tx=tx,
                steps=10,
                accumulate=parts,
                render_config=config.render.to_dict(),
                loss_config=config.loss.to_dict(),
            )
            found.append(jax.jit(step)(state, vqvae.Frozen(tokenizer), batch, jax.random.key(2)))
    (one, whole), (two, parted) = found
    for name, value in whole.items():
        if name != "pairs" and "psnr" not in name:  # a count of a part; a mean of logarithms
            np.testing.assert_allclose(parted[name], value, rtol=1e-5, err_msg=name)
    assert whole["own_depth"] > 0 and whole["warp"] > 0 and whole["temporal"] > 0
    # Adam's first moments are a tenth of the gradients.
    moments = [jax.tree.leaves(x.opt_state[1][0].mu) for x in (one, two)]
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max() + 1e-12)


def test_parts_must_divide_a_batch():
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        train_state.check_parts(2, 6, mesh)
        with pytest.raises(ValueError, match="config.accumulate=4 .* config.batch_size=6"):
            train_state.check_parts(4, 6, mesh)


def test_the_first_capacity_holds_what_an_untrained_decoder_makes(monkeypatch):
    """One step is compiled, not another after its first count."""
    config, batch = config_of(), batch_of()
    assert vqvae.first_capacity(config, batch) is None  # few: rasterize makes room by itself
    monkeypatch.setattr(vqvae, "FEW_PAIRS", 1000)
    capacity = vqvae.first_capacity(config, batch)
    arguments = bundle.module_arguments("vqvae", config.model.to_dict())
    model = nn.build(VQVAE4D, jax.random.key(0), **arguments)
    cameras = Cameras(batch["viewmats"], batch["Ks"])

    @jax.jit
    def count(model, codes):
        gaussians = model(codes, cameras, jnp.asarray(batch["times"])).gaussians
        return losses.render(gaussians, cameras, width=SIZE, height=SIZE).num_intersections

    pairs = int(count(model, jax.random.normal(jax.random.key(1), (B, T, V, 16, 4))))
    assert capacity is not None and 1000 < pairs <= capacity < 4 * pairs
    assert vqvae.next_capacity(pairs, False, capacity) == capacity


def test_capacity_grows_only():
    assert vqvae.next_capacity(7, False, None) is None  # rasterize makes room by itself
    first = vqvae.next_capacity(7000, True, None)  # unless that was too little
    assert first is not None and first >= vqvae.SPARE * 7000
    for pairs in (first, first // 2, 1):  # no step is compiled for nothing
        assert vqvae.next_capacity(pairs, False, first) == first
    more = vqvae.next_capacity(2 * first, True, first)
    assert more is not None and more >= 2 * vqvae.SPARE * first
