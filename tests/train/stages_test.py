"""Training steps of the three stages: one device and eight agree, and a step lowers the loss."""

import jax
import numpy as np
import pytest

from fourdstar_jax import geometry, nn, sharding
from fourdstar_jax.star.model import STAR
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.tokenizer.unitok import UniTok
from fourdstar_jax.train import adversarial, optim, star, tokenizer, vqvae
from fourdstar_jax.train import state as train_state
from fourdstar_jax.vqvae.model import VQVAE4D

# One part in 1e5: what float32 sums in another order may differ by.
RTOL = 1e-5
B, T, V, E, SIZE = 8, 2, 2, 1, 16
TOKENIZER = dict(
    resolution=SIZE, stem_channels=(8, 8), dim=16, num_blocks=1, num_decoder_blocks=1, num_heads=2,
    hidden_dim=32, tail_channels=(8, 8), num_codebooks=2, vocab_size=16, code_dim=8,
)  # fmt: skip
VQVAE = dict(
    resolution=SIZE, grid=2, code_dim=8, dim=16, num_blocks=1, num_heads=2, hidden_dim=32,
    view_attention_every=1, up_channels=(8, 8), offset_dim=16, offset_layers=1, offset_heads=2,
    unet_channels=(8, 8), unet_blocks=1, remat=True, up_pictures=3,
)  # fmt: skip
ADVERSARIAL = dict(  # from the second step on
    weight=0.05, start=1 / 3, multiplier=1 / 64, learning_rate=1e-3, r1_weight=1.25, r1_every=2
)  # fmt: skip
AUGMENT = dict(mirror=0.5, colour=0.8, hue=0.5, saturation=0.4, value=0.3)
STAR_MODEL = dict(
    num_codebooks=2, vocab_size=16, code_dim=8, resolution=SIZE, grid=SIZE // 8, dim=16,
    num_layers=2, num_heads=2, hidden_dim=32, head_dim=16, head_layers=1, head_heads=2,
    container_slots=3, container_neighbors=2, text_vocab=11, text_length=3, text_dim=8,
)  # fmt: skip


def batch():
    rng = np.random.default_rng(0)
    rig = geometry.orbit_cameras([0, 90], width=SIZE, height=SIZE)
    extra = geometry.orbit_cameras([33], [-20], width=SIZE, height=SIZE)

    def repeat(x):
        return np.stack([x] * B)

    rgba = rng.integers(0, 256, (B, T, V + E, SIZE, SIZE, 4), np.uint8)
    rgba[..., 3] = 255 * (rgba[..., 3] > 127)
    return {
        "rgba": rgba[:, :, :V],
        "extra_rgba": rgba[:, :, V:],
        "viewmats": repeat(rig.viewmats),
        "Ks": repeat(rig.Ks),
        "extra_viewmats": repeat(extra.viewmats),
        "extra_Ks": repeat(extra.Ks),
        "times": np.tile(np.arange(T, dtype=np.float32), (B, 1)),
        "tokens": rng.integers(0, 16, size=(B, T, V, 4, 2)).astype(np.int32),
        "text_ids": rng.integers(0, 11, size=(B, 3)).astype(np.int32),
    }


def run(stage, mesh_shape, devices, steps=3):
    """Losses of the first steps of a stage on a mesh, with those of its discriminator, and the
    sums of squares of its parameters, averaged ones and discriminator."""
    with sharding.use_mesh(mesh_shape, devices=devices) as mesh:
        key = jax.random.key(0)
        schedule = optim.learning_rate_schedule(
            learning_rate=3e-3, warmup_steps=1, total_steps=steps
        )
        tx = optim.make_optimizer(
            schedule, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0, average=0.9
        )
        data = train_state.to_device(batch(), mesh)
        adversary, judge = adversarial.create(
            SIZE, **ADVERSARIAL, dtype=np.float32, steps=steps, key=jax.random.key(1), mesh=mesh
        )
        match stage:
            case "tokenizer":
                graphdef, state = train_state.create(UniTok, TOKENIZER, tx, key, mesh)
                state = state._replace(judge=judge)

                def step(state, data):
                    return tokenizer.train_step(
                        graphdef, state, tokenizer.Frozen(), data, key,
                        tx=tx, adversary=adversary, augment=AUGMENT,
                        loss_config={"foreground_weight": 1.0},
                    )  # fmt: skip

            case "vqvae":
                frozen = nn.build(UniTok, key, **TOKENIZER)
                near = quantize.near_codes(frozen.codebooks(), 2)
                frozen = train_state.replicate(vqvae.Frozen(frozen, None, near), mesh)
                graphdef, state = train_state.create(VQVAE4D, VQVAE, tx, key, mesh)
                state = state._replace(judge=judge)

                def step(state, data):
                    render = dict(num_timesteps=1, rig_views=2, extra_views=0)
                    return vqvae.train_step(
                        graphdef, state, frozen, data, key,
                        tx=tx, steps=steps, adversary=adversary, augment=AUGMENT,
                        code_noise=0.2, render_config=render, loss_config={},
                    )  # fmt: skip

            case "star":
                graphdef, state = train_state.create(STAR, STAR_MODEL, tx, key, mesh)

                def step(state, data):
                    return star.train_step(
                        graphdef, state, data, key, tx=tx, forcing_config={}, loss_config={}
                    )

        step = jax.jit(step)
        losses, judged = [], []
        for _ in range(steps):
            state, metrics = step(state, data)
            losses.append(float(metrics["loss"]))
            judged.append(float(metrics.get("discriminator", 0.0)))
        sums = [
            sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(tree))
            for tree in (state.params, train_state.averaged(state).params, state.judge)
        ]
        return losses, judged, sums


@pytest.mark.parametrize("stage", ["tokenizer", "vqvae", "star"])
def test_eight_devices_agree_with_one(stage):
    """Augmented clips, an average of the weights, and a discriminator from the second step on."""
    one = run(stage, {"data": 1}, jax.devices()[:1])
    eight = run(stage, {"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    for few, many in zip(one, eight, strict=True):
        np.testing.assert_allclose(many, few, rtol=RTOL)
    losses, judged, sums = one
    assert losses[-1] < losses[0] and sums[0] != sums[1]
    if stage != "star":
        assert judged[0] == 0 < judged[1] and judged[1] != judged[2]
