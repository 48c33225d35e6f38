"""From a video to an object, through all three stages with arbitrary weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fourdstar_jax as fs
from fourdstar_jax import bundle, generate, geometry
from fourdstar_jax.generate import NEUTRAL_PROMPT
from fourdstar_jax.star import sample

T, V, G = 2, 2, 2 * 4 * 4


@pytest.fixture(autouse=True)
def mesh():
    """None, as for users; and what one test has compiled serves the next."""


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return fs.load(tiny_bundle)


def frames(count=5, size=20, seed=0):
    """RGBA frames with a square of random texture."""
    rng = np.random.default_rng(seed)
    video = np.zeros((count, size, size, 4), np.uint8)
    video[:, 5:15, 6:14] = rng.integers(0, 255, (count, 10, 8, 4))
    video[:, 5:15, 6:14, 3] = 255
    return video


@pytest.fixture(scope="module")
def object4d(model):
    return model.generate(frames(), seed=3)


def test_shapes_and_ranges(object4d):
    means, quats, scales, opacities, colors = object4d.gaussians
    assert means.shape == (T, G, 3) and quats.shape == (T, G, 4) and scales.shape == (T, G, 3)
    assert opacities.shape == (T, G) and colors.shape == (T, G, 3)
    for array in (opacities, colors):
        assert array.min() >= 0 and array.max() <= 1
    assert scales.min() > 0 and np.isfinite(means).all()
    assert object4d.fps == 8 and object4d.rig == geometry.Rig.around(2, fps=8.0)
    assert object4d.tokens.shape == (T, V * 4, 2)
    assert object4d.tokens.min() >= 0 and object4d.tokens.max() < 5


def test_a_picture_is_one_of_a_still(model, object4d):
    """A decoder that learnt clips alone is not asked for a single timestep."""
    tokens = jnp.asarray(object4d.tokens[:1]).reshape(1, 1, V, -1, 2)
    cameras = model.rig.cameras(model.resolution)
    alone = generate.decode_tokens(model.tokenizer, model.vqvae, tokens, cameras)
    still = jnp.repeat(tokens, generate.STILL, axis=1)
    many = generate.decode_tokens(model.tokenizer, model.vqvae, still, cameras)
    for a, b in zip(alone, many, strict=True):
        assert a.shape[:2] == (1, 1)
        np.testing.assert_allclose(a, b[:, :1], atol=1e-6)


def test_the_seed_decides(model, object4d):
    again = model.generate(frames(), seed=3)
    np.testing.assert_array_equal(again.tokens, object4d.tokens)
    for a, b in zip(again.gaussians, object4d.gaussians, strict=True):
        np.testing.assert_array_equal(a, b)
    other = model.generate(frames(), seed=4)
    assert (other.tokens != object4d.tokens).any()


def test_every_timestep_runs_the_same_program(model):
    for function in (sample.prefill, sample.decode_group):
        function.clear_cache()
    model.generate(frames(), seed=3)
    model.generate(frames(), seed=4, temperature=0.5)
    assert sample.prefill._cache_size() == sample.decode_group._cache_size() == 1


def test_input_view_keeps_its_tokens(model, object4d):
    images, _ = model.read(frames())
    known = np.asarray(generate.encode_images(model.tokenizer, jnp.asarray(images)))
    np.testing.assert_array_equal(object4d.tokens[:, :4], known)


def test_input_is_compared_with_the_training(tiny_bundle, tmp_path):
    """Where the bundle tells how well its tokenizer gave its pictures back."""
    assert generate.load(tiny_bundle).read(frames()).info["reach"] is None
    shutil.copytree(tiny_bundle, tmp_path / "told")
    bundle.add_info(tmp_path / "told", "tokenizer", reach={"0.5": 0.1, "0.99": 0.2})
    reach = generate.load(tmp_path / "told").read(frames()).info["reach"]
    assert reach["usual"] == 0.2 and 0 < reach["error"] < 1


def test_reconstruct_decodes_the_tokens_it_encodes(model):
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (T, V, 16, 16, 3)).astype(np.float32)
    result = model.reconstruct(images, clip="a")
    assert result.gaussians.means.shape == (T, G, 3)
    assert result.meta["input"] == {"clip": "a"} and "seed" not in result.meta
    tokens = generate.encode_images(model.tokenizer, jnp.asarray(images))
    np.testing.assert_array_equal(result.tokens, np.asarray(tokens).reshape(T, -1, 2))
    for wrong, told in (
        (images[:, :1], r"images has shape \(2, 1, 16, 16, 3\); \[T, 2, 16, 16, 3\] is needed"),
        (images[:0], r"images has shape \(0, "),
        (None, "images=None must be an array"),
        (255 * images, r"images has floats from \S+ to 25\S+; \[0, 1\] is needed"),
        (images * np.nan, "images has values that are not finite"),
        (np.uint8(255 * images), "images has type uint8; floats"),
    ):
        with pytest.raises(ValueError, match=told):
            model.reconstruct(wrong)


def test_a_picture_is_a_static_object(model, tmp_path):
    Image.fromarray(frames(1)[0]).save(tmp_path / "a.png")
    result = model.generate(tmp_path / "a.png", seed=0)
    assert result.gaussians.means.shape == (1, G, 3)
    assert result.meta["input"]["name"] == "a.png"
    assert len(result.meta["input"]["sha256"]) == 64


def test_text_reaches_the_prompt(model):
    assert model.generate(frames(1), seed=0).meta["prompt"] == NEUTRAL_PROMPT
    assert model.generate(frames(1), text="a dog, walking").meta["prompt"] == "a dog, walking"


def test_a_short_clip_loops_to_the_timesteps_asked_for(model):
    result = model.generate(frames(1), seed=0, timesteps=T)
    assert len(result.tokens) == T
    np.testing.assert_array_equal(result.tokens[0, :4], result.tokens[1, :4])
    assert len(model.generate(frames(1), seed=0).tokens) == 1


def test_what_is_read_can_be_looked_at_first(model):
    clip = model.read(frames(), timesteps=1)
    assert clip.images.shape == (1, 16, 16, 3) and clip.info["timesteps"] == 1
    assert clip.info["object"] == "alpha" and 0 < clip.info["object_area"] < 1
    at_once, later = model.generate(frames(), timesteps=1, seed=3), model.generate(clip, seed=3)
    np.testing.assert_array_equal(at_once.tokens, later.tokens)
    assert at_once.meta == later.meta
    np.testing.assert_array_equal(later.frames, clip.images)
    with pytest.raises(ValueError, match="^fps is for `read`"):
        model.generate(clip, fps=2.5)


def test_the_object_moves_as_fast_as_what_was_read(model):
    slow = model.generate(frames(), seed=3, fps=2.5)
    assert slow.fps == 2.5 and slow.meta["input"]["seconds_read"] == T / 2.5
    assert model.rig.fps == 8


def test_bad_arguments(model):
    for name, value, allowed in (
        ("seed", 1.5, "a whole number from 0 to 4294967295"),
        ("seed", True, "a whole number"),
        ("seed", -1, "a whole number"),
        ("key", 3, "one key, such as"),
        ("key", jax.random.split(jax.random.key(0)), "one key, such as"),
        ("text", ["a fox"], "a text"),
        ("timesteps", 0, "a whole number of at least 1"),
        ("timesteps", 1.0, "a whole number of at least 1"),
        ("timesteps", 3, "from 1 to 2, the most that the model was trained on"),
        ("fps", -1, "a number from 0.001 to 1000"),
        ("fps", float("nan"), "a number from 0.001 to 1000"),
        ("fps", "8", "a number from 0.001 to 1000"),
        ("fit", "all", "one of object, none, crop"),
        ("temperature", -1.0, "a number from 0"),
        ("temperature", "hot", "a number from 0"),
        ("top_k", 1.5, "a whole number from 1"),
        ("cfg", float("nan"), "a number from -1000 to 1000"),
        ("history_cfg", [1], "a number from -1000 to 1000"),
    ):
        with pytest.raises(ValueError, match=f"^{name}=.* must be {allowed}"):
            model.generate(frames(1), **{name: value})
    with pytest.raises(ValueError, match="key or seed"):
        model.generate(frames(), key=jax.random.key(0), seed=0)
    with pytest.raises(ValueError, match="^start=1 is for files"):
        model.generate(frames(), start=1)
    with pytest.raises(ValueError, match="^folder=None must be a path"):
        fs.load(None)


@pytest.mark.parametrize(
    "video, told",
    [
        (None, "^video=None must be a path or an array"),
        (3, "^video=3 must be a path or an array"),
        ([np.zeros((20, 20, 3)), np.zeros((20, 21, 3))], "^video=.* must be a path or an array"),
        ("nowhere.mp4", "^nowhere.mp4 does not exist"),
        ("https://a.org/b.mp4", "^https://a.org/b.mp4 is a URL: download it first"),
        (frames()[:0], "^video has shape"),
        (frames()[0], "^video has shape"),
        (frames()[..., :1], r"^video has shape \(5, 20, 20, 1\); \[T, h, w, 3 or 4\] is needed"),
        (frames()[:, :7], "^video is 20x7 pixels; at least 16x16 are needed"),
        (frames().astype(np.float32), r"^video has floats from 0 to 255; \[0, 1\] is needed"),
        (frames() / 127.5 - 1, r"^video has floats from -1 to 1; \[0, 1\] is needed"),
        (np.where(frames() == 0, np.nan, 1.0), "^video has values that are not finite"),
        (frames().astype(np.int64), "^video has type int64; uint8 or floats are needed"),
    ],
)
def test_bad_videos(model, video, told):
    with pytest.raises(ValueError, match=told):
        model.generate(video)


def test_numbers_may_be_those_of_arrays(model, tmp_path):
    """And the manifest, which is JSON, can still be written."""
    found = model.generate(frames(1), seed=np.int64(3), fps=np.float32(4), cfg=jnp.float32(1.5))
    assert json.loads(json.dumps(found.meta))["seed"] == 3 and found.fps == 4
    fs.save(found, tmp_path / "a", size=np.int32(32))
    with pytest.raises(ValueError, match="^object4d='a' must be an Object4D"):
        fs.save("a", tmp_path / "b")
    with pytest.raises(ValueError, match="^size=8 must be a whole number from 16"):
        fs.save(found, tmp_path / "b", size=8)


def test_render(object4d):
    cameras = geometry.orbit_cameras([0.0, 90.0, 180.0], width=17, height=19)
    images = object4d.render(cameras, width=17, height=19)
    assert images.shape == (T, 3, 19, 17, 3)
    assert np.asarray(images).std() > 0
    with pytest.raises(ValueError, match="^background='white' must be a number from 0 to 1"):
        object4d.render(cameras, width=17, height=19, background="white")


def test_an_incomplete_bundle_says_what_is_missing(tiny_bundle, tmp_path):
    bundle.copy(tiny_bundle, tmp_path / "half", stages=("tokenizer", "vqvae"))
    half = fs.load(tmp_path / "half")
    images = np.ones((T, V, 16, 16, 3), np.float32)
    assert half.reconstruct(images).gaussians.means.shape == (T, G, 3)
    with pytest.raises(ValueError, match="has no star yet"):
        half.generate(frames())
    bundle.copy(tiny_bundle, tmp_path / "less", stages=("tokenizer",))
    with pytest.raises(ValueError, match="not complete"):
        fs.load(tmp_path / "less")


def test_a_text_that_is_cut_gives_a_warning(model):
    with pytest.warns(UserWarning, match=r"has \d+ word pieces; the model reads the first \d+"):
        model.encode_text("a red dog that jumps over a blue bull " * 20)


def test_a_bundle_tells_how_star_was_trained_and_is_sampled(tiny_bundle, tmp_path):
    def with_info(**info):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(tiny_bundle, folder)
        content = json.loads((folder / "model.json").read_text())
        content["stages"]["star"]["info"] |= info
        (folder / "model.json").write_text(json.dumps(content))
        return folder

    model = generate.load(
        with_info(
            trained={"timesteps": 1, "views": 2},
            sampling={"temperature": 0.25, "top_k": 3, "cfg_scale": 2.0},
        )
    )
    kept = {"temperature": 0.25, "top_k": 3, "cfg_scale": 2.0}
    assert model.sampling == kept | {"history_scale": 1.0}  # older bundles do not say
    with pytest.raises(ValueError, match="timesteps=2 must be from 1 to 1, the most"):
        model.read(frames(), timesteps=2)
    assert len(model.read(frames()).images) == 1
    with pytest.raises(ValueError, match="its star was trained on 3 views, its vqvae on 2"):
        generate.load(with_info(trained={"timesteps": 1, "views": 3}))
    hot = generate.load(with_info(sampling={"temperature": "hot", "cfg_scale": 1}))
    with pytest.raises(ValueError, match="sampling.temperature must be a number"):
        hot.generate(frames())
