"""The networks that protocols measure by, loaded when first needed from a folder of .npz files."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fourdstar_jax.data.batching import in_batches
from fourdstar_jax.evaluate.device import ALONE
from fourdstar_jax.perceptual import clip, dreamsim, i3d, inception, lpips, resnet3d


class Network(NamedTuple):
    """Which files may hold it, and what reads them."""

    files: str  # pattern of the name
    load: Callable[..., Any]
    about: str
    digest: Callable[[Any], str]  # of a loaded one


def _is(network: str) -> Callable[..., Any]:
    def load(path):
        found = lpips.load(path)
        if found.network != network:
            raise ValueError(f"{path}: holds LPIPS with {found.network}, not with {network}")
        return found

    return load


NETWORKS = {
    "lpips_vgg": Network(
        "lpips_vgg*.npz",
        _is("VGG16"),
        "LPIPS 0.1 with VGG16",
        lambda n: lpips.NETWORKS[n.network].digest,
    ),
    "lpips_alex": Network(
        "lpips_alex*.npz",
        _is("AlexNet"),
        "LPIPS 0.1 with AlexNet",
        lambda n: lpips.NETWORKS[n.network].digest,
    ),
    "i3d": Network("i3d*.npz", i3d.load, "I3D of Kinetics-400", lambda n: i3d.DIGEST),
    "inception": Network(
        "inception*.npz", inception.load, "Inception of 2015", lambda n: inception.DIGEST
    ),
    "clip_b32": Network(
        "clip*b32*.npz",
        functools.partial(clip.load, network="ViT-B/32"),
        "CLIP ViT-B/32",
        lambda n: n.digest,
    ),
    "clip_l14": Network(
        "clip*l14*.npz",
        functools.partial(clip.load, network="ViT-L/14"),
        "CLIP ViT-L/14",
        lambda n: n.digest,
    ),
    "dreamsim": Network(
        "dreamsim*.npz", dreamsim.load, "DreamSim, its ensemble", lambda n: n.digest
    ),
    "resnet3d": Network("resnet3d*.npz", resnet3d.load, "3D-ResNet50", lambda n: n.digest),
}


class Networks:
    """The networks of a folder. `batch` frames go through one at once."""

    def __init__(self, folder: str | os.PathLike[str] | None, *, batch: int = 8):
        self.folder, self.batch = None if folder is None else Path(folder), batch
        self._loaded: dict[str, Any] = {}
        self._files: dict[str, str] = {}

    def check(self, name: str) -> Path:
        """The file of a network. Raises ValueError that says how to make it if it is missing."""
        network = NETWORKS[name]
        how = f"{network.about}: docs/WEIGHTS.md says how to make its {network.files}"
        if self.folder is None:
            raise ValueError(f"--weights DIR is needed for {how}; or choose --metrics")
        found = sorted(self.folder.glob(network.files))
        if not found:
            raise ValueError(f"{self.folder} has no weights of {how}; or choose --metrics")
        return found[0]

    def get(self, name: str) -> Any:
        """A network, loaded once."""
        if name not in self._loaded:
            path = self.check(name)
            self._loaded[name] = jax.device_put(NETWORKS[name].load(path), jax.local_devices()[0])
            self._files[name] = path.name
        return self._loaded[name]

    def about(self) -> dict[str, dict[str, str]]:
        """File, digest of the arrays and name of all that were used."""
        return {
            name: {
                "network": NETWORKS[name].about,
                "file": self._files[name],
                "digest": NETWORKS[name].digest(network),
            }
            for name, network in self._loaded.items()
        }

    def lpips(
        self, name: str, first: Float[np.ndarray, "n h w 3"], second: Float[np.ndarray, "n h w 3"]
    ) -> Float[np.ndarray, " n"]:
        """LPIPS of pictures of 0 to 255, pair by pair."""
        return self._run(_distance, name, first, second)

    def lpips_in_time(
        self, name: str, first: Float[np.ndarray, "n h w 3"], second: Float[np.ndarray, "n h w 3"]
    ) -> tuple[np.ndarray, ...]:
        """LPIPS of two videos of 0 to 255 frame by frame, and of each from a frame to the next.

        Every frame goes through the network once, but where batches meet.
        """
        count, pairs, changes = len(first), [], ([], [])
        for start in range(0, count, self.batch):
            frames = np.minimum(np.arange(start, start + self.batch + 1), count - 1)
            found, *moved = self._call(_in_time, name, first[frames], second[frames])
            pairs.append(found[: count - start])
            for rows, new in zip(changes, moved, strict=True):
                rows.append(new[: count - 1 - start])
        return np.concatenate(pairs), *map(np.concatenate, changes)

    def logits(
        self, video: Float[np.ndarray, "T 224 224 3"], *, pool_frames: int
    ) -> Float[np.ndarray, " 400"]:
        """I3D's logits of a clip of 0 to 255."""
        return self._call(_logits, "i3d", video, pool_frames=pool_frames)

    def features(
        self, name: str, images: Float[np.ndarray, "n *T h w 3"]
    ) -> Float[np.ndarray, "n d"]:
        """A network's features of pictures, or clips, of 0 to 255."""
        frames = images.shape[1] if images.ndim == 5 else 1
        return self._run(_features, name, images, batch=max(1, self.batch // frames))

    def _run(self, function: Callable, name: str, *arrays: np.ndarray, batch: int = 0):
        call = functools.partial(self._call, function, name)
        return in_batches(call, arrays, batch or self.batch)

    def _call(self, function: Callable, name: str, *arrays: np.ndarray, **options) -> Any:
        """One batch through a network."""
        with ALONE, jax.default_matmul_precision("highest"):
            return jax.device_get(function(self.get(name), *arrays, **options))


class Rehearsal(Networks):
    """Networks that tell how long they would take: of each program one batch is run by the clock.

    It is run once before, which compiles it. `seconds` is the time of all batches that were asked
    for; they give what the first one of their shape gave, so that results are good for nothing.
    """

    def __init__(self, networks: Networks):
        super().__init__(networks.folder, batch=networks.batch)
        self._loaded, self._files = networks._loaded, networks._files
        self.seconds = 0.0
        self._known: dict[Any, tuple[Any, float]] = {}

    def _call(self, function: Callable, name: str, *arrays: np.ndarray, **options) -> Any:
        key = (function, name, *(x.shape for x in arrays), *options.items())
        if key not in self._known:
            super()._call(function, name, *arrays, **options)
            start = time.perf_counter()
            found = super()._call(function, name, *arrays, **options)
            self._known[key] = found, time.perf_counter() - start
        found, seconds = self._known[key]
        self.seconds += seconds
        return found


@jax.jit
def _distance(network, first, second):
    return network(first / 255, second / 255)


@jax.jit
def _in_time(network, first, second):
    """Of pictures [B + 1, h, w, 3]: [B] of the pairs, and [B] of each side to the next frame."""
    one, other = (network.features(x / 255) for x in (first, second))

    def compared(a, b, shift=0):
        rows = len(first) - 1
        return network.compared([x[:rows] for x in a], [x[shift:][:rows] for x in b])

    return compared(one, other), compared(one, one, 1), compared(other, other, 1)


@functools.partial(jax.jit, static_argnames="pool_frames")
def _logits(network, video, *, pool_frames: int):
    return network(jnp.asarray(video) / 255, pool_frames=pool_frames)


@jax.jit
def _features(network, images):
    return network(images / 255)
