"""`fourdstar convert`: a released PyTorch file to a bundle of ours, and a bundle of ours back.

Going there, names and shapes are checked strictly both ways: every tensor of theirs must be asked
for or known not to be needed, and every tensor of ours must come from one. The bundle's stage
tells where it is from (`info.converted`): the source's SHA-256 and the version of the map.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast, runtime_checkable

import numpy as np
import safetensors
import safetensors.numpy

from fourdstar_jax import bundle, folders, nn, outside
from fourdstar_jax.convert import rules, torch_file

# kind of file -> stage of the bundle that it becomes
KINDS = {
    "unitok": "tokenizer",
    "vq16": "tokenizer",
    "t5": "text",
    "llamagen": "trunk",
    "mvar": "trunk",
}
MAX_INDEX = 16 << 20  # bytes, of the list of a model's shards


@runtime_checkable
class KeyMap(Protocol):
    """The map between a kind's names and ours: `convert.unitok` and its siblings.

    A kind that no model of ours is made for also has `shapes`, which takes the arguments.
    """

    VERSION: int
    IGNORED: tuple[str, ...]  # patterns of tensors that are not needed

    def find(self, tree: Mapping[str, object]) -> dict[str, np.ndarray]:
        """The state dict in a file's tree."""
        ...

    def arguments(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Arguments of the model that a state dict is of."""
        ...

    def rules_for(self, shapes: Mapping[str, tuple[int, ...]]) -> list[rules.Rule]:
        """The rules for our arrays of these names and shapes."""
        ...


class Converted(TypedDict):
    """The source of a stage that was converted."""

    kind: str
    key_map: int  # version of the kind's names and rules
    source: str
    source_sha256: str
    shards_sha256: dict[str, str]  # by file name, of a source that is an index
    tensors: int
    not_needed: int  # tensors of the source that the stage does without


def key_map(kind: str) -> KeyMap:
    """The module with a kind's names. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"{kind=} must be one of {sorted(KINDS)}")
    return cast(KeyMap, importlib.import_module(f"fourdstar_jax.convert.{kind}"))


def read(path: str | os.PathLike[str]) -> dict[str, object]:
    """The tree of a .pth, .pt, .bin or .safetensors file, or of shards by their .index.json.

    Arrays are views of the mapped files where the format allows. Raises ValueError with the file
    and the reason for what is none of these; nothing in a file is ever run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    if path.name.endswith(".index.json"):
        return {name: x for shard in _shards(path) for name, x in read(shard).items()}
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > bundle.MAX_HEADER:
                raise ValueError(f"{path}: its header is above {bundle.MAX_HEADER} bytes")
        try:
            return dict(safetensors.numpy.load_file(path))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
    tree = torch_file.read(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not a dict")
    return tree


def _shards(path: Path) -> list[Path]:
    """The files that an index names, all beside it."""
    weights = outside.read(path, max_bytes=MAX_INDEX).part("weight_map")
    shards = [path.parent / name for name in sorted({weights.text(name) for name in weights})]
    for shard in shards:
        if shard.parent != path.parent or shard.name.endswith(".index.json"):
            raise ValueError(f"{path}: names the file {str(shard)!r}, which is not one beside it")
    return shards


def convert(
    kind: str,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    storage: bundle.Storage = "float32",
    dtype: str = "float32",
) -> Converted:
    """Writes a released file as a stage of a bundle; returns what the stage's `info` says of it.

    Args:
      kind: "unitok", "vq16", "t5", "llamagen" or "mvar".
      source: the released file (see `read`).
      folder: the bundle, new or with other stages already.
      storage: of the bundle's floats, float32 or float16.
      dtype: of the arithmetic when the stage is loaded, float32 or bfloat16.

    Raises ValueError that lists every missing, unknown or misshapen tensor by name.
    """
    names = key_map(kind)
    stage = KINDS[kind]
    tree = read(source)
    try:
        state = names.find(tree)
        arguments = {**names.arguments(state), "dtype": dtype}
        shapes = _shapes(names, stage, arguments)
        table = names.rules_for(shapes)
        if wrong := rules.check(state, rules.their_shapes(table, shapes), names.IGNORED):
            raise ValueError(f"not the {kind} that is known here: " + "; ".join(wrong))
        arrays = rules.forward(table, state)
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        # the sizes are read off the file's own shapes, which may make no sense at all
        why = error if isinstance(error, ValueError) else f"no {kind}: {error!r}"
        raise ValueError(f"{source}: {why}") from error
    shards = _shards(Path(source)) if str(source).endswith(".index.json") else []
    used = {name for rule in table for name in rule.theirs}
    info: Converted = {
        "kind": kind,
        "key_map": names.VERSION,
        "source": Path(source).name,
        "source_sha256": folders.file_sha256(source),
        "shards_sha256": {shard.name: folders.file_sha256(shard) for shard in shards},
        "tensors": len(used),
        "not_needed": len(state) - len(used & set(state)),
    }
    config = {"model": arguments}
    bundle.save_arrays(folder, stage, _float32(arrays), config, storage=storage, converted=info)
    return info


def reverse(
    kind: str, folder: str | os.PathLike[str], out: str | os.PathLike[str]
) -> dict[str, tuple[int, ...]]:
    """Writes a bundle's stage as a safetensors file with the original's names; returns the shapes.

    PyTorch's users load it with `model.load_state_dict(safetensors.torch.load_file(out))`; what
    the original has besides (UniTok's CLIP side, T5's decoder) is not in it: `strict=False`. Of a
    bundle with a STAR that was trained here, "llamagen" writes its layers, last norm and, with T5,
    its text MLP; its tokens, head and positions are not LlamaGen's, and no RoPE goes with the
    layers. Raises ValueError if the bundle's stage is not of this kind, or `out` is not named
    .safetensors.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the way back writes .safetensors, which PyTorch's users can load")
    names = key_map(kind)
    stage = KINDS[kind]
    found = bundle.read(folder)
    if kind == "llamagen" and stage not in found.stages and "star" in found.stages:
        arrays = _trunk_of_star(found.arrays("star"))
        shapes = {name: array.shape for name, array in arrays.items()}
        return _write(out, kind, rules.backward(names.rules_for(shapes), _float32(arrays)))
    arrays = found.arrays(stage)
    arguments = found.stages[stage].model
    shapes = {name: array.shape for name, array in arrays.items()}
    try:
        if wanted := set(_shapes(names, stage, arguments)) ^ set(shapes):
            raise ValueError(f"{sorted(wanted)[0]} is in one of them only")
        state = rules.backward(names.rules_for(shapes), _float32(arrays))
        if again := names.arguments(state):
            differing = [k for k in again if _plain(arguments.get(k, again[k])) != _plain(again[k])]
            differing = [k for k in differing if k not in ("resolution", "dtype")]
            if differing:
                raise ValueError(f"{differing[0]} is {arguments[differing[0]]!r}")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: its {stage} is not of the {kind} kind: {error}") from error
    return _write(out, kind, state)


def _trunk_of_star(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """STAR's arrays that LlamaGen has names for, one layer at a time."""
    stacked = "trunk/layers/"
    found = {"norm/scale": arrays["trunk/norm/scale"]}
    for name, array in arrays.items():
        if name.startswith(stacked):
            found |= {f"layers/{i}/{name[len(stacked) :]}": x for i, x in enumerate(array)}
    if "text/table" not in arrays:  # it reads T5's features, as LlamaGen's does
        found |= {name: x for name, x in arrays.items() if name.startswith("text/mlp/")}
    return found


def _write(out: Path, kind: str, state: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    contiguous = {name: np.ascontiguousarray(array) for name, array in state.items()}
    with folders.output_file(out) as partial:
        metadata = {"format": "pt", "kind": kind}
        safetensors.numpy.save_file(contiguous, partial, metadata=metadata)
    return {name: array.shape for name, array in contiguous.items()}


def _shapes(names: KeyMap, stage: str, arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our arrays: of the stage's module, or as the key map says."""
    if shapes := getattr(names, "shapes", None):
        return shapes(arguments)
    model = bundle.shapes(stage, arguments)
    return {name: tuple(x.shape) for name, x in nn.named_arrays(model).items()}


def _float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Floats of every width as float32; integers as they are."""
    return {
        name: x if np.issubdtype(x.dtype, np.integer) else np.asarray(x, np.float32)
        for name, x in arrays.items()
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, list | tuple) else value
