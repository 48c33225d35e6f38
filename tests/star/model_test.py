"""STAR: who sees what, conditions, loss and options."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from fourdstar_jax import nn, sharding
from fourdstar_jax.star.forcing import Forcing, corrupt
from fourdstar_jax.star.model import STAR
from fourdstar_jax.types import Cameras

n = 4  # tokens of a view; of three, the groups hold the last two


def bump(tokens, where, vocab=7):
    return tokens.at[where].set((tokens[where] + 1) % vocab)


def differs(a, b):
    """Whether logits differ, per [T, N, K] of sample 0; float32 noise apart."""
    return np.asarray(jnp.abs(a - b).max(axis=-1)[0] > 1e-5)


@pytest.mark.central
@pytest.mark.parametrize("t, j, k", [(0, 0, 0), (0, 7, 2), (1, 3, 1), (1, 4, 0), (2, 6, 2)])
def test_a_code_changes_nothing_before_it(model, data, logits, t, j, k):
    tokens, condition = data
    before = logits(model, tokens, condition, tokens)
    bumped = bump(tokens, (0, t, n + j, k))
    after = logits(model, bumped, condition, bumped)
    changed = differs(before, after)
    assert not changed[:t].any()
    assert not changed[t, :j].any() and not changed[t, j, : k + 1].any()
    assert changed[t, j, k + 1 :].all() and changed[t, j + 1 :].all()
    assert changed[t + 1 :].all()
    np.testing.assert_array_equal(before[1], after[1])  # the other sample


@pytest.mark.central
def test_groups_reach_later_groups_only_through_the_container(model, data, logits):
    tokens, condition = data
    before = logits(model, tokens, condition, tokens)
    bumped = bump(tokens, (0, 0, n + 5, 1))
    assert not differs(before, logits(model, bumped, condition, tokens))[1:].any()  # container kept
    after = logits(model, tokens, condition, bumped)  # container only
    changed = differs(before, after)
    assert changed[1:].all() and not changed[0].any()
    after = logits(model, tokens, condition, bump(tokens, (0, 1)))
    changed = differs(before, after)
    assert changed[2].all() and not changed[:2].any()


@pytest.mark.central
def test_causality_by_gradient(model, data):
    """The same seen from the input embeddings, which tokens enter through."""
    tokens, condition = data
    places = model.places(condition)
    features = model.in_groups(model.embed(tokens))
    places = jax.tree.map(model.in_groups, places)

    def slot(features, j):
        stream = model.token_slots(features, places.spe)
        return jnp.sum(stream[0, 1, j] * jnp.arange(1, stream.shape[-1] + 1))

    gradient = jax.jit(jax.grad(slot))
    for j in (0, 1, n, 7):
        reached = jnp.abs(gradient(features, j)).max(axis=-1)[0] > 0
        want = np.zeros(features.shape[1:3], bool)
        want[1, j - 1] = j > 0
        np.testing.assert_array_equal(reached, want)


def test_positional_encoding_is_that_of_the_next_token(model, data):
    tokens, condition = data
    features, places = jax.tree.map(model.in_groups, (model.embed(tokens), model.places(condition)))
    slots = model.token_slots(features, places.spe)
    rays = model.ray_norm(model.rays(condition.cameras)[0])
    times = model.time_norm(model.time(condition.times))
    # Slot 0: START and the ray of view 1's token 0, in every group.
    want = model.start[...] + rays[:, None, n] + times
    np.testing.assert_allclose(slots[:, :, 0], want, atol=1e-5)
    # The slot whose input is the last token of view 1 carries the first ray of view 2.
    want = features[:, :, n - 1] + rays[:, None, 2 * n] + times
    np.testing.assert_allclose(slots[:, :, n], want, atol=1e-5)
    # And that ray is view 1's: turning view 1's camera changes its slots and no others.
    viewmats, Ks = condition.cameras
    turned = Cameras(viewmats.at[:, 1].set(viewmats[:, 2]), Ks)
    changed = jnp.abs(model.ray_norm(model.rays(turned)[0]) - rays).max(axis=(0, 2)) > 1e-3
    np.testing.assert_array_equal(changed, (np.arange(3 * n) >= n) & (np.arange(3 * n) < 2 * n))


@pytest.mark.parametrize(
    "changes",
    [
        dict(inject="aligned", container_around=True),
        dict(history="window:1", inject="none"),
        dict(container_merge="learned"),
        pytest.param(dict(container_merge="mean"), marks=pytest.mark.slow),
        pytest.param(dict(container_merge="last"), marks=pytest.mark.slow),
    ],
)
def test_other_ways_of_the_past_are_causal(data, logits, make_model, changes):
    tokens, condition = data
    model = make_model(**changes)
    before = logits(model, tokens, condition, tokens)
    for t, j, k in ((0, 2, 1), (1, 7, 2), (2, 6, 0)):
        bumped = bump(tokens, (0, t, n + j, k))
        changed = differs(before, logits(model, bumped, condition, bumped))
        of_the_past = differs(before, logits(model, tokens, condition, bumped))
        assert not of_the_past[: t + 1].any()  # a group's state is of those before it
        assert not changed[:t].any()
        assert not changed[t, :j].any() and not changed[t, j, : k + 1].any()
        assert changed[t, j + 1 :].all()
        # Of a token that a window ends with no slot holds it; the container does.
        reached = changed[t + 1 : t + 2]
        assert reached.all() or "history" in changes and j == 7 and not reached.any()


def test_a_dropped_history_is_none(model, data):
    """Every group then is as a first one, whatever was before."""
    tokens, condition = data
    drop = jnp.array([True, False])
    run = jax.jit(lambda past, drop: model.logits(
        tokens, condition, Forcing(history_tokens=past, drop_history=drop)
    ))  # fmt: skip
    other = (tokens + 1) % 7
    dropped, kept = run(tokens, drop), run(tokens, ~drop)
    np.testing.assert_array_equal(dropped[0], run(other, drop)[0])
    assert (jnp.abs(dropped - kept).max(axis=(3, 4))[:, 1:] > 1e-5).all()
    np.testing.assert_allclose(dropped[:, 0], kept[:, 0], atol=1e-5)


def test_noise_is_seen_and_not_predicted(model, data):
    tokens, condition = data
    wrong = (tokens + 1) % 7
    forcing = corrupt(jax.random.key(0), tokens, wrong=wrong, code_noise=0.5)
    seen = forcing.past_tokens
    assert set(np.unique((seen - tokens) % 7)) == {0, 1}
    assert 0.05 < float((seen != tokens).mean()) < 0.5
    with pytest.raises(ValueError, match="code_noise=0.5"):
        corrupt(jax.random.key(0), tokens, code_noise=0.5)
    hidden = jax.jit(lambda t, f: model.hidden(t, condition, f))
    np.testing.assert_allclose(
        hidden(tokens, Forcing(past_tokens=seen)), hidden(seen, Forcing()), atol=1e-5
    )
    nll = jax.jit(lambda t, f: model.nll(t, condition, f))(tokens, Forcing(past_tokens=tokens))
    np.testing.assert_allclose(nll, jax.jit(lambda t: model.nll(t, condition))(tokens), rtol=1e-5)


def test_every_condition_is_used(model, data, logits):
    tokens, condition = data
    before = logits(model, tokens, condition, tokens)
    viewmats, Ks = condition.cameras
    changes = dict(
        text_ids=condition.text_ids.at[:, 0].set(condition.text_ids[:, 0] % 10 + 1),
        video_tokens=bump(condition.video_tokens, (0, 2, 3, 1)),
        times=condition.times + 0.5,
        cameras=Cameras(viewmats.at[:, :, 0, 3].add(0.1), Ks),
    )
    for name, value in changes.items():
        after = logits(model, tokens, condition._replace(**{name: value}), tokens)
        assert differs(before, after).all(), name


def test_padded_text_is_visible_and_finite(model, data, logits):
    tokens, condition = data
    words = condition.text_ids
    before = logits(model, tokens, condition, tokens)
    silent = logits(model, tokens, condition._replace(text_ids=jnp.zeros_like(words)), tokens)
    assert np.isfinite(np.asarray(silent)).all() and differs(before, silent).all()
    pad = model.text.pad[...]
    try:
        model.text.pad[...] = pad + 1.0
        assert differs(before, logits(model, tokens, condition, tokens)).all()
    finally:
        model.text.pad[...] = pad


@pytest.mark.parametrize("inside", [False, True])
def test_dropped_conditions_hide_what_they_held(model, old_model, data, inside):
    """A dropped video is hidden in the groups, too, but for where it is predicted."""
    tokens, condition = data
    model = old_model if inside else model
    other = condition._replace(
        text_ids=condition.text_ids % 10 + 1, video_tokens=(condition.video_tokens + 1) % 7
    )

    @jax.jit
    def nll(condition, text, video):
        shown = tokens.at[:, :, :n].set(condition.video_tokens)
        forcing = Forcing(drop_text=text, drop_video=video)
        return model.nll(shown, condition, forcing)[:, :, model.num_known :]

    yes, no = jnp.array([True, True]), jnp.array([False, False])
    np.testing.assert_array_equal(nll(condition, yes, yes), nll(other, yes, yes))
    for drop in ((no, yes), (yes, no)):
        assert jnp.abs(nll(condition, *drop) - nll(other, *drop)).max() > 1e-4
    mixed = nll(condition, jnp.array([True, False]), no)
    np.testing.assert_allclose(mixed[0], nll(condition, yes, no)[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], nll(condition, no, no)[1], atol=1e-5)


@pytest.mark.central
def test_losses_agree_with_logits(model, old_model, data, logits):
    tokens, condition = data
    both = jax.jit(lambda m: (m.nll(tokens, condition), m.loss(tokens, condition)))
    for one, first in ((model, n), (old_model, 0)):
        want = -jnp.take_along_axis(
            jax.nn.log_softmax(logits(one, tokens, condition, tokens)),
            tokens[:, :, first:, :, None],
            axis=-1,
        )[..., 0]
        got, (loss, metrics) = both(one)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["nll_novel"], want[:, :, n - first :].mean(), rtol=1e-4)
        assert ("nll_ref" in metrics) == (first == 0)
    np.testing.assert_allclose(metrics["nll_ref"], want[:, :, :n].mean(), rtol=1e-4)


def test_groups_can_be_chosen_and_change_nothing(model, data):
    tokens, condition = data
    groups = jnp.array([[0, 2], [1, 2]])

    @jax.jit
    def hidden(model):
        whole = model.hidden(tokens, condition)
        return model.hidden(tokens, condition, Forcing(groups=groups)), whole

    some, whole = hidden(model)
    np.testing.assert_allclose(some, whole[jnp.arange(2)[:, None], groups], atol=1e-4)
    with pytest.raises(ValueError, match="num_groups=0"):
        corrupt(jax.random.key(0), tokens, num_groups=0)
    assert corrupt(jax.random.key(0), tokens, num_groups=4).groups is None


def test_gradient_reaches_every_parameter(model, data):
    tokens, condition = data

    @jax.jit
    @jax.grad
    def gradient(model):
        drop = dict(drop_text=jnp.array([False, True]), drop_video=jnp.array([True, False]))
        return jnp.mean(model.nll(tokens, condition, Forcing(**drop)))

    grads = nnx.state(gradient(model), nnx.Param)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) > 40
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        rows = leaf if "'trunk']['layers'" not in name else leaf.reshape(leaf.shape[0], -1)
        largest = jnp.abs(rows).max(axis=-1) if rows.ndim == 2 and "trunk" in name else rows
        assert np.isfinite(np.asarray(leaf)).all(), name
        assert jnp.abs(largest).max() > 0, name
        if "'trunk']['layers'" in name:
            assert (largest > 0).all(), name  # every layer of the stack
    assert not any("codebook" in jax.tree_util.keystr(path) for path, _ in leaves)


def test_training_starts_at_the_entropy_of_the_vocabulary(data, make_model):
    tokens, condition = data
    model = make_model()
    model.head.output[...] = jnp.zeros(model.head.output.shape)
    forcing = corrupt(jax.random.key(0), tokens, num_groups=2)
    assert forcing.groups.shape == (2, 2)
    loss, metrics = jax.jit(lambda m: m.loss(tokens, condition, forcing))(model)
    np.testing.assert_allclose(loss, math.log(7), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll_code3"], math.log(7), rtol=1e-5)
    assert "nll_group1" not in metrics  # the groups differ from sample to sample


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(prefix="causal"), marks=pytest.mark.slow),
        pytest.param(dict(num_kv_heads=1, rope="none", spe_octaves=0), marks=pytest.mark.slow),
        pytest.param(dict(qk_norm=True), marks=pytest.mark.slow),
        dict(remat=True, remat_saves="products", dropout=0.1, dtype=jnp.bfloat16),
    ],
)
def test_options_train(data, make_model, changes):
    tokens, condition = data
    model = make_model(**changes)
    forcing = corrupt(jax.random.key(0), tokens)
    step = jax.jit(jax.value_and_grad(lambda m: m.loss(tokens, condition, forcing)[0]))
    loss, grads = step(model)
    assert np.isfinite(loss)
    kernel = grads.trunk.layers.k.kernel[...]
    assert np.isfinite(np.asarray(kernel)).all() and jnp.abs(kernel).max() > 0
    assert kernel.dtype == jnp.float32


@pytest.mark.parametrize("saves", ["products", "attention"])
def test_layers_one_by_one_train_as_in_a_scan(data, make_model, saves):
    tokens, condition = data
    forcing = corrupt(jax.random.key(0), tokens)
    found, programs = [], []
    for scanned in (True, False):
        model = make_model(num_layers=6, remat=True, remat_saves=saves, scan_layers=scanned)

        def loss(model):
            return model.loss(tokens, condition, forcing)[0]

        value, grads = jax.jit(jax.value_and_grad(loss))(model)
        found.append((value, grads.trunk.layers.k.kernel[...]))
        programs.append(str(jax.make_jaxpr(loss)(model)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    # three parts of two layers each, with what is injected between them
    assert ["unroll=2" in program for program in programs] == [False, True]


def test_prefix_may_be_causal(data, make_model):
    tokens, condition = data
    late = condition._replace(video_tokens=bump(condition.video_tokens, (0, 2)))
    for prefix in ("causal", "bidirectional"):
        model = make_model(prefix=prefix)

        @jax.jit
        def keys(condition, model=model):
            places = model.places(condition)
            stream = model.prefix_stream(condition, places, None, None)
            return model.trunk.prefill(*stream).k[-1]  # the last layer's

        changed = jnp.abs(keys(condition) - keys(late)).max(axis=(2, 3))[0] > 1e-6
        first = 5 + 2 * n  # text, then two frames
        assert changed[first:].all()
        assert changed[:first].all() == (prefix == "bidirectional")
        assert changed[:first].any() == (prefix == "bidirectional")


@pytest.mark.slow
def test_t5_features_go_through_the_same_prefix(data, make_model):
    tokens, condition = data
    model = make_model(text_encoder="t5", text_dim=13)
    features = jax.random.normal(jax.random.key(0), (2, 5, 13))
    nll = jax.jit(lambda f: model.nll(tokens, condition._replace(text_features=f)))
    padded = features.at[:, -2:].add(1.0)  # the last two slots are padding
    np.testing.assert_array_equal(nll(features), nll(padded))
    assert jnp.abs(nll(features) - nll(features.at[:, 0].add(1.0))).max() > 1e-4
    with pytest.raises(ValueError, match="text_features"):
        model.nll(tokens, condition)


def test_codebooks_are_taken_and_stay(make_model):
    books = np.random.default_rng(0).normal(size=(3, 7, 2)).astype(np.float32)
    model = make_model(codebooks=jnp.asarray(books))
    np.testing.assert_array_equal(model.codebook[...], books)
    with pytest.raises(ValueError, match="codebooks"):
        make_model(codebooks=jnp.zeros((3, 7, 3)))


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope="2d"),
        dict(prefix="none"),
        dict(code_dim=7),
        dict(num_heads=5),
        dict(text_encoder="hash"),
        dict(grid=3),
        dict(text_vocab=0),
    ],
)
def test_bad_options_are_named(make_model, changes):
    """By ValueError; the type checker of the tests comes before it where options are words."""
    with pytest.raises((ValueError, TypeCheckError), match=next(iter(changes))):
        make_model(**changes)


def test_inputs_that_do_not_fit_are_named(model, data):
    tokens, condition = data
    with pytest.raises(ValueError, match="tokens are"):
        model.logits(tokens[:, :, :8], condition)
    with pytest.raises(ValueError, match="times are"):
        model.check(condition._replace(times=condition.times[:, :2]))
    with pytest.raises(ValueError, match="none to predict"):
        model.check(condition._replace(cameras=jax.tree.map(lambda x: x[:, :1], condition.cameras)))
    with pytest.raises(ValueError, match="video_tokens have 3"):
        model.check(condition._replace(video_tokens=condition.video_tokens[:, :, :3]))
    with pytest.raises(ValueError, match="text_ids have 4"):
        model.logits(tokens, condition._replace(text_ids=condition.text_ids[:, :4]))


@pytest.mark.slow
def test_eight_devices_agree_with_one(make_example):
    """Weights sharded over fsdp and tensor, the batch over data and fsdp."""
    sizes = dict(
        num_codebooks=2, vocab_size=8, code_dim=4, resolution=10, grid=2, dim=32, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=16, head_layers=1, head_heads=2, container_slots=5,
        container_neighbors=2, text_vocab=12, text_length=5, text_dim=6, time_features=8,
    )  # fmt: skip
    tokens, condition = make_example(batch=4, timesteps=2, views=2, sizes=sizes)
    data = jax.tree.map(np.asarray, (tokens, condition))
    got = []
    for shape, devices in ((None, 1), (dict(data=2, fsdp=2, tensor=2), 8)):
        with sharding.use_mesh(shape, devices=jax.devices()[:devices]):
            model = nn.build(STAR, jax.random.key(0), **sizes)
            output = jax.random.normal(jax.random.key(1), model.head.output.shape)
            model.head.output[...] = output

            @jax.jit
            @jax.value_and_grad
            def step(model, tokens, condition):
                return model.loss(tokens, condition)[0]

            loss, grads = step(model, *data)
            got.append((loss, grads.trunk.layers.q.kernel[...], grads.image.up.kernel[...]))
            if devices == 8:
                kernel = model.trunk.layers.q.kernel[...]  # [layers, embed, heads]
                assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 16)
    one, eight = (jax.tree.map(np.asarray, x) for x in got)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    for a, b in zip(eight[1:], one[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


def test_paper_size_builds_without_memory():
    sizes = dict(
        num_codebooks=8, vocab_size=4096, code_dim=64, resolution=256, grid=16,
        dim=1280, num_layers=36, num_heads=20, hidden_dim=3584, head_dim=768, head_layers=3,
        head_heads=12, container_slots=512, container_neighbors=5, text_encoder="t5",
        text_length=120, text_dim=2048, time_features=256,
    )  # fmt: skip
    model = jax.eval_shape(lambda: nn.build(STAR, jax.random.key(0), **sizes))
    assert 800e6 < nn.count_parameters(model) < 900e6
