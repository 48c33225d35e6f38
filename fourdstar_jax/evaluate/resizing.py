"""Resizing as the libraries do it that published numbers were made with."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from fourdstar_jax.evaluate.protocols import Resize

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def resized(
    frames: UInt8[np.ndarray, "T h w 3"], steps: Sequence[Resize]
) -> Float32[np.ndarray, "T h2 w2 3"]:
    """Frames of 0 to 255 as floats of 0 to 255, after these steps; bicubic ones may overshoot."""
    values: np.ndarray = frames
    for step in steps:
        if step.library == "TensorFlow 1":
            values = _tensorflow(values, step.size)
            continue
        size, method = (step.size, step.size), FILTERS[step.filter]
        if step.library == "Pillow, 8 bits":
            assert values.dtype == np.uint8, "8 bits come before floats"
            values = np.stack([np.asarray(Image.fromarray(x).resize(size, method)) for x in values])
            continue
        channels = np.moveaxis(values.astype(np.float32), -1, 1)  # [T, 3, h, w]
        values = np.stack(
            [
                [np.asarray(Image.fromarray(x).resize(size, method)) for x in channel]
                for channel in channels
            ]
        )
        values = np.moveaxis(values, 1, -1)
    return values.astype(np.float32)


def _tensorflow(values: np.ndarray, size: int) -> Float32[np.ndarray, "T s s c"]:
    """Bilinear, corner to corner of the pixel grid: `resize_bilinear` of TensorFlow 1's default."""
    values = values.astype(np.float32)
    for axis in (1, 2):
        length = values.shape[axis]
        places = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = np.floor(places).astype(np.int64)
        share = (places - low).reshape(-1, *(1,) * (values.ndim - 1 - axis)).astype(np.float32)
        high = np.minimum(low + 1, length - 1)
        left, right = values.take(low, axis), values.take(high, axis)
        values = left + (right - left) * share
    return values
