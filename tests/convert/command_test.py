"""`fourdstar convert` on files as the originals' code writes them (tests/parity/fixtures)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax import bundle, cli, folders, nn
from fourdstar_jax.convert import command, torch_file
from tests.helpers import TINY

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
UNITOK = FIXTURES / "unitok" / "weights.pth"
SOURCES = {
    "unitok": UNITOK,
    "vq16": FIXTURES / "vq16" / "weights.safetensors",
    "t5": FIXTURES / "t5" / "weights.bin",
}


def state_of(kind):
    return dict(command.key_map(kind).find(command.read(SOURCES[kind])))


@pytest.mark.parametrize("kind", SOURCES)
def test_there_and_back_is_exact(kind, tmp_path):
    info = command.convert(kind, SOURCES[kind], tmp_path / "b")
    shapes = command.reverse(kind, tmp_path / "b", tmp_path / "back.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    state = state_of(kind)
    assert set(back) == set(shapes) and len(back) == info["tensors"]
    skipped = set(state) - set(back)
    assert len(skipped) == info["not_needed"]
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name].astype(np.float32), err_msg=name)
    # and what went back can come again
    again = command.convert(kind, tmp_path / "back.safetensors", tmp_path / "c")
    assert (
        bundle.read(tmp_path / "c").weights_sha256() == bundle.read(tmp_path / "b").weights_sha256()
    )
    assert again["not_needed"] == 0


def test_the_bundle_tells_where_it_is_from(tmp_path, capsys):
    assert cli.main(["convert", "unitok", str(UNITOK), str(tmp_path / "b")]) == 0
    assert "tensors" in capsys.readouterr().out
    entry = bundle.read(tmp_path / "b").stages["tokenizer"]
    converted = entry.info["converted"]
    assert converted["source_sha256"] == folders.file_sha256(UNITOK)
    assert converted["key_map"] == 1 and converted["kind"] == "unitok"
    assert converted["source"] == "weights.pth"
    tokenizer = bundle.read(tmp_path / "b").load("tokenizer")
    assert tokenizer.spec.num_codebooks == 4 and tokenizer.spec.vocab_size == 32
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    assert converted["source_sha256"] in capsys.readouterr().out


def test_every_wrong_tensor_is_named(tmp_path):
    state = {n: np.ascontiguousarray(x) for n, x in state_of("unitok").items()}
    del state["encoder.norm.bias"]
    state["decoder.extra.weight"] = np.zeros(3, np.float32)
    state["quant_proj.proj.bias"] = np.zeros(5, np.float32)
    state["text_encoder.anything"] = np.zeros(2, np.float32)  # CLIP's side: known not to be needed
    safetensors.numpy.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as error:
        command.convert("unitok", tmp_path / "w.safetensors", tmp_path / "b")
    text = str(error.value)
    assert text.startswith(str(tmp_path / "w.safetensors"))
    assert "missing: encoder.norm.bias (64,)" in text
    assert "not known: decoder.extra.weight (3,)" in text
    assert "of another shape: quant_proj.proj.bias is (5,), not (16,)" in text
    assert "text_encoder" not in text
    assert not (tmp_path / "b").exists()


def test_positions_that_are_learned_are_refused(tmp_path):
    state = {n: np.ascontiguousarray(x) for n, x in state_of("unitok").items()}
    state["encoder.pos_embed"] = state["encoder.pos_embed"] + 1
    safetensors.numpy.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="encoder.pos_embed is not zero"):
        command.convert("unitok", tmp_path / "w.safetensors", tmp_path / "b")


def test_shards_are_read_by_their_index(tmp_path):
    state = {n: np.ascontiguousarray(x) for n, x in state_of("t5").items()}
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        safetensors.numpy.save_file({n: state[n] for n in part}, tmp_path / file)
    index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    command.convert("t5", path, tmp_path / "b")
    command.convert("t5", SOURCES["t5"], tmp_path / "c")
    assert (
        bundle.read(tmp_path / "b").weights_sha256() == bundle.read(tmp_path / "c").weights_sha256()
    )
    path.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="not one beside it"):
        command.read(path)


@pytest.mark.parametrize(
    "kind, source, why",
    [
        ("vq16", "unitok", "no ema, model or state_dict"),
        ("unitok", "t5", "no trainer.unitok"),
        ("t5", "unitok", "no T5"),
    ],
)
def test_another_kind_of_file_is_told(kind, source, why, tmp_path, capsys):
    arguments = ["convert", kind, str(SOURCES[source]), str(tmp_path / "b")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert why in error and str(SOURCES[source]) in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("encoder.norm.weight", np.float32(1)),  # no axis to count
        ("encoder.norm.weight", np.ones(3, np.float32)),  # no head of 64 fits
        ("quantizer.codebooks.0.codebook.weight", np.ones(3, np.float32)),
        ("encoder.blocks.0.mlp.w0.weight", np.ones((0, 0), np.float32)),
    ],
)
def test_sizes_that_make_no_sense_are_told_in_a_line(name, value, tmp_path, capsys):
    state = {n: np.ascontiguousarray(x) for n, x in state_of("unitok").items()}
    state[name] = np.asarray(value)
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(state, path)
    assert cli.main(["convert", "unitok", str(path), str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and len(error.splitlines()) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["unitok", "vq16", "llamagen", "mvar"])
def test_a_list_for_a_state_dict_is_told(kind):
    with pytest.raises(ValueError, match="a list where the state dict should be"):
        command.key_map(kind).find({"trainer": {"unitok": [1]}, "model": [1]})


def test_hostile_and_damaged_files_are_told_in_a_line(tmp_path, capsys):
    path = tmp_path / "cut.pth"
    path.write_bytes(UNITOK.read_bytes()[:5000])
    assert cli.main(["convert", "unitok", str(path), str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and len(error.splitlines()) == 1
    with pytest.raises(ValueError, match="cut.pth"):
        torch_file.read(path)


def test_reverse_wants_the_same_kind(tmp_path):
    command.convert("vq16", SOURCES["vq16"], tmp_path / "b")
    with pytest.raises(ValueError, match="not of the unitok kind"):
        command.reverse("unitok", tmp_path / "b", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        command.reverse("vq16", tmp_path / "b", tmp_path / "x.pth")
    assert not (tmp_path / "x.safetensors").exists()


def test_layers_of_a_star_trained_here_go_to_llamagens_names(tmp_path):
    arguments = ["convert", "llamagen", str(TINY), str(tmp_path / "s.safetensors")]
    assert cli.main([*arguments, "--reverse"]) == 0
    back = safetensors.numpy.load_file(tmp_path / "s.safetensors")
    ours = nn.named_arrays(bundle.read(TINY).load("star"))
    layers, dim, _ = ours["trunk/layers/q/kernel"].shape
    assert len(back) == 1 + 7 * layers  # the last norm; q, k, v in one, out, three, two norms
    fused = back["layers.1.attention.wqkv.weight"]
    np.testing.assert_array_equal(fused[dim : 2 * dim], ours["trunk/layers/k/kernel"][1].T)
    gate = back[f"layers.{layers - 1}.feed_forward.w1.weight"]
    np.testing.assert_array_equal(gate, ours["trunk/layers/ffn/gate/kernel"][-1].T)
    np.testing.assert_array_equal(back["norm.weight"], ours["trunk/norm/scale"])


def test_another_stage_of_the_bundle_stays(tmp_path):
    command.convert("unitok", UNITOK, tmp_path / "b")
    command.convert("t5", SOURCES["t5"], tmp_path / "b")
    assert set(bundle.read(tmp_path / "b").stages) == {"tokenizer", "text"}
    shutil.rmtree(tmp_path / "b")
