"""CLIP's image tower and 3D-ResNet50 on what the original code gave for small ones."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax.convert import measuring
from fourdstar_jax.perceptual import clip, resnet3d, weights

FIXTURE = Path(__file__).parent / "fixtures" / "measuring"


def test_features_are_the_originals(parity):
    found = parity.compare(FIXTURE)
    assert set(found) == {"clip_small", "resnet3d"}
    assert max(found.values()) < 1e-5, found


def state(name):
    stored = safetensors.numpy.load_file(FIXTURE / f"{name}.safetensors")
    return {k.removeprefix("state."): x for k, x in stored.items() if k.startswith("state.")}


def test_either_naming_of_clip_gives_the_same_arrays():
    """transformers has q, k and v apart and the projection turned."""
    ours = state("clip_small")
    theirs = {}
    for name, array in ours.items():
        if "in_proj" in name:
            end = name.rpartition("_")[2]
            for part, piece in zip("qkv", np.split(array, 3), strict=True):
                theirs[f"{measuring.HF_LAYER}0.self_attn.{part}_proj.{end}"] = piece
        elif name == "proj":
            theirs["visual_projection.weight"] = array.T
        elif name.startswith(clip.LAYER):
            part, _, end = name.removeprefix(f"{clip.LAYER}0.").rpartition(".")
            [hf] = [k for k, v in measuring.HF_PARTS.items() if v == part]
            theirs[f"{measuring.HF_LAYER}0.{hf}.{end}"] = array
        else:
            [(hf, our)] = [(k, v) for k, v in measuring.HF_OUTER.items() if name.startswith(v)]
            theirs[hf + name.removeprefix(our)] = array
    named = {f"visual.{k}": x for k, x in ours.items()} | {"logit_scale": np.ones(())}
    for found in (measuring.clip_arrays(theirs), measuring.clip_arrays(named)):
        assert found.keys() == ours.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(found[name], array)
    assert {k: x.shape for k, x in ours.items()} == clip.shapes(clip.Sizes(8, 128, 1, 12, 24))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="x.pt: SHA-256 .* is of no CLIP that is known, ViT-B/32"):
        measuring.convert("clip", tmp_path / "x.pt", tmp_path / "out.npz")
    named = {f"visual.{k}": x for k, x in state("clip_small").items()}
    safetensors.numpy.save_file(named, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"width \(128,\), patches \(8, 8\)\) is neither ViT-B/32"):
        measuring.convert("clip", tmp_path / "x.safetensors", tmp_path / "out.npz")
    safetensors.numpy.save_file(state("resnet3d"), tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="y.safetensors: no 3D-ResNet50: conv1.weight is .2, 3, 7"):
        measuring.convert("resnet3d", tmp_path / "y.safetensors", tmp_path / "out.npz")
    np.savez(tmp_path / "z.npz", **named)
    with pytest.raises(ValueError, match="z.npz: not the weights of CLIP ViT-B/32: class_emb"):
        clip.load(tmp_path / "z.npz", "ViT-B/32")
    with pytest.raises(ValueError, match="z.npz: not the weights of 3D-ResNet50"):
        resnet3d.load(tmp_path / "z.npz")
    assert set(weights.read_arrays(tmp_path / "z.npz", "", made_by="")) == set(named)


def test_shapes_are_those_of_depth_50():
    found = resnet3d.shapes()
    assert (
        sum(np.prod(x) for n, x in found.items() if "running" not in n) == 46_198_976
    )  # as PyTorch counts them
    assert found["layer4.2.bn3.running_var"] == (2048,)
    assert found["layer2.0.downsample.1.bias"] == (512,)
