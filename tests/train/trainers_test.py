"""The three trainers in a row on a small dataset of boxes, and the object that comes out."""

import functools
import hashlib
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fourdstar_jax import bundle, cli, generate, nn
from fourdstar_jax.data import prepare, splits
from fourdstar_jax.tokenizer import make
from fourdstar_jax.tokenizer.losses import tokenizer_loss
from fourdstar_jax.tokenizer.measures import errors
from fourdstar_jax.train import encode, star, tokenizer, vqvae
from fourdstar_jax.train.metrics import Mean, MetricWriter, Watch
from fourdstar_jax.vqvae.model import VQVAE4D

CONFIGS = Path(__file__).parents[2] / "configs"
# What differs between two runs.
CLOCKS = ("steps_per_s", "data_wait", "objects_per_s", "tokens_per_s", "tflops")
CLOCKS += ("goodput", "time", "kept_s")
QUIET = dict(log=lambda line: None)


@pytest.fixture(scope="module")
def data_dir(objects_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("trainers") / "data"
    prepare.prepare(
        objects_dir,
        out,
        image_size=16,
        views=2,
        extra_views=1,
        max_frames=3,
        depth=True,
        workers=0,
        **QUIET,
    )
    return out


def config_of(stage, data_dir, source=None, steps=4):
    """The tiny config, shrunk further."""
    spec = importlib.util.spec_from_file_location(stage, CONFIGS / f"{stage}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny,unitok")
    model = dict(
        tokenizer=dict(
            resolution=16, stem_channels=(8,), tail_channels=(8,), dim=16, num_blocks=1,
            num_decoder_blocks=1, num_heads=2, hidden_dim=32, num_codebooks=2, vocab_size=16,
            code_dim=8,
        ),
        vqvae=dict(
            resolution=16, grid=4, code_dim=8, dim=16, num_blocks=1, num_heads=2, hidden_dim=32,
            view_attention_every=1, up_channels=(8,), offset_dim=16, offset_heads=2,
            unet_channels=(8, 8),
        ),
        star=dict(
            num_codebooks=2, vocab_size=16, code_dim=8, resolution=16, grid=4, dim=16,
            num_layers=2, num_heads=2, hidden_dim=32, head_dim=16, head_heads=2,
            container_slots=3, container_neighbors=2, text_length=5, text_dim=8,
        ),
    )[stage]  # fmt: skip
    config.model.update(model)
    config.data.update(dir=str(data_dir), timesteps=2)
    if stage == "star":
        config.data.buckets = ((1, 0.2), (2, 0.8))
    config.mesh.data = 1
    config.update(batch_size=2, steps=steps, log_every=2, checkpoint_every=2, eval_every=2)
    if stage == "vqvae":
        config.picture_every = 4
    if source is not None:
        config.bundle = str(source)
    return config.lock()


def save_arbitrary(folder, stage, arguments, seed=0):
    """A bundle's stage with arbitrary weights, where its training is not what is tested."""
    module = dict(tokenizer=make, vqvae=VQVAE4D)[stage]
    build = functools.partial(nn.build, module, **bundle.module_arguments(stage, arguments))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(build, jax.random.key(0))
    model = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)
    bundle.save_stage(folder, stage, model, {"model": arguments})


@pytest.fixture
def one_device(monkeypatch):
    """The trainers take all devices; the tests have eight simulated ones."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)


@pytest.mark.central
def test_stages_build_on_each_other_and_resume_exactly(data_dir, tmp_path, one_device):
    tokenizer.train(config_of("tokenizer", data_dir), tmp_path / "t")
    folder = tmp_path / "t/bundle"

    vqvae.train(config_of("vqvae", data_dir, folder), tmp_path / "v")
    metrics = [json.loads(x) for x in (tmp_path / "v/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [2, 4]
    assert all(np.isfinite(row["train/loss"]) for row in metrics)
    with Image.open(tmp_path / "v/pictures/step_00000004.png") as picture:
        assert picture.size == (
            5 * 16,
            6 * 16,
        )  # two objects, two views of the rig and an extra one

    token_dir = tmp_path / "tokens"
    encode.prepare_tokens(data_dir, tmp_path / "v/bundle", token_dir)
    config = config_of("star", token_dir, tmp_path / "v/bundle")
    star.train(config, tmp_path / "s")  # straight through; then killed after 2 of 4 steps
    stop_after(2, star, config, tmp_path / "again")
    star.train(config, tmp_path / "again")
    straight, resumed = (
        bundle.read(tmp_path / d / "bundle").weights_sha256() for d in ("s", "again")
    )
    assert set(straight) == {"tokenizer", "vqvae", "star"}
    assert straight == resumed

    model = generate.load(tmp_path / "s/bundle")
    video = np.full((2, 16, 16, 3), 255, np.uint8)
    video[:, 4:12, 4:12] = [200, 30, 30]
    object4d = model.generate(video, fit="none", seed=1)
    assert object4d.gaussians.means.shape == (2, 2 * 8 * 8, 3)
    assert np.isfinite(object4d.gaussians.means).all()


@pytest.mark.slow  # tests/tokenizer/vq16_test.py takes each of its steps alone
def test_stages_build_on_vq16(data_dir, tmp_path, one_device):
    """A bundle with LlamaGen's tokenizer, one code a token, instead of UniTok."""
    arguments = dict(
        family="vq16", resolution=16, channels=32, multipliers=[1, 1, 1], num_blocks=1, z_dim=8,
        vocab_size=32, code_dim=4,
    )  # fmt: skip
    save_arbitrary(tmp_path / "t", "tokenizer", arguments)

    config = config_of("vqvae", data_dir, tmp_path / "t", steps=2)
    config.model.code_dim = 4
    vqvae.train(config, tmp_path / "v")
    token_dir = tmp_path / "tokens"
    encode.prepare_tokens(data_dir, tmp_path / "v/bundle", token_dir)
    spec = json.loads((token_dir / "spec.json").read_text())["tokenizer"]
    assert (spec["name"], spec["num_codebooks"], spec["vocab_size"]) == ("vq16", 1, 32)
    config = config_of("star", token_dir, tmp_path / "v/bundle", steps=2)
    config.model.update(num_codebooks=1, vocab_size=32, code_dim=4)
    star.train(config, tmp_path / "s")
    for stage in "vs":
        text = (tmp_path / stage / "metrics.jsonl").read_text()
        losses = [json.loads(line)["train/loss"] for line in text.splitlines()]
        assert len(losses) == 1 and np.isfinite(losses[0]) and losses[0] > 0

    model = generate.load(tmp_path / "s/bundle")
    video = np.full((2, 16, 16, 3), 255, np.uint8)
    video[:, 4:12, 4:12] = [200, 30, 30]
    object4d = model.generate(video, fit="none", seed=1)
    assert object4d.gaussians.means.shape == (2, 2 * 8 * 8, 3)
    assert np.isfinite(object4d.gaussians.means).all()


def test_local_tokenizer_trains_and_tells_how_steady_it_is(
    objects_dir, tmp_path, one_device, monkeypatch
):
    """Its bundle sees white as blank; the held-out clip's metrics have the two shares."""
    plate = hashlib.sha256((objects_dir / "pack/wild_pack__Plate2.glb").read_bytes()).hexdigest()
    table = {(plate, 0): "train", (plate, 1): "unseen_clip"}
    monkeypatch.setattr(splits, "load", lambda: table)
    prepare.prepare(
        objects_dir, tmp_path / "d", image_size=16, views=2, extra_views=1, max_frames=2,
        workers=0, **QUIET,
    )  # fmt: skip
    with config_of("tokenizer", tmp_path / "d").unlocked() as config:
        config.update(batch_size=1)
        config.model = dict(
            family="local", resolution=16, stem_channels=(8,), tail_channels=(8,), dim=16,
            num_decoder_blocks=1, num_codebooks=3, vocab_size=16, code_dim=12,
        )  # fmt: skip
    tokenizer.train(config, tmp_path / "t")
    rows = [json.loads(x) for x in (tmp_path / "t/metrics.jsonl").read_text().splitlines()]
    held = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in held] == [2, 4]
    for row in held:
        assert row["eval/blank_with_blank_token"] == 1
        assert 0 < row["eval/blank_share"] < 1 and 0 <= row["eval/unchanged_kept"] <= 1
    trained = bundle.read(tmp_path / "t/bundle")
    tokenizer_ = trained.load("tokenizer")
    white = jnp.ones((1, 16, 16, 3))
    np.testing.assert_array_equal(tokenizer_.encode(white), np.zeros((1, 16, 3)))
    reach = trained.stage("tokenizer").info["reach"]  # with which `generate` compares its input
    assert 0 < reach["0.5"] <= reach["0.9"] <= reach["0.99"] < 1 and reach["pictures"] == 256
    box = white.at[:, 4:12, 4:12].set(0.0)
    assert errors(tokenizer_, white) == 0 < errors(tokenizer_, box)


def test_star_looks_at_what_it_makes(objects_dir, tmp_path, one_device, monkeypatch):
    """Samples of an unseen clip are measured and drawn; the bundle has the best weights by them."""
    plate = hashlib.sha256((objects_dir / "pack/wild_pack__Plate2.glb").read_bytes()).hexdigest()
    table = {(plate, 0): "train", (plate, 1): "unseen_clip"}
    monkeypatch.setattr(splits, "load", lambda: table)
    prepare.prepare(
        objects_dir, tmp_path / "d", image_size=16, views=2, extra_views=0, max_frames=2,
        workers=0, **QUIET,
    )  # fmt: skip
    for stage in ("tokenizer", "vqvae"):
        arguments = config_of(stage, tmp_path / "d").model.to_dict()
        save_arbitrary(tmp_path / "v", stage, arguments)
    encode.prepare_tokens(tmp_path / "d", tmp_path / "v", tmp_path / "tokens")
    with config_of("star", tmp_path / "tokens", tmp_path / "v").unlocked() as config:
        config.update(batch_size=1, best="free/psnr_in_mask")
        config.free.update(every=2, clips=3)
        config.data.update(buckets=(), shuffle_views=True)
    star.train(config, tmp_path / "s")
    rows = [json.loads(x) for x in (tmp_path / "s/metrics.jsonl").read_text().splitlines()]
    free = [row for row in rows if "free/accuracy" in row]
    assert [row["step"] for row in free] == [2, 4]
    for row in free:
        assert all(np.isfinite(value) for value in row.values())
        assert {"free/over_copy_t2", "free/over_copy_view1", "free/psnr_in_mask"} <= row.keys()
    with Image.open(tmp_path / "s/pictures/step_00000004.png") as picture:
        assert picture.size == (2 * 2 * 16, 2 * 16)  # one clip: two timesteps, two views
    values = [row["free/psnr_in_mask"] for row in free]
    kept = bundle.read(tmp_path / "s/bundle")
    assert kept.stage("star").info["best"] == {
        "metric": "free/psnr_in_mask", "value": max(values), "step": 2 * (1 + np.argmax(values)),
    }  # fmt: skip
    assert kept.weights_sha256() == bundle.read(tmp_path / "s/best").weights_sha256()
    assert kept.stage("star").info["trained"] == {"timesteps": 2, "views": 2}
    with pytest.raises(ValueError, match="config.best='free/lpips': this run measures"):
        config.best = "free/lpips"
        star.train(config, tmp_path / "again")

    config.best = "free/psnr_in_mask"
    for on_device in (False, True):  # the pictures that the tokens are of
        config.data.update(dir=str(tmp_path / "d"), on_device=on_device)
        workdir = tmp_path / f"pictures{on_device}"
        star.train(config, workdir)
        seen = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert len(seen) == len(rows)
        for got, wanted in zip(seen, rows, strict=True):
            got, wanted = (
                {k: v for k, v in x.items() if not k.endswith(CLOCKS)} for x in (got, wanted)
            )
            assert got == pytest.approx(wanted, rel=1e-4)
    assert bundle.read(workdir / "bundle").stage("star").info["trained"]["views"] == 2
    config.augment.update(mirror=1.0, colour=1.0, reverse=0.5)
    config.update(best=None)
    config.free.clips = 0
    star.train(config, tmp_path / "augmented")
    text = (tmp_path / "augmented/metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(text)["train/grad_norm"] != pytest.approx(
        rows[0]["train/grad_norm"], rel=1e-4
    )
    config.data.dir = str(tmp_path / "tokens")
    with pytest.raises(ValueError, match="holds tokens, which config.augment cannot change"):
        star.train(config, tmp_path / "refused")


@pytest.mark.parametrize("stage", [tokenizer, vqvae])
def test_a_restart_gives_the_same_curve_discriminator_included(
    stage, data_dir, tmp_path, one_device
):
    """Killed after 2 of 4 steps, the discriminator from the second on, with averaged weights.

    The pictures lie on the device; the clips are augmented.
    """
    name = stage.__name__.split(".")[-1]
    if stage is vqvae:
        arguments = config_of("tokenizer", data_dir).model.to_dict()
        save_arbitrary(tmp_path / "t", "tokenizer", arguments)
    config = config_of(name, data_dir, tmp_path / "t" if stage is vqvae else None)
    config.update(log_every=1)
    config.adversarial.update(weight=0.05, start=0.25, multiplier=1 / 64, r1_every=2)
    config.augment.update(mirror=0.5, colour=0.8)
    config.data.on_device = True
    if stage is vqvae:
        config.data.buckets = ((1, 1.0),)
        config.augment.update(reverse=0.5, frozen=0.5)
        config.update(batch_size=2, accumulate=2)
    stage.train(config, tmp_path / "straight")
    stop_after(2, stage, config, tmp_path / "again")
    stage.train(config, tmp_path / "again")

    def curve(folder):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if k.partition("/")[2] not in CLOCKS} for row in rows]

    straight = curve("straight")
    assert straight == curve("again")
    assert straight[0]["train/discriminator"] == 0 < straight[1]["train/discriminator"]
    assert straight[1]["train/r1"] > 0 == straight[2]["train/r1"] < straight[3]["train/r1"]
    assert all(row["train/adversarial"] != 0 for row in straight[1:])
    hashes = [
        bundle.read(tmp_path / d / "bundle").weights_sha256()[name] for d in ("straight", "again")
    ]
    assert hashes[0] == hashes[1]


def stop_after(step, stage, config, workdir):
    """Runs the trainer until it has saved `step`, as a kill would end it."""

    class Killed(Exception):
        pass

    def die(self, done, *args, **kwargs):
        save(self, done, *args, **kwargs)
        if done == step:
            self._manager.wait_until_finished()
            raise Killed

    save = stage.Checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.Checkpoints, "save", die)
        with pytest.raises(Killed):
            stage.train(config, workdir)


def test_tokens_of_another_tokenizer_are_refused(data_dir, tmp_path, one_device):
    arguments = config_of("tokenizer", data_dir).model.to_dict()
    for seed, name in enumerate(("one", "other")):
        save_arbitrary(tmp_path / name, "tokenizer", arguments, seed)
    encode.prepare_tokens(data_dir, tmp_path / "one", tmp_path / "tokens")
    with pytest.raises(ValueError, match="weights_sha256"):
        star.train(config_of("star", tmp_path / "tokens", tmp_path / "other"), tmp_path)


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    writer = MetricWriter(tmp_path, total_steps=7)
    writer.write(3, {"loss": 1.0})
    with pytest.raises(FloatingPointError, match="step 5"):
        writer.write(5, {"loss": float("nan")})
    writer.close()


def test_a_term_that_is_not_finite_is_named_with_step_and_clips():
    def metrics(**values):
        return {
            name: jnp.float32(x) for name, x in {"loss": 1.0, "grad_norm": 2.0, **values}.items()
        }

    watch = Watch()
    assert watch.add(4, np.array([1, 2]), metrics()) is None
    assert watch.add(5, np.array([7, 30]), metrics(flow=np.nan, loss=np.nan)) == metrics()
    with pytest.raises(
        FloatingPointError, match="^step 5: flow is nan; clips 7, 30 of the dataset$"
    ):
        watch.add(6, np.array([3, 4]), metrics())
    watch.add(7, np.array([9]), metrics(grad_norm=np.inf))
    with pytest.raises(FloatingPointError, match="^step 7: grad_norm is inf; clips 9 of"):
        watch.check()
    assert watch.check()["grad_norm"] == np.inf


def test_some_steps_may_be_broken_and_are_left_out(capsys):
    watch, good = Watch(limit=2), {"loss": jnp.float32(1.0), "flow": jnp.float32(3.0)}
    for step in range(3):
        watch.add(step, np.array([step]), good | ({"loss": jnp.float32(np.nan)} if step else {}))
    assert watch.mean() == {"loss": 1.0, "flow": 3.0}
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "learnt nothing (1 of 2): step 1: loss is nan; clips 1 of the dataset",
        "learnt nothing (2 of 2): step 2: loss is nan; clips 2 of the dataset",
    ]
    watch.add(3, np.array([3]), good | {"flow": jnp.float32(np.inf)})
    with pytest.raises(FloatingPointError, match="step 3: flow is inf"):
        watch.check()


def test_a_broken_step_ends_the_command_in_one_line(data_dir, tmp_path, one_device, capsys):
    """Nothing of it is saved, and the exit code is that of other errors."""

    def broken(output, *args, **kwargs):
        loss, metrics = tokenizer_loss(output, *args, **kwargs)
        return loss, metrics | {"l1": metrics["l1"] / 0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "tokenizer_loss", broken)
        patch.setattr(cli.train, "read_config", lambda *_: config_of("tokenizer", data_dir))
        code = cli.main(["train", "--config=configs/tokenizer.py:tiny", "--workdir", str(tmp_path)])
    assert code == 2
    assert re.search(
        r"^fourdstar: step 1: l1 is inf; clips \d, \d of the dataset$",
        capsys.readouterr().err,
        re.M,
    )
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_a_mean_is_over_the_steps_that_have_the_metric():
    mean = Mean()
    for metrics in ({"a": 1.0, "b": 4.0}, {"a": 3.0}):
        mean.add(metrics)
    assert mean.result() == {"a": 2.0, "b": 4.0}
