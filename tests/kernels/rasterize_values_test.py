"""Images and gradients of `rasterize` against float64 numpy, finite differences and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import AS_USERS

from fourdstar_jax import geometry
from fourdstar_jax.kernels.rasterize import api, binning
from fourdstar_jax.types import Gaussians

WIDTH, HEIGHT, VIEWS = 37, 29, 2  # no multiples of a tile
NUM = 500  # one size for most scenes: compiling takes longer than rendering
# float32 against float64; needles lose digits of their slope before any implementation sees them.
ATOL = 1e-5
NEEDLE_FACTOR = 20
GRADIENT_RTOL = 1e-4  # relative L2, for each argument


def random_gaussians(seed, num, scale=0.05, opacity=(0.05, 0.95), spread=0.5):
    rng = np.random.default_rng(seed)
    return Gaussians(
        means=rng.uniform(-spread, spread, (num, 3)).astype(np.float32),
        quats=rng.standard_normal((num, 4)).astype(np.float32),
        scales=(scale * np.exp(rng.uniform(-1, 1, (num, 3)))).astype(np.float32),
        opacities=rng.uniform(*opacity, num).astype(np.float32),
        colors=rng.uniform(0, 1, (num, 3)).astype(np.float32),
    )


def cameras(views=VIEWS, width=WIDTH, height=HEIGHT):
    azimuths = [17.0 + 360 * i / views for i in range(views)]
    return geometry.orbit_cameras(azimuths, -20.0, width=width, height=height)


def few(g, num=60):
    """Where every Gaussian covers the picture, many would put too many pixels near a cut-off."""
    return g._replace(opacities=np.where(np.arange(NUM) < num, g.opacities, 0).astype(np.float32))


def make_scene(name):
    """Scenes that are hard in one way each."""
    g = random_gaussians(1, NUM)
    rng = np.random.default_rng(2)
    match name:
        case "random":
            return g
        case "behind":
            return g._replace(means=g.means * 6)
        case "across":  # the near plane and the edges of the image cut through them
            return few(g._replace(means=g.means * 3, scales=g.scales * 4))
        case "outside":
            far_off = g.means + np.where(rng.random((NUM, 1)) < 0.7, 30, 0) * [1, 0.3, 0]
            return g._replace(means=far_off.astype(np.float32))
        case "large":
            return few(random_gaussians(3, NUM, scale=3.0, opacity=(0.02, 0.3)))
        case "thin":
            return g._replace(scales=g.scales * np.float32(1e-3))
        case "needles":
            scales = np.broadcast_to(np.float32([0.5, 5e-4, 5e-4]), (NUM, 3))
            return g._replace(scales=scales.copy())
        case "opaque and clear":
            return g._replace(opacities=np.where(rng.random(NUM) < 0.5, 1, 0).astype(np.float32))
        case "500 on one pixel":
            return random_gaussians(4, NUM, scale=0.02, opacity=(0.005, 0.1), spread=0.0)
        case "one":
            return random_gaussians(5, 1, scale=0.2)
    raise ValueError(name)


SCENES = [
    "random",
    "behind",
    "across",
    "outside",
    "large",
    "thin",
    "needles",
    "opaque and clear",
    "500 on one pixel",
    "one",
]


def oracle(g, c, *, width, height, near=0.01, far=np.inf, eps2d=0.3, antialiased=False):
    """One dense float64 evaluation: colours, alpha, depth, and pixels near no cut-off."""
    means, quats, scales, opacities, colors = (np.asarray(x, np.float64) for x in g)
    w, x, y, z = (quats / np.linalg.norm(quats, axis=-1, keepdims=True)).T
    rot = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    ).transpose(2, 0, 1)
    factor = rot * scales[:, None]
    images, clean = [], []
    for viewmat, K in zip(np.float64(c.viewmats), np.float64(c.Ks), strict=True):
        local = means @ viewmat[:3, :3].T + viewmat[:3, 3]
        keep = (local[:, 2] >= near) & (local[:, 2] <= far)
        order = np.argsort(local[:, 2].astype(np.float32), kind="stable")
        color = np.zeros((height, width, colors.shape[1] + 1))
        trans = np.ones((height, width))
        live = np.ones((height, width), bool)
        ok = np.ones((height, width), bool)
        px, py = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
        for i in order[keep[order]]:
            X, Y, Z = local[i]
            tx = Z * np.clip(X / Z, -cx / fx - 0.15 * width / fx, (1.15 * width - cx) / fx)
            ty = Z * np.clip(Y / Z, -cy / fy - 0.15 * height / fy, (1.15 * height - cy) / fy)
            J = np.array([[fx / Z, 0, -fx * tx / Z**2], [0, fy / Z, -fy * ty / Z**2]])
            half = J @ viewmat[:3, :3] @ factor[i]
            sharp = half @ half.T
            blurred = sharp + eps2d * np.eye(2)
            opacity = opacities[i]
            if antialiased:
                opacity *= np.sqrt(max(np.linalg.det(sharp) / np.linalg.det(blurred), 0))
            conic = np.linalg.inv(blurred)
            dx, dy = fx * X / Z + cx - px, fy * Y / Z + cy - py
            sigma = (conic[0, 0] * dx**2 + conic[1, 1] * dy**2) / 2 + conic[0, 1] * dx * dy
            alpha = np.minimum(opacity * np.exp(-sigma), 0.999)
            ok &= np.abs(alpha * 255 - 1) > 1e-5
            alpha = np.where(alpha >= 1 / 255, alpha, 0)
            after = trans * (1 - alpha)
            ok &= np.abs(after / 1e-4 - 1) > 1e-5
            live &= after > 1e-4
            weight = np.where(live, alpha * trans, 0)
            color += weight[..., None] * np.append(colors[i], Z)
            trans = np.where(live, after, trans)
        alpha = 1 - trans[..., None]
        depth = np.where(alpha > 0, color[..., -1:] / np.where(alpha > 0, alpha, 1), 0)
        images.append(np.concatenate([color[..., :-1], alpha, depth], axis=-1))
        clean.append(ok)
    return np.stack(images), np.stack(clean)


TILED = ["xla", "pallas_gpu"]
CAPACITY = 2**14


def weighted_sum(arrays, implementation, antialiased=False, capacity=CAPACITY):
    """A scalar that every output counts in, with random but fixed weights; and the outputs.

    Kernels for GPUs run as they are where there is one, and by their twin in plain JAX elsewhere.
    """
    result = api._rasterize(
        *arrays,
        width=WIDTH,
        height=HEIGHT,
        near=0.01,
        far=np.inf,
        eps2d=0.3,
        antialiased=antialiased,
        with_depths=True,
        capacity=capacity,
        implementation=implementation,
        interpret=implementation == "pallas_gpu" and jax.default_backend() != "gpu",
    )
    total = 0.0
    for i, x in enumerate((result.renders, result.alphas, result.depths, result.features)):
        weights = np.random.default_rng(i).standard_normal(x.shape)
        total += jnp.sum(x * weights.astype(x.dtype))
    return total, result


static = ("implementation", "antialiased", "capacity")
with_gradients = jax.value_and_grad(weighted_sum, has_aux=True)
# As users compile it: without its optimisations XLA rounds otherwise, which hard scenes magnify.
evaluate_tiled = jax.jit(with_gradients, static_argnames=static, compiler_options=AS_USERS)
evaluate_reference = jax.jit(with_gradients, static_argnames=static)


def evaluate(arguments, implementation, **options):
    run = evaluate_reference if implementation == "reference" else evaluate_tiled
    return run(arguments, implementation, **options)


def full_arguments(g):
    rng = np.random.default_rng(8)
    features = rng.standard_normal((g.means.shape[0], 2)).astype(np.float32)
    background = rng.random((VIEWS, 3)).astype(np.float32)
    return jax.tree.map(jnp.asarray, (g, cameras(), features, background))


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-6)


def labelled(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def check_images(result, arguments, factor=1, **options):
    """Compares with the oracle where no pixel sits on a cut-off."""
    g, c, features, background = arguments
    g = g._replace(colors=np.concatenate([g.colors, features], axis=-1))
    wanted, clean = oracle(g, c, width=WIDTH, height=HEIGHT, **options)
    assert np.mean(~clean) <= 2e-3
    renders = result.renders - (1 - result.alphas) * background[:, None, None]
    got = np.concatenate([renders, result.features, result.alphas, result.depths], axis=-1)
    assert got.shape == (VIEWS, HEIGHT, WIDTH, 7) and np.isfinite(got).all()
    np.testing.assert_allclose(got[clean][:, :6], wanted[clean][:, :6], atol=ATOL * factor, rtol=0)
    # Expected depth is a quotient: its error is that of alpha over alpha.
    error = np.abs(got[..., 6] - wanted[..., 6]) * wanted[..., 5]
    assert error[clean].max() <= ATOL * factor * max(1, wanted[..., 6].max())
    assert wanted[..., 5].max() > 0.1  # the scene shows something


def check_gradients(gradients, wanted, factor=1):
    wanted = labelled(wanted)
    for label, x in labelled(gradients).items():
        assert np.isfinite(x).all(), label
        assert relative_error(x, wanted[label]) < GRADIENT_RTOL * factor, label


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.central] if n == "random" else []) for n in SCENES],
)
def test_hard_scenes(name):
    """All implementations against float64 numpy, and their gradients against each other."""
    arguments = full_arguments(make_scene(name))
    factor = NEEDLE_FACTOR if name == "needles" else 1
    (_, dense), dense_gradients = evaluate(arguments, "reference")
    check_images(dense, arguments, factor)
    for implementation in TILED:
        (_, tiled), tiled_gradients = evaluate(arguments, implementation)
        check_images(tiled, arguments, factor)
        check_gradients(tiled_gradients, dense_gradients, factor)
        assert not tiled.overflow
        if implementation == "xla":
            assert tiled.num_intersections == dense.num_intersections
        if name == "random":
            assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(tiled_gradients))


def test_antialiased():
    g = make_scene("random")
    arguments = full_arguments(g._replace(scales=g.scales * np.float32(0.2)))
    (_, dense), dense_gradients = evaluate(arguments, "reference", antialiased=True)
    check_images(dense, arguments, antialiased=True)
    for implementation in TILED:
        (_, tiled), tiled_gradients = evaluate(arguments, implementation, antialiased=True)
        check_images(tiled, arguments, antialiased=True)
        check_gradients(tiled_gradients, dense_gradients)
        (_, plain), _ = evaluate(arguments, implementation)
        assert np.abs(plain.alphas - tiled.alphas).max() > 0.1


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_equal_finite_differences(implementation):
    """In float64, along a random direction of every argument at a time."""
    with jax.enable_x64(True):
        arguments = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64),
            full_arguments(random_gaussians(9, 13, scale=0.1)),
        )
        _, gradients = evaluate(arguments, implementation)
        leaves, tree = jax.tree.flatten(arguments)
        step = 1e-7  # a pixel may cross a cut-off between the two ends: keep them close
        for i, (label, g) in enumerate(labelled(gradients).items()):
            direction = np.random.default_rng(i).standard_normal(g.shape)
            if "viewmats" in label:
                direction[..., 3, :] = 0
            ends = []
            for sign in (1, -1):
                moved = list(leaves)
                moved[i] = leaves[i] + sign * step * direction
                ends.append(evaluate(tree.unflatten(moved), implementation)[0][0])
            slope = float(ends[0] - ends[1]) / (2 * step)
            assert g.dtype == jnp.float64
            np.testing.assert_allclose(
                float(jnp.sum(g * direction)), slope, rtol=1e-5, atol=1e-5, err_msg=label
            )


@pytest.mark.parametrize("implementation", TILED)
def test_float32_gradients_equal_float64(implementation):
    arguments = full_arguments(make_scene("random"))
    _, got = evaluate(arguments, implementation)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), arguments)
        wanted = jax.tree.map(np.asarray, evaluate(double, "reference")[1])
    assert all(x.dtype == np.float64 for x in jax.tree.leaves(wanted))
    check_gradients(got, wanted)


def test_sorted_lists_equal_dense_lists(monkeypatch):
    """Large problems sort their (tile, Gaussian) pairs; both routes make the same picture."""
    arguments = full_arguments(make_scene("across"))
    (_, dense), dense_gradients = evaluate(arguments, "xla")
    count = int(dense.num_intersections)
    monkeypatch.setattr(binning, "DENSE_LIMIT", 0)
    (_, tiled), gradients = evaluate(arguments, "xla", capacity=count)  # compiled anew
    assert not tiled.overflow and int(tiled.num_intersections) == count
    np.testing.assert_allclose(tiled.renders, dense.renders, atol=1e-6)
    for label, x in labelled(gradients).items():
        assert relative_error(x, labelled(dense_gradients)[label]) < 1e-6, label
    jax.clear_caches()
