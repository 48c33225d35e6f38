import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fourdstar_jax import nn, sharding
from fourdstar_jax.tokenizer import UNITOK
from fourdstar_jax.tokenizer.losses import tokenizer_loss
from fourdstar_jax.tokenizer.quantize import CodeUsage
from fourdstar_jax.tokenizer.unitok import UniTok
from fourdstar_jax.types import TokenizerSpec

SMALLEST = dict(
    resolution=24,
    stem_channels=(5, 7),
    dim=24,
    num_blocks=1,
    num_decoder_blocks=1,
    num_heads=3,
    hidden_dim=20,
    tail_channels=(7, 5),
    num_codebooks=3,
    vocab_size=11,
    code_dim=6,
)


def build(**changes):
    return nn.build(UniTok, jax.random.key(0), **{**SMALLEST, **changes})


@functools.cache
def fresh():
    return build()


def pictures(*leading, size=24):
    return jax.random.uniform(jax.random.key(1), (*leading, size, size, 3))


def trainable_gradients(grads):
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(grads, nnx.Param)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("leading", [(), (2,), (2, 3, 1)])
def test_shapes_and_ranges(leading):
    model = fresh()
    tokens = jax.jit(lambda m, x: m.encode(x))(model, pictures(*leading))
    assert tokens.shape == (*leading, 9, 3) and tokens.dtype == jnp.int32
    assert np.min(tokens) >= 0 and np.max(tokens) < 11
    assert model.codes(tokens).shape == (*leading, 9, 6)
    assert model.codebooks().shape == (3, 11, 2)
    images = model.decode(tokens)
    assert images.shape == (*leading, 24, 24, 3) and 0 <= images.min() and images.max() <= 1


def test_codes_are_rows_of_the_codebooks_side_by_side():
    model = fresh()
    tokens = model.encode(pictures(2))
    books = np.asarray(model.codebooks())
    wanted = np.concatenate([books[k][np.asarray(tokens)[..., k]] for k in range(3)], axis=-1)
    np.testing.assert_array_equal(model.codes(tokens), wanted)


def test_training_pass_agrees_with_encode_and_decode():
    model, images = fresh(), pictures(2)
    out = model(images)
    np.testing.assert_array_equal(out.tokens, model.encode(images))
    np.testing.assert_allclose(
        np.clip(out.images, 0, 1), model.decode(out.tokens), atol=1e-5, rtol=0
    )


def test_images_do_not_meet():
    model, images = fresh(), pictures(3)
    order = jnp.array([2, 0, 1])
    np.testing.assert_array_equal(model.encode(images[order]), model.encode(images)[order])


def test_every_parameter_learns():
    model, images = fresh(), pictures(5)

    def loss(model):
        out = model(images)
        return tokenizer_loss(out, images)[0]

    grads = trainable_gradients(jax.jit(jax.grad(loss, allow_int=True))(model))
    dead = [name for name, grad in grads.items() if not np.any(grad)]
    assert len(grads) > 50 and not dead


def test_hybrid_layers_run_and_learn():
    model = build(
        resolution=32,
        stem="hybrid",
        stem_channels=(6, 6, 7),
        stem_depths=(1, 2),
        tail="hybrid",
        tail_channels=(7, 7, 6),
        tail_depths=(2, 1),
        learned_positions=False,
    )
    images = pictures(2, size=32)
    assert model.num_tokens == 4

    def loss(model):
        return tokenizer_loss(model(images), images)[0]

    grads = trainable_gradients(jax.jit(jax.grad(loss, allow_int=True))(model))
    assert not [name for name, grad in grads.items() if not np.any(grad)]


def test_released_sizes():
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        model = jax.eval_shape(lambda: UniTok(**UNITOK, rngs=nnx.Rngs(0)))

    def count(module):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

    # The released encoder's count holds 1,024 more: a frozen position embedding of zeros.
    assert count(model.encoder) == 332_331_936 - 1024
    assert count(model.quant_proj) == 3_246_784
    assert count(model.post_quant_proj) == 7_615_744
    assert count(model.decoder) == 352_402_531


def test_one_batch_is_learned():
    model = fresh()
    rng = np.random.default_rng(0)
    images = np.ones((4, 24, 24, 3), np.float32)
    for image in images:  # a coloured square on white
        row, column = rng.integers(2, 10, 2)
        image[row : row + 11, column : column + 11] = rng.uniform(0, 1, 3)
    images = jnp.asarray(images)
    params_of = nnx.Param
    graphdef, params, rest = nnx.split(model, params_of, ...)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, rest, opt_state):
        def loss(params):
            out = nnx.merge(graphdef, params, rest)(images)
            total, metrics = tokenizer_loss(out, images)
            return total, (metrics, out.stats)

        grads, (metrics, stats) = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        model = nnx.merge(graphdef, optax.apply_updates(params, updates), rest)
        _, params, rest = nnx.split(model.with_stats(stats), params_of, ...)
        return params, rest, opt_state, metrics

    opt_state = optimizer.init(params)
    first = None
    for _ in range(120):
        params, rest, opt_state, metrics = step(params, rest, opt_state)
        first = metrics if first is None else first
    assert metrics["l2"] < 0.1 * first["l2"]
    assert all(isinstance(v, CodeUsage) for v in jax.tree.leaves(rest, is_leaf=is_variable))
    stats = nnx.merge(graphdef, params, rest).quantizer.stats()
    assert 0 < np.asarray(stats.usage).sum() <= 3 and stats.idle_steps.max() <= 120


def is_variable(x):
    return isinstance(x, nnx.Variable)


def test_repair_replaces_idle_codes_only():
    model, images = fresh(), pictures(2)
    stats = model.quantizer.stats()
    idle = stats.idle_steps.at[0, 3].set(50)
    repaired, count = model.with_stats(stats._replace(idle_steps=idle)).repair(
        images, jax.random.key(5), max_idle_steps=50
    )
    assert count == 1
    # Codes are unit vectors; normalising one again may move its last bit.
    moved = np.abs(np.asarray(repaired.codebooks() - model.codebooks()))
    changed = np.any(moved > 1e-6, axis=-1)
    assert changed[0, 3] and changed.sum() == 1
    assert repaired.quantizer.idle_steps[0, 3] == 0
    assert np.any(np.asarray(repaired.encode(images))[..., 0] == 3)  # now something chooses it


def test_foreground_counts_more():
    model, images = fresh(), pictures(1)
    out = model(images)._replace(images=images.at[:, :12].add(1.0))
    masks = jnp.zeros((1, 24, 24, 1)).at[:, :12].set(1.0)
    _, plain = tokenizer_loss(out, images, masks)
    _, weighted = tokenizer_loss(out, images, masks, foreground_weight=3.0)
    np.testing.assert_allclose(plain["l2"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(weighted["l2"], 3.2, rtol=1e-5)
    with pytest.raises(ValueError, match="masks"):
        tokenizer_loss(out, images, foreground_weight=1.0)


def test_spec_follows_the_weights():
    spec = fresh().spec
    assert dataclasses.replace(spec, weights_sha256="") == TokenizerSpec(
        "unitok", 24, 9, 3, 11, 6, ""
    )
    assert spec == build().spec
    other = nn.build(UniTok, jax.random.key(1), **SMALLEST).spec
    assert other.weights_sha256 != spec.weights_sha256
    assert TokenizerSpec.from_dict(spec.to_dict()) == spec


def test_spec_names_what_differs():
    spec = TokenizerSpec("unitok", 64, 16, 4, 64, 16, "a")
    spec.check(TokenizerSpec("unitok", 64, 16, 4, 64, 16, "a"))
    with pytest.raises(
        ValueError, match="vocab_size 64 != 512.*weights_sha256 'a' != 'b'"
    ) as error:
        spec.check(TokenizerSpec("unitok", 64, 16, 4, 512, 16, "b"))
    assert "num_tokens" not in str(error.value)
    with pytest.raises(ValueError, match="spec: resolution is missing"):
        TokenizerSpec.from_dict({"name": "unitok"})
    with pytest.raises(ValueError, match="colour is an unknown field"):
        TokenizerSpec.from_dict({**spec.to_dict(), "colour": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(resolution=20), "resolution"),
        (dict(tail_channels=(7,)), "tail_channels"),
        (dict(num_heads=5), "num_heads"),
        (dict(code_dim=9), "multiple"),
        (dict(num_codebooks=4), "num_codebooks"),
        (dict(stem="hybrid", stem_depths=(1, 1)), "depths"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_wrong_picture_size():
    with pytest.raises(ValueError, match="24"):
        fresh().encode(pictures(2, size=32))


def test_eight_devices_agree_with_one():
    images = jax.device_get(pictures(8))
    even = dict(stem_channels=(6, 8), tail_channels=(8, 6), num_heads=4, vocab_size=12)

    def run():
        model = build(**even)
        return jax.jit(lambda m, x: (m.encode(x), m(x).images, m(x).quantizer_loss))(model, images)

    tokens, recon, loss = run()
    with sharding.use_mesh({"data": 2, "fsdp": 2, "tensor": 2}) as mesh:
        assert mesh.size == 8
        many_tokens, many_recon, many_loss = run()
    np.testing.assert_array_equal(many_tokens, tokens)
    np.testing.assert_allclose(many_recon, recon, atol=1e-5, rtol=0)
    np.testing.assert_allclose(many_loss, loss, rtol=1e-5)
