"""Pictures and videos through an image tokenizer and back: the paper's 2D baselines."""

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from fourdstar_jax import arguments
from fourdstar_jax.data import video
from fourdstar_jax.data.batching import in_batches
from fourdstar_jax.data.decode import MAX_FRAMES
from fourdstar_jax.evaluate import metrics
from fourdstar_jax.export.video import write_video
from fourdstar_jax.folders import PICTURES
from fourdstar_jax.lists import pictures_and_videos

SEAM = 2  # pixels between the pictures of a sheet


def write_sheet(
    path: str | os.PathLike[str],
    images: Float[np.ndarray, "T h w 3"],
    *,
    columns: int | None = None,
) -> None:
    """Frames in rows from left to right, pixel for pixel, with grey seams between them.

    By default there are about as many rows as columns.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    cell = np.array([height + SEAM, width + SEAM])
    rows = math.ceil(count / columns)
    sheet = np.full((*(cell * [rows, columns] + SEAM), 3), 160, np.uint8)
    for index, image in enumerate(images):
        top, left = cell * divmod(index, columns) + SEAM
        sheet[top : top + height, left : left + width] = np.rint(255 * np.clip(image, 0, 1))
    Image.fromarray(sheet).save(path, "PNG")


def reconstruct(
    tokenizer: Any,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fit: str = "none",
    start: float = 0.0,
    fps: float = video.FPS,
    max_frames: int = MAX_FRAMES,
    batch_size: int = 16,
    on_input: Callable[[Path, dict[str, Any]], None] = lambda path, info: None,
) -> dict[str, Any]:
    """Encodes and decodes every file; writes what comes back and `manifest.json`, and returns that.

    Args:
      tokenizer: behind `tokenizer.base.Tokenizer`.
      source: a picture, a video or a folder of them.
      out: an existing folder. A picture becomes `<name>.png`, what moves `<name>.mp4`, on the left
        what the tokenizer saw, on the right what it made of it; `tokens/<name>.npy` holds the
        tokens [frames, n, K], int32.
      fit: how files become squares (see `data.video.read_video`).
      start: of the part of videos that is read, in seconds.
      fps: at which videos are sampled.
      batch_size: images at a time; one shape is compiled.
      on_input: called with each file and what was read of it, before it is encoded.

    Raises ValueError, in one line, for files that cannot be used.
    """
    batch_size = arguments.whole("batch_size", batch_size, *arguments.BATCH)
    out = Path(out)
    (out / "tokens").mkdir(exist_ok=True)
    spec = tokenizer.spec
    encode = jax.jit(lambda tokenizer, images: tokenizer.encode(images))
    decode = jax.jit(lambda tokenizer, tokens: tokenizer.decode(tokens))
    results, names = [], set()
    for path in pictures_and_videos(source):
        images, info = video.read_video(
            path, resolution=spec.resolution, timesteps=max_frames, start=start, fps=fps, fit=fit,
            max_frames=max_frames,
        )  # fmt: skip
        on_input(path, info)
        tokens = in_batches(functools.partial(encode, tokenizer), (images,), batch_size)
        again = in_batches(functools.partial(decode, tokenizer), (tokens,), batch_size)
        name = path.stem if path.stem not in names else path.name.replace(".", "_")
        names.add(name)
        pairs = np.concatenate([images, again], axis=2)
        if len(pairs) > 1:
            write_video(out / f"{name}.mp4", pairs, fps=fps)
        else:
            Image.fromarray(np.rint(255 * pairs[0]).astype(np.uint8)).save(out / f"{name}.png")
        np.save(out / "tokens" / f"{name}.npy", tokens.astype(np.int32), allow_pickle=False)
        results.append(
            {
                "file": path.name,
                "frames": len(images),
                "input": info,
                "psnr": metrics.psnr(again, images),
                "l1": float(np.mean(np.abs(again - images))),
            }
        )
    content = {
        "tokenizer": spec.to_dict(),
        "fit": fit,
        "files": results,
        "mean_psnr": float(np.mean([result["psnr"] for result in results])),
        "mean_l1": float(np.mean([result["l1"] for result in results])),
    }
    (out / PICTURES.manifest).write_text(json.dumps(content, indent=1) + "\n")
    return content
