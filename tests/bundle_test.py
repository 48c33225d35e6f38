"""Bundles: what goes in comes out, other shapes are refused, nothing is half-written."""

import functools
import hashlib
import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax import bundle, nn, sharding
from fourdstar_jax.data import pipeline, prepare
from fourdstar_jax.text.words import WordTokenizer
from fourdstar_jax.tokenizer.unitok import UniTok
from fourdstar_jax.train import free
from fourdstar_jax.train.star import all_views
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae.losses import psnr_in_mask
from tests.helpers import TINY

pytestmark = pytest.mark.central

CONFIG = {
    "stage": "tokenizer",
    "model": {
        "resolution": 16,
        "stem_channels": [3],
        "dim": 12,
        "num_blocks": 1,
        "num_decoder_blocks": 1,
        "num_heads": 2,
        "hidden_dim": 7,
        "tail_channels": [5],
        "num_codebooks": 2,
        "vocab_size": 5,
        "code_dim": 6,
        "dtype": "float32",
    },
}


def make(seed=0):
    """A tokenizer with arbitrary weights; initialising one for real takes a minute of compiling."""
    rng = np.random.default_rng(seed)
    arguments = bundle.module_arguments("tokenizer", CONFIG["model"])

    def fill(shape):
        if np.issubdtype(shape.dtype, np.floating):
            return jnp.asarray(rng.normal(0, 0.3, shape.shape), shape.dtype)
        return jnp.zeros(shape.shape, shape.dtype)

    with sharding.use_mesh(devices=jax.devices()[:1]):
        build = functools.partial(nn.build, UniTok, **arguments)
        return jax.tree.map(fill, jax.eval_shape(build, jax.random.key(0)))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def folder(tmp_path, model):
    bundle.save_stage(tmp_path / "b", "tokenizer", model, CONFIG, data_sha256="abc")
    return tmp_path / "b"


def test_round_trip(folder, model):
    loaded = bundle.read(folder).load("tokenizer")
    wanted, got = nn.named_arrays(model), nn.named_arrays(loaded)
    assert list(wanted) == list(got) and len(wanted) > 30
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)
    assert bundle.read(folder).spec == model.spec
    assert bundle.read(folder).stages["tokenizer"].info == {"data_sha256": "abc"}
    images = np.random.default_rng(0).uniform(0, 1, (3, 16, 16, 3)).astype(np.float32)
    encode = jax.jit(lambda m, x: m.encode(x))
    tokens = encode(loaded, images)
    np.testing.assert_array_equal(tokens, encode(model, images))
    assert len(np.unique(tokens)) > 1


def test_same_model_same_bytes(tmp_path, model):
    for name in ("a", "b"):
        bundle.save_stage(tmp_path / name, "tokenizer", model, CONFIG)
    for file in (bundle.FILE, "tokenizer.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_float16_is_half_the_size_and_its_spec_is_of_what_is_stored(tmp_path, folder, model):
    bundle.save_stage(tmp_path / "half", "tokenizer", model, CONFIG, storage="float16")
    sizes = [(f / "tokenizer.safetensors").stat().st_size for f in (folder, tmp_path / "half")]
    assert sizes[1] < 0.75 * sizes[0]
    loaded = bundle.read(tmp_path / "half").load("tokenizer")
    assert loaded.spec == bundle.read(tmp_path / "half").spec != model.spec
    for name, array in nn.named_arrays(model).items():
        got = nn.named_arrays(loaded)[name]
        assert got.dtype == array.dtype
        np.testing.assert_allclose(got, array, rtol=1e-3, atol=1e-6)  # half precision: 2^-11


def test_a_bundle_is_stored_anew(tmp_path, folder):
    """Of more than a tokenizer that stays: those after it were trained on its very weights."""
    bundle.store_as(folder, tmp_path / "half", "float16")
    bundle.store_as(tmp_path / "half", tmp_path / "small", "int8")
    assert bundle.read(tmp_path / "small").stage("tokenizer").storage == "int8"
    assert bundle.read(tmp_path / "small").stages["tokenizer"].info == {"data_sha256": "abc"}
    with pytest.raises(ValueError, match="is a bundle already"):
        bundle.store_as(folder, tmp_path / "small", "float16")
    bundle.store_as(TINY, tmp_path / "tiny", "int8")
    before, after = bundle.read(TINY), bundle.read(tmp_path / "tiny")
    sizes = {
        name: (tmp_path / "tiny" / stage.file).stat().st_size / (TINY / stage.file).stat().st_size
        for name, stage in after.stages.items()
    }
    assert sizes["tokenizer"] == 1 and sizes["vqvae"] < 0.6 and sizes["star"] < 0.55
    assert before.spec == after.spec and after.load("tokenizer").spec == before.spec
    star = after.stage("star")
    assert star.info == before.stage("star").info and star.storage == "int8"
    assert star.num_parameters == before.stage("star").num_parameters
    stored = safetensors.numpy.load_file(tmp_path / "tiny/star.safetensors")
    old, new = before.arrays("star"), after.arrays("star")
    loaded = nn.named_arrays(after.load("star"))
    assert set(old) == set(new) == set(loaded) and "head/output" in old and "text/table" in old
    for name, array in old.items():
        kernel = name.endswith("kernel") and array.shape[-2] >= 16
        assert stored[name].dtype == (np.int8 if kernel else np.float16)
        step = np.abs(array).max(axis=-2, keepdims=True) / 127 if kernel else 0
        assert np.all(np.abs(new[name] - array.astype(np.float32)) <= 0.501 * step), name
        np.testing.assert_array_equal(loaded[name], new[name])


def test_int8_hardly_changes_a_trained_model(tmp_path, objects_dir):
    """Nats a code of STAR, PSNR in the mask of 4D VQ-VAE and tokenizer, on a made clip."""
    prepare.prepare(
        objects_dir, tmp_path / "data", image_size=64, views=2, extra_views=0, max_frames=2,
        workers=0, log=lambda line: None,
    )  # fmt: skip
    bundle.copy(TINY, tmp_path / "tokenizer", stages=("tokenizer",))
    for name, source in (("tokenizer8", tmp_path / "tokenizer"), ("model8", TINY)):
        bundle.store_as(source, tmp_path / name, "int8")
    captions = bundle.read(TINY).info("star").part("words")
    words = WordTokenizer.from_dict(captions.values)
    loader = pipeline.make_loader(
        tmp_path / "data", "train", batch_size=1, timesteps=2, words=words, seed=0
    )
    batch = {name: jnp.asarray(x) for name, x in next(iter(loader)).items() if name != "clip"}
    cameras = Cameras(batch["viewmats"], batch["Ks"])
    tokens = jax.jit(lambda model: model.encode(batch["images"]))(
        bundle.read(TINY).load("tokenizer")
    )

    @jax.jit
    def decoded(tokenizer):
        images = tokenizer.decode(tokens)
        return psnr_in_mask(images, batch["images"], batch["masks"])

    @jax.jit
    def rendered(vqvae, tokenizer):
        decoder = free.Decoder(tokenizer, vqvae, None)
        found = free.render_tokens(decoder, tokens, cameras, batch["times"])
        return psnr_in_mask(found.renders, batch["images"], batch["masks"])

    @jax.jit
    def nats(model):
        condition = free.condition_of(batch | {"tokens": tokens})
        return model.loss(all_views({"tokens": tokens}), condition)[1]["nll_novel"]

    def figures(model, tokenizer):
        stage, first = bundle.read(model).load, bundle.read(TINY).load("tokenizer")
        own = bundle.read(tokenizer).load("tokenizer")
        return [
            float(x) for x in (nats(stage("star")), rendered(stage("vqvae"), first), decoded(own))
        ]

    whole = figures(TINY, TINY)
    small = figures(tmp_path / "model8", tmp_path / "tokenizer8")
    changes = np.abs(np.subtract(small, whole))
    assert np.all(changes > 0)  # they were stored so
    assert changes[0] < 0.02 and np.all(changes[1:] < 0.1)


def test_steps_that_do_not_fit_are_refused(tmp_path, model):
    bundle.save_stage(tmp_path, "tokenizer", model, CONFIG, storage="int8")
    path = tmp_path / "tokenizer.safetensors"
    arrays = safetensors.numpy.load_file(path)
    name = next(name for name in arrays if name.endswith(bundle.SCALE))
    arrays[name] = np.ones((1 << 10, 1 << 10), np.float32)
    safetensors.numpy.save_file(arrays, path)
    description = (tmp_path / bundle.FILE).read_text()
    old = bundle.read(tmp_path).stage("tokenizer").sha256
    new = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / bundle.FILE).write_text(description.replace(old, new))
    with pytest.raises(ValueError, match="steps of"):
        bundle.read(tmp_path).load("tokenizer")


def test_copy_starts_a_new_bundle(tmp_path, folder):
    bundle.copy(folder, tmp_path / "new", stages=("tokenizer",))
    assert bundle.read(tmp_path / "new").weights_sha256() == bundle.read(folder).weights_sha256()
    assert bundle.read(tmp_path / "new").load("tokenizer").spec == bundle.read(folder).spec
    with pytest.raises(ValueError, match="vqvae"):
        bundle.copy(folder, tmp_path / "other", stages=("tokenizer", "vqvae"))


def test_another_tokenizer_drops_what_was_trained_on_the_old_one(folder, model):
    description = json.loads((folder / bundle.FILE).read_text())
    description["stages"]["vqvae"] = bundle.read(TINY).stage("vqvae").to_dict()
    (folder / bundle.FILE).write_text(json.dumps(description))
    bundle.save_stage(folder, "tokenizer", model, CONFIG)  # the same one: all stays
    assert set(bundle.read(folder).stages) == {"tokenizer", "vqvae"}
    bundle.save_stage(folder, "tokenizer", make(seed=1), CONFIG)
    assert set(bundle.read(folder).stages) == {"tokenizer"}


def rewrite(folder, arrays):
    """Puts other tensors into a bundle, with a hash that fits."""
    data = safetensors.numpy.save(arrays)
    (folder / "tokenizer.safetensors").write_bytes(data)
    description = json.loads((folder / bundle.FILE).read_text())
    description["stages"]["tokenizer"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / bundle.FILE).write_text(json.dumps(description))


def stored(folder):
    return safetensors.numpy.load_file(folder / "tokenizer.safetensors")


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    arrays = stored(folder)
    name = "quant_proj/proj/kernel"
    rewrite(folder, {k: v for k, v in arrays.items() if k != name})
    with pytest.raises(ValueError, match=f"another shape.*1 tensors missing.*{name}"):
        bundle.read(folder).load("tokenizer")
    rewrite(folder, {**arrays, "extra": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="another shape.*1 too many.*extra"):
        bundle.read(folder).load("tokenizer")
    rewrite(folder, {**arrays, name: arrays[name].T.copy()})
    with pytest.raises(ValueError, match=f"another shape.*{name}"):
        bundle.read(folder).load("tokenizer")
    rewrite(folder, {**arrays, name: np.full_like(arrays[name], np.nan)})
    with pytest.raises(ValueError, match="finite"):
        bundle.read(folder).load("tokenizer")
    rewrite(folder, {**arrays, name: arrays[name] + 1})
    with pytest.raises(ValueError, match="weights_sha256"):
        bundle.read(folder).load("tokenizer")


def test_the_blocks_of_older_decoders_are_stacked(tmp_path, tiny_bundle):
    """Until 0.1 they had arrays of their own."""
    stage = bundle.read(tiny_bundle).stage("vqvae")
    arrays = bundle.read(tiny_bundle).arrays("vqvae")
    stacked = re.compile("static/(blocks|view_attentions)/(.+)")
    older = {}
    for name, array in arrays.items():
        if found := stacked.fullmatch(name):
            older |= {f"static/{found[1]}/{i}/{found[2]}": layer for i, layer in enumerate(array)}
        else:
            older[name] = array
    assert len(older) == len(arrays) and set(older) != set(arrays)  # it has one block
    bundle.save_arrays(tmp_path, "vqvae", older, stage.config)
    loaded = nn.named_arrays(bundle.read(tmp_path).load("vqvae"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)

    layer = "static/blocks/1/norm1/scale"  # of a second block that is not whole
    bundle.save_arrays(tmp_path, "vqvae", older | {layer: np.ones(12, "f")}, stage.config)
    with pytest.raises(ValueError, match=r"static/blocks/norm1/scale is \(2, 12\), not \(1, 12\)"):
        bundle.read(tmp_path).load("vqvae")


def test_all_may_read_what_they_may_read_of_other_files(folder):
    modes = {(folder / name).stat().st_mode for name in ("model.json", "tokenizer.safetensors")}
    assert len(modes) == 1


def test_interrupted_replacement_is_refused(folder):
    path = folder / "tokenizer.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="SHA-256"):
        bundle.read(folder).load("tokenizer")


def test_never_a_pickle(folder):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    data = pickle.dumps(Bomb())
    (folder / "tokenizer.safetensors").write_bytes(data)
    description = json.loads((folder / bundle.FILE).read_text())
    description["stages"]["tokenizer"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / bundle.FILE).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="tokenizer.safetensors"):
        bundle.read(folder).load("tokenizer")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"format": "fourdstar_jax bundle", "version": 99}', "version must be 1, not 99"),
        (
            '{"format": "fourdstar_jax bundle", "version": 1, "stages": {"x": {}}}',
            "stages.x is",
        ),
        (
            '{"format": "fourdstar_jax bundle", "version": 1, "stages": {"star": {}}}',
            "star.file is",
        ),
    ],
)
def test_bad_descriptions(tmp_path, text, words):
    (tmp_path / bundle.FILE).write_text(text)
    with pytest.raises(ValueError, match=words):
        bundle.read(tmp_path)


def test_files_outside_the_bundle_are_not_read(folder):
    description = json.loads((folder / bundle.FILE).read_text())
    description["stages"]["tokenizer"]["file"] = "../tokenizer.safetensors"
    (folder / bundle.FILE).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="stages.tokenizer.file must be"):
        bundle.read(folder).load("tokenizer")


def test_missing_stage_and_missing_bundle(tmp_path, folder):
    with pytest.raises(ValueError, match="has no star yet"):
        bundle.read(folder).load("star")
    with pytest.raises(ValueError, match="there is no such folder"):
        bundle.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it has no model.json"):
        bundle.read(tmp_path / "empty")


def test_non_finite_weights_are_not_saved(tmp_path, model):
    broken = jax.tree.map(lambda x: x * np.nan if x.dtype == np.float32 else x, model)
    with pytest.raises(ValueError, match="finite"):
        bundle.save_stage(tmp_path / "b", "tokenizer", broken, CONFIG)
    assert not (tmp_path / "b").exists()
