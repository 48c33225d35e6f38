"""What STAR's trainer reads: a folder of tokens, or a dataset whose pictures a step tokenises.

Tokens on disk need no pictures in memory and no tokenizer in the step. Pictures may be augmented:
their colours, mirror image and time, drawn anew each time that a clip is seen.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from fourdstar_jax import bundle, folders, remote
from fourdstar_jax.data import pipeline, tokens
from fourdstar_jax.data.features import TextFeatures, captions_of
from fourdstar_jax.data.resident import Frames
from fourdstar_jax.text.captions import NEUTRAL_PROMPT, caption
from fourdstar_jax.text.words import WordTokenizer
from fourdstar_jax.train import inputs
from fourdstar_jax.train import state as train_state
from fourdstar_jax.types import Array


class Eyes(NamedTuple):
    """What makes tokens of a batch's pictures, on the device (a pytree)."""

    tokenizer: Any
    frames: Frames | None = None  # that batches are gathered from

    def __call__(
        self,
        batch: Mapping[str, Array],
        key: Array | None = None,
        augment: Mapping[str, float] | None = None,
    ) -> dict[str, Array]:
        """The batch with `tokens` [B, T, V, n, K] in place of pictures, augmented with a key."""
        out = inputs.prepare(batch, self.frames, key, augment)
        seen = self.tokenizer.encode(out["images"])
        kept = {name: x for name, x in out.items() if "images" not in name and "masks" not in name}
        return kept | {"tokens": seen}


def see(
    eyes: Eyes | None,
    batch: Mapping[str, Array],
    key: Array | None = None,
    augment: Mapping[str, float] | None = None,
) -> Mapping[str, Array]:
    """A batch of tokens: as it is read, or as `eyes` see it."""
    return batch if eyes is None else eyes(batch, key, augment)


class Source(NamedTuple):
    """What there is to train on, of either kind."""

    words: WordTokenizer
    codebooks: Float[np.ndarray, "K vocab d"]
    num_views: int
    hashes: dict[str, str]  # of the dataset and its split
    splits: Mapping[str, int]
    eyes: Eyes | None  # where the batches have pictures
    loader: Callable[..., Any]  # of `split` and more, as `pipeline.make_loader` and its options
    first_windows: Callable[..., dict[str, np.ndarray]]  # of a split, how many


def open_source(config: Any, mesh: Mesh) -> tuple[Source, TextFeatures | None]:
    """What `config.data.dir` holds, whichever it is, and the features of its captions.

    Raises ValueError for a folder that is neither, for tokens of another tokenizer than that of
    `config.bundle`, for tokens and `config.augment`, and for text features that do not fit.
    """
    found = bundle.read(config.bundle)
    holds_tokens = (remote.fetched(config.data.dir) / folders.TOKENS.manifest).is_file()
    return (_tokens if holds_tokens else _pictures)(config, found, mesh)


def _tokens(config: Any, found: Any, mesh: Mesh) -> tuple[Source, TextFeatures | None]:
    folder = tokens.TokenFolder(config.data.dir)
    folder.spec.check(found.spec)
    augment = config.augment.to_dict()
    if any(augment[name] for name in inputs.CHANCES):
        raise ValueError(
            f"config.data.dir={config.data.dir} holds tokens, which config.augment cannot change: "
            f"set its {', '.join(inputs.CHANCES)} to 0, or read the dataset that they are of"
        )

    def said() -> list[str]:
        captions = [NEUTRAL_PROMPT, *folder.content["train_captions"]]
        if "unseen_clip" in folder.splits:
            clips = tokens.TokenSource(folder, "unseen_clip")
            each = (clips[i] for i in range(len(clips)))
            captions += [caption(clip["appearance"], clip["motion"]) for clip in each]
        return captions

    features = text_features(config, found, said)
    words = folder.word_tokenizer(config.model.text_length)
    timesteps = config.data.timesteps

    def loader(*, cache_bytes: int = 0, **options):  # tokens are read as they are needed
        return tokens.make_loader(
            folder, words=words, features=features, timesteps=timesteps, **options
        )

    def first(split: str, count: int) -> dict[str, np.ndarray]:
        windows = tokens.TokenWindows(words, timesteps, False, False, 0.0, features)
        return first_windows(tokens.TokenSource(folder, split), windows, count)

    source = Source(
        words=words,
        codebooks=folder.codebooks,
        num_views=folder.num_views,
        hashes=folder.hashes,
        splits=folder.splits,
        eyes=None,
        loader=loader,
        first_windows=first,
    )
    return source, features


def _pictures(config: Any, found: Any, mesh: Mesh) -> tuple[Source, TextFeatures | None]:
    manifest = pipeline.read_manifest(config.data.dir)
    features = text_features(config, found, lambda: captions_of(config.data.dir))
    words = pipeline.load_words(config.data.dir, config.model.text_length)
    timesteps = config.data.timesteps
    tokenizer = found.load("tokenizer")
    codebooks = np.asarray(tokenizer.codebooks())
    frames, resident = inputs.on_device(config, mesh, extra=False)
    eyes = train_state.replicate(Eyes(tokenizer, frames), mesh)

    def loader(*, split: str, **options):
        lies = resident is not None and split == "train"
        return pipeline.make_loader(
            config.data.dir,
            split,
            source=resident if lies else None,
            form="index" if lies else "uint8",
            maps=(),
            words=words,
            features=features,
            timesteps=timesteps,
            **options,
        )

    def first(split: str, count: int) -> dict[str, np.ndarray]:
        windows = pipeline.Windows(words, timesteps, False, False, 0.0, features, "uint8")
        clips = pipeline.ClipSource(config.data.dir, split, cache_bytes=0, maps=())
        batch = first_windows(clips, windows, count)
        one_by_one = jax.jit(lambda eyes, batch: jax.lax.map(lambda x: _alone(eyes, x), batch))
        return jax.device_get(one_by_one(eyes, batch))

    source = Source(
        words=words,
        codebooks=codebooks,
        num_views=manifest["settings"]["views"],
        hashes=pipeline.provenance(config.data.dir),
        splits=manifest["splits"],
        eyes=eyes,
        loader=loader,
        first_windows=first,
    )
    return source, features


def _alone(eyes: Eyes, example: Mapping[str, Array]) -> dict[str, Array]:
    """An example seen without others beside it, whose pictures would take much memory."""
    batch = eyes(jax.tree.map(lambda x: x[None], dict(example)))
    return jax.tree.map(lambda x: x[0], batch)


def first_windows(source: Any, window: pipeline.Windows, count: int) -> dict[str, np.ndarray]:
    """The first windows of up to `count` clips as one batch, the same on every process.

    Clips are taken from one object after the other, so that they are of as many as may be.
    """
    by_object: dict[str, list[int]] = {}
    for i in range(len(source)):
        by_object.setdefault(source[i]["object_id"], []).append(i)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_object.values()))
    chosen = [i for i in turns if i is not None][:count]
    examples = [window(source[i], np.random.default_rng(0)) for i in chosen]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def text_features(
    config: Any, found: Any, captions: Callable[[], Sequence[str]]
) -> TextFeatures | None:
    """The features of `config.data.text_features`, which text_encoder="t5" needs; else None.

    Raises ValueError if one of `captions` has none, or the text encoder of `config.bundle`, `found`
    when read, is another one than theirs.
    """
    path, encoder = config.data.text_features, config.model.text_encoder
    if encoder != "t5":
        if path is not None:
            raise ValueError(f"config.data.text_features={path!r}, but text_encoder={encoder!r}")
        return None
    if path is None:
        raise ValueError(
            "text_encoder='t5' needs config.data.text_features, a folder made by "
            "`fourdstar prepare --text_features`"
        )
    features = TextFeatures(path)
    features.check(captions(), config.model.text_length, config.model.text_dim)
    own = found.weights_sha256().get("text")
    theirs = features.provenance["encoder_sha256"]
    if own not in (None, theirs):
        raise ValueError(
            f"text_features={path!r} are of the text encoder {theirs[:16]}; bundle "
            f"{config.bundle} has {own[:16]}"
        )
    return features
