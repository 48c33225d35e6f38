"""Cuts the object out of frames with a network in an ONNX file: the models that rembg runs.

The file is the user's (u2net.onnx, u2netp.onnx, isnet-general-use.onnx, birefnet-general.onnx and
others of github.com/danielgatis/rembg); what goes in and comes out is as in rembg's sessions.
Nothing is downloaded. The extra `rembg` has what runs it.
"""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

SIDE = 320  # of models whose file does not say one (U2-Net's)
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
ISNET = (np.array([0.5, 0.5, 0.5]), np.array([1.0, 1.0, 1.0]))


@functools.cache
def load(path: str | os.PathLike[str]) -> "Cutter":
    """The network of a file, once. Raises ValueError if there is none that can be run."""
    return Cutter(Path(path))


class Cutter:
    """Frames to frames with alpha."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path} is no file: a network as ONNX is needed, such as u2net.onnx")
        try:
            import onnxruntime  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                "to cut objects out needs onnxruntime: pip install 'fourdstar-jax[rembg]'"
            ) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session: Any = onnxruntime.InferenceSession(
                path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of types of its own
            raise ValueError(
                f"{path} cannot be run: {' '.join(str(error).split())[:200]}"
            ) from None
        wanted = self._session.get_inputs()[0]
        shape = list(wanted.shape)
        if len(shape) != 4 or shape[1] != 3 or wanted.type != "tensor(float)":
            raise ValueError(
                f"{path} takes {wanted.type} of shape {shape}; float [1, 3, h, w] is needed"
            )
        self._path, self._name = path, wanted.name
        height, width = (n if isinstance(n, int) else SIDE for n in shape[2:])
        self._size = width, height
        self._mean, self._std = ISNET if "isnet" in path.name.lower() else IMAGENET

    def __call__(self, frames: UInt8[np.ndarray, "T h w 4"]) -> UInt8[np.ndarray, "T h w 4"]:
        """The frames, opaque where the object is. Raises ValueError for what is no mask."""
        alphas = [self._mask(frame[..., :3]) for frame in frames]
        return np.concatenate([frames[..., :3], np.stack(alphas)[..., None]], axis=-1)

    def _mask(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        picture = Image.fromarray(frame)
        small = np.asarray(picture.resize(self._size, Image.Resampling.LANCZOS), np.float64)
        small = (small / max(small.max(), 1e-6) - self._mean) / self._std
        inputs = {self._name: small.transpose(2, 0, 1)[None].astype(np.float32)}
        found = np.asarray(self._session.run(None, inputs)[0])
        if found.ndim != 4 or found.shape[:2] != (1, 1) or not np.isfinite(found).all():
            raise ValueError(
                f"{self._path} gave {found.shape}; one finite mask [1, 1, h, w] is needed"
            )
        mask = found[0, 0].astype(np.float64)
        if mask.min() < 0 or mask.max() > 1:  # BiRefNet ends before its sigmoid
            mask = 1 / (1 + np.exp(-mask.clip(-60, 60)))
        mask = (mask - mask.min()) / max(mask.max() - mask.min(), 1e-6)
        alpha = Image.fromarray(np.rint(mask * 255).astype(np.uint8))
        return np.asarray(alpha.resize(picture.size, Image.Resampling.LANCZOS))
