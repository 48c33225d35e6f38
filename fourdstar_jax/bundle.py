"""Model bundles: a folder with `model.json` and one safetensors file a stage.

A bundle is all that generation needs, and all that a later stage needs of an earlier one. The
stages are `tokenizer`, `vqvae` and `star`; a bundle grows with them. Only JSON and safetensors are
read, never a pickle. A stage of `RAW_STAGES` has no module of ours: `trunk` holds released weights
that STAR's training may start from (`config.warm_start`), by names of their own.

`model.json`:

    format, version      "fourdstar_jax bundle", 1
    tokenizer            the tokenizer's spec: what the token ids mean
    stages.<stage>       file, sha256, num_parameters, storage (type of the stored floats),
                         model (the constructor's arguments), config (the whole resolved
                         configuration of its training), info (whatever its trainer adds: rig,
                         words, hashes of split and data, final metrics)
    packages             versions that wrote it

Tensors are named by their place in the module, `blocks/0/attention/qkv/kernel`.
"""

import hashlib
import importlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fourdstar_jax import sharding
from fourdstar_jax.tokenizer.base import TokenizerSpec

FORMAT = "fourdstar_jax bundle"
VERSION = 1
FILE = "model.json"
# stage -> where its module class, or what makes it, is
STAGES = {
    "tokenizer": ("fourdstar_jax.tokenizer", "make"),  # of the family that the arguments name
    "vqvae": ("fourdstar_jax.vqvae.model", "VQVAE4D"),
    "star": ("fourdstar_jax.star.model", "STAR"),
}
RAW_STAGES = ("trunk",)  # arrays alone: `save_arrays`, `load_arrays`
MAX_HEADER = 16 << 20  # bytes, of a safetensors file
MAX_JSON = 16 << 20  # bytes
PACKAGES = ("fourdstar-jax", "jax", "flax", "numpy")


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide its numbers."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def rig(
    *,
    num_views: int,
    fps: float,
    max_timesteps: int,
    radius: float = 1.5,
    fov_deg: float = 49.1,
) -> dict[str, Any]:
    """How the model sees an object, for a stage's `info`: views equally spaced around it."""
    return {
        "azimuths_deg": [360 * view / num_views for view in range(num_views)],
        "radius": radius,
        "fov_deg": fov_deg,
        "fps": fps,
        "max_timesteps": max_timesteps,
    }


def named_arrays(model: Any) -> dict[str, Any]:
    """All arrays of a module, parameters and other state, by their place in it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {n.removesuffix("/value"): leaf for n, (_, leaf) in zip(names, leaves, strict=True)}


def module_arguments(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's `config.model` as constructor arguments: `dtype`, if given, is a name there."""
    arguments: dict[str, Any] = dict(model_config)
    if isinstance(arguments.get("dtype"), str):
        arguments["dtype"] = jnp.dtype(arguments["dtype"])
    return arguments


def save_stage(
    folder: str | os.PathLike[str],
    stage: str,
    model: Any,
    config: Any,
    *,
    storage: str = "float32",
    **info: Any,
) -> None:
    """Adds or replaces one stage of a bundle.

    `config` is the resolved configuration, with the constructor's arguments under `model`
    (a ConfigDict or a dict). `storage` float16 halves the file; the stage then acts as loaded
    from it, so train what builds on it (tokens, above all) with `load_stage`. `info` is anything
    JSON can hold.

    The new file is written aside and renamed, then `model.json` likewise: whenever it is
    interrupted, the bundle is the old one, the new one, or one whose hash does not fit, which
    loading refuses. Replacing the tokenizer drops the stages trained on another one.
    """
    if stage not in STAGES:
        raise ValueError(f"{stage=} must be one of {sorted(STAGES)}")
    if storage not in ("float32", "float16"):
        raise ValueError(f"{storage=} must be 'float32' or 'float16'")
    folder = Path(folder)
    description = read(folder) if (folder / FILE).exists() else _empty()
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)  # pyright: ignore

    arrays = _storable(stage, named_arrays(model), storage)
    _put_stage(folder, description, stage, arrays, storage, config, info)
    if stage == "tokenizer":
        # the spec of the weights as stored, which is what everybody will load
        spec = _build(stage, description, arrays).spec.to_dict()
        if description["tokenizer"] not in (None, spec):
            for later in ("vqvae", "star"):
                description["stages"].pop(later, None)
        description["tokenizer"] = spec
    _write_description(folder, description)


def save_arrays(
    folder: str | os.PathLike[str],
    stage: str,
    arrays: Mapping[str, Any],
    *,
    model: Mapping[str, Any],
    storage: str = "float32",
    **info: Any,
) -> None:
    """Adds or replaces a stage of `RAW_STAGES`: arrays by name, floats of any size or integers.

    `model` holds the sizes of what they are of, anything JSON can hold; otherwise as `save_stage`.
    """
    if stage not in RAW_STAGES:
        raise ValueError(f"{stage=} must be one of {sorted(RAW_STAGES)}")
    if storage not in ("float32", "float16"):
        raise ValueError(f"{storage=} must be 'float32' or 'float16'")
    folder = Path(folder)
    description = read(folder) if (folder / FILE).exists() else _empty()
    stored = _storable(stage, arrays, storage)
    _put_stage(folder, description, stage, stored, storage, {"model": dict(model)}, info)
    _write_description(folder, description)


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`model.json`, checked. Raises ValueError for a folder that is not a bundle."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a model bundle: it has no {FILE}")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} is larger than {MAX_JSON} bytes")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a {FORMAT}")
    if description.get("version") != VERSION:
        raise ValueError(f"{path} has version {description.get('version')}; {VERSION} is read")
    stages = description.get("stages")
    keys = {"file", "sha256", "storage", "model", "config", "info"}
    known = {*STAGES, *RAW_STAGES}
    if not isinstance(stages, dict) or not set(stages) <= known:
        raise ValueError(f"{path} lists unknown stages; there are {sorted(known)}")
    for stage, entry in stages.items():
        if not isinstance(entry, dict) or not keys <= set(entry):
            raise ValueError(f"{path}: stage {stage} lacks some of {sorted(keys)}")
        if entry["file"] != f"{stage}.safetensors":
            raise ValueError(f"{path}: stage {stage} names the file {entry['file']!r}")
    return description


def load_stage(folder: str | os.PathLike[str], stage: str) -> Any:
    """One stage's module with its weights (float32, on the default device).

    Raises ValueError if the stage is missing, damaged, or of another shape than its description.
    """
    if stage in RAW_STAGES:
        raise ValueError(f"{stage=} is no model: training STAR starts from it (config.warm_start)")
    description = read(folder)
    if stage not in description["stages"]:
        present = sorted(description["stages"]) or "no stage"
        raise ValueError(f"bundle {folder} has no {stage} yet (it has {present}): train that stage")
    module = _build(stage, description, _read_arrays(Path(folder), stage, description))
    if stage == "tokenizer":
        try:
            TokenizerSpec.from_dict(description["tokenizer"] or {}).check(module.spec)
        except ValueError as error:
            raise ValueError(f"bundle {folder}: {error}") from error
    return module


def load_arrays(folder: str | os.PathLike[str], stage: str) -> dict[str, np.ndarray]:
    """The arrays of a stage of `RAW_STAGES`, by name, as they are stored.

    Raises ValueError if the stage is missing or damaged, or holds values that are not finite.
    """
    if stage not in RAW_STAGES:
        raise ValueError(f"{stage=} must be one of {sorted(RAW_STAGES)}: others are models")
    description = read(folder)
    if stage not in description["stages"]:
        present = sorted(description["stages"]) or "no stage"
        raise ValueError(f"bundle {folder} has no {stage} (it has {present}): convert one")
    arrays = _read_arrays(Path(folder), stage, description)
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(f"bundle: {stage} {name} holds values that are not finite")
    return arrays


def copy(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], stages: Sequence[str]
) -> None:
    """Starts bundle `folder` with stages of another one, as they are, hashes and all.

    A trainer does this with the stages it builds on before it saves its own. Raises ValueError if
    `source` lacks one of them.
    """
    description = read(source)
    if missing := [stage for stage in stages if stage not in description["stages"]]:
        raise ValueError(f"bundle {source} has no {missing} yet: train that first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        _replace(
            folder / f"{stage}.safetensors", (Path(source) / f"{stage}.safetensors").read_bytes()
        )
    description["stages"] = {stage: description["stages"][stage] for stage in stages}
    _write_description(folder, description)


def spec(folder: str | os.PathLike[str]) -> TokenizerSpec:
    """The tokenizer's spec, without loading it. Raises ValueError if the bundle has none."""
    description = read(folder)
    if description["tokenizer"] is None:
        raise ValueError(f"bundle {folder} has no tokenizer yet: train that stage")
    return TokenizerSpec.from_dict(description["tokenizer"])


def weights_sha256(folder: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of every stage's file, as `model.json` says and loading checks."""
    return {stage: entry["sha256"] for stage, entry in sorted(read(folder)["stages"].items())}


def _empty() -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "tokenizer": None, "stages": {}}


def _storable(stage: str, named: Mapping[str, Any], storage: str) -> dict[str, np.ndarray]:
    """Arrays as a file holds them: floats, which must be finite, as `storage`; integers as is."""
    arrays = {}
    for name, array in named.items():
        array = np.asarray(array)
        if jnp.issubdtype(array.dtype, jnp.floating):  # bfloat16 too
            if not np.isfinite(array).all():
                raise ValueError(f"{stage} holds values that are not finite: {name}")
            with np.errstate(over="ignore"):  # told by name
                array = array.astype(storage)
            if not np.isfinite(array).all():
                raise ValueError(f"{stage}: {name} does not fit into {storage=}")
        elif not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{stage}: {name} has type {array.dtype}")
        arrays[name] = np.ascontiguousarray(array)
    return arrays


def _put_stage(
    folder: Path,
    description: dict[str, Any],
    stage: str,
    arrays: dict[str, np.ndarray],
    storage: str,
    config: Mapping[str, Any],
    info: Mapping[str, Any],
) -> None:
    """Replaces a stage's file and its entry in `description`, which is still to be written."""
    data = safetensors.numpy.save(arrays)
    description["stages"][stage] = {
        "file": f"{stage}.safetensors",
        "sha256": hashlib.sha256(data).hexdigest(),
        "num_parameters": sum(array.size for array in arrays.values()),
        "storage": storage,
        "model": config["model"],
        "config": config,
        "info": info,
    }
    description["packages"] = versions()
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{stage}.safetensors", data)


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    _replace(folder / FILE, text.encode())


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    aside.write_bytes(data)
    aside.replace(path)


def _read_arrays(folder: Path, stage: str, description: dict) -> dict[str, np.ndarray]:
    path = folder / f"{stage}.safetensors"
    if not path.is_file():
        raise ValueError(f"bundle {folder} lacks {path.name}")
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise ValueError(f"{path} has a header above {MAX_HEADER} bytes")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != description["stages"][stage]["sha256"]:
        raise ValueError(f"{path} is not the file that {FILE} describes (its SHA-256 differs)")
    try:
        return safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _build(stage: str, description: dict, arrays: dict[str, np.ndarray]) -> Any:
    """The stage's module, never initialised: its shapes alone, filled with `arrays`."""
    module_name, maker = STAGES[stage]
    make = getattr(importlib.import_module(module_name), maker)
    arguments = module_arguments(description["stages"][stage]["model"])
    with sharding.use_mesh(devices=jax.devices()[:1]):
        try:
            model = jax.eval_shape(
                lambda key: sharding.build(make, key, **arguments), jax.random.key(0)
            )
        except TypeError as error:
            raise ValueError(f"bundle: {stage} of this version differs: {error}") from error
    wanted = named_arrays(model)
    if differing := sorted(set(wanted) ^ set(arrays)):
        raise ValueError(
            f"bundle of another shape: {stage} has {len(set(wanted) - set(arrays))} tensors "
            f"missing and {len(set(arrays) - set(wanted))} too many, {differing[0]} among them"
        )
    filled = []
    for name, target in wanted.items():
        array = arrays[name]
        if array.shape != target.shape:
            raise ValueError(
                f"bundle of another shape: {stage} {name} is {array.shape}, not {target.shape}"
            )
        if np.issubdtype(array.dtype, np.floating) != jnp.issubdtype(target.dtype, jnp.floating):
            raise ValueError(f"bundle: {stage} {name} is {array.dtype}, not {target.dtype}")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(f"bundle: {stage} {name} holds values that are not finite")
        filled.append(jnp.asarray(array, target.dtype))
    return jax.tree.unflatten(jax.tree.structure(model), filled)
