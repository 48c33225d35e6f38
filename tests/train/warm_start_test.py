"""Trainers started from weights of others: these are where a run begins, once."""

import json
import shutil

import jax
import numpy as np
import pytest

from fourdstar_jax import bundle, cli, nn, sharding
from fourdstar_jax.convert import llamagen
from fourdstar_jax.data import prepare
from fourdstar_jax.star.model import STAR
from fourdstar_jax.text.words import WordTokenizer
from fourdstar_jax.train import encode, optim, star, tokenizer, vqvae
from fourdstar_jax.train import state as train_state
from fourdstar_jax.vqvae.model import VQVAE4D

SIZES = dict(
    family="llamagen", dim=16, num_layers=2, num_heads=2, num_kv_heads=2, hidden_dim=32,
    text_length=5, text_dim=6, vocab_size=11,
)  # fmt: skip
# Two steps at a learning rate of 1e-9 leave weights of size one where they were.
ATOL = 1e-6


@pytest.fixture(scope="module")
def token_dir(objects_dir, tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    prepare.prepare(
        objects_dir,
        folder / "data",
        image_size=16,
        views=2,
        extra_views=1,
        max_frames=3,
        workers=0,
        log=lambda line: None,
    )
    encode.prepare_tokens(folder / "data", tiny_bundle, folder / "tokens")
    return folder / "tokens"


@pytest.fixture
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)


def save_trunk(folder):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(0, 0.1, shape).astype(np.float32) + name.endswith("scale")
        for name, shape in llamagen.shapes(SIZES).items()
    }
    bundle.save_arrays(folder, "trunk", arrays, {"model": SIZES}, converted={"kind": "llamagen"})
    return arrays


def config_of(token_dir, source, warm_start, steps=2):
    config = cli.read_config("configs/star.py:tiny,unitok", [])
    config.model.update(
        num_codebooks=2, vocab_size=5, code_dim=6, resolution=16, grid=2, dim=16, num_layers=2,
        num_heads=2, hidden_dim=32, head_dim=16, head_heads=2, container_slots=3,
        container_neighbors=2, text_length=5, text_dim=6,
    )  # fmt: skip
    config.data.update(dir=str(token_dir), timesteps=2, buckets=())
    config.forcing.near = 2
    config.mesh.data = 1
    config.update(batch_size=2, steps=steps, log_every=1, checkpoint_every=2, eval_every=2)
    config.schedule.update(learning_rate=1e-9, warmup_steps=1)
    config.storage = "float32"
    config.bundle = str(source)
    config.warm_start = None if warm_start is None else str(warm_start)
    return config


def test_a_run_starts_warm_once(token_dir, tiny_bundle, tmp_path, one_device, capsys):
    arrays = save_trunk(tmp_path / "trunk")
    workdir = tmp_path / "star"
    star.train(config_of(token_dir, tiny_bundle, tmp_path / "trunk"), workdir)
    report = (workdir / "warm_start.txt").read_text()
    assert report.startswith("loaded 19 arrays of the file, skipped 5; ")
    assert "layers 0-1: attention_norm q k v out" in report
    assert bundle.read(tmp_path / "trunk").weights_sha256()["trunk"] in report
    assert report in capsys.readouterr().out

    def check(steps):
        rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        assert len(losses) == steps and np.isfinite(losses).all()
        trained = bundle.read(workdir / "bundle").arrays("star")
        for name in ("q/kernel", "ffn/down/kernel", "ffn_norm/scale"):
            expected = np.stack([arrays[f"layers/{i}/{name}"] for i in range(2)])
            np.testing.assert_allclose(trained[f"trunk/layers/{name}"], expected, atol=ATOL)
        np.testing.assert_allclose(trained["trunk/norm/scale"], arrays["norm/scale"], atol=ATOL)
        info = bundle.read(workdir / "bundle").stages["star"].info
        assert info["warm_start"] == report.splitlines()[0]

    check(2)
    shutil.rmtree(tmp_path / "trunk")  # a run that goes on does not look for it
    star.train(config_of(token_dir, tiny_bundle, tmp_path / "trunk", steps=4), workdir)
    assert "warm start" not in capsys.readouterr().out
    check(4)


def test_a_folder_without_a_trunk_is_refused(token_dir, tiny_bundle, tmp_path, one_device):
    bundle.copy(tiny_bundle, tmp_path / "tokenizer", ["tokenizer"])
    config = config_of(token_dir, tiny_bundle, tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="has no trunk"):
        star.train(config, tmp_path)


def test_sizes_of_another_tokenizer_are_named(token_dir, tiny_bundle, tmp_path, one_device):
    config = config_of(token_dir, tiny_bundle, None)
    config.model.num_codebooks, config.model.code_dim = 4, 12
    with pytest.raises(ValueError, match=r"its tokenizer has codebooks of shape \(2, 5, 3\).*4, 5"):
        star.train(config, tmp_path)


def test_a_trunk_is_no_model_but_can_be_inspected(tmp_path, capsys):
    save_trunk(tmp_path)
    with pytest.raises(ValueError, match="warm_start"):
        bundle.read(tmp_path).load("trunk")
    assert cli.main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    number = sum(int(np.prod(shape)) for shape in llamagen.shapes(SIZES).values())
    assert f"trunk: {number:,} numbers as float32" in shown and "llamagen" in shown


def test_the_vqvae_starts_as_its_tokenizer(tmp_path, tiny_bundle, one_device, capsys):
    stage = bundle.read(tiny_bundle).stage("tokenizer")
    bundle.copy(tiny_bundle, tmp_path / "tokenizer", ["tokenizer"])
    with sharding.use_mesh() as mesh:
        tokenizer = bundle.read(tiny_bundle).load("tokenizer")
        changes = dict(up="shuffle", up_channels=[5, 3], num_blocks=1, view_attention_every=1)
        sizes = bundle.read(tiny_bundle).stage("vqvae").model | changes
        tx = optim.make_optimizer(
            lambda step: 1e-3, b1=0.9, b2=0.9, weight_decay=0.0, clip_norm=1.0, average=0.9
        )
        graphdef, state = train_state.create(VQVAE4D, sizes, tx, jax.random.key(0), mesh)
        refused = pytest.raises(ValueError, match="config.warm_start: bundle .*learned positions")
        with refused:
            vqvae.start_warm(graphdef, state, tmp_path / "tokenizer", tmp_path, tiny_bundle)
        model = stage.model | dict(learned_positions=False)
        arrays = nn.named_arrays(tokenizer)
        arrays = {n: np.asarray(x) for n, x in arrays.items() if not n.endswith("pos_embed")}
        bundle.save_arrays(tmp_path / "unitok", "tokenizer", arrays, {"model": model})
        state = vqvae.start_warm(graphdef, state, tmp_path / "unitok", tmp_path, tiny_bundle)
    for params in (state.params, optim.averaged(state.opt_state, state.params)):
        found = nn.named_arrays(params)
        name = "decoder/blocks/0/mlp/w1/kernel"
        np.testing.assert_array_equal(found["static/blocks/mlp/w1/kernel"][0], arrays[name])
        assert not np.any(found["static/rays/kernel"])
    report = (tmp_path / "warm_start.txt").read_text()
    assert train_state.warm_info(tmp_path) == {"warm_start": report.splitlines()[0]}
    assert report in capsys.readouterr().out and stage.sha256 not in report
    assert bundle.read(tmp_path / "unitok").weights_sha256()["tokenizer"] in report


def test_a_run_starts_from_a_bundle_of_its_own_stage(token_dir, tiny_bundle, tmp_path, one_device):
    """Weights by name, words by word; what differs is told, with the shapes of both."""
    first = config_of(token_dir, tiny_bundle, None)
    star.train(first, tmp_path / "first")
    source = tmp_path / "first/bundle"
    star.train(config_of(token_dir, tiny_bundle, source), tmp_path / "second")
    old, new = (
        bundle.read(tmp_path / name / "bundle").arrays("star") for name in ("first", "second")
    )
    assert set(old) == set(new)
    for name, array in old.items():
        np.testing.assert_allclose(new[name], array, atol=ATOL, err_msg=name)
    report = (tmp_path / "second/warm_start.txt").read_text()
    assert report.startswith(f"loaded {len(old)} arrays of star; 0 start anew\n  words: ")

    other = config_of(token_dir, tiny_bundle, source)
    other.model.head_dim = 32
    other.data.buckets = ((1, 0.1), (8, 0.9))
    with pytest.raises(ValueError, match=r"config.data.buckets has \(8, 0.9\)"):
        star.train(other, tmp_path / "third")
    other.data.buckets = ()
    with pytest.raises(ValueError, match=r"star of bundle .* head/input/kernel is 16x16 there and"):
        star.train(other, tmp_path / "third")


def test_a_tokenizer_starts_from_a_bundle_with_its_codebooks(token_dir, tmp_path, one_device):
    def arrays_of(name, warm_start, seed):
        config = cli.read_config("tests/helpers/small_tokenizer.py", [])
        config.data.dir = str(token_dir.parent / "data")
        config.mesh.data = 1
        config.update(batch_size=2, steps=1, seed=seed, storage="float32", warm_start=warm_start)
        config.schedule.update(learning_rate=1e-9, warmup_steps=1)
        tokenizer.train(config, tmp_path / name)
        return bundle.read(tmp_path / name / "bundle").arrays("tokenizer")

    cold = arrays_of("cold", None, seed=0)
    warm = arrays_of("from it", str(tmp_path / "cold/bundle"), seed=1)
    assert set(warm) == set(cold) and any("codebook" in name for name in warm)
    for name, array in cold.items():
        if not name.endswith(("usage", "idle_steps")):  # counts of this run
            np.testing.assert_allclose(warm[name], array, atol=ATOL, err_msg=name)
    report = (tmp_path / "from it/warm_start.txt").read_text()
    assert report.startswith(f"loaded {len(cold)} arrays of tokenizer; 0 start anew")
    told = bundle.read(tmp_path / "from it/bundle").stages["tokenizer"].info
    assert told["warm_start"] == report.splitlines()[0]


def test_words_keep_their_rows(tmp_path, tiny_bundle):
    """Of a bundle with other captions: its rows by word, those of new words as they were."""
    stage = bundle.read(tiny_bundle).stage("star")
    old = WordTokenizer.from_dict(bundle.read(tiny_bundle).info("star").part("words").values)
    words = WordTokenizer([7, *old.t5_vocabulary[::-1]], old.max_len)
    tx = optim.make_optimizer(
        lambda step: 1e-3, b1=0.9, b2=0.9, weight_decay=0.0, clip_norm=1.0, average=0.9
    )
    sizes = stage.model | {"text_vocab": words.vocab_size}
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        arguments = bundle.module_arguments("star", sizes)
        graphdef, state = train_state.create(STAR, arguments, tx, jax.random.key(0), mesh)
        before = np.asarray(nn.named_arrays(state.params)[star.WORDS])
        state = star.start_warm(graphdef, state, tiny_bundle, tmp_path, words, tiny_bundle)
    table = np.asarray(nn.named_arrays(state.params)[star.WORDS])
    rows = bundle.read(tiny_bundle).arrays("star")[star.WORDS]
    np.testing.assert_array_equal(table[[0, 1]], rows[[0, 1]])
    np.testing.assert_array_equal(table[2], before[2])
    np.testing.assert_array_equal(table[3:], rows[:1:-1])


def test_offsets_may_come_later(tmp_path, tiny_bundle):
    stage = bundle.read(tiny_bundle).stage("vqvae")
    arrays = bundle.read(tiny_bundle).arrays("vqvae")
    still = {name: x for name, x in arrays.items() if not name.startswith("offsets/")}
    bundle.copy(tiny_bundle, tmp_path / "still", ["tokenizer"])
    bundle.save_arrays(
        tmp_path / "still", "vqvae", still, {"model": stage.model | {"offsets": False}}
    )
    tx = optim.make_optimizer(
        lambda step: 1e-3, b1=0.9, b2=0.9, weight_decay=0.0, clip_norm=1.0, average=0.9
    )
    with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
        graphdef, state = train_state.create(VQVAE4D, stage.model, tx, jax.random.key(0), mesh)
        before = nn.named_arrays(state.params)
        state = vqvae.start_warm(graphdef, state, tmp_path / "still", tmp_path, tiny_bundle)
    for name, array in nn.named_arrays(state.params).items():
        wanted = before[name] if name.startswith("offsets/") else arrays[name]
        np.testing.assert_array_equal(array, wanted, err_msg=name)
