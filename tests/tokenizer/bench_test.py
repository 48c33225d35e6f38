"""The tokenizer's benchmark at tiny size, and weights cast once."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import sharding
from fourdstar_jax.nn import cast_weights
from fourdstar_jax.tokenizer import bench, bench_original


@pytest.fixture(scope="module")
def model():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return bench.random_model("tiny", "bfloat16")


def test_run(tmp_path, capsys):
    file = tmp_path / "new" / "results.json"
    results = bench.run(size="tiny", batch=3, repeats=2, json_file=file, commit="abc")
    out = capsys.readouterr().out
    assert "encode  ours" in out and "decode  ours" in out
    stored = json.loads(file.read_text())
    assert stored == results
    assert stored["commit"] == "abc" and stored["device"] and stored["versions"]["jax"]
    assert set(stored["ours"]) == {"encode", "decode"} and "original" not in stored
    assert stored["tflop_per_image"] is None and stored["batch"] == 3
    for line in stored["ours"].values():
        low, high = line["back_to_back_range_ms"]
        assert 0 < low <= line["back_to_back_ms"] <= high and line["sync_ms"] > 0
        assert line["images_per_s"] == pytest.approx(3000 / line["back_to_back_ms"])
        assert line["program_bytes"] > 0


def test_released_size_is_the_configs():
    from configs import tokenizer

    wanted = tokenizer.model("paper").to_dict()
    assert wanted.pop("dtype") == "bfloat16"
    assert bench.SIZES["released"] == wanted


@pytest.mark.parametrize("name", bench.OPERATIONS)
def test_compiled_operation_is_the_models(model, name):
    with sharding.use_mesh(devices=jax.devices()[:1]):
        out = bench.operation(name, model, 2)()
    if name == "encode":
        assert out.shape == (2, 4, 2) and out.dtype == jnp.int32
        assert len(np.unique(out)) > 3
    else:
        assert out.shape == (2, 32, 32, 3) and np.ptp(out) > 0.01


def test_cast_weights(model):
    cast = cast_weights(model)
    block, stem = cast.encoder.blocks[0], cast.encoder.patch_embed
    assert block.attn.qkv.kernel[...].dtype == jnp.bfloat16
    assert block.mlp.w2.bias[...].dtype == jnp.bfloat16
    assert stem.conv1.kernel[...].dtype == jnp.bfloat16
    for kept in (block.norm1.scale, cast.quant_proj.proj.kernel, cast.quantizer.codebooks):
        assert kept[...].dtype == jnp.float32
    assert cast.quantizer.idle_steps[...].dtype == jnp.int32
    assert model.encoder.blocks[0].attn.qkv.kernel[...].dtype == jnp.float32  # a copy
    assert jax.tree.structure(nnx.state(cast)) == jax.tree.structure(nnx.state(model))
    images = np.random.default_rng(0).uniform(0, 1, (5, 32, 32, 3)).astype(np.float32)
    encode = jax.jit(lambda m, x: m.encoder(x))
    np.testing.assert_array_equal(encode(cast, images), encode(model, images))
    tokens = jax.jit(lambda m, x: m.encode(x))(model, images)
    np.testing.assert_array_equal(jax.jit(lambda m, x: m.encode(x))(cast, images), tokens)
    decode = jax.jit(lambda m, x: m.decode(x))
    # Kernels for doubled pictures are sums: of rounded weights here, of exact ones there.
    np.testing.assert_allclose(decode(cast, tokens), decode(model, tokens), atol=0.02)


def test_cast_weights_leaves_float32_models_alone():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        model = bench.random_model("tiny", "float32")
    same = jax.tree.map(lambda a, b: a is b, cast_weights(model), model)
    assert all(jax.tree.leaves(same))


def test_protocol_counts_its_calls():
    calls, waits = [], []
    line = bench_original.measure(
        lambda: calls.append(0) or len(calls), waits.append, repeats=4, batch=8
    )
    warm, rounds = bench_original.WARM_UP, bench_original.ROUNDS
    assert len(calls) == warm + rounds * 4 + 4
    assert len(waits) == warm + rounds + 4 and waits[-1] == len(calls)
    assert line["images_per_s"] == pytest.approx(8000 / line["back_to_back_ms"])


def test_against_reads_the_scripts_last_line(tmp_path, monkeypatch, capsys):
    """A stand-in for the original; the real one needs torch and takes minutes."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "unitok.py").write_text("")
    line = dict(back_to_back_ms=2.0, sync_ms=3.0, images_per_s=1500.0, peak_bytes=10**9)
    answer = dict(encode=line, decode=line, versions=dict(torch="0"))
    script = tmp_path / "script.py"
    wanted = "--dtype float32 --batch 3 --repeats 1 --layouts contiguous".split()
    script.write_text(
        f"import sys\nassert sys.argv[2:] == {wanted}\nprint('talk')\nprint({json.dumps(answer)!r})"
    )
    monkeypatch.setattr(bench_original, "__file__", str(script))
    monkeypatch.setitem(bench.SIZES, "released", bench.SIZES["tiny"])
    results = bench.run(
        batch=3, dtype="float32", repeats=1, against=tmp_path, layouts=["contiguous"]
    )
    assert results["versions"]["torch"] == "0"
    ours = results["ours"]["decode"]
    assert ours["ratios"]["images_per_s"] == pytest.approx(ours["images_per_s"] / 1500)
    assert ours["ratios"]["sync"] == pytest.approx(3 / ours["sync_ms"])
    assert results["original"]["encode"]["tflops"] == pytest.approx(1500 * 0.1997)
    assert "x the original" in capsys.readouterr().out

    script.write_text("import sys; sys.exit('no')")
    with pytest.raises(ValueError, match="original cannot run here"):
        bench.measure_original(
            tmp_path,
            python=Path(sys.executable),
            batch=1,
            dtype="bfloat16",
            repeats=1,
            layouts=None,
        )
