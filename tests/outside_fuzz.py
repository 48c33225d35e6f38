"""Damages every JSON file that is read, field by field: `python -m tests.outside_fuzz [MINUTES]`.

Each must be read, or refused by this package in one line and within seconds. A little of it is
run by `tests/outside_test.py`.
"""

import copy
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 63, 3_000_000, 2**31, -(2**63), 2**63, 1e308, -0.5),
    *("", "foo", "float16", "\x1b[31m", "../../etc/passwd", "0" * 64, "f" * 100_000, "ü\u2028"),
    *([], {}, [[]], [None], [0, -1], ["a"], {"a": None}, [1] * 5000),
    json.loads("[" * 40 + "]" * 40),
]  # fmt: skip
TEXTS = [
    "1e999",
    "-Infinity",
    "NaN",
    "[" * 5000,
    "9" * 5000,
    '{"a":1,"a":2}',
    '"\\ud800"',
    "\\",
    "",
]
LIMIT_S = 5.0  # a stage whose sizes are possible is laid out before its file is seen not to fit


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every value, of long lists to the first few."""
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree[:3] if isinstance(tree, list) else [])
    )
    for key, value in items:
        yield from places(value, (*path, key))


def changed(tree: Any, rng: random.Random) -> bytes:
    """A JSON text with one to three values changed, taken away or added, or no JSON at all."""
    tree = copy.deepcopy(tree)
    mark = "\x00 here \x00"
    text = None
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice(list(places(tree))[1:] or [()])
        if not path:
            return json.dumps(rng.choice(VALUES)).encode()
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        match rng.randrange(6):
            case 0:
                del parent[path[-1]]
            case 1 if isinstance(parent, dict):
                parent["more"] = rng.choice(VALUES)
            case 2:
                parent[path[-1]] = mark
                text = rng.choice(TEXTS)
            case 3 if isinstance(parent[path[-1]], int | float):
                parent[path[-1]] *= rng.choice([2, -1, 0.5, 1000, 0])
            case _:
                parent[path[-1]] = rng.choice(VALUES)
    data = json.dumps(tree).encode()
    if text is not None:
        data = data.replace(json.dumps(mark).encode(), text.encode())
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data))]
    if rng.random() < 0.05:
        place = rng.randrange(len(data) + 1)
        data = data[:place] + rng.randbytes(3) + data[place:]
    return data


def use_bundle(folder: Path, rng: random.Random) -> None:
    from fourdstar_jax import generate

    model = generate.load(folder)
    _ = model.words, model.rig.cameras(model.resolution), model.text_encoder
    model.encode_text("a fox")
    getattr(model, rng.choice(["tokenizer", "vqvae", "star"]))


def use_dataset(folder: Path, rng: random.Random) -> None:
    from fourdstar_jax.data import pipeline

    pipeline.provenance(folder)
    words = pipeline.load_words(folder)
    pipeline.rig(folder).cameras(16)
    clip = pipeline.ClipSource(folder, "train")[0]
    pipeline.Windows(words, 2, True, True, 0.5)(clip, np.random.default_rng(0))


def use_tokens(folder: Path, rng: random.Random) -> None:
    from fourdstar_jax.data import tokens

    opened = tokens.TokenFolder(folder)
    _ = opened.codebooks, opened.hashes, opened.word_tokenizer(5)
    tokens.TokenSource(opened, "train")[0]


def use_features(folder: Path, rng: random.Random) -> None:
    from fourdstar_jax.data import features
    from fourdstar_jax.text.captions import NEUTRAL_PROMPT

    opened = features.TextFeatures(folder)
    _ = opened.provenance
    opened(NEUTRAL_PROMPT)


def use_object(folder: Path, rng: random.Random) -> None:
    from fourdstar_jax import folders

    for kind in (folders.OBJECT, folders.PICTURES):
        folders.is_of_kind(folder, kind)


def use_index(folder: Path, rng: random.Random) -> None:
    from fourdstar_jax.convert import command

    command._shards(folder / "model.index.json")


Use = Callable[[Path, random.Random], None]
READERS: dict[str, tuple[list[str], Use]] = {
    "bundle": (["model.json"], use_bundle),
    "dataset": (["manifest.json"], use_dataset),
    "tokens": (["spec.json"], use_tokens),
    "features": (["manifest.json"], use_features),
    "object": (["manifest.json"], use_object),
    "index": (["model.index.json"], use_index),
}


def fault_of(use: Use, folder: Path, rng: random.Random) -> str | None:
    """What is wrong in how a reader takes a folder."""
    from fourdstar_jax.cli.main import _ours

    start = time.process_time()
    try:
        use(folder, rng)
    except ValueError as error:
        if not _ours(error):
            return traceback.format_exc()
        if len(str(error)) > 1000 or "\x1b" in str(error) or "\n" in str(error).strip():
            return f"an error that is no short line: {str(error)[:2000]!r}"
    except Exception:
        return traceback.format_exc()
    took = time.process_time() - start
    return f"{took:.1f} s" if took > LIMIT_S else None


def faults(
    sources: dict[str, Path], seed: int, *, seconds: float = 1e9, rounds: int = 10**9
) -> Iterator[tuple[str, int, str]]:
    """(reader, number of the round, what is wrong) of random damage in copies of these folders."""
    rng = random.Random(seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        copies = {
            name: Path(shutil.copytree(folder, Path(work) / name))
            for name, folder in sources.items()
        }
        for number in range(rounds):
            if time.monotonic() - start > seconds:
                return
            name = rng.choice(sorted(sources))
            files, use = READERS[name]
            file = copies[name] / rng.choice(files)
            data = file.read_bytes()
            file.write_bytes(damaged := changed(json.loads(data), rng))
            if fault := fault_of(use, copies[name], rng):
                yield name, number, f"{file.name} {damaged[:300]!r}: {fault}"
            file.write_bytes(data)
        print(f"{rounds} rounds")


def made(folder: Path) -> dict[str, Path]:
    """A small folder of each kind."""
    from fourdstar_jax.data import features, prepare, tokens
    from fourdstar_jax.types import TokenizerSpec
    from tests.helpers import TINY, glb

    (folder / "assets").mkdir(parents=True)
    for i in range(2):
        data = glb.moving_box(0.5 + i / 4, color=(i / 2, 0.5, 0.5, 1.0))
        (folder / "assets" / f"box_{i}.glb").write_bytes(data)
    dataset = folder / "dataset"
    settings = dict(image_size=17, views=2, extra_views=1, max_frames=2, workers=0)
    prepare.prepare(folder / "assets", dataset, log=lambda line: None, **settings)
    tokens.tokenize(
        dataset,
        folder / "tokens",
        lambda images: np.zeros((len(images), 4, 2), np.int32),
        spec=TokenizerSpec("corners", 17, 4, 2, 50, 6, "0" * 64),
        codebooks=np.zeros((2, 50, 3), np.float32),
        log=lambda line: None,
    )
    features.write(
        dataset,
        folder / "features",
        lambda ids, mask: np.zeros((*ids.shape, 5), np.float32),
        encoder={"sha256": "0" * 64},
        length=9,
        log=lambda line: None,
    )
    (folder / "object").mkdir()
    manifest = {"timesteps": 2, "gaussians": 5, "files": {"a": "b"}, "tokenizer": {"name": "x"}}
    (folder / "object" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "index").mkdir()
    index = {"metadata": {"total_size": 3}, "weight_map": {"a": "1.safetensors", "b": "2.bin"}}
    (folder / "index" / "model.index.json").write_text(json.dumps(index))
    names = ("dataset", "tokens", "features", "object", "index")
    return {"bundle": TINY, **{name: folder / name for name in names}}


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    print(f"seed {seed}", flush=True)
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, number, fault in faults(made(Path(folder)), seed, seconds=60 * minutes):
            count += 1
            print(f"{name}, round {number}: {fault}\n", flush=True)
    print(f"{count} faults")
    sys.exit(bool(count))


if __name__ == "__main__":
    main()
