"""From a dataset on disk to batches: grain over tensorflow-datasets' records.

A batch is a dict of numpy arrays (float32 unless it says otherwise):

    images        [B, T, V, h, w, 3]  [0, 1] over white      extra_images   [B, T, E, h, w, 3]
    masks         [B, T, V, h, w, 1]                         extra_masks    [B, T, E, h, w, 1]
    viewmats, Ks  [B, V, 4, 4], [B, V, 3, 3]                 extra_viewmats, extra_Ks
    flow          [B, T-1, V, h, w, 2]  pixels to the next timestep (where the dataset has it)
    depth         [B, T, V, h, w, 1]  camera z (where the dataset has it)
    times         [B, T]  frames since the window's first
    text_ids      [B, L] int32          clip  [B] int32, the clip's number in the dataset
    text_features [B, L, C]  with a text encoder that has features

This is the form "float". In the form "uint8", for `train.inputs`, images and masks are together and
as records have them, `rgba` [B, T, V, h, w, 4] and `extra_rgba`, flow and depth are float16. In the
form "index" a batch has no pixels but `frames` [B, T], numbers of rows of `resident.Frames`, and
`view` [B], the rig's view that is to be the first, both int32.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fourdstar_jax import arguments, folders, outside, remote
from fourdstar_jax.data import splits, transforms
from fourdstar_jax.data.quarantine import CorruptRecord, Quarantine, Readable
from fourdstar_jax.data.settings import MAX_POINTS
from fourdstar_jax.geometry import Rig
from fourdstar_jax.text.captions import NEUTRAL_PROMPT, caption
from fourdstar_jax.text.words import WordTokenizer

# a caption to ids [L] and features [L, C], such as `features.TextFeatures`
Features = Callable[[str], tuple[np.ndarray, np.ndarray]]
Form = Literal["float", "uint8", "index"]
POINTS = ["points", "point_normals"]  # where the dataset has them
MAPS = ("flow", "depth")  # what the rig's views may have besides colours
# the most of each of a dataset's settings
SETTINGS = {"image_size": 1024, "views": 64, "extra_views": 64, "max_frames": 1024}


def read_manifest(data_dir: str | Path) -> dict:
    """The dataset's manifest (settings, hash, splits, captions); ValueError if there is none."""
    manifest = outside.read(folders.check_dataset(data_dir))
    manifest.integer("schema", 1, 1)
    check_content(manifest)
    settings = manifest.part("settings")
    for name, most in SETTINGS.items():
        settings.integer(name, 0 if name == "extra_views" else 1, most)
    settings.number("fps", *arguments.FPS)
    for name in ("flow", "depth"):
        settings.flag(name)
    settings.integer("points", 0, MAX_POINTS, default=0)
    if "clips" in manifest:
        for clip in manifest.parts("clips"):
            clip.text("clip_id")
            clip.text("split", choices=splits.SPLITS)
            clip.integer("num_frames", 1, SETTINGS["max_frames"])
            clip.text("sha256", pattern=outside.SHA256)
    counts = manifest.part("counts", default={})  # datasets of before have none
    counts.only(splits.SPLITS)
    for split in counts:
        told = counts.part(split)
        for name in ("clips", "objects", "coloured", "textured"):
            told.integer(name, 0, 1 << 31)
        told.numbers("mask_area_quartiles", 0, 1, most=3)
    return manifest.values


def check_content(fields: outside.Fields) -> None:
    """Splits and captions of a manifest; ValueError for what is not right in them."""
    counts = fields.part("splits")
    counts.only(splits.SPLITS)
    for name in counts:
        counts.integer(name, 1, 1 << 31)
    fields.texts("train_captions")
    hashes = fields.part("data") if "data" in fields else fields
    hashes.text("sha256", pattern=outside.SHA256)
    hashes.text("split_sha256", pattern=outside.SHA256)


def provenance(data_dir: str | Path) -> dict[str, str]:
    """What a model trained on the dataset says of it: the hashes of its content and its split."""
    manifest = read_manifest(data_dir)
    return {"data_sha256": manifest["sha256"], "split_sha256": manifest["split_sha256"]}


def load_words(data_dir: str | Path, max_len: int = 12) -> WordTokenizer:
    """The word tokenizer of a dataset's training captions; the same for the same dataset."""
    return WordTokenizer.from_captions(read_manifest(data_dir)["train_captions"], max_len)


def rig(data_dir: str | Path) -> Rig:
    """The rig that a dataset was rendered with."""
    settings = read_manifest(data_dir)["settings"]
    return Rig.around(settings["views"], fps=settings["fps"])


class Records:
    """Random access to a split's records, decoded by the schema of builder.py.

    What they hold follows from the manifest's settings alone: neither their files' names nor their
    types are taken from what tensorflow-datasets wrote beside them. With `only`, just these fields
    are decoded, and never those of `without`. A file that cannot be opened is left out, and
    `quarantine` counts its records.

    Raises ValueError for a split that the dataset does not have, and for files that are not as the
    manifest says; CorruptRecord for such records.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        *,
        only: Sequence[str] = (),
        without: Sequence[str] = (),
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        from fourdstar_jax.data.builder import features_of

        data_dir = remote.fetched(data_dir)
        manifest = read_manifest(data_dir)
        if split not in manifest["splits"]:
            raise ValueError(f"{split=} is not one of the dataset's {sorted(manifest['splits'])}")
        features = features_of(manifest["settings"])
        kept = [name for name in only or features if name not in without]
        self._features = type(features)({name: features[name] for name in kept})
        self._place, wanted = f"{data_dir}, split {split}", manifest["splits"][split]
        self.quarantine = Quarantine(self._place, wanted)
        files, corrupt = [], {}
        for file in sorted(data_dir.glob(f"*-{split}.array_record-*")):
            try:
                len(ArrayRecordDataSource(str(file)))
                files.append(str(file))
            except (RuntimeError, ValueError) as error:  # cut short, or of another kind
                corrupt[file.name] = _line(error)
        self._records = ArrayRecordDataSource(files) if files else ()
        missing = wanted - len(self._records)
        if missing > 0 and corrupt:
            reasons = "; ".join(f"{name}: {line}" for name, line in corrupt.items())
            self.quarantine.add(reasons, missing)
        elif missing:
            raise ValueError(
                f"{self._place} holds {len(self._records)} records, manifest.json says {wanted}"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            return dict(self._features.deserialize_example_np(self._records[i]))  # pyright: ignore
        except UNREADABLE as error:
            raise CorruptRecord(
                f"{self._place}: record {i} is not as the settings in manifest.json say: "
                f"{_line(error)}"
            ) from error


# What decoding a record raises: of array_record, protocol buffers, zlib and the readers of PNG.
UNREADABLE = (ValueError, KeyError, TypeError, RuntimeError, IndexError, OSError, zlib.error)


def _line(error: BaseException) -> str:
    """The beginning of an error's text, in one line."""
    return " ".join(str(error).split())[:200]


class ClipSource:
    """A split's clips as dicts of arrays with decoded uint8 images, kept in memory up to a cap.

    A grain random-access source. Every record's own split is compared with the one asked for, and
    with the committed split file, so that no unseen clip can reach training by a wrong file name.
    Of MAPS only `maps` are read, and tracked points only with `points`.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        *,
        cache_bytes: int = 2 << 30,
        maps: Sequence[str] = MAPS,
        points: bool = False,
    ):
        self.data_dir, self.split = str(remote.fetched(data_dir)), split
        self.manifest = read_manifest(self.data_dir)
        self._without = [f"rig_{name}" for name in MAPS if name not in maps]
        self._without += [] if points else POINTS
        self._source = Records(self.data_dir, split, without=self._without)
        self.quarantine = self._source.quarantine
        self._room, self._cache = cache_bytes, {}

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:  # grain stores it beside the iterator's state
        return f"ClipSource({self.manifest['sha256'][:16]}, {self.split}, {len(self)})"

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = int(i)
        if i in self._cache:
            return self._cache[i]
        record = self._source[i]
        text = ("object_id", "clip_id", "asset_sha256", "clip_name", "split", "licence")
        out: dict[str, Any] = {k: as_text(record[k]) for k in (*text, "appearance", "motion")}
        clip_index = int(record["clip_index"])
        splits.check(
            out["clip_id"],
            out["asset_sha256"],
            clip_index,
            out["split"],
            self.split,
            self.manifest["split_sha256"],
        )
        s = self.manifest["settings"]
        F = len(record["frame_times"])
        for name, views in (("rig", s["views"]), ("extra", s["extra_views"])):
            if views == 0:
                continue
            rgba = np.stack(record[f"{name}_rgba"])
            if len(rgba) != F * views:
                raise CorruptRecord(
                    f"clip {out['clip_id']}: {len(rgba)} pictures, not {F} x {views}"
                )
            out[f"{name}_rgba"] = rgba.reshape(F, views, *rgba.shape[1:])
            out[f"{name}_viewmats"] = record[f"{name}_viewmats"]
            out[f"{name}_Ks"] = record[f"{name}_Ks"]
        for key in ("rig_flow", "rig_depth", *POINTS):
            if key in record:
                out[key] = np.asarray(record[key])
        for key, value in out.items():
            floats = isinstance(value, np.ndarray) and value.dtype != np.uint8
            if floats and not np.isfinite(value).all():
                raise CorruptRecord(f"clip {out['clip_id']}: {key} is not finite")
        out["clip_index"] = clip_index
        out |= {"fps": float(record["fps"]), "frame_times": record["frame_times"]}
        out["index"] = int(record["index"])
        nbytes = sum(v.nbytes for v in out.values() if isinstance(v, np.ndarray))
        if nbytes <= self._room:
            self._room -= nbytes
            self._cache[i] = out
        return out

    def __getstate__(self) -> dict:  # for worker processes, which open the files themselves
        return self.__dict__ | {"_cache": {}, "_source": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._source = Records(self.data_dir, self.split, without=self._without)
        self.quarantine = self._source.quarantine


def as_text(value: bytes | str) -> str:
    """A record's text."""
    return value.decode() if isinstance(value, bytes) else str(value)


class Windows:
    """A clip and a random generator to an example; a class, so that worker processes can have it.

    Without `random` an example is the first window with its own caption, the rig as it is. With it,
    windows take every frame or, as often, every second and so on to every `max_stride`-th: motions
    of other speeds.
    """

    def __init__(
        self,
        words: WordTokenizer,
        timesteps: int,
        random: bool,
        rig_roll: bool,
        neutral_prompt: float,
        features: Features | None = None,
        form: Form = "float",
        max_stride: int = 1,
    ):
        if timesteps < 1 or max_stride < 1:
            raise ValueError(f"{timesteps=} and {max_stride=} must be positive")
        self.words, self.timesteps, self.random = words, timesteps, random
        self.rig_roll, self.neutral_prompt = rig_roll, neutral_prompt
        self.features, self.form, self.max_stride = features, form, max_stride

    def text(self, clip: dict[str, Any], neutral: bool) -> dict[str, np.ndarray]:
        """What an example says of its text."""
        text = NEUTRAL_PROMPT if neutral else caption(clip["appearance"], clip["motion"])
        if self.features is None:
            return {"text_ids": self.words([text])[0]}
        ids, features = self.features(text)
        return {"text_ids": ids, "text_features": features}

    def draw(
        self, num_frames: int, num_views: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, int, bool]:
        """Frames of the window, the view that becomes view 0, whether the prompt is neutral.

        The draws come in one order and number, so that images and tokens of one seed agree.
        """
        stride = 1
        if self.random and self.max_stride > 1:  # as far as it does not make the clip loop
            most = (num_frames - 1) // max(1, self.timesteps - 1)
            stride = 1 + int(rng.integers(max(1, min(self.max_stride, most))))
        frames = transforms.window(
            num_frames, self.timesteps, rng if self.random else None, stride=stride
        )
        view, chance = int(rng.integers(num_views)), rng.random()
        return frames, view if self.rig_roll else 0, bool(chance < self.neutral_prompt)

    def __call__(self, clip: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        V = len(clip["rig_viewmats"])
        frames, view, neutral = self.draw(len(clip["frame_times"]), V, rng)
        others = clip.get("extra_viewmats", np.zeros((0, 4, 4), np.float32))
        viewmats, extra_viewmats = clip["rig_viewmats"], others
        if view:
            viewmats, extra_viewmats = transforms.input_view_to_front(viewmats, others, view)
        out = {
            "viewmats": viewmats,
            "Ks": np.roll(clip["rig_Ks"], -view, axis=0),
            "times": np.arange(self.timesteps, dtype=np.float32),
            "clip": np.int32(clip["index"]),
            **self.text(clip, neutral),
        }
        if "extra_viewmats" in clip:
            out |= {"extra_viewmats": extra_viewmats, "extra_Ks": clip["extra_Ks"]}
        if self.form == "index":
            return out | {"frames": np.int32(clip["first"] + frames), "view": np.int32(view)}
        return out | self.pixels(clip, frames, view)

    def pixels(self, clip: dict[str, Any], frames: np.ndarray, view: int) -> dict[str, np.ndarray]:
        """Pictures and maps of these frames, `view` first."""

        def rig(name, frames):
            return np.roll(clip[name][frames], -view, axis=1)

        out = {"rgba": rig("rig_rgba", frames)}
        if "extra_rgba" in clip:
            out["extra_rgba"] = clip["extra_rgba"][frames]
        if self.form == "float":
            for name in list(out):
                images, masks = transforms.on_white(out.pop(name))
                prefix = name.removesuffix("rgba")
                out |= {f"{prefix}images": images, f"{prefix}masks": masks}
        dtype = np.float32 if self.form == "float" else np.float16
        if "rig_flow" in clip:
            out["flow"] = rig("rig_flow", frames[:-1]).astype(dtype)
        if "rig_depth" in clip:
            out["depth"] = rig("rig_depth", frames).astype(dtype)[..., None]
        return out


def make_loader(
    data_dir: str | Path,
    split: str,
    *,
    source: Any = None,
    form: Form = "float",
    maps: Sequence[str] = MAPS,
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
    features: Features | None = None,
    worker_count: int = 0,
    cache_bytes: int = 2 << 30,
    max_stride: int = 1,
):
    """A grain dataset of batches; its iterators have `get_state` and `set_state` to resume exactly.

    Training (the default for the split "train") shuffles, repeats without end, starts windows at
    random, rolls the rig so that any view may be the input view, and gives half of the examples the
    neutral prompt. Otherwise clips come once, in order, from the first frame, as they are, and the
    last batch may be smaller. Every JAX process reads its own share of `batch_size`.

    Args:
      source: the split's clips, in place of those read from `data_dir`: `resident.Clips`.
      form: of the batches, see above.
      maps: of MAPS, those to read where the dataset has them.
      train: reads as for training or as for evaluation, whatever the split; the further options
        change parts of it.
      words: tokenizer of a model that exists; by default that of the training captions, with
        captions cut to `max_len` pieces.
      features: of a caption, ids [L] and features [L, C] in place of the words' ids.
      worker_count: processes that read; 0 reads in threads of this one.
      cache_bytes: decoded clips kept in memory, a process.
      max_stride: of the frames of random windows, see `Windows`; without maps of flow, which lead
        from each frame to the next.
    """
    random = split == "train" if train is None else train
    neutral_prompt = (0.5 if random else 0.0) if neutral_prompt is None else neutral_prompt
    if not 0 <= neutral_prompt <= 1:
        raise ValueError(f"{neutral_prompt=} is not a probability")
    if source is None:
        source = Readable(ClipSource(data_dir, split, cache_bytes=cache_bytes, maps=maps))
    return batches(
        source,
        Windows(
            words or load_words(data_dir, max_len),
            timesteps,
            random,
            random if rig_roll is None else rig_roll,
            neutral_prompt,
            features,
            form,
            max_stride,
        ),
        batch_size=batch_size,
        seed=seed,
        shuffle=random if shuffle is None else shuffle,
        repeat=random if repeat is None else repeat,
        worker_count=worker_count,
    )


def batches(
    source,
    example,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    repeat: bool,
    worker_count: int,
):
    """The steps that every loader shares: shuffle, repeat, `example`, process share, batch.

    A batch's rows, and what is drawn for each, are the same for any number of processes.
    """
    import grain
    import jax

    processes = jax.process_count()
    if batch_size < 1 or batch_size % processes:
        raise ValueError(f"{batch_size=} must be a positive multiple of {processes=}")
    dataset = grain.MapDataset.source(source).seed(seed)
    if repeat and len(dataset) == 0:
        raise ValueError("there are no clips")
    if shuffle:
        dataset = dataset.shuffle()
    if repeat:
        dataset = dataset.repeat()
    share = Share(dataset.random_map(example), batch_size, jax.process_index(), processes)
    dataset = grain.MapDataset.source(share).batch(batch_size // processes, drop_remainder=repeat)
    # Each thread makes a batch; decoding PNG lets the others run.
    count = min(8, max(2, os.cpu_count() or 2))
    threads = grain.ReadOptions(num_threads=count, prefetch_buffer_size=max(4, count))
    dataset = dataset.to_iter_dataset(threads)
    if worker_count:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain's workers ask for values of theirs
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=worker_count))
    return dataset


class Share:
    """The rows of each batch that are a process's: one after another, as they lie on its devices.

    A grain random-access source. Of a last batch that the number of processes does not divide, the
    last rows belong to none.
    """

    def __init__(self, rows: Any, batch_size: int, process: int, processes: int):
        self._rows, self._batch_size = rows, batch_size
        self._process, self._processes = process, processes

    def __len__(self) -> int:
        return len(self._rows) // self._processes

    def __repr__(self) -> str:  # grain stores it beside the iterator's state
        return f"Share({self._rows!r}, {self._batch_size})"

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(int(index), self._batch_size // self._processes)
        first = batch * self._batch_size
        size = min(self._batch_size, len(self._rows) - first) // self._processes
        return self._rows[first + self._process * size + row]
