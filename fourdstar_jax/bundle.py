"""Model bundles: a folder with `model.json` and one safetensors file a stage.

A bundle is all that generation needs, and all that a later stage needs of an earlier one. The
stages are `tokenizer`, `vqvae` and `star`, and `text` where STAR takes features of T5; a bundle
grows with them. Only JSON and safetensors are read, never a pickle.

`model.json`:

    format, version      "fourdstar_jax bundle", 1
    tokenizer            the tokenizer's spec: what the token ids mean
    stages.<stage>       file, sha256, num_parameters, storage (type of the stored floats),
                         model (the constructor's arguments), config (the whole resolved
                         configuration of its training), info (whatever its trainer adds: rig,
                         words, hashes of split and data, final metrics), hashed (the tokenizer's:
                         SHA-256 of its file and of the weights in it)
    packages             versions that wrote it

Tensors are named by their place in the module, `blocks/0/attention/qkv/kernel`.
"""

import concurrent.futures
import hashlib
import importlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
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
    "text": ("fourdstar_jax.text.t5", "T5Encoder"),
}
# weights of others that a stage can start from, and that are no stage of the model
RAW_STAGES = ("trunk",)  # star's, from LlamaGen or MVAR: `star.warm_start`
MAX_HEADER = 16 << 20  # bytes, of a safetensors file
# of safetensors, what `save_arrays` writes and more
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
TYPES |= {"I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}
READERS = 2  # threads that copy tensors: new memory comes faster to two
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
    save_arrays(folder, stage, named_arrays(model), config, storage=storage, **info)


def save_arrays(
    folder: str | os.PathLike[str],
    stage: str,
    named: Mapping[str, Any],
    config: Any,
    *,
    storage: str = "float32",
    **info: Any,
) -> None:
    """`save_stage` of arrays by name, where there is no module (yet)."""
    if stage not in (*STAGES, *RAW_STAGES):
        raise ValueError(f"{stage=} must be one of {sorted((*STAGES, *RAW_STAGES))}")
    if storage not in ("float32", "float16"):
        raise ValueError(f"{storage=} must be 'float32' or 'float16'")
    folder = Path(folder)
    description = read(folder) if (folder / FILE).exists() else _empty()
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)  # pyright: ignore

    arrays = {}
    for name, array in named.items():
        array = np.asarray(array)
        if array.dtype == np.float32:
            if not np.isfinite(array).all():
                raise ValueError(f"{stage} holds values that are not finite: {name}")
            array = array.astype(storage)
            if not np.isfinite(array).all():
                raise ValueError(f"{stage}: {name} does not fit into {storage=}")
        elif not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{stage}: {name} has type {array.dtype}")
        arrays[name] = np.ascontiguousarray(array)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.safetensors"
    aside = _aside(path)
    safetensors.numpy.save_file(arrays, aside)
    description["stages"][stage] = {
        "file": path.name,
        "sha256": file_sha256(aside),
        "num_parameters": sum(array.size for array in arrays.values()),
        "storage": storage,
        "model": config["model"],
        "config": config,
        "info": info,
    }
    description["packages"] = versions()

    aside.replace(path)
    if stage == "tokenizer":
        # the spec of the weights as stored, which is what everybody will load
        spec = _build(stage, description, set(arrays), arrays.__getitem__).spec.to_dict()
        entry = description["stages"][stage]
        entry["hashed"] = {"file": entry["sha256"], "weights": spec["weights_sha256"]}
        if description["tokenizer"] not in (None, spec):
            for later in ("vqvae", "star"):
                description["stages"].pop(later, None)
        description["tokenizer"] = spec
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
    if not isinstance(stages, dict) or not set(stages) <= {*STAGES, *RAW_STAGES}:
        raise ValueError(f"{path} lists unknown stages; there are {sorted((*STAGES, *RAW_STAGES))}")
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
        raise ValueError(f"{stage} is no stage to run: star starts from it (config.warm_start)")
    description = read(folder)
    _check_stage(folder, stage, description)
    # The file is hashed in a thread, while its tensors go to the device one after another: no more
    # than the mapped file, the module and a tensor are in memory.
    path = _check_file(Path(folder), stage)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sha256 = pool.submit(file_sha256, path)
        try:
            arrays = _mapped(path)
            module = _build(stage, description, set(arrays), arrays.__getitem__)
            if stage == "tokenizer":
                hashed = description["stages"][stage].get("hashed", {})
                known = hashed.get("file") == sha256.result()  # then its weights were hashed before
                spec = module.described(hashed.get("weights")) if known else module.spec
                TokenizerSpec.from_dict(description["tokenizer"] or {}).check(spec)
        except (ValueError, safetensors.SafetensorError) as error:
            _check_sha256(path, sha256.result(), description["stages"][stage])  # the likelier cause
            if isinstance(error, safetensors.SafetensorError):
                raise ValueError(f"{path} is not a safetensors file: {error}") from error
            raise ValueError(f"bundle {folder}: {error}") from error
        _check_sha256(path, sha256.result(), description["stages"][stage])
    return module


def load_arrays(folder: str | os.PathLike[str], stage: str) -> dict[str, np.ndarray]:
    """One stage's arrays by name, as stored. Raises ValueError if it is missing or damaged."""
    description = read(folder)
    _check_stage(folder, stage, description)
    path = _check_file(Path(folder), stage)
    _check_sha256(path, file_sha256(path), description["stages"][stage])
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _check_stage(folder: Any, stage: str, description: dict) -> None:
    if stage not in description["stages"]:
        present = sorted(description["stages"]) or "no stage"
        raise ValueError(f"bundle {folder} has no {stage} yet (it has {present}): train that stage")


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


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    _replace(folder / FILE, text.encode())


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, which is read a piece at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _replace(path: Path, data: bytes) -> None:
    aside = _aside(path)
    aside.write_bytes(data)
    aside.replace(path)


def _check_file(folder: Path, stage: str) -> Path:
    """A stage's file. Raises ValueError if it is missing or its header is out of all proportion."""
    path = folder / f"{stage}.safetensors"
    if not path.is_file():
        raise ValueError(f"bundle {folder} lacks {path.name}")
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise ValueError(f"{path} has a header above {MAX_HEADER} bytes")
    return path


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file's arrays as read-only views of the mapped file: nothing is copied."""
    with safetensors.safe_open(path, "numpy") as file:  # checks the header and every place in it
        names = file.keys()
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    arrays = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{path}: {name} has type {entry['dtype']}")
        low, high = entry["data_offsets"]
        values = data[start + low : start + high].view(TYPES[entry["dtype"]])
        arrays[name] = values.reshape(entry["shape"])
    return arrays


def _check_sha256(path: Path, sha256: str, entry: dict) -> None:
    if sha256 != entry["sha256"]:
        raise ValueError(f"{path} is not the file that {FILE} describes (its SHA-256 differs)")


def shapes(stage: str, model_config: Mapping[str, Any]) -> Any:
    """A stage's module, never initialised: `jax.ShapeDtypeStruct` in place of its arrays.

    `model_config` holds the constructor's arguments. Raises ValueError for those it does not take.
    """
    module_name, maker = STAGES[stage]
    make = getattr(importlib.import_module(module_name), maker)
    arguments = module_arguments(model_config)
    with sharding.use_mesh(devices=jax.devices()[:1]):
        try:
            return jax.eval_shape(
                lambda key: sharding.build(make, key, **arguments), jax.random.key(0)
            )
        except TypeError as error:
            raise ValueError(f"bundle: {stage} of this version differs: {error}") from error


def _build(stage: str, description: dict, names: set[str], get: Callable[[str], np.ndarray]) -> Any:
    """The stage's module, filled with the arrays of these names that `get` returns."""
    model = shapes(stage, description["stages"][stage]["model"])
    wanted = named_arrays(model)
    if differing := sorted(set(wanted) ^ names):
        raise ValueError(
            f"bundle of another shape: {stage} has {len(set(wanted) - names)} tensors "
            f"missing and {len(names - set(wanted))} too many, {differing[0]} among them"
        )

    def fill(item: tuple[str, Any]) -> jax.Array:
        name, target = item
        array = get(name)
        if array.shape != target.shape:
            raise ValueError(
                f"bundle of another shape: {stage} {name} is {array.shape}, not {target.shape}"
            )
        if np.issubdtype(array.dtype, np.floating) != jnp.issubdtype(target.dtype, jnp.floating):
            raise ValueError(f"bundle: {stage} {name} is {array.dtype}, not {target.dtype}")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(f"bundle: {stage} {name} holds values that are not finite")
        return jnp.asarray(array, target.dtype)

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        filled = list(pool.map(fill, wanted.items()))
    return jax.tree.unflatten(jax.tree.structure(model), filled)
