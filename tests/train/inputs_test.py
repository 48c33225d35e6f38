"""What a step sees is what the loader read, in every form; augmentation does not contradict it."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import geometry
from fourdstar_jax.data import pipeline, resident
from fourdstar_jax.kernels.rasterize import rasterize
from fourdstar_jax.train import inputs
from fourdstar_jax.types import Cameras, Gaussians
from fourdstar_jax.vqvae import losses

SIZES = dict(batch_size=2, timesteps=3, max_len=7, seed=4)
V, SIZE = 4, 24
OPTIONS = dict(mirror=0.5, colour=0.7, hue=0.5, saturation=0.4, value=0.3)


@pytest.mark.parametrize("maps", [("flow", "depth"), ()])
def test_all_forms_show_the_same(dataset_dir, maps):
    """Floats from the host, bytes from the host, and frames that lie on the device."""
    frames, clips = resident.read(dataset_dir, "train", maps=maps)
    assert (frames.flow is None) == (frames.depth is None) == (not maps)
    loaders = [
        iter(pipeline.make_loader(dataset_dir, "train", form=form, maps=maps, **SIZES, **more))
        for form, more in (("float", {}), ("uint8", {}), ("index", {"source": clips}))
    ]
    seen = set()
    for _, wanted, raw, index in zip(range(6), *loaders, strict=False):
        assert raw["rgba"].dtype == np.uint8 and set(index) & {"rgba", "flow"} == set()
        seen |= set(index["view"].tolist())
        for found in (inputs.prepare(raw), inputs.prepare(index, frames)):
            assert found.keys() == wanted.keys()
            for name, x in wanted.items():
                np.testing.assert_allclose(found[name], x, atol=1e-6, err_msg=name)
    assert len(seen) == 3  # any view is first


def test_shorter_batches_are_beginnings(dataset_dir):
    batch = next(iter(pipeline.make_loader(dataset_dir, "train", form="uint8", **SIZES)))
    for timesteps in (1, 2):
        found = inputs.cut(batch, timesteps)
        assert found["rgba"].shape[1] == found["extra_rgba"].shape[1] == timesteps
        assert found["flow"].shape[1] == timesteps - 1
        np.testing.assert_array_equal(found["depth"], batch["depth"][:, :timesteps])
        np.testing.assert_array_equal(found["viewmats"], batch["viewmats"])


def test_a_batch_is_split_into_shorter_clips_of_time_zero_on(dataset_dir):
    """All timesteps are in it, each with the clip's own cameras and text; flow is refused."""
    sizes = dict(SIZES) | {"timesteps": 3}
    batch = next(iter(pipeline.make_loader(dataset_dir, "train", form="uint8", **sizes)))
    with pytest.raises(ValueError, match="flow leads over the ends"):
        inputs.split(batch, 1)
    batch.pop("flow")
    found, clips = inputs.split(batch, 1), len(batch["clip"])
    for i in range(3 * clips):
        np.testing.assert_array_equal(found["rgba"][i, 0], batch["rgba"][i // 3, i % 3])
        np.testing.assert_array_equal(found["viewmats"][i], batch["viewmats"][i // 3])
    assert not found["times"].any() and found["times"].shape == (3 * clips, 1)
    pairs = inputs.split(batch, 2)  # the third timestep is left over
    np.testing.assert_array_equal(pairs["depth"], batch["depth"][:, :2])
    assert pairs["times"].tolist() == [[0, 1]] * clips
    jax.tree.map(np.testing.assert_array_equal, inputs.split(batch, 3), batch)


def test_buckets_have_their_shares_and_are_checked():
    buckets = ((1, 0.1), (2, 0.2), (8, 0.7))
    drawn = [inputs.timesteps_of(step, 3, buckets, 8) for step in range(600)]
    assert drawn[:9] == [inputs.timesteps_of(step, 3, buckets, 8) for step in range(9)]
    for timesteps, share in buckets:
        assert abs(drawn.count(timesteps) / 600 - share) < 0.08  # four deviations
    assert inputs.timesteps_of(5, 3, (), 8) == 8
    for wrong, named in ((((9, 0.5),), r"\(9, 0.5\)"), ((8, 0.5), "8:"), (((2.5, 1),), r"\(2.5")):
        with pytest.raises(ValueError, match=f"config.data.buckets has {named}"):
            inputs.check_buckets(wrong, 8)


def test_a_dataset_that_does_not_fit_is_refused(dataset_dir, monkeypatch):
    monkeypatch.setattr(resident, "memory", lambda: 20_000)
    with pytest.raises(ValueError, match=r"60% of a device's .*config.data.on_device=False"):
        resident.read(dataset_dir, "train")


def scene():
    """A cloud without symmetry that moves, and a batch of its pictures: a ring of V, 2 others."""
    keys = jax.random.split(jax.random.key(0), 3)
    means = jax.random.uniform(keys[0], (1, 30, 3), minval=-0.3, maxval=0.3)
    means = means.at[..., 0].add(0.1) + jnp.array([0.06, 0.02, 0.0]) * jnp.arange(2)[:, None, None]
    cloud = Gaussians(
        means=means[None],
        quats=jnp.broadcast_to(jnp.array([1.0, 0, 0, 0]), (1, 2, 30, 4)),
        scales=jnp.full((1, 2, 30, 3), 0.05),
        opacities=jnp.full((1, 2, 30), 0.9),
        colors=jnp.broadcast_to(jax.random.uniform(keys[1], (30, 3)), (1, 2, 30, 3)),
    )
    rig = geometry.Rig.around(V, fps=8.0).cameras(SIZE)
    extra = geometry.orbit_cameras([33, 250], [-20, 4], width=SIZE, height=SIZE)
    batch = {}
    for prefix, cameras in (("", rig), ("extra_", extra)):
        cameras = Cameras(*(jnp.asarray(x)[None] for x in cameras))
        batch |= {f"{prefix}viewmats": cameras.viewmats, f"{prefix}Ks": cameras.Ks}
        batch |= {f"{prefix}{name}": x for name, x in pictures(cloud, cameras).items()}
    return cloud, batch


def pictures(cloud, cameras):
    options = dict(width=SIZE, height=SIZE)
    rendered = rasterize(
        cloud, jax.tree.map(lambda x: x[:, None], cameras), background=jnp.ones(3), **options
    )
    flow, weight = losses.splatted_flow(cloud, cameras, **options)
    return {
        "images": rendered.renders,
        "masks": rendered.alphas,
        "depth": rendered.depths,
        "flow": flow * (weight > 0.5),
    }


def test_the_mirror_image_is_that_of_the_mirrored_object():
    """Rendered anew from the mirrored object and the new cameras; the ring's are as they were."""
    cloud, batch = scene()
    found = inputs.mirrored(batch, jnp.array([True]))
    there = cloud._replace(means=cloud.means * jnp.array([-1.0, 1.0, 1.0]))
    for prefix in ("", "extra_"):
        cameras = Cameras(found[f"{prefix}viewmats"], found[f"{prefix}Ks"])
        for name, wanted in pictures(there, cameras).items():
            assert np.ptp(wanted) > 0.1
            np.testing.assert_allclose(found[prefix + name], wanted, atol=2e-3, err_msg=name)
        rotation = np.asarray(cameras.viewmats[0, :, :3, :3])
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)
    for name in ("viewmats", "Ks"):
        np.testing.assert_allclose(found[name], batch[name], atol=1e-6)
    assert np.abs(found["images"] - batch["images"]).max() > 0.1
    same = inputs.mirrored(batch, jnp.array([False]))
    again = inputs.mirrored(found, jnp.array([True]))
    for name, x in batch.items():
        np.testing.assert_array_equal(same[name], x)
        np.testing.assert_allclose(again[name], x, atol=1e-6)


def test_clips_go_backwards_or_stand_still():
    """Clip 0 as it is, 1 backwards, 2 still, 3 both; pictures and depth together."""
    rng = np.random.default_rng(0)
    batch = {
        "rgba": rng.integers(0, 256, (4, 3, 2, 5, 5, 4), np.uint8),
        "extra_rgba": rng.integers(0, 256, (4, 3, 1, 5, 5, 4), np.uint8),
        "depth": rng.random((4, 3, 2, 5, 5, 1), np.float32),
        "flow": rng.random((4, 2, 2, 5, 5, 2), np.float32),
        "times": np.tile(np.arange(3, dtype=np.float32), (4, 1)),
    }
    reverse, frozen = jnp.array([0, 1, 0, 1], bool), jnp.array([0, 0, 1, 1], bool)
    found = inputs.retimed(batch, reverse, frozen)
    order = [[0, 1, 2], [2, 1, 0], [0, 0, 0], [2, 2, 2]]
    for name in ("rgba", "extra_rgba", "depth"):
        for clip, rows in enumerate(order):
            np.testing.assert_array_equal(found[name][clip], batch[name][clip][rows])
    np.testing.assert_array_equal(found["times"], batch["times"])
    np.testing.assert_array_equal(found["flow"][:2], batch["flow"][:2])
    np.testing.assert_array_equal(found["flow"][2:], 0)
    np.testing.assert_array_equal(found["flow_known"], [1, 0, 1, 1])
    drawn = inputs.draw(jax.random.key(2), 2000, **{**OPTIONS, "reverse": 0.25, "frozen": 0.05})
    assert 0.2 < np.mean(drawn["reverse"]) < 0.3 and 0.03 < np.mean(drawn["frozen"]) < 0.07


def test_colours_turn_as_hsv():
    rng = np.random.default_rng(0)
    rgb = rng.random((3, 5, 7, 1, 3)).astype(np.float32)
    rgb[:, 0] = [1, 0, 0]
    rgb[:, 1] = 0.4  # grey has no hue to turn
    drawn = {
        "turn": jnp.array([0.0, 1 / 3, -0.2]),
        "saturation": jnp.array([1.0, 1.0, 0.7]),
        "value": jnp.array([1.0, 1.0, 1.3]),
    }
    found = inputs.jitter(jnp.asarray(rgb), drawn)
    np.testing.assert_allclose(found[0], rgb[0], atol=1e-6)
    np.testing.assert_allclose(found[1, 0], np.broadcast_to([0, 1, 0], (7, 1, 3)), atol=1e-6)
    np.testing.assert_allclose(found[1, 1], rgb[1, 1], atol=1e-6)
    for before, after in zip(rgb[2].reshape(-1, 3), found[2].reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(float(x) for x in before))
        wanted = colorsys.hsv_to_rgb((h - 0.2) % 1, min(1, 0.7 * s), min(1, 1.3 * v))
        np.testing.assert_allclose(after, wanted, atol=1e-5)


def test_one_draw_serves_all_views_and_times(dataset_dir):
    """White stays white, masks are those of before, and clips differ from one another."""
    raw = next(iter(pipeline.make_loader(dataset_dir, "train", form="uint8", **SIZES)))
    raw = {name: np.concatenate([x[:1]] * 8) for name, x in raw.items()}  # one clip eight times
    options = dict(OPTIONS, mirror=0.0, colour=1.0)
    plain = inputs.prepare(raw)
    found = jax.jit(lambda raw, key: inputs.prepare(raw, None, key, options))(
        raw, jax.random.key(1)
    )
    np.testing.assert_allclose(found["masks"], plain["masks"], atol=1e-6)
    assert np.all(np.where(plain["masks"] == 0, found["images"], 1.0) == 1.0)
    inside = np.asarray(plain["masks"][..., 0] == 1)
    changes = []
    for b in range(8):
        pairs = np.concatenate([plain["images"][b][inside[b]], found["images"][b][inside[b]]], -1)
        pairs = np.unique(np.round(pairs, 3), axis=0)
        assert len(np.unique(pairs[:, :3], axis=0)) == len(pairs)  # a colour goes to one colour
        changes.append(pairs[:, 3:].mean())
    assert len(set(np.round(changes, 3))) == 8
    drawn = inputs.draw(jax.random.key(2), 2000, **OPTIONS)
    assert 0.45 < np.mean(drawn["mirror"]) < 0.55
    assert 0.26 < np.mean(drawn["turn"] == 0) < 0.34
    assert np.abs(drawn["turn"]).max() > 0.48 and drawn["value"].max() < np.exp(0.3) + 1e-6
