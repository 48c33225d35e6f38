"""CLIP's image tower, 3D-ResNet50 and DreamSim on what the original code gave for small ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax.convert import measuring
from fourdstar_jax.perceptual import clip, dreamsim, resnet3d, weights

FIXTURE = Path(__file__).parent / "fixtures" / "measuring"
DREAMSIM = FIXTURE.with_name("dreamsim")  # a cache folder of the original's, made small


def test_features_are_the_originals(parity):
    found = parity.compare(FIXTURE)
    assert set(found) == {"clip_small", "resnet3d"}
    assert max(found.values()) < 1e-5, found


def test_dreamsim_is_the_originals_with_its_lora(parity, tmp_path):
    found = parity.compare(DREAMSIM)
    assert found["embeddings"] < 1e-5 and found["distance"] < 1e-3, found
    arrays = measuring.dreamsim_arrays(DREAMSIM)
    shutil.copytree(DREAMSIM, tmp_path / "plain")
    path = tmp_path / "plain" / "ensemble_lora" / "adapter_model.safetensors"
    lora = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({n: np.zeros_like(x) for n, x in lora.items()}, path)
    plain = measuring.dreamsim_arrays(tmp_path / "plain")
    merged = {n for n in arrays if not np.array_equal(arrays[n], plain[n])}
    assert merged == {f"{b}.blocks.{i}.attn.qkv.weight" for b in dreamsim.BRANCHES for i in (0, 1)}


def test_other_folders_of_dreamsim_are_refused(tmp_path):
    def refused(match, change):
        folder = tmp_path / "folder"
        shutil.copytree(DREAMSIM, folder)
        change(folder)
        with pytest.raises(ValueError, match=match):
            measuring.convert("dreamsim", folder, tmp_path / "out.npz")
        shutil.rmtree(folder)

    def more(folder):
        path = folder / "ensemble_lora" / "adapter_model.safetensors"
        lora = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file(lora | {"extra": np.zeros(1)}, path)

    refused(
        "folder has no dino_vitbase16_pretrain.pth or checkpoints/dino_vitbase16",
        lambda folder: (folder / "dino_vitbase16_pretrain.pth").unlink(),
    )
    refused("13 arrays, of which 12 belong to the three ViTs", more)
    # the very small one is not what is released
    refused(r"no DreamSim: dino.patch_embed.proj.weight is \(64, 3, 16, 16\), not", lambda x: None)
    with pytest.raises(ValueError, match="x is not a folder: DreamSim comes in several files"):
        measuring.convert("dreamsim", tmp_path / "x", tmp_path / "out.npz")
    np.savez(tmp_path / "z.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match="z.npz: not the weights of DreamSim"):
        dreamsim.load(tmp_path / "z.npz")


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
    np.savez(tmp_path / "n.npz", a=np.ones(3), b=np.array([1, np.nan]))
    with pytest.raises(ValueError, match="n.npz: b holds float64 that are not all finite"):
        weights.read_shapes(tmp_path / "n.npz", "", {"a": (3,), "b": (2,)}, made_by="")


def test_shapes_are_those_of_b16():
    counts = {
        n: sum(map(np.prod, dreamsim.shapes(b).values())) for n, b in dreamsim.BRANCHES.items()
    }
    clips = 85_798_656 + 2 * 768 + 768 * 512  # ViT-B/16, the norm before its blocks, projection
    assert counts == {"dino": 85_798_656 - 2 * 768, "clip": clips, "open_clip": clips}


def test_shapes_are_those_of_depth_50():
    found = resnet3d.shapes()
    assert (
        sum(np.prod(x) for n, x in found.items() if "running" not in n) == 46_198_976
    )  # as PyTorch counts them
    assert found["layer4.2.bn3.running_var"] == (2048,)
    assert found["layer2.0.downsample.1.bias"] == (512,)
