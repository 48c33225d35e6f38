"""A folder of text features: every caption of a dataset seen through a frozen text encoder.

Layout of the folder (nothing in it is ever unpickled):

    manifest.json            schema, the encoder (hash of its weights, arguments), length L, dim C,
                             dtype, the dataset's hashes, count, files with their hashes, and the
                             row of each caption by the SHA-256 of its `normal` form
    rows_00000.safetensors   up to 256 rows: `features` [R, L, C], zero where there is no token;
                             `ids` [R, L] int32, padded with 0; `num_tokens` [R] int32
    rows_00001.safetensors ...

FLAN-T5 XL's 120 x 2048 features in bfloat16 take 0.5 MB a caption. They are read row by row.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int32

from fourdstar_jax import outside, remote
from fourdstar_jax.data import pipeline
from fourdstar_jax.data.batching import in_batches
from fourdstar_jax.folders import FEATURES, file_sha256, output_folder
from fourdstar_jax.text import pieces
from fourdstar_jax.text.captions import NEUTRAL_PROMPT, caption

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
ROWS_A_FILE = 256


def normal(text: str) -> str:
    """The form in which captions are tokenised, and under which features are kept."""
    return text.lower().strip()


def key_of(text: str) -> str:
    """SHA-256 of a caption's normal form."""
    return hashlib.sha256(normal(text).encode()).hexdigest()


def captions_of(data_dir: str | Path) -> list[str]:
    """The captions of all clips of a dataset, all splits, and the neutral prompt; each once."""
    manifest = pipeline.read_manifest(data_dir)
    names = ("appearance", "motion")  # the images stay packed
    found = {normal(NEUTRAL_PROMPT)}
    for split in manifest["splits"]:
        records = pipeline.Records(data_dir, split, only=names)
        for i in range(len(records)):
            record = records[i]
            appearance, motion = (pipeline.as_text(record[k]) for k in names)
            found.add(normal(caption(appearance, motion)))
    return sorted(found)


def write(
    data_dir: str | Path,
    out_dir: str | Path,
    encode: Callable[[np.ndarray, np.ndarray], Any],
    *,
    encoder: Mapping[str, Any],
    length: int = pieces.LENGTH,
    dtype: str = "bfloat16",
    batch: int = 8,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> dict:
    """Encodes every caption of a dataset; returns the manifest's content.

    Args:
      encode: ids [batch, length] and mask to features [batch, length, C]; the last batch is filled
        up, so one compiled shape serves all.
      encoder: what the manifest says of the encoder; `sha256` is its weights'.

    Raises ValueError when `out_dir` holds something (unless `overwrite`), for features that are not
    finite or do not fit `dtype`, with the caption, and for another dtype than bfloat16 or float16.
    """
    from safetensors.numpy import save

    if dtype not in DTYPES:
        raise ValueError(f"{dtype=} must be one of {sorted(DTYPES)}")
    if batch < 1:
        raise ValueError(f"{batch=} must be positive")
    texts = captions_of(data_dir)
    with output_folder(out_dir, FEATURES, overwrite=overwrite) as partial:
        files, dim = [], 0
        for start in range(0, len(texts), ROWS_A_FILE):
            part = texts[start : start + ROWS_A_FILE]
            ids, mask = pieces.tokenize(part, length)
            features = _encode(part, ids, mask, encode, batch, dtype)
            dim = features.shape[-1]
            arrays = {"features": features, "ids": ids, "num_tokens": mask.sum(1, dtype=np.int32)}
            data = save(arrays)
            name = f"rows_{len(files):05d}.safetensors"
            (partial / name).write_bytes(data)
            files.append({"file": name, "sha256": hashlib.sha256(data).hexdigest()})
            log(f"{start + len(part)} of {len(texts)} captions")
        content = {
            "schema": 1,
            "encoder": dict(encoder),
            "length": length,
            "dim": dim,
            "dtype": dtype,
            "data": pipeline.provenance(data_dir),
            "count": len(texts),
            "rows_a_file": ROWS_A_FILE,
            "files": files,
            "rows": {key_of(text): row for row, text in enumerate(texts)},
        }
        (partial / FEATURES.manifest).write_text(json.dumps(content, indent=1) + "\n")
    return content


def stored(features: np.ndarray, dtype: str, texts: Iterable[str]) -> np.ndarray:
    """Features [B, L, C] in a storage dtype; ValueError names a caption whose do not fit."""
    with np.errstate(over="ignore"):
        out = np.asarray(features, np.float32).astype(DTYPES[dtype])
    for text, row, before in zip(texts, out, features, strict=True):
        if not np.isfinite(row.astype(np.float32)).all():
            why = f"do not fit {dtype}" if np.isfinite(before).all() else "are not finite"
            raise ValueError(f"the features of {text!r} {why}")
    return out


def _encode(texts, ids, mask, encode, batch: int, dtype: str) -> np.ndarray:
    features = in_batches(encode, (ids, mask), batch).astype(np.float32)
    return stored(np.where(mask[..., None], features, 0), dtype, texts)


class TextFeatures:
    """A folder of text features, opened: called with a caption it gives ids and features.

    Raises ValueError for a folder that is none, and when a file is read whose hash differs from
    the manifest's.
    """

    def __init__(self, folder: str | Path):
        self.path = remote.fetched(folder)
        path = self.path / "manifest.json"
        if not path.is_file():
            raise ValueError(f"text_features={str(folder)!r} has no manifest.json: not features")
        found = outside.read(path)
        found.integer("schema", 1, 1)
        found.part("encoder").text("sha256", pattern=outside.SHA256)
        found.integer("length", 1, 1 << 16)
        found.integer("dim", 1, 1 << 16)
        found.text("dtype", choices=sorted(DTYPES))
        for entry in (files := found.parts("files")):
            entry.text("sha256", pattern=outside.SHA256)
        most = len(files) * found.integer("rows_a_file", 1, 1 << 20)
        rows = found.part("rows")
        for name in rows:
            rows.integer(name, 0, most - 1)
        self.content = found.values
        self._open()

    def _open(self) -> None:
        # one for each folder and process, as they hold what they have read
        self._file = functools.lru_cache(maxsize=None)(self._read_file)
        self._row = functools.lru_cache(maxsize=512)(self._read_row)

    @property
    def length(self) -> int:
        """Tokens of a caption, padding included."""
        return self.content["length"]

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.content["dim"]

    @property
    def provenance(self) -> dict[str, Any]:
        """What a model trained on the features says of them."""
        return {
            "encoder_sha256": self.content["encoder"]["sha256"],
            "length": self.length,
            "dim": self.dim,
            "dtype": self.content["dtype"],
        }

    def check(self, texts: Iterable[str], length: int, dim: int) -> None:
        """Raises ValueError unless all these captions have features of this shape."""
        if (self.length, self.dim) != (length, dim):
            raise ValueError(
                f"text_features={str(self.path)!r} are [{self.length}, {self.dim}]; the model "
                f"takes text_length={length}, text_dim={dim}"
            )
        for text in texts:
            self.row_of(text)

    def row_of(self, text: str) -> int:
        """The row of a caption; ValueError, with the caption, if it has none."""
        row = self.content["rows"].get(key_of(text))
        if row is None:
            raise ValueError(f"text_features={str(self.path)!r} has no features of {text!r}")
        return row

    def __call__(self, text: str) -> tuple[Int32[np.ndarray, " L"], np.ndarray]:
        """Ids [L] and features [L, C], in the dtype they are kept in."""
        return self._row(self.row_of(text))

    def _read_row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        file, place = divmod(row, self.content["rows_a_file"])
        opened = self._file(file)
        shape = opened.get_slice("features").get_shape()
        if shape[1:] != [self.length, self.dim] or place >= shape[0]:
            raise ValueError(f"{self.path}: file {file} holds {shape}, not what manifest.json says")
        return opened.get_slice("ids")[place], opened.get_slice("features")[place]

    def _read_file(self, number: int) -> Any:
        import safetensors

        entry = self.content["files"][number]
        path = self.path / f"rows_{number:05d}.safetensors"
        if not path.is_file():
            raise ValueError(f"{self.path} lacks {path.name}")
        if file_sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} is not the file that manifest.json describes (SHA-256)")
        return safetensors.safe_open(path, "numpy")

    def __getstate__(self) -> dict:  # for worker processes, which open the files themselves
        return {"path": self.path, "content": self.content}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()
