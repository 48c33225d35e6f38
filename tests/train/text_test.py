"""STAR on features of a T5 encoder: prepared, trained on, and generation with the bundle's own."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fourdstar_jax import bundle, cli, generate, nn, sharding
from fourdstar_jax.data import prepare
from fourdstar_jax.data.features import TextFeatures
from fourdstar_jax.evaluate import unseen
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.text import pieces, t5
from fourdstar_jax.text.captions import NEUTRAL_PROMPT
from fourdstar_jax.train import encode, star
from fourdstar_jax.types import Cameras

SIZES = dict(
    vocab_size=32128, dim=6, num_layers=2, num_heads=2, head_dim=3, hidden_dim=7, dtype="bfloat16"
)


@pytest.fixture(scope="module")
def data_dir(objects_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "data"
    prepare.prepare(
        objects_dir,
        out,
        image_size=16,
        views=2,
        extra_views=1,
        max_frames=3,
        workers=0,
        log=lambda line: None,
    )
    return out


def save_encoder(folder, seed=0):
    with sharding.use_mesh(devices=jax.devices()[:1]):
        arguments = bundle.module_arguments("text", SIZES)
        encoder = nn.build(t5.T5Encoder, jax.random.key(seed), **arguments)
    bundle.save_stage(folder, "text", encoder, {"model": SIZES}, storage="float16")


@pytest.fixture(scope="module")
def with_text(tiny_bundle, tmp_path_factory):
    """Tokenizer, VQ-VAE and text encoder."""
    folder = tmp_path_factory.mktemp("text") / "bundle"
    bundle.copy(tiny_bundle, folder, stages=("tokenizer", "vqvae"))
    save_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def token_dir(data_dir, with_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "tokens"
    encode.prepare_tokens(data_dir, with_text, out)
    return out


@pytest.fixture(scope="module")
def feature_dir(data_dir, with_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "features"
    words = ["prepare", "--text-features", "--data", data_dir, "--bundle", with_text, "--out", out]
    assert cli.main([*map(str, words), "--batch", "3"]) == 0
    return out


@pytest.fixture
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)


def config_of(token_dir, source, feature_dir):
    file = Path(__file__).parents[2] / "configs" / "star.py"
    spec = importlib.util.spec_from_file_location("star_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny,unitok")
    config.model.update(
        num_codebooks=2, vocab_size=5, code_dim=6, resolution=16, grid=2, dim=16, num_layers=1,
        num_heads=2, hidden_dim=32, head_dim=16, head_heads=2, container_slots=3,
        container_neighbors=2, text_encoder="t5", text_length=120, text_dim=6,
    )  # fmt: skip
    config.data.update(dir=str(token_dir), timesteps=2, buckets=())
    config.forcing.near = 2
    config.data.text_features = None if feature_dir is None else str(feature_dir)
    config.mesh.data = 1
    config.update(batch_size=2, steps=2, log_every=1, checkpoint_every=2, eval_every=2)
    config.bundle = str(source)
    return config.lock()


def test_features_are_the_encoders(feature_dir, with_text):
    opened = TextFeatures(feature_dir)
    encoder = bundle.read(with_text).load("text")
    ids, values = opened(NEUTRAL_PROMPT)
    expected_ids, mask = pieces.tokenize([NEUTRAL_PROMPT])
    np.testing.assert_array_equal(ids, expected_ids[0])
    exact = np.asarray(encoder(jnp.asarray(expected_ids), jnp.asarray(mask)))[0]
    assert values.shape == (120, 6) and values.dtype == ml_dtypes.bfloat16
    near = np.abs(values.astype(np.float32) - exact)[mask[0]]
    assert near.max() < 0.03 * np.abs(exact).max()  # bfloat16, in another batch
    assert (values[~mask[0]] == 0).all()
    entry = bundle.read(with_text).stages["text"]
    assert opened.content["encoder"] == {"sha256": entry.sha256, "model": SIZES}


@pytest.fixture(scope="module")
def trained(token_dir, with_text, feature_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("text") / "star"
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices)
        star.train(config_of(token_dir, with_text, feature_dir), workdir)
    return workdir


VIDEO = np.full((1, 16, 16, 3), 255, np.uint8)
VIDEO[:, 4:12, 4:12] = [200, 30, 30]


def test_star_trains_on_them_and_generates_with_the_encoder(trained, feature_dir):
    rows = [json.loads(x) for x in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    assert set(bundle.read(trained / "bundle").weights_sha256()) == {
        "tokenizer",
        "vqvae",
        "star",
        "text",
    }
    info = bundle.read(trained / "bundle").stages["star"].info
    assert info["text"] == TextFeatures(feature_dir).provenance and "words" not in info

    model = generate.load(trained / "bundle")
    ids, values = model.encode_text(NEUTRAL_PROMPT)
    expected_ids, expected = TextFeatures(feature_dir)(NEUTRAL_PROMPT)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(
        values.astype(np.float32), expected.astype(np.float32), rtol=0, atol=0.05
    )
    object4d = model.generate(VIDEO, text="a red box, sliding", fit="none", seed=1)
    assert np.isfinite(object4d.gaussians.means).all()
    assert set(object4d.meta["model"]["weights_sha256"]) >= {"star", "text"}


def test_the_text_reaches_the_loss(trained):
    """Every token's features move the likelihood, and those of padded slots do not."""
    model = generate.load(trained / "bundle")
    network: STAR = model.star
    ids, values = model.encode_text("a red box, sliding")
    condition = Condition(
        text_ids=jnp.asarray(ids)[None],
        video_tokens=jnp.zeros((1, 1, 4, 2), jnp.int32),
        times=jnp.zeros((1, 1)),
        cameras=Cameras(*(jnp.asarray(x)[None] for x in model.rig.cameras(16))),
    )
    groups = jnp.ones((1, 1, 8, 2), jnp.int32)

    def total(features):
        return network.nll(groups, condition._replace(text_features=features)).sum()

    slopes = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(values, jnp.float32)[None]))[0]
    count = int((ids != 0).sum())
    assert (np.abs(slopes[:count]).max(axis=1) > 0).all()
    assert (slopes[count:] == 0).all()


def test_evaluation_takes_the_bundles_encoder(trained, data_dir):
    model = generate.load(trained / "bundle")
    clips = unseen.load(model, data_dir, "train")
    assert clips["text_features"].shape == (3, 120, 6)
    seen = {tuple(row) for row in clips["text_ids"]}
    assert len(seen) == 3 and (clips["text_ids"] != 0).any(axis=1).all()
    figures = unseen._likelihood(model, clips, clips)
    mean, low, high = figures["nll_novel"]
    assert 0 < low <= mean <= high < 10  # ln 5 = 1.6 for an even guess


def test_a_bundle_without_the_encoder_says_so(trained, tmp_path, capsys):
    bundle.copy(trained / "bundle", tmp_path / "b", stages=("tokenizer", "vqvae", "star"))
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    assert "text: not there yet" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no text stage"):
        generate.load(tmp_path / "b").generate(VIDEO, fit="none")
    save_encoder(tmp_path / "b", seed=1)
    with pytest.raises(ValueError, match="its text stage is"):
        generate.load(tmp_path / "b").generate(VIDEO, fit="none")


def test_wrong_features_are_refused_before_training(
    token_dir, with_text, feature_dir, tmp_path, one_device
):
    with pytest.raises(ValueError, match="needs config.data.text_features"):
        star.train(config_of(token_dir, with_text, None), tmp_path / "w")
    words = config_of(token_dir, with_text, feature_dir)
    words.model.text_encoder = "words"
    with pytest.raises(ValueError, match="text_encoder='words'"):
        star.train(words, tmp_path / "w")
    narrow = config_of(token_dir, with_text, feature_dir)
    narrow.model.text_dim = 8
    with pytest.raises(ValueError, match="text_dim=8"):
        star.train(narrow, tmp_path / "w")

    few = tmp_path / "few"
    shutil.copytree(feature_dir, few)
    content = json.loads((few / "manifest.json").read_text())
    neutral = {k: v for k, v in content["rows"].items() if k == _key(NEUTRAL_PROMPT)}
    (few / "manifest.json").write_text(json.dumps(content | {"rows": neutral}))
    with pytest.raises(ValueError, match="no features of 'a"):
        star.train(config_of(token_dir, with_text, few), tmp_path / "w")

    other = tmp_path / "other"
    bundle.copy(with_text, other, stages=("tokenizer", "vqvae"))
    save_encoder(other, seed=1)
    with pytest.raises(ValueError, match="are of the text encoder"):
        star.train(config_of(token_dir, other, feature_dir), tmp_path / "w")
    assert not (tmp_path / "w" / "bundle").exists()


def _key(caption):
    from fourdstar_jax.data.features import key_of

    return key_of(caption)


def test_a_bundle_without_text_cannot_prepare(data_dir, tiny_bundle, tmp_path, capsys):
    with pytest.raises(ValueError, match="has no text yet"):
        encode.prepare_features(data_dir, tiny_bundle, tmp_path / "a")
    assert cli.main(["prepare", "--text_features", "--out", str(tmp_path / "a")]) == 2
    assert "--bundle" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_encoder_of_another_width_is_named(trained, monkeypatch):
    model = generate.load(trained / "bundle")
    monkeypatch.setitem(model.bundle.stage("star").model, "text_dim", 7)
    with pytest.raises(ValueError, match="its text stage is 6 wide, its star takes 7"):
        model.encode_text(NEUTRAL_PROMPT)
