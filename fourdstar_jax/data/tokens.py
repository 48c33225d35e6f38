"""A folder of tokens: a dataset seen through a frozen tokenizer, to train STAR without images.

Layout of the folder (nothing in it is ever unpickled):

    spec.json              schema, the tokenizer's spec, the dataset's hash and settings, counts
    codebooks.safetensors  `codebooks` [K, vocab, D/K] float32
    train.array_record     one record a clip: a safetensors file with `tokens` [F, V, n, K] uint16,
                           `viewmats` [V, 4, 4], `Ks` [V, 3, 3]; names and captions as metadata
    unseen_clip.array_record, unseen_object.array_record

Readers compare the tokenizer's spec: tokens of another tokenizer are numbers without meaning.
"""

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fourdstar_jax import outside, remote
from fourdstar_jax.arguments import counted
from fourdstar_jax.data import pipeline, splits, transforms
from fourdstar_jax.data.batching import in_batches
from fourdstar_jax.folders import TOKENS, output_folder
from fourdstar_jax.text.words import WordTokenizer
from fourdstar_jax.types import TokenizerSpec

_TEXT = ("clip_id", "object_id", "asset_sha256", "split", "appearance", "motion")


def tokenize(
    data_dir: str | Path,
    out_dir: str | Path,
    encode: Callable[[np.ndarray], Any],
    *,
    spec: TokenizerSpec,
    codebooks: Float[np.ndarray, "K vocab d"],
    batch_images: int = 64,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> dict:
    """Encodes the rig views of every clip of a dataset; returns the content of spec.json.

    Args:
      encode: images [batch_images, h, w, 3] in [0, 1] to tokens [batch_images, n, K]; the last
        batch is filled up, so one compiled shape serves all.
      spec: the tokenizer's.
      codebooks: as `codes` uses them.

    Raises ValueError when `out_dir` holds something (unless `overwrite`), or for more than 65,536
    codes.
    """
    from array_record.python import array_record_module  # pyright: ignore
    from safetensors.numpy import save, save_file

    if codebooks.shape[1] > 1 << 16:
        raise ValueError(f"{codebooks.shape[1]} codes do not fit 16 bits")
    manifest = pipeline.read_manifest(data_dir)
    with output_folder(out_dir, TOKENS, overwrite=overwrite) as partial:
        for split in manifest["splits"]:
            source = pipeline.ClipSource(data_dir, split, cache_bytes=0)
            writer = array_record_module.ArrayRecordWriter(
                str(partial / f"{split}.array_record"), "group_size:1"
            )
            for i in range(len(source)):
                clip = source[i]
                images = transforms.on_white(clip["rig_rgba"])[0]  # [F, V, h, w, 3]
                tokens = _encode(images, encode, batch_images)
                if tokens.min() < 0 or tokens.max() >= codebooks.shape[1]:
                    raise ValueError(f"encode gave token {tokens.max()} of {codebooks.shape[1]}")
                arrays = {
                    "tokens": tokens.astype(np.uint16),
                    "viewmats": clip["rig_viewmats"],
                    "Ks": clip["rig_Ks"],
                }
                metadata = {k: clip[k] for k in _TEXT}
                metadata |= {
                    "index": str(clip["index"]),
                    "clip_index": str(clip["clip_index"]),
                }
                arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
                writer.write(save(arrays, metadata=metadata))
            writer.close()
            log(f"{split}: {counted(len(source), 'clips')}")
        content = {
            "schema": 1,
            "tokenizer": spec.to_dict(),
            "data": {k: manifest[k] for k in ("sha256", "split_sha256", "settings")},
            "splits": manifest["splits"],
            "train_captions": manifest["train_captions"],
        }
        save_file(
            {"codebooks": np.ascontiguousarray(codebooks, np.float32)},
            partial / "codebooks.safetensors",
        )
        (partial / TOKENS.manifest).write_text(json.dumps(content, indent=1) + "\n")
    return content


class TokenFolder:
    """A folder of tokens, opened: spec, codebooks, hashes and words.

    With `spec`, the spec of the tokenizer in use, a difference is a ValueError that names it.
    """

    def __init__(self, token_dir: str | Path, *, spec: TokenizerSpec | None = None):
        self.path = remote.fetched(token_dir)
        path = self.path / "spec.json"
        if not path.is_file():
            raise ValueError(
                f"token_dir={str(token_dir)!r} has no spec.json: `fourdstar tokenize` makes tokens"
            )
        found = outside.read(path)
        found.integer("schema", 1, 1)
        pipeline.check_content(found)
        self.content = found.values
        self.spec = TokenizerSpec.from_dict(found.part("tokenizer").values, f"{path}: tokenizer")
        if spec is not None:
            self.spec.check(spec)

    @property
    def splits(self) -> dict[str, int]:
        """Clips of each split."""
        return self.content["splits"]

    @property
    def num_views(self) -> int:
        """Views of the dataset's rig."""
        return (
            outside.Fields(self.content, str(self.path / TOKENS.manifest))
            .part("data")
            .part("settings")
            .integer("views", 1, 1 << 10)
        )

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the dataset and of its split, which trained models carry."""
        data = self.content["data"]
        return {"data_sha256": data["sha256"], "split_sha256": data["split_sha256"]}

    @functools.cached_property
    def codebooks(self) -> Float[np.ndarray, "K vocab d"]:
        """The vectors that the tokens index."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path, s = self.path / "codebooks.safetensors", self.spec
        try:
            codebooks = load_file(path)["codebooks"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a safetensors file with codebooks: {error}") from error
        shape = (s.num_codebooks, s.vocab_size, s.code_dim // s.num_codebooks)
        if codebooks.shape != shape or codebooks.dtype != np.float32:
            raise ValueError(
                f"{path} holds codebooks of {codebooks.dtype} {codebooks.shape}, spec.json says "
                f"float32 {shape}"
            )
        return codebooks

    def word_tokenizer(self, max_len: int) -> WordTokenizer:
        """The word tokenizer of the training captions, the same as the dataset's."""
        return WordTokenizer.from_captions(self.content["train_captions"], max_len)


class TokenSource:
    """A split's clips as dicts with `tokens` [F, V, n, K]; a grain random-access source."""

    def __init__(self, folder: TokenFolder, split: str):
        self.folder, self.split = folder, split
        if split not in folder.splits:
            raise ValueError(f"{split=} is not one of {sorted(folder.splits)}")
        self._open()

    def _open(self) -> None:
        from array_record.python import array_record_module  # pyright: ignore

        self._reader = array_record_module.ArrayRecordReader(
            str(self.folder.path / f"{self.split}.array_record")
        )
        self._cache: dict[int, dict] = {}

    def __len__(self) -> int:
        return self._reader.num_records()

    def __repr__(self) -> str:  # grain stores it beside the iterator's state
        data = self.folder.hashes["data_sha256"][:16]
        return f"TokenSource({data}, {self.split}, {len(self)})"

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = int(i)
        if i not in self._cache:
            self._cache[i] = self._read(i)
        return self._cache[i]

    def _read(self, i: int) -> dict[str, Any]:
        from safetensors.numpy import load

        data = self._reader.read([i])[0]
        out: dict[str, Any] = dict(load(data))
        where = f"{self.folder.path / self.split}.array_record: record {i}"
        header = outside.parse(data[8 : 8 + struct.unpack_from("<Q", data)[0]], where)
        metadata = outside.Fields(header, where).part("__metadata__")
        out |= {k: metadata.text(k) for k in _TEXT}
        out["index"] = int(metadata.text("index", pattern=r"\d{1,9}"))
        clip_index = int(metadata.text("clip_index", pattern=r"\d{1,9}"))
        splits.check(
            out["clip_id"],
            out["asset_sha256"],
            clip_index,
            out["split"],
            self.split,
            self.folder.hashes["split_sha256"],
        )
        return out

    def __getstate__(self) -> dict:  # for worker processes, which open the files themselves
        return {"folder": self.folder, "split": self.split}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def make_loader(
    folder: TokenFolder | str | Path,
    split: str,
    *,
    batch_size: int,
    timesteps: int,
    seed: int = 0,
    train: bool | None = None,
    shuffle: bool | None = None,
    repeat: bool | None = None,
    rig_roll: bool | None = None,
    neutral_prompt: float | None = None,
    words: WordTokenizer | None = None,
    max_len: int = 12,
    features: pipeline.Features | None = None,
    worker_count: int = 0,
    max_stride: int = 1,
):
    """Like `pipeline.make_loader`, over tokens: `tokens` [B, T, V, n, K] int32 in place of images.

    Batches also hold `viewmats`, `Ks`, `times`, `text_ids`, `clip` and, with `features`,
    `text_features`. With the same seed they are the same clips, windows, rolls and prompts as those
    of the images.
    """
    if not isinstance(folder, TokenFolder):
        folder = TokenFolder(folder)
    random = split == "train" if train is None else train
    neutral_prompt = (0.5 if random else 0.0) if neutral_prompt is None else neutral_prompt
    if not 0 <= neutral_prompt <= 1:
        raise ValueError(f"{neutral_prompt=} is not a probability")
    return pipeline.batches(
        TokenSource(folder, split),
        TokenWindows(
            words or folder.word_tokenizer(max_len),
            timesteps,
            random,
            random if rig_roll is None else rig_roll,
            neutral_prompt,
            features,
            max_stride=max_stride,
        ),
        batch_size=batch_size,
        seed=seed,
        shuffle=random if shuffle is None else shuffle,
        repeat=random if repeat is None else repeat,
        worker_count=worker_count,
    )


class TokenWindows(pipeline.Windows):
    """`pipeline.Windows` over tokens."""

    def __call__(self, clip: dict, rng: np.random.Generator) -> dict[str, Any]:
        F, V = clip["tokens"].shape[:2]
        frames, view, neutral = self.draw(F, V, rng)
        viewmats = clip["viewmats"]
        if view:
            viewmats, _ = transforms.input_view_to_front(viewmats, viewmats[:0], view)
        return {
            "tokens": np.roll(clip["tokens"][frames], -view, axis=1).astype(np.int32),
            "viewmats": viewmats,
            "Ks": np.roll(clip["Ks"], -view, axis=0),
            "times": np.arange(self.timesteps, dtype=np.float32),
            "clip": np.int32(clip["index"]),
            **self.text(clip, neutral),
        }


def _encode(images: np.ndarray, encode, batch_images: int) -> np.ndarray:
    flat = images.reshape(-1, *images.shape[2:])
    tokens = in_batches(encode, (flat,), batch_images)
    return tokens.reshape(*images.shape[:2], *tokens.shape[1:])
