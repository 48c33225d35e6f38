"""The dataset of moving objects, schema version 1: a tensorflow-datasets builder (no TensorFlow).

One record is one clip of one object: F frames of V rig views and E extra views, every camera fixed
over time. Images are h x w pixels. Frames form a ring: readers that want more frames than F go on
with frame 0.

| field | what it is | type, shape, unit |
| --- | --- | --- |
| `index` | number of the clip in the dataset, over all splits, in order of `clip_id` | int64 |
| `object_id` | path of the file below the assets folder, without its ending | text |
| `clip_id` | `object_id`, "#", number of the animation, "@" and the rig unless it is 0 | text |
| `asset_sha256`, `clip_name` | of the file; of its animation | text |
| `clip_index` | number of the animation in the file | int64 |
| `split` | train, unseen_clip or unseen_object | text |
| `licence` | of the asset, "unknown" without an assets.csv | text |
| `appearance`, `motion` | captions: from the two names, or from tables of them | text |
| `fps`, `frame_times` | frames a second; seconds since the clip's first key | float32, [F] |
| `rig_rgba` | PNG, straight alpha (alpha is the mask), frame-major | [F*V] images [h, w, 4] |
| `rig_viewmats`, `rig_Ks` | world to camera (OpenCV); pixels | float32 [V, 4, 4], [V, 3, 3] |
| `rig_flow` (optional) | (x, y) pixels to the next frame, 0 where empty | float16 [F, V, h, w, 2] |
| `rig_depth` (optional) | camera z in scene units, 0 where empty | float16 [F, V, h, w] |
| `points` (optional) | N of the surface, tracked: world frame, scene units | float32 [F, N, 3] |
| `point_normals` (with `points`) | of their triangles, unit length or 0 | float16 [F, N, 3] |
| `extra_rgba` | as `rig_rgba`, of the extra views (when E > 0, and so the next two) | [F*E] |
| `extra_viewmats`, `extra_Ks` | as those of the rig | float32 [E, 4, 4], [E, 3, 3] |

Flow, depth and points are compressed by zlib; the flow of the last frame leads to frame 0.

World frame: x right, y up, z towards the camera of azimuth 0; the object is in the middle, as large
as docs/DATASET.md says. Rig cameras: radius 1.5, fov 49.1 degrees, elevation 0,
azimuths 0, 360/V, ... Extra cameras: the same, at random azimuths and elevations in [-30, 5]
degrees (negative looks from above).
"""

import collections
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.hashing import Hasher

# Its readers advise everybody to install OpenCV; Pillow reads our PNGs.
logging.getLogger("absl").addFilter(lambda record: "OpenCV is not installed" not in str(record.msg))

SCHEMA_VERSION = 1
FILE_BYTES = 1 << 28  # a file of records that is larger gets no more of them


@dataclasses.dataclass(kw_only=True)
class FourdstarConfig(tfds.core.BuilderConfig):
    """Sizes of a dataset and, by split, its records: each one's key, and what reads its fields."""

    image_size: int
    views: int
    extra_views: int
    flow: bool
    depth: bool
    points: int
    splits: tuple[str, ...] = ("train",)
    records: Mapping[str, Sequence[tuple[str, Callable[[], dict[str, Any]]]]] | None = None


def features_of(settings: Mapping[str, Any]) -> tfds.features.FeaturesDict:
    """The fields of a record, as in the table above, of a dataset with these settings."""
    h, V, E = settings["image_size"], settings["views"], settings["extra_views"]
    images = tfds.features.Sequence(
        tfds.features.Image(shape=(h, h, 4), dtype=np.uint8, encoding_format="png")
    )

    def packed(*shape, dtype: type = np.float16):
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="zlib")

    def floats(*shape):
        return tfds.features.Tensor(shape=shape, dtype=np.float32)

    names = ("object_id", "clip_id", "asset_sha256", "clip_name", "split", "licence")
    features = {
        "index": np.int64,
        **{name: tfds.features.Text() for name in (*names, "appearance", "motion")},
        "clip_index": np.int64,
        "fps": np.float32,
        "frame_times": floats(None),
        "rig_rgba": images,
        "rig_viewmats": floats(V, 4, 4),
        "rig_Ks": floats(V, 3, 3),
    }
    if settings["flow"]:
        features["rig_flow"] = packed(None, V, h, h, 2)
    if settings["depth"]:
        features["rig_depth"] = packed(None, V, h, h)
    if points := settings.get("points", 0):  # datasets of before have no such setting
        features["points"] = packed(None, points, 3, dtype=np.float32)
        features["point_normals"] = packed(None, points, 3)
    if E:
        features |= {
            "extra_rgba": images,
            "extra_viewmats": floats(E, 4, 4),
            "extra_Ks": floats(E, 3, 3),
        }
    return tfds.features.FeaturesDict(features)


class Fourdstar(tfds.core.GeneratorBasedBuilder):
    """Renders of moving objects, the spatial-temporal matrix of 4DSTAR.

    It writes as tensorflow-datasets does, to files of array_record in the order of their keys'
    hashes, but in a stream: its own writer keeps all records of a split in memory.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First schema."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Animated 3D objects seen by a ring of cameras and by extra ones.",
            features=features_of(vars(self._config())),
            homepage="https://arxiv.org/abs/2602.18830",
        )

    def _download_and_prepare(self, dl_manager, download_config):
        infos = [self._write(split) for split in self._config().splits]
        self.info.set_splits(tfds.core.SplitDict(infos))

    def _write(self, split: str) -> tfds.core.SplitInfo:
        """Writes a split's files; its records are read and compressed in threads."""
        records = self._config().records
        assert records is not None
        features = self.info.features
        assert features is not None
        serializer = ExampleSerializer(features.get_serialized_info())  # pyright: ignore[reportArgumentType]

        def serialized(read: Callable[[], dict[str, Any]]) -> bytes:
            return serializer.serialize_example(features.encode_example(read()))

        hasher = Hasher(split)
        order = sorted((hasher.hash_key(key), i) for i, (key, _) in enumerate(records[split]))
        template = self._get_filename_template(split)
        lengths, total = [], 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = (functools.partial(serialized, records[split][i][1]) for _, i in order)
            stream = _in_order(pool, jobs)
            for first in stream:
                path = self.data_path / f"{split}.{len(lengths)}"
                writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
                size = count = 0
                for record in itertools.chain([first], stream):
                    writer.write(record)
                    size, count = size + len(record), count + 1
                    if size >= FILE_BYTES:
                        break
                writer.close()
                lengths, total = [*lengths, count], total + size
        for i in range(len(lengths)):
            path = template.sharded_filepath(shard_index=i, num_shards=len(lengths))
            (self.data_path / f"{split}.{i}").rename(path)
        return tfds.core.SplitInfo(
            name=split, shard_lengths=lengths, num_bytes=total, filename_template=template
        )

    def _config(self) -> FourdstarConfig:
        assert isinstance(self.builder_config, FourdstarConfig)
        return self.builder_config

    def _split_generators(self, dl_manager):
        raise NotImplementedError("records come from FourdstarConfig.records")

    def _generate_examples(self):
        raise NotImplementedError("records come from FourdstarConfig.records")


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], bytes]]) -> Iterator[bytes]:
    """Results of jobs in their order, with two a core of the pool begun ahead."""
    begun: collections.deque[Future[bytes]] = collections.deque()
    for job in jobs:
        begun.append(pool.submit(job))
        if len(begun) > 2 * (os.cpu_count() or 1):
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
