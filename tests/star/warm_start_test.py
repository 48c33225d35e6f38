"""Warm starts: a file's layers compute in STAR what they compute in LlamaGen; all else is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import bundle, cli, nn, sharding
from fourdstar_jax.convert import llamagen, mvar
from fourdstar_jax.star import warm_start
from fourdstar_jax.star.model import STAR

# float32 sums in another order.
ATOL = 1e-5
TRUNK = dict(dim=12, num_layers=3, num_heads=2, num_kv_heads=2, hidden_dim=14)
LLAMAGEN = dict(family="llamagen", **TRUNK, text_length=4, text_dim=5, vocab_size=11)
MVAR = dict(LLAMAGEN, family="mvar", patch=5, num_condition_layers=3, align_dim=4)
MVAR |= dict(align_hidden_dim=9)
SIZES = dict(
    num_codebooks=1, vocab_size=7, code_dim=6, resolution=10, grid=2, dim=12, num_layers=3,
    num_heads=2, hidden_dim=14, head_dim=10, head_layers=1, head_heads=1, container_slots=5,
    container_neighbors=2, text_vocab=0, text_length=4, text_dim=5, time_features=8,
    text_encoder="t5", prefix="causal",
)  # fmt: skip


def arrays_of(arguments):
    names = {"llamagen": llamagen, "mvar": mvar}[arguments["family"]]
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.3, shape).astype(np.float32) + name.endswith("scale")
        for name, shape in names.shapes(arguments).items()
    }


def build(**changes):
    """A model with arbitrary weights; initialising one for real takes seconds of compiling."""
    rng = np.random.default_rng(3)

    def fill(shape):
        return jnp.asarray(rng.normal(0, 0.3, shape.shape), shape.dtype)

    make = functools.partial(nn.build, STAR, **(SIZES | changes))
    return jax.tree.map(fill, jax.eval_shape(make, jax.random.key(0)))


def parameters(model):
    state = nnx.state(model, nnx.Param)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {
        n.removesuffix("/value"): np.asarray(x) for n, (_, x) in zip(names, leaves, strict=True)
    }


@pytest.fixture(scope="module")
def model():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return build()


def norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def llama(arrays, x, num_layers=3, num_heads=2):
    """LlamaGen's layers on x [L, D], without its rotation: causal, in float64."""
    length, dim = x.shape
    for i in range(num_layers):
        w = {n.removeprefix(f"layers/{i}/"): y.astype(np.float64) for n, y in arrays.items()}
        h = norm(x, w["attention_norm/scale"])
        q, k, v = (
            (h @ w[f"{part}/kernel"]).reshape(length, num_heads, -1).swapaxes(0, 1)
            for part in "qkv"
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ v
        x = x + y.swapaxes(0, 1).reshape(length, dim) @ w["out/kernel"]
        h = norm(x, w["ffn_norm/scale"])
        gate = h @ w["ffn/gate/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn/up/kernel"])) @ w["ffn/down/kernel"]
    return norm(x, arrays["norm/scale"].astype(np.float64))


@pytest.mark.parametrize("arguments", [LLAMAGEN, MVAR], ids=["llamagen", "mvar"])
def test_the_trunk_computes_what_the_files_layers_compute(model, arguments):
    arrays = arrays_of(arguments)
    warm, report = warm_start.load(model, arrays, arguments)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 12))
    prefix, group = x[None, :3], x[None, None, 3:]  # a prefix of three and a group of four

    def run(model):
        f32 = (jnp.asarray(y, jnp.float32) for y in (prefix, group))
        return np.asarray(model.trunk(*f32, 0))[0, 0]

    expected = llama(arrays, x)[3:]
    np.testing.assert_allclose(run(warm), expected, atol=ATOL)
    assert np.abs(run(model) - expected).max() > 0.1  # STAR's own initialisation does not
    assert len(report.loaded) == 3 * 9 + 1 + 2


def test_the_text_mlp_computes_what_the_files_computes(model):
    arrays = arrays_of(LLAMAGEN)
    warm, _ = warm_start.load(model, arrays, LLAMAGEN)
    x = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
    hidden = x @ arrays["text/mlp/up/kernel"]
    gelu = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    expected = gelu @ arrays["text/mlp/down/kernel"]
    np.testing.assert_allclose(warm.text.mlp(jnp.asarray(x)), expected, atol=ATOL)


def test_every_array_of_the_file_and_of_star_is_told(model):
    arrays = arrays_of(MVAR)
    warm, report = warm_start.load(model, arrays, MVAR)
    skipped = dict(report.skipped)
    assert len(skipped) == len(report.skipped)
    assert set(report.loaded) | set(skipped) == set(arrays)
    assert not set(report.loaded) & set(skipped)
    before, after = parameters(model), parameters(warm)
    assert list(before) == list(after)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert len(changed) == 12 and changed == set(before) - set(report.fresh)
    assert "head/output" in report.fresh and "rays/conv/kernel" in report.fresh
    assert all("AdaLN" in why for name, why in skipped.items() if "layers/0/ada" in name)
    assert "point away from the object" in skipped["cam_patchify/proj/kernel"]
    assert "no table of tokens" in skipped["tok_embeddings/embedding"]
    assert "prefix" in skipped["image_warp/self_attn/wqkv/kernel"]
    assert "one for all" in skipped["cls_embedding/uncond_embedding"]


def test_the_report_is_short_and_names_what_no_shape_tells(model):
    lines = warm_start.load(model, arrays_of(LLAMAGEN), LLAMAGEN)[1].lines()
    assert lines[0].startswith("loaded 30 arrays of the file, skipped 3; ")
    parts = "attention_norm q k v out ffn_norm ffn/gate ffn/up ffn/down"
    assert lines[1] == f"  loaded layers 0-2: {parts}; norm text/mlp/up text/mlp/down"
    assert lines[2].startswith("  skipped tok_embeddings: ")
    assert any(line.startswith("  anew ") and "container (" in line for line in lines)
    notes = [line for line in lines if line.startswith("  note: ")]
    assert len(notes) == 1 and "2D RoPE" in notes[0] and "rope='none'" in notes[0]

    other = build(prefix="bidirectional", rope="axial", dim=16, head_dim=8, num_heads=2)
    arguments = MVAR | dict(dim=16)
    report = warm_start.load(other, arrays_of(arguments), arguments)[1]
    assert any("condition_layers (6) image_warp (14): " in line for line in report.lines())
    notes = report.notes
    assert any("prefix='causal'" in note for note in notes)
    assert any("AdaLN" in note for note in notes) and any("'axial'" in note for note in notes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_layers": 2}, "num_layers is 3, and STAR's 2"),
        ({"num_heads": 3}, "num_heads is 2, and STAR's 3"),
        ({"num_kv_heads": 1}, "num_kv_heads is 2, and STAR's 1"),
    ],
)
def test_another_trunk_is_skipped_whole(changes, words):
    model = build(**changes)
    _, report = warm_start.load(model, arrays_of(LLAMAGEN), LLAMAGEN)
    skipped = dict(report.skipped)
    assert report.loaded == ["text/mlp/up/kernel", "text/mlp/down/kernel"] and not report.notes
    assert skipped["layers/1/q/kernel"] == skipped["norm/scale"] == words


def test_other_shapes_are_told_and_the_rest_of_their_part_is_skipped():
    model = build(hidden_dim=18, text_dim=6)
    warm, report = warm_start.load(model, arrays_of(LLAMAGEN), LLAMAGEN)
    skipped = dict(report.skipped)
    assert report.loaded == []
    assert skipped["layers/2/ffn/down/kernel"] == "its shape is (14, 12), and STAR's (18, 12)"
    assert skipped["text/mlp/up/kernel"] == "its shape is (5, 12), and STAR's (6, 12)"
    assert "taken whole" in skipped["layers/2/q/kernel"]
    assert "other half" in skipped["text/mlp/down/kernel"]
    before, after = parameters(model), parameters(warm)
    assert set(report.fresh) == set(before)
    assert all((before[name] == after[name]).all() for name in before)


def test_words_keep_their_own_mlp_and_classes_have_none():
    words = build(text_encoder="words", text_vocab=9)
    arguments = {k: v for k, v in LLAMAGEN.items() if not k.startswith("text")}
    for sizes in (LLAMAGEN, arguments | {"num_classes": 4}):
        _, report = warm_start.load(words, arrays_of(sizes), sizes)
        assert len(report.loaded) == 28 and "text/mlp/up/kernel" in report.fresh
        reasons = dict(report.skipped)
        if "num_classes" in sizes:
            assert "classes" in reasons["cls_embedding/embedding_table/embedding"]
        else:
            assert "'words'" in reasons["text/mlp/up/kernel"]


def test_a_file_that_lacks_a_layer_is_refused(model):
    arrays = arrays_of(LLAMAGEN)
    del arrays["layers/1/v/kernel"]
    with pytest.raises(ValueError, match="lacks layers/1/v/kernel, and 1 in all"):
        warm_start.load(model, arrays, LLAMAGEN)


def test_arrays_stay_where_they_are_on_the_mesh_and_half_precision_widens():
    arrays = {name: x.astype(np.float16) for name, x in arrays_of(LLAMAGEN).items()}
    model = build()
    with sharding.use_mesh({"data": 1, "fsdp": 2, "tensor": 2}, devices=jax.devices()[:4]) as mesh:
        places = {
            (3, 12, 12): sharding.named(mesh, "layers", "embed", "heads"),
            (12, 12): sharding.named(mesh, "mlp", "embed"),
        }
        everywhere = sharding.named(mesh)
        model = jax.tree.map(lambda x: jax.device_put(x, places.get(x.shape, everywhere)), model)
        warm, _ = warm_start.load(model, arrays, LLAMAGEN)
        for old, new in zip(jax.tree.leaves(model), jax.tree.leaves(warm), strict=True):
            assert (old.shape, old.dtype, old.sharding) == (new.shape, new.dtype, new.sharding)
        kernel = warm.trunk.layers.q.kernel[...]
        assert kernel.addressable_shards[0].data.shape == (3, 6, 6)
        expected = np.stack([arrays[f"layers/{i}/q/kernel"] for i in range(3)])
        np.testing.assert_array_equal(kernel, expected.astype(np.float32))
        down = warm.text.mlp.down.kernel[...]
        assert down.addressable_shards[0].data.shape == (6, 6)
        np.testing.assert_array_equal(down, arrays["text/mlp/down/kernel"].astype(np.float32))


@pytest.mark.parametrize("scale, width, layers", [("base", 1024, 24), ("paper", 1280, 36)])
def test_the_large_scales_have_llamagens_sizes(scale, width, layers):
    """Base takes LlamaGen's L whole, paper its XL: by shapes alone."""
    config = cli.read_config(f"configs/star.py:{scale}", [])
    arguments = bundle.module_arguments("star", config.model.to_dict())
    model = jax.eval_shape(functools.partial(nn.build, STAR, **arguments), jax.random.key(0))
    heads = llamagen.NUM_HEADS[width]
    sizes = dict(dim=width, num_layers=layers, num_heads=heads, num_kv_heads=heads)
    sizes |= dict(hidden_dim=model.trunk.layers.ffn.up.kernel.shape[-1], text_length=120)
    sizes |= dict(text_dim=2048, vocab_size=16384)
    assert sizes["hidden_dim"] == -(-(8 * width // 3) // 256) * 256  # as LlamaGen rounds it
    nothing = np.zeros((), np.float32)
    arrays = {n: np.broadcast_to(nothing, x) for n, x in llamagen.shapes(sizes).items()}
    assert warm_start.misfits(model, arrays, sizes) == {}
