"""A video or picture, and perhaps text, to a 4D object: tokenizer, STAR, 4D VQ-VAE.

video [T, h, w, 3] -> tokens of view 0 [T, n, K] -> tokens of all views [T, V n, K]
-> codes [T, V, n, D] -> Gaussians [T, G, ...]
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import typing
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fourdstar_jax import arguments, bars, bundle, folders
from fourdstar_jax.data import video as video_input
from fourdstar_jax.data.decode import MIN_SIDE
from fourdstar_jax.data.features import DTYPES, stored
from fourdstar_jax.geometry import Rig
from fourdstar_jax.kernels.rasterize import rasterize
from fourdstar_jax.outside import SHA256
from fourdstar_jax.star import sample
from fourdstar_jax.star.model import STAR, Condition
from fourdstar_jax.text import pieces
from fourdstar_jax.text.captions import NEUTRAL_PROMPT
from fourdstar_jax.text.t5 import T5Encoder
from fourdstar_jax.text.words import WordTokenizer
from fourdstar_jax.tokenizer.base import Tokenizer
from fourdstar_jax.tokenizer.measures import errors
from fourdstar_jax.types import Cameras, Gaussians
from fourdstar_jax.vqvae.model import VQVAE4D

STILL = 4  # timesteps that a picture is decoded as
# Of the sampler's scales, as `Model.generate` and the manifest call them.
SCALES = {"cfg_scale": "cfg", "history_scale": "history_cfg"}


@dataclasses.dataclass(frozen=True)
class Object4D:
    """Moving Gaussians, the same ones in the same order at every timestep, and how they came."""

    gaussians: Gaussians  # numpy, [T, G, ...]
    rig: Rig  # the views it was made from
    tokens: Int[np.ndarray, "T N K"]
    meta: dict[str, Any]  # JSON: seed, text, input, model, versions; see the export's manifest
    frames: Float[np.ndarray, "T h w 3"] | None = None  # of the input, as the model saw it

    @property
    def fps(self) -> float:
        """Timesteps a second."""
        return self.rig.fps

    @typing.no_type_check  # arguments are checked below, in the tests as elsewhere
    def render(
        self, cameras: Cameras, *, width: int, height: int, background: float = 1.0
    ) -> Float[Array, "T V h w 3"]:
        """Images in [0, 1] of every timestep from every camera `[V, ...]`."""
        background = arguments.real("background", background, 0, 1)
        images = []
        for t in range(len(self.gaussians.means)):
            gaussians = Gaussians(*(x[t] for x in self.gaussians))
            images.append(
                rasterize(
                    gaussians,
                    cameras,
                    width=width,
                    height=height,
                    background=np.full(3, background, np.float32),
                ).renders
            )
        return jnp.stack(images)


class Clip(NamedTuple):
    """What a model sees of a video, and where it came from."""

    images: Float[np.ndarray, "T h w 3"]  # in [0, 1], on white
    info: dict[str, Any]  # JSON, as in the manifest; `data.video.described` puts it in words


@typing.no_type_check  # arguments are checked by Model, in the tests as elsewhere
def load(folder: str | os.PathLike[str]) -> "Model":
    """The model of a bundle (see `bundle`). Raises ValueError if something in it is unusable."""
    return Model(folder)


class Model:
    """The stages of a bundle, loaded as they are needed, and what they are called with."""

    @typing.no_type_check
    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = arguments.path("folder", folder)
        self.bundle = bundle.read(folder)
        if self.bundle.tokenizer is None or "vqvae" not in self.bundle.stages:
            raise ValueError(f"bundle {folder} is not complete: it has no tokenizer or no vqvae")
        seen = self.bundle.info("vqvae").part("rig")
        self.max_timesteps = seen.integer("max_timesteps", *arguments.TIMESTEPS)
        rig = {name: value for name, value in seen.values.items() if name != "max_timesteps"}
        self.rig = Rig.from_dict(rig, f"{seen.where}: {seen.path}")
        self.resolution = self.bundle.spec.resolution
        if "star" in self.bundle.stages:
            trained = self.bundle.info("star").part("trained", default={})  # older ones: nothing
            self.max_timesteps = min(
                self.max_timesteps,
                trained.integer("timesteps", *arguments.TIMESTEPS, default=self.max_timesteps),
            )
            views = trained.integer("views", 1, 1 << 10, default=self.rig.num_views)
            if views != self.rig.num_views:
                raise ValueError(
                    f"bundle {folder}: its star was trained on {views} views, its vqvae on "
                    f"{self.rig.num_views}"
                )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Images to tokens and codes."""
        return self.bundle.load("tokenizer")

    @functools.cached_property
    def vqvae(self) -> VQVAE4D:
        """Codes of all views to Gaussians."""
        return self.bundle.load("vqvae")

    @functools.cached_property
    def star(self) -> STAR:
        """Text and the input view's tokens to tokens of all views."""
        return self.bundle.load("star")

    @functools.cached_property
    def words(self) -> WordTokenizer:
        """The vocabulary of a STAR with a table of words of its own."""
        words = self.bundle.info("star").part("words")
        return WordTokenizer.from_dict(words.values, f"{words.where}: {words.path}")

    @property
    def text_encoder(self) -> Literal["words", "t5"]:
        """What STAR takes its text from: a table of words of its own, or the stage `text`."""
        return self.bundle.stage("star").model.get("text_encoder", "words")

    @functools.cached_property
    def text(self) -> T5Encoder:
        """The text encoder; ValueError without one, or with another than STAR was trained on."""
        if "text" not in self.bundle.stages:
            raise ValueError(
                f"bundle {self.folder} has no text stage, the T5 encoder that its star takes text "
                "features of: add that stage to generate"
            )
        found = self.bundle.stage("text").sha256
        text = self.bundle.info("star").part("text", default={})
        wanted = text.text("encoder_sha256", pattern=SHA256, default=found)
        if wanted != found:
            raise ValueError(
                f"bundle {self.folder}: its star was trained on features of the text encoder "
                f"{wanted[:16]}, its text stage is {found[:16]}"
            )
        return self.bundle.load("text")

    @functools.cached_property
    def sampling(self) -> dict[str, Any]:
        """How STAR is sampled where `generate` is not told otherwise: the bundle's settings."""
        kept = self.bundle.info("star").part("sampling", default=sample.DEFAULTS)
        top_k = kept.values.get("top_k")
        return {
            "temperature": kept.number("temperature", *arguments.TEMPERATURES),
            "top_k": None if top_k is None else kept.integer("top_k", *arguments.TOP_K),
            "cfg_scale": kept.number("cfg_scale", *arguments.GUIDANCE),
            "history_scale": kept.number("history_scale", *arguments.GUIDANCE, default=1.0),
        }

    @typing.no_type_check  # arguments are checked below, in the tests as elsewhere
    def settings(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        cfg: float | None = None,
        history_cfg: float | None = None,
    ) -> dict[str, Any]:
        """`sampling`, but for what is given. Raises ValueError for values out of range."""
        told: dict[str, Any] = {}
        if temperature is not None:
            told["temperature"] = arguments.real(
                "temperature", temperature, *arguments.TEMPERATURES
            )
        if top_k is not None:
            told["top_k"] = arguments.whole("top_k", top_k, *arguments.TOP_K)
        if cfg is not None:
            told["cfg_scale"] = arguments.real("cfg", cfg, *arguments.GUIDANCE)
        if history_cfg is not None:
            told["history_scale"] = arguments.real("history_cfg", history_cfg, *arguments.GUIDANCE)
        return self.sampling | told

    @typing.no_type_check  # arguments are checked below, in the tests as elsewhere
    def encode_text(
        self, prompt: str
    ) -> tuple[Int[np.ndarray, " L"], Shaped[np.ndarray, "L C"] | None]:
        """Ids and, of a STAR with text_encoder="t5", features, rounded as in its training."""
        if not isinstance(prompt, str):
            raise ValueError(f"text={arguments.shown(prompt)} must be a text")
        self._check_length(prompt)
        if self.text_encoder == "words":
            return self.words([prompt])[0], None
        sizes = self.bundle.stage("star").model
        ids, mask = pieces.tokenize([prompt], sizes["text_length"])
        features = np.asarray(_encode_text(self.text, ids, mask))
        if features.shape[-1] != sizes["text_dim"]:
            raise ValueError(
                f"bundle {self.folder}: its text stage is {features.shape[-1]} wide, its star "
                f"takes {sizes['text_dim']}"
            )
        features = np.where(mask[..., None], features, 0)
        kept = self.bundle.info("star").part("text", default={})
        if "dtype" in kept:
            features = stored(features, kept.text("dtype", choices=sorted(DTYPES)), [prompt])
        return ids[0], features[0]

    def _check_length(self, prompt: str) -> None:
        """Warns of a text that is cut."""
        most = self.bundle.stage("star").model["text_length"]
        count = len(pieces.ids(prompt)) + (self.text_encoder == "t5")  # its end mark
        if count > most:
            warnings.warn(
                f"the text has {count} word pieces; the model reads the first {most}", stacklevel=3
            )

    @typing.no_type_check  # as `generate`, which hands on what it was given
    def condition(self, images: Float[np.ndarray, "B T h w 3"], prompt: str) -> Condition:
        """What STAR makes tokens of: clips of one length as `read` gives them, with one text.

        Images are in [0, 1] on white. Raises ValueError for a text that is none, and where the
        bundle lacks the encoder that its STAR takes text from.
        """
        count = len(images)
        text_ids, text_features = self.encode_text(prompt)
        cameras = self.rig.cameras(self.resolution)

        def each(x):
            return jnp.broadcast_to(jnp.asarray(x), (count, *np.shape(x)))

        return Condition(
            text_ids=each(text_ids),
            video_tokens=encode_images(self.tokenizer, jnp.asarray(images)),
            times=each(np.arange(images.shape[1], dtype=np.float32)),
            cameras=Cameras(*(each(x) for x in cameras)),
            text_features=None if text_features is None else each(text_features),
        )

    @typing.no_type_check  # arguments are checked below, in the tests as elsewhere
    def generate(
        self,
        video: str | os.PathLike[str] | Shaped[np.ndarray, "T h w c"] | Clip,
        text: str | None = None,
        *,
        key: jax.Array | None = None,
        seed: int | None = None,
        timesteps: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        cfg: float | None = None,
        history_cfg: float | None = None,
        fit: str = "object",
        start: float = 0.0,
        fps: float | None = None,
        folder_fps: float = video_input.FPS,
        masks: str | os.PathLike[str] | None = None,
        rembg: str | os.PathLike[str] | None = None,
        max_frames: int = video_input.MAX_FRAMES,
        progress: bool = False,
    ) -> Object4D:
        """Makes a 4D object that looks and moves like a video; a picture makes a static one.

        `video` is what `read` takes with the arguments of the same names, or, without any of these,
        what it gave. `text` says what is seen and how it moves; without it the paper's neutral
        prompt stands in. The randomness is `key` or `jax.random.key(seed)` (0). `temperature` (0
        takes the likeliest codes), `top_k`, `cfg` and `history_cfg` (guidance towards the video and
        towards the state of the timesteps before) are by default those of `sampling`. The object's
        fps is the clip's. A text that is longer than the model reads gives a warning.

        Raises ValueError for input that cannot be used.
        """
        if key is not None and seed is not None:
            raise ValueError("give key or seed, not both")
        if key is None:
            seed = 0 if seed is None else arguments.whole("seed", seed, *arguments.SEEDS)
            key = jax.random.key(seed)
        else:
            _check_key(key)
        settings = self.settings(
            temperature=temperature, top_k=top_k, cfg=cfg, history_cfg=history_cfg
        )
        reading = dict(
            timesteps=timesteps, fit=fit, start=start, fps=fps, folder_fps=folder_fps, masks=masks,
            rembg=rembg, max_frames=max_frames,
        )  # fmt: skip
        if not isinstance(video, Clip):
            video = self.read(video, **reading)
        else:
            usual = inspect.signature(self.read).parameters
            if late := [name for name, value in reading.items() if value != usual[name].default]:
                raise ValueError(f"{late[0]} is for `read`, which this clip has behind it")
        images, info = video
        count = len(images)
        prompt = text if text is not None else NEUTRAL_PROMPT
        with bars.waiting("encoding", disable=not progress):
            star = self.star
            condition = self.condition(images[None], prompt)
            condition.video_tokens.block_until_ready()
        with bars.steps(count, desc="timesteps", unit="step", disable=not progress) as step:

            def on_group(t: int, tokens: Array) -> None:
                tokens.block_until_ready()  # so that the estimate is of work done
                step()

            tokens = sample.generate(
                star,
                condition,
                key,
                **settings,
                on_group=on_group,
            )[0]
        meta = {
            "made_by": "generate",
            "seed": seed,
            "text": text,
            "prompt": prompt,
            "input": info,
            "sampling": {SCALES.get(k, k): v for k, v in settings.items()},
            **self._provenance(
                ("tokenizer", "vqvae", "star", *(["text"] if self.text_encoder == "t5" else []))
            ),
        }
        rig = dataclasses.replace(self.rig, fps=info["fps"])
        with bars.waiting("decoding", disable=not progress):
            found = self._object(tokens, meta)
        return dataclasses.replace(found, rig=rig, frames=images)

    @typing.no_type_check  # arguments are checked below, in the tests as elsewhere
    def reconstruct(self, images: Float[np.ndarray, "T V h w 3"], **info: Any) -> Object4D:
        """The object of a clip seen by the whole rig, through tokenizer and 4D VQ-VAE alone.

        Images are in [0, 1] on white. `info` is kept in the result's description of the input.
        """
        views, size = self.rig.num_views, self.resolution
        images = _array("images", images)
        if images.shape[1:] != (views, size, size, 3) or not len(images):
            needed = f"[T, {views}, {size}, {size}, 3]"
            raise ValueError(f"images has shape {images.shape}; {needed} is needed")
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images has type {images.dtype}; floats in [0, 1] are needed")
        _check_range("images", images)
        tokens = encode_images(self.tokenizer, jnp.asarray(images))  # [T, V, n, K]
        tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
        meta = {
            "made_by": "reconstruct",
            "input": info,
            **self._provenance(("tokenizer", "vqvae")),
        }
        return self._object(tokens, meta)

    @typing.no_type_check  # arguments are checked below, in the tests as elsewhere
    def read(
        self,
        video: str | os.PathLike[str] | Shaped[np.ndarray, "T h w c"],
        *,
        timesteps: int | None = None,
        fit: str = "object",
        start: float = 0.0,
        fps: float | None = None,
        folder_fps: float = video_input.FPS,
        masks: str | os.PathLike[str] | None = None,
        rembg: str | os.PathLike[str] | None = None,
        max_frames: int = video_input.MAX_FRAMES,
    ) -> Clip:
        """What `generate` sees of a video.

        `video` is a file or folder (see `data.video.read_video`) or an array of RGB or RGBA frames,
        uint8 or floats in [0, 1], all used, 1 / fps apart. `fps` is by default that of the model's
        training. All timesteps there are are read, up to the model's maximum; `timesteps` asks for
        a number, and a shorter clip is then repeated, as in training.

        Where the bundle tells how well its tokenizer gives the pictures of its training back,
        `info["reach"]` has the clip's own `error` and the `usual` one, which 99 % of those are
        under: what is far above it is far from the training data.

        Raises ValueError for input that cannot be used.
        """
        most = self.max_timesteps
        if timesteps is not None:
            most = timesteps = arguments.whole("timesteps", timesteps, 1)
        if most > self.max_timesteps:
            raise ValueError(
                f"{timesteps=} must be from 1 to {self.max_timesteps}, the most that the model was "
                "trained on"
            )
        fps = self.rig.fps if fps is None else arguments.real("fps", fps, *arguments.FPS)
        arguments.real("start", start, *arguments.START_S)
        arguments.real("folder_fps", folder_fps, *arguments.FPS)
        arguments.whole("max_frames", max_frames, *arguments.FRAMES)
        arguments.choice("fit", fit, arguments.FITS)
        if isinstance(video, str | os.PathLike):
            images, info = video_input.read_video(
                video, resolution=self.resolution, timesteps=most, fit=fit, start=start, fps=fps,
                folder_fps=folder_fps, masks=masks, rembg=rembg, max_frames=max_frames,
            )  # fmt: skip
            info |= {"name": Path(video).name, "sha256": _sha256_of(Path(video))}
        elif masks is not None or rembg is not None:
            raise ValueError("masks and rembg are for files: give arrays an alpha channel instead")
        elif start != 0:
            raise ValueError(f"{start=} is for files: give the part of the array instead")
        else:
            images, info = self._frames(video, most, fit, fps)
        if timesteps is not None:
            images = images[np.arange(timesteps) % len(images)]
        return Clip(images, info | {"timesteps": len(images), "reach": self._reach(images)})

    def _reach(self, images: Float[np.ndarray, "T h w 3"]) -> dict[str, float] | None:
        """How wrong the tokenizer gives a clip back, and the most of 99 % of training's pictures.

        None where the bundle does not tell the second.
        """
        told = self.bundle.info("tokenizer").part("reach", default={})
        usual = told.number("0.99", 0, 1e6, default=0.0)
        if not usual:
            return None
        return {"error": float(np.median(errors(self.tokenizer, images))), "usual": usual}

    def _frames(
        self, video: Any, most: int, fit: str, fps: float
    ) -> tuple[Float[np.ndarray, "T r r 3"], dict[str, Any]]:
        frames = _array("video", video, "a path or an array [T, h, w, 3 or 4]")
        if frames.ndim != 4 or frames.shape[-1] not in (3, 4) or len(frames) == 0:
            raise ValueError(f"video has shape {frames.shape}; [T, h, w, 3 or 4] is needed")
        height, width = frames.shape[1:3]
        if min(height, width) < (side := MIN_SIDE):
            raise ValueError(f"video is {width}x{height} pixels; at least {side}x{side} are needed")
        if np.issubdtype(frames.dtype, np.floating):
            _check_range("video", frames)
            frames = np.rint(frames * 255).astype(np.uint8)
        if frames.dtype != np.uint8:
            raise ValueError(f"video has type {frames.dtype}; uint8 or floats are needed")
        used = frames[:most]
        digest = hashlib.sha256(np.ascontiguousarray(used).tobytes()).hexdigest()
        images, info = video_input.frame_object(used, resolution=self.resolution, fit=fit)
        seconds = {"seconds": len(frames) / fps, "seconds_read": len(used) / fps, "start": 0.0}
        return images, {"kind": "array", **seconds, **info, "fps": fps, "sha256": digest}

    def _object(self, tokens: Int[Array, "T N K"], meta: dict[str, Any]) -> Object4D:
        views = self.rig.num_views
        by_view = tokens.reshape(1, len(tokens), views, -1, tokens.shape[-1])
        gaussians = decode_tokens(
            self.tokenizer, self.vqvae, by_view, self.rig.cameras(self.resolution)
        )
        return Object4D(
            gaussians=Gaussians(*(np.asarray(x[0], np.float32) for x in gaussians)),
            rig=self.rig,
            tokens=np.asarray(tokens, np.int32),
            meta=meta,
        )

    def _provenance(self, stages: tuple[str, ...]) -> dict[str, Any]:
        entries = {stage: self.bundle.stage(stage) for stage in stages}
        configs = json.dumps({s: e.config for s, e in entries.items()}, sort_keys=True)
        return {
            "model": {
                "config_sha256": hashlib.sha256(configs.encode()).hexdigest(),
                "weights_sha256": {stage: entry.sha256 for stage, entry in entries.items()},
            },
            "versions": bundle.versions(),
            "device": jax.devices()[0].platform,
        }


def _array(name: str, value: Any, allowed: str = "an array") -> np.ndarray:
    """An array of what makes one. Raises ValueError, which names it, for anything else."""
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.zeros(())
    if array.ndim == 0:
        raise ValueError(f"{name}={arguments.shown(value)} must be {allowed}")
    return array


def _check_range(name: str, images: np.ndarray) -> None:
    """Raises ValueError for floats outside [0, 1]."""
    if not np.isfinite(images).all():
        raise ValueError(f"{name} has values that are not finite; floats in [0, 1] are needed")
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        raise ValueError(f"{name} has floats from {low:g} to {high:g}; [0, 1] is needed")


def _check_key(key: Any) -> None:
    """Raises ValueError for what is not one key."""
    try:
        jax.random.fold_in(key, 0)
    except (TypeError, ValueError):
        told = arguments.shown(key)
        raise ValueError(f"key={told} must be one key, such as jax.random.key(0)") from None


@jax.jit
def _encode_text(encoder: T5Encoder, ids, mask) -> Float[Array, "B L C"]:
    return encoder(ids, mask)


@jax.jit
def encode_images(tokenizer: Tokenizer, images: Float[Array, "*b h w 3"]) -> Int[Array, "*b n K"]:
    """Tokens of images in [0, 1]."""
    return tokenizer.encode(images)


@jax.jit
def decode_tokens(
    tokenizer: Tokenizer, vqvae: VQVAE4D, tokens: Int[Array, "B T V n K"], cameras: Cameras
) -> Gaussians:
    """Gaussians `[B, T, G, ...]` of tokens that cameras `[V, ...]` saw.

    A single timestep is decoded as the first of a still, which costs as many times as much: a
    model that was trained on clips alone gives it wrong colours (2.6 dB inside the mask).
    """
    count = tokens.shape[1]
    if count == 1:
        tokens = jnp.repeat(tokens, STILL, axis=1)
    batch, timesteps = tokens.shape[:2]
    cameras = Cameras(*(jnp.broadcast_to(x, (batch, *x.shape)) for x in cameras))
    times = jnp.broadcast_to(jnp.arange(timesteps, dtype=jnp.float32), (batch, timesteps))
    gaussians = vqvae(tokenizer.codes(tokens), cameras, times).gaussians
    return jax.tree.map(lambda x: x[:, :count], gaussians)


def _sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files, sorted by name."""
    if not path.is_dir():
        return folders.file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(f for f in path.iterdir() if f.is_file()):
        digest.update(f"{file.name}\0{_sha256_of(file)}\n".encode())
    return digest.hexdigest()
