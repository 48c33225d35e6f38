"""What is counted of a step of STAR, whatever carries its past."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fourdstar_jax import bundle
from fourdstar_jax.star.container import Container
from fourdstar_jax.timing import count_flops
from fourdstar_jax.train.work import forward_flops

CONFIG = Path(__file__).parents[2] / "configs" / "star.py"
T, V, TEXT = 3, 3, 12


def model_of(ablation):
    spec = importlib.util.spec_from_file_location("star", CONFIG)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = module.get_config("tiny" if ablation == "ours" else f"tiny,{ablation}").model.to_dict()
    return bundle.shapes("star", sizes | {"text_vocab": 3})


def counted(model):
    return forward_flops(model, objects=2, timesteps=T, views=V, groups=T, text=TEXT)


@pytest.mark.parametrize("ablation", ["average", "merging", "explicit", "ours"])
def test_the_state_counts_as_it_is_traced(ablation):
    """But for what is not counted: averaging, which is taken off, and clusters' merging."""
    model = model_of(ablation)
    box, dim, size = model.container, 128, (V - 1) * model.grid**2
    shape = 2, T, size

    def told(box, features, tokens, rays, positions):
        groups = box.group(features, tokens, rays, jnp.ones(shape, bool))
        merged = box.over_time(groups, positions)
        return box.tell(merged, jnp.ones(shape[:2], bool), jnp.float32)

    def array(*more, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((*shape, *more), dtype)

    codes = array(model.num_codebooks, dtype=jnp.int32)
    traced = count_flops(told, box, array(dim), codes, array(6), array(dim + 4))
    if isinstance(box, Container):
        # traced are merging and giving back by place, too, and attention to tokens not there yet
        assert 0.6 < counted(model)["container"] / traced < 1
        return
    averaging = 2 * 2 * T * T * size * (dim + dim + 4)
    assert counted(model)["container"] == traced - averaging


def test_the_baseline_counts_the_attention_to_all_groups_before():
    ours, baseline = (counted(model_of(name)) for name in ("ours", "baseline"))
    assert "container" not in baseline and baseline["head"] == ours["head"]
    size, slots, layers, prefix = (V - 1) * 16, 16, 4, TEXT + T * 16
    # ours: slots of the state ask the prefix and themselves, and are asked by the group's tokens;
    # the baseline: tokens ask those of the groups before
    by_slots = T * (slots * (prefix + slots) + size * slots)
    before = size**2 * (T * (T - 1) // 2)
    assert baseline["attention"] - ours["attention"] == 2 * 4 * 128 * layers * (before - by_slots)
