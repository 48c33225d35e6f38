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

Tensors are named by their place in the module, `blocks/0/attention/qkv/kernel`. Where `storage` is
int8 a kernel is a matrix of int8 for every output channel and `kernel:scale`, what one of its steps
is; all other floats are float16.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fourdstar_jax import arguments, nn, outside, remote, sharding, tokenizer
from fourdstar_jax.folders import file_sha256, output_file, replace_file
from fourdstar_jax.outside import SHA256, Fields
from fourdstar_jax.star.model import STAR
from fourdstar_jax.text.t5 import T5Encoder
from fourdstar_jax.tokenizer.base import Tokenizer
from fourdstar_jax.types import TokenizerSpec
from fourdstar_jax.vqvae.model import VQVAE4D

FORMAT = "fourdstar_jax bundle"
VERSION = 1
FILE = "model.json"
# stage -> what makes its module
STAGES = {
    "tokenizer": tokenizer.make,  # of the family that the arguments name
    "vqvae": VQVAE4D,
    "star": STAR,
    "text": T5Encoder,
}
# weights of others that a stage can start from, and that are no stage of the model
RAW_STAGES = ("trunk",)  # star's, from LlamaGen or MVAR: `star.warm_start`
MAX_HEADER = 16 << 20  # bytes, of a safetensors file
# of safetensors, what `save_arrays` writes and more
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
TYPES |= {"I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}
READERS = 2  # threads that copy tensors: new memory comes faster to two
PACKAGES = ("fourdstar-jax", "jax", "flax", "numpy")


Storage = Literal["float32", "float16", "int8"]  # of the stored floats
SCALE = ":scale"  # after the name of an array of int8
FEW_INPUTS = 16  # a kernel of fewer is not stored as int8, which would save little


@dataclasses.dataclass(frozen=True)
class Stage:
    """What `model.json` says of one stage."""

    file: str  # beside model.json
    sha256: str  # of the file
    storage: Storage
    model: dict[str, Any]  # the constructor's arguments
    config: dict[str, Any]  # of its training, resolved; `model` is in it, too
    info: dict[str, Any]  # whatever its trainer adds
    num_parameters: int | None = None
    hashed: dict[str, str] | None = None  # the tokenizer's: SHA-256 of `file` and of its `weights`

    def to_dict(self) -> dict[str, Any]:
        """Without the fields that are not known."""
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle's description, read once; its weights are read by `load` and `arrays`."""

    folder: Path
    tokenizer: TokenizerSpec | None
    stages: dict[str, Stage]
    packages: dict[str, str]  # versions that wrote it

    @property
    def spec(self) -> TokenizerSpec:
        """What its token ids mean. Raises ValueError if the bundle has no tokenizer."""
        if self.tokenizer is None:
            raise ValueError(f"bundle {self.folder} has no tokenizer yet: train that stage")
        return self.tokenizer

    def stage(self, name: str) -> Stage:
        """One stage's description. Raises ValueError if the bundle lacks it."""
        if name not in self.stages:
            present = sorted(self.stages) or "no stage"
            raise ValueError(
                f"bundle {self.folder} has no {name} yet (it has {present}): train that stage"
            )
        return self.stages[name]

    def info(self, name: str) -> Fields:
        """What the trainer of a stage added, to be taken field by field."""
        return Fields(self.stage(name).info, str(self.folder / FILE), f"stages.{name}.info")

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of every stage's file, as `model.json` says and loading checks."""
        return {name: stage.sha256 for name, stage in sorted(self.stages.items())}

    @overload
    def load(self, name: Literal["tokenizer"]) -> Tokenizer: ...
    @overload
    def load(self, name: Literal["vqvae"]) -> VQVAE4D: ...
    @overload
    def load(self, name: Literal["star"]) -> STAR: ...
    @overload
    def load(self, name: Literal["text"]) -> T5Encoder: ...

    def load(self, name: str) -> Any:
        """One stage's module with its weights (float32, on the default device).

        Raises ValueError if the stage is missing, damaged, or of another shape than its
        description.
        """
        if name in RAW_STAGES:
            raise ValueError(f"{name} is no stage to run: star starts from it (config.warm_start)")
        stage, path = self.stage(name), self._file(name)
        # The file is hashed in a thread, while its tensors go to the device one after another: no
        # more than the mapped file, the module and a tensor are in memory.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sha256 = pool.submit(file_sha256, path)
            try:
                arrays = _stacked(name, _mapped(path))
                module = _build(
                    name, stage.model, _names(arrays), functools.partial(_whole, arrays)
                )
                if name == "tokenizer":
                    self._check_tokenizer(module, stage, sha256.result())
            except (ValueError, safetensors.SafetensorError) as error:
                _check_sha256(path, sha256.result(), stage)  # the likelier cause
                if isinstance(error, safetensors.SafetensorError):
                    raise ValueError(f"{path} is not a safetensors file: {error}") from error
                raise ValueError(f"bundle {self.folder}: {error}") from error
            _check_sha256(path, sha256.result(), stage)
        return module

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """One stage's arrays by name, float32 where stored as int8, else as stored.

        Raises ValueError if it is missing or damaged.
        """
        stage, path = self.stage(name), self._file(name)
        _check_sha256(path, file_sha256(path), stage)
        try:
            arrays = _stacked(name, safetensors.numpy.load_file(path))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        names = _names(arrays)
        return {name: _whole(arrays, name) for name in arrays if name in names}

    def _check_tokenizer(self, module: Tokenizer, stage: Stage, file_sha256: str) -> None:
        hashed = stage.hashed or {}
        known = hashed.get("file") == file_sha256  # then its weights were hashed before
        spec = module.described(hashed["weights"]) if known else module.spec
        self.spec.check(spec)

    def _file(self, name: str) -> Path:
        """A stage's file. Raises ValueError if it is missing or its header out of proportion."""
        path = self.folder / self.stages[name].file
        if not path.is_file():
            raise ValueError(f"bundle {self.folder} lacks {path.name}")
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                raise ValueError(f"{path} has a header above {MAX_HEADER} bytes")
        return path

    def _write(self) -> None:
        description = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_dict(),
            "stages": {name: stage.to_dict() for name, stage in self.stages.items()},
            "packages": self.packages,
        }
        text = json.dumps(description, indent=2, sort_keys=True) + "\n"
        replace_file(self.folder / FILE, text.encode())


def versions() -> dict[str, str]:
    """Versions of this package and of those that decide its numbers."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def module_arguments(stage: str, model_config: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's `config.model` as constructor arguments: `dtype`, if given, is a name there.

    Raises ValueError for those that the stage's module does not take.
    """
    _check_arguments(stage, model_config, "config", "model")
    taken: dict[str, Any] = dict(model_config)
    if isinstance(taken.get("dtype"), str):
        taken["dtype"] = jnp.dtype(taken["dtype"])
    return taken


def save_stage(
    folder: str | os.PathLike[str],
    stage: str,
    model: Any,
    config: Any,
    *,
    storage: Storage = "float32",
    **info: Any,
) -> None:
    """Adds or replaces one stage of a bundle.

    `config` is the resolved configuration, with the constructor's arguments under `model`
    (a ConfigDict or a dict). `storage` float16 halves the file, int8 halves it again; the stage
    then acts as loaded from it, so train what builds on it (tokens, above all) with `Bundle.load`.
    `info` is anything JSON can hold.

    The new file is written aside and renamed, then `model.json` likewise: whenever it is
    interrupted, the bundle is the old one, the new one, or one whose hash does not fit, which
    loading refuses. Replacing the tokenizer drops the stages trained on another one.
    """
    save_arrays(folder, stage, nn.named_arrays(model), config, storage=storage, **info)


def save_arrays(
    folder: str | os.PathLike[str],
    stage: str,
    named: Mapping[str, Any],
    config: Any,
    *,
    storage: Storage = "float32",
    **info: Any,
) -> None:
    """`save_stage` of arrays by name, where there is no module (yet)."""
    if stage not in (*STAGES, *RAW_STAGES):
        raise ValueError(f"{stage=} must be one of {sorted((*STAGES, *RAW_STAGES))}")
    if storage not in typing.get_args(Storage):
        raise ValueError(f"{storage=} must be one of {list(typing.get_args(Storage))}")
    folder = Path(folder)
    bundle = read(folder) if (folder / FILE).exists() else Bundle(folder, None, {}, {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)  # pyright: ignore

    arrays = {}
    for name, array in named.items():
        array = np.asarray(array)
        if array.dtype == np.float32:
            if not np.isfinite(array).all():
                raise ValueError(f"{stage} holds values that are not finite: {name}")
            if storage == "int8" and is_int8(name, array.shape):
                steps, array = _in_steps(array)
                arrays[name + SCALE] = steps
            else:
                array = array.astype("float16" if storage == "int8" else storage)
            if not np.isfinite(array).all():
                raise ValueError(f"{stage}: {name} does not fit into {storage=}")
        elif not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{stage}: {name} has type {array.dtype}")
        arrays[name] = np.ascontiguousarray(array)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.safetensors"
    with output_file(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            safetensors.numpy.save_file(arrays, partial)
        except safetensors.SafetensorError as error:  # a full disk, say
            raise ValueError(f"{path} cannot be written: {error}") from error
        partial.chmod(mode)  # which safetensors makes its owner's alone
        sha256 = file_sha256(partial)
    entry = Stage(
        file=path.name,
        sha256=sha256,
        storage=storage,
        model=config["model"],
        config=config,
        info=info,
        num_parameters=sum(arrays[name].size for name in _names(arrays)),
    )
    stages, spec = {**bundle.stages, stage: entry}, bundle.tokenizer
    if stage == "tokenizer":
        # the spec of the weights as stored, which is what everybody will load
        get = functools.partial(_whole, arrays)
        spec = _build(stage, entry.model, _names(arrays), get).spec
        hashed = {"file": entry.sha256, "weights": spec.weights_sha256}
        stages[stage] = dataclasses.replace(entry, hashed=hashed)
        if bundle.tokenizer not in (None, spec):
            stages = {name: s for name, s in stages.items() if name not in ("vqvae", "star")}
    Bundle(folder, spec, stages, versions())._write()


def is_int8(name: str, shape: Sequence[int]) -> bool:
    """Whether an array is stored as int8 where `storage` is: the kernels of linear layers and
    convolutions, which are nearly all of a model, and neither tables nor the head's output."""
    return name.endswith("kernel") and len(shape) > 1 and shape[-2] >= FEW_INPUTS


def stored_bytes(arrays: Mapping[str, Any], storage: Storage) -> int:
    """Bytes of a stage's arrays by name, which may be shapes, if they are stored as `storage`."""
    total = 0
    for name, array in arrays.items():
        size = math.prod(array.shape)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            total += size * array.dtype.itemsize
        elif storage == "int8" and is_int8(name, array.shape):
            total += size + 4 * size // array.shape[-2]
        else:
            total += size * (4 if storage == "float32" else 2)
    return total


def _in_steps(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [..., inputs, outputs] as steps [..., 1, outputs], and how many of them it is."""
    steps = np.abs(array).max(axis=-2, keepdims=True) / 127
    return steps, np.rint(array / np.where(steps > 0, steps, 1)).astype(np.int8)


def _names(arrays: Mapping[str, np.ndarray]) -> set[str]:
    """Names of a stage's arrays as its module has them, without the scales of those of int8."""
    return {name for name in arrays if not name.endswith(SCALE)}


def _whole(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """An array of the module, out of its steps where it is stored as int8."""
    array, steps = arrays[name], arrays.get(name + SCALE)
    if steps is None:
        return array
    if steps.shape != (*array.shape[:-2], 1, *array.shape[-1:]) or array.dtype != np.int8:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}, which steps of {steps.shape} do not fit"
        )
    return array.astype(np.float32) * steps


def store_as(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], storage: Storage
) -> None:
    """Makes bundle `folder` of another one, with its weights stored as `storage`.

    A tokenizer that other stages were trained on stays as it is: what its tokens mean to them hangs
    on its weights. Raises ValueError for a `folder` that is there already.
    """
    found, folder = read(source), Path(folder)
    if (folder / FILE).exists():
        raise ValueError(f"{folder} is a bundle already: give a new folder")
    kept = ["tokenizer"] if "tokenizer" in found.stages and len(found.stages) > 1 else []
    if kept:
        copy(source, folder, kept)
    for name, entry in found.stages.items():
        if name not in kept:
            config = {**entry.config, "model": entry.model}
            arrays = {
                name: array.astype(np.float32) if array.dtype == np.float16 else array
                for name, array in found.arrays(name).items()
            }
            save_arrays(folder, name, arrays, config, storage=storage, **entry.info)


def add_info(folder: str | os.PathLike[str], stage: str, **info: Any) -> None:
    """Adds to what the trainer of a stage told of it; its weights stay as they are."""
    found = read(folder)
    entry = found.stage(stage)
    stages = {**found.stages, stage: dataclasses.replace(entry, info=entry.info | info)}
    dataclasses.replace(found, stages=stages)._write()


def read(folder: str | os.PathLike[str]) -> Bundle:
    """A bundle's description, checked. Raises ValueError for a folder that is not a bundle."""
    folder = remote.fetched(folder)
    path = folder / FILE
    if not path.is_file():
        found = f"it has no {FILE}" if folder.exists() else "there is no such folder"
        raise ValueError(f"{folder} is not a model bundle: {found}")
    found = outside.read(path, max_bytes=arguments.MAX_JSON)
    found.text("format", choices=[FORMAT])
    found.integer("version", VERSION, VERSION)
    entries = found.part("stages")
    entries.only((*STAGES, *RAW_STAGES))
    spec = None
    if found.values.get("tokenizer") is not None:
        spec = TokenizerSpec.from_dict(found.part("tokenizer").values, f"{path}: tokenizer")
    packages = found.part("packages", default={})
    return Bundle(
        folder=folder,
        tokenizer=spec,
        stages={name: _stage(name, entries.part(name)) for name in entries},
        packages={name: packages.text(name) for name in packages},
    )


def _stage(name: str, entry: Fields) -> Stage:
    """What `model.json` says of a stage, checked."""
    entry.only(field.name for field in dataclasses.fields(Stage))
    entry.text("file", choices=[f"{name}.safetensors"])
    entry.text("sha256", pattern=SHA256)
    entry.text("storage", choices=typing.get_args(Storage))
    entry.integer("num_parameters", 0, 1 << 48, default=0)
    hashed = entry.part("hashed", default={})
    for key in hashed:
        hashed.text(key, pattern=SHA256)
    if hashed.values:
        hashed.text("weights", pattern=SHA256)
    for key in ("config", "info"):
        entry.part(key)
    model = _upgraded(name, entry.part("model"))
    if name in STAGES:
        _check_arguments(name, model, entry.where, f"{entry.path}.model")
    return Stage(**{**entry.values, "model": model})


def _check_arguments(stage: str, values: Mapping[str, Any], where: str, path: str) -> None:
    module: Any = STAGES[stage]
    if stage == "tokenizer":
        values = dict(values)
        family = {"family": values.pop("family", "unitok")}
        name = Fields(family, where, path).text("family", choices=list(tokenizer.FAMILIES))
        module = tokenizer.class_of(name)
    arguments.check(module, values, where, path)


def _upgraded(stage: str, arguments: Fields) -> dict[str, Any]:
    """Constructor arguments as this version takes them, of a stage that may be older.

    Until 0.1 STAR took `image_size` and `patch` instead of `resolution` and `grid`, and `history`,
    which had one choice.
    """
    new = dict(arguments.values)
    if stage == "star" and "image_size" in new:
        new["resolution"] = arguments.integer("image_size", 1, 4096)
        new["grid"] = new["resolution"] // arguments.integer("patch", 1, 4096)
        del new["image_size"], new["patch"]
        new.pop("history", None)
    return new


def _stacked(stage: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A stage's arrays as this version names them, of a file that may be older.

    Until 0.1 every block of the VQ-VAE's decoder had arrays of its own, `static/blocks/3/...`.
    """
    if stage != "vqvae":
        return arrays
    new: dict[str, Any] = {}
    for name, array in arrays.items():
        if found := re.fullmatch(r"(static/(?:blocks|view_attentions)/)(\d+)/(.+)", name):
            new.setdefault(found[1] + found[3], {})[int(found[2])] = array
        else:
            new[name] = array
    for name, layers in new.items():
        if isinstance(layers, dict):
            new[name] = np.stack([layers[i] for i in sorted(layers)])
    return new


def copy(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], stages: Sequence[str]
) -> None:
    """Starts bundle `folder` with stages of another one, as they are, hashes and all.

    A trainer does this with the stages it builds on before it saves its own. Raises ValueError if
    `source` lacks one of them.
    """
    found = read(source)
    if missing := [stage for stage in stages if stage not in found.stages]:
        raise ValueError(f"bundle {source} has no {missing} yet: train that first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        file = found.stages[stage].file
        replace_file(folder / file, (found.folder / file).read_bytes())
    copied = {stage: found.stages[stage] for stage in stages}
    dataclasses.replace(found, folder=folder, stages=copied)._write()


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file's arrays as read-only views of the mapped file: nothing is copied."""
    with safetensors.safe_open(path, "numpy") as file:  # checks the header and every place in it
        names = file.keys()
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = outside.parse(data[8:start].tobytes(), f"{path}: its header")
    arrays = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{path}: {name} has type {entry['dtype']}")
        low, high = entry["data_offsets"]
        values = data[start + low : start + high].view(TYPES[entry["dtype"]])
        arrays[name] = values.reshape(entry["shape"])
    return arrays


def _check_sha256(path: Path, sha256: str, stage: Stage) -> None:
    if sha256 != stage.sha256:
        raise ValueError(f"{path} is not the file that {FILE} describes (its SHA-256 differs)")


def shapes(stage: str, model_config: Mapping[str, Any]) -> Any:
    """A stage's module, never initialised: `jax.ShapeDtypeStruct` in place of its arrays.

    `model_config` holds the constructor's arguments. Raises ValueError for those it does not take.
    """
    taken = module_arguments(stage, model_config)
    with sharding.use_mesh(devices=jax.devices()[:1]):
        try:
            return jax.eval_shape(
                lambda key: nn.build(STAGES[stage], key, **taken), jax.random.key(0)
            )
        except TypeError as error:
            raise ValueError(f"bundle: {stage} of this version differs: {error}") from error


def _build(
    stage: str,
    arguments: Mapping[str, Any],
    names: set[str],
    get: Callable[[str], np.ndarray],
) -> Any:
    """The stage's module, filled with the arrays of these names that `get` returns."""
    model = shapes(stage, arguments)
    wanted = nn.named_arrays(model)
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
