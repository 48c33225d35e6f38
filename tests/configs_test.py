"""Every config of every stage and scale builds, shape-only, and fits the stages beside it."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import bundle, geometry, nn
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.tokenizer import LOCAL, RELEASED, make
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae.model import VQVAE4D

CONFIGS = Path(__file__).parents[1] / "configs"
SCALES = (
    "tiny",
    "small",
    "base",
    "paper",
    "base,vq16",
    "paper,vq16",
    "tiny,unitok",
    "small,unitok",
)
STAGES = {"tokenizer": make, "vqvae": VQVAE4D, "star": STAR}
# Millions of parameters, tokenizer, vqvae and star: from the sizes of the published parts.
MILLIONS = {
    "tiny": ((0.2, 0.6), (0.2, 0.8), (1.0, 2.3)),
    "small": ((2, 4), (3, 7), (11, 20)),
    "base": ((680, 710), (360, 420), (330, 400)),
    "paper": ((680, 710), (370, 430), (800, 870)),
    "base,vq16": ((71.8, 71.9), (360, 420), (330, 400)),
    "paper,vq16": ((71.8, 71.9), (370, 430), (800, 870)),
    "tiny,unitok": ((0.2, 0.6), (0.2, 0.8), (1.0, 2.3)),
    "small,unitok": ((3, 7), (3, 7), (11, 20)),
}


def config_of(stage, scale):
    spec = importlib.util.spec_from_file_location(stage, CONFIGS / f"{stage}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(scale)


def arguments_of(stage, scale):
    arguments = bundle.module_arguments(stage, config_of(stage, scale).model.to_dict())
    if stage == "star" and arguments["text_encoder"] == "words":
        arguments["text_vocab"] = 100  # the trainer counts the words of the captions
    return arguments


def shapes(stage, scale):
    def build(key):
        return nn.build(STAGES[stage], key, **arguments_of(stage, scale))

    return jax.eval_shape(build, jax.random.key(0))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("stage", STAGES)
def test_builds_at_its_size(stage, scale):
    counted = nn.count_parameters(shapes(stage, scale))
    low, high = MILLIONS[scale][list(STAGES).index(stage)]
    assert low < counted / 1e6 < high
    told = json.loads((CONFIGS.parent / "docs" / "results" / "sizes.json").read_text())
    if scale in told:  # else `python docs/make.py --sizes`
        assert told[scale][stage] == counted


def test_small_is_no_larger_than_a_download_may_be():
    """32 MB, with as many words as captions have."""
    stored = {
        stage: bundle.stored_bytes(
            nn.named_arrays(shapes(stage, "small")), config_of(stage, "small").storage
        )
        for stage in STAGES
    }
    words = 1000 * config_of("star", "small").model.text_dim * 2
    assert 25e6 < sum(stored.values()) + words < 32e6


@pytest.mark.parametrize("scale", SCALES)
def test_stages_fit_together(scale):
    """Images of a config's size go through all three stages, abstractly."""
    tokenizer, vqvae, star = (shapes(stage, scale) for stage in STAGES)
    size = config_of("tokenizer", scale).model.resolution
    B, T, V = 1, 2, 4
    rig = geometry.orbit_cameras([0, 90, 180, 270], width=size, height=size)
    cameras = Cameras(*(jnp.asarray(np.stack([x] * B)) for x in rig))
    times = jnp.zeros((B, T)) + jnp.arange(T)
    text = arguments_of("star", scale)

    def run(tokenizer, vqvae, star, images, ids, features):
        tokens = tokenizer.encode(images)
        decoded = vqvae(tokenizer.codes(tokens), cameras, times)
        condition = Condition(ids, tokens[:, :, 0], times, cameras, features)
        groups = tokens.reshape(B, T, -1, tokens.shape[-1])
        return decoded, star.loss(groups, condition)[0]

    ids = jax.ShapeDtypeStruct((B, text["text_length"]), jnp.int32)
    features = None
    if text["text_encoder"] == "t5":
        features = jax.ShapeDtypeStruct((*ids.shape, text["text_dim"]), jnp.float32)
    images = jax.ShapeDtypeStruct((B, T, V, size, size, 3), jnp.float32)
    decoded, loss = jax.eval_shape(run, tokenizer, vqvae, star, images, ids, features)
    expected = {"tiny": 16, "small": 64}.get(scale.partition(",")[0], 128) ** 2 * V
    assert decoded.gaussians.means.shape == (B, T, expected, 3)
    assert loss.shape == ()


@pytest.mark.parametrize("name", ["baseline", "average", "merging", "explicit"])
def test_ablations_change_what_carries_the_past_and_nothing_else(name):
    ours, other = (config_of("star", x).to_dict() for x in ("small,local", f"small,local,{name}"))
    changed = {key for key in other["model"] if other["model"][key] != ours["model"].get(key)}
    assert changed and changed <= {"inject", "history", "container_merge"}
    assert {**other, "model": ours["model"]} == ours
    assert config_of("star", f"paper,vq16,{name}").data.dir == "data/paper_vq16_tokens"
    assert 5 < nn.count_parameters(shapes("star", f"small,{name}")) / 1e6 < 20


def test_slots_are_as_many_as_a_group_has_places():
    with pytest.raises(
        ValueError, match=r"'slot' must be one of .*; or, of STAR alone, in .*'slots'"
    ):
        config_of("star", "small,slot")
    for scale, views in (("tiny", 4), ("base", 8), ("paper", 8)):
        model = config_of("star", f"{scale},slots").model
        assert model.container_slots == (views - 1) * model.grid**2
    ours, other = (config_of("star", x) for x in ("small,local", "small,local,slots"))
    assert other.model.container_slots == 3 * other.model.grid**2 > ours.model.container_slots
    other.model.container_slots = ours.model.container_slots
    assert other.to_dict() == ours.to_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_scale_names_the_scales(stage):
    with pytest.raises(ValueError, match="tiny, small, base or paper"):
        config_of(stage, "huge")


@pytest.mark.parametrize("stage", STAGES)
def test_scales_of_their_own_tokenizer_take_no_other(stage):
    with pytest.raises(ValueError, match="base and paper, not 'small'"):
        config_of(stage, "small,vq16")
    with pytest.raises(ValueError, match="tiny and small, not 'base'"):
        config_of(stage, "base,local")
    with pytest.raises(ValueError, match=r"'vqgan' must be one of \['local', 'unitok', 'vq16'\]"):
        config_of(stage, "base,vqgan")


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_of_released_codes_are_said_in_one_place(name):
    star = config_of("star", f"paper,{name}").model
    assert {key: star[key] for key in RELEASED[name]} == RELEASED[name]
    assert config_of("vqvae", f"paper,{name}").model.code_dim == RELEASED[name]["code_dim"]
    assert config_of("star", f"paper,{name}").data.dir == f"data/paper_{name}_tokens"
    plain, named = (config_of("star", x).model for x in ("paper", "paper,unitok"))
    assert plain.to_dict() == named.to_dict()


@pytest.mark.parametrize("scale", LOCAL)
def test_sizes_of_local_codes_are_said_in_one_place(scale):
    tokenizer, vqvae, star = (config_of(stage, f"{scale},local").model for stage in STAGES)
    assert {key: star[key] for key in LOCAL[scale]} == LOCAL[scale]
    assert {key: tokenizer[key] for key in LOCAL[scale]} == LOCAL[scale]
    assert vqvae.code_dim == LOCAL[scale]["code_dim"] and vqvae.projection == "token"
    for stage in STAGES:  # it is what these scales build on
        plain, named = (config_of(stage, x).model for x in (scale, f"{scale},local"))
        assert plain.to_dict() == named.to_dict()
