"""Reads what users bring (mp4, webm, gif, a folder of frames, a picture) as the model's input.

The frames are sampled in time and framed in space as the training data is: `fps` 8, white
background, the object centred and as large as in training (`posing.placing`).
"""

import math
import os
import typing
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from fourdstar_jax import arguments
from fourdstar_jax.data import cutout
from fourdstar_jax.data.decode import FPS, MAX_FRAMES, MAX_PIXELS, decode
from fourdstar_jax.data.posing import root_motion
from fourdstar_jax.geometry import OCCUPANCY, apparent_size

CROP = 1.125  # UniTok resizes a photograph's short side to so many times the middle square

# What told the object from each kind of background.
FOUND_BY = {
    "transparent": "alpha",
    "white": "plain background",
    "plain": "plain background",
    "not plain": None,
}
BACKGROUND_TOLERANCE = 20 / 255  # of a plain background: video compression leaves some noise


@typing.no_type_check  # arguments are checked below, in the tests as elsewhere
def read_video(
    path: str | os.PathLike[str],
    *,
    resolution: int,
    timesteps: int,
    start: float = 0.0,
    fps: float = FPS,
    folder_fps: float = FPS,
    fit: str = "object",
    masks: str | os.PathLike[str] | None = None,
    rembg: str | os.PathLike[str] | None = None,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
    timeout_s: int = 120,
    max_memory: int = 4 << 30,
) -> tuple[Float[np.ndarray, "T r r 3"], dict[str, Any]]:
    """Up to `timesteps` frames of a file or folder, ready for a tokenizer of `resolution` pixels.

    The clip is sampled at the times start, start + 1/fps, ... in seconds (the nearest frame of
    each), for as long as it lasts; a picture gives one frame. A folder's pictures, in natural order
    (2 before 10), and the pages of a TIFF are `folder_fps` a second. Frames are as players show
    them: turned, mirrored and stretched as the file says, HDR as sRGB. Transparent pixels become
    white. With `fit="object"` the object is cut out, followed where it moves on, and scaled as in
    training; `fit="none"` only pads to a square and resizes; `fit="crop"` takes the
    middle square and resizes it bilinearly, as UniTok and LlamaGen evaluate photographs. Values are
    in [0, 1]; the second result tells what was read (`described` puts it in words).

    What the object is, is told by alpha or a plain background; or by `masks`, a folder of pictures
    or a video with one for each frame of the file, in order (white, or opaque, is object); or,
    where the clip has no alpha, by `rembg`, an ONNX file of a network that `data.cutout` runs.

    Decoding happens in a process of its own with limits on time and memory, and opens no network
    connection. Raises ValueError, in one line that names the file, for anything that cannot be
    used.
    """
    path = arguments.there(arguments.path("path", path))
    resolution = arguments.whole("resolution", resolution, *arguments.RESOLUTION)
    timesteps = arguments.whole("timesteps", timesteps, *arguments.FRAMES)
    fps = arguments.real("fps", fps, *arguments.FPS)
    folder_fps = arguments.real("folder_fps", folder_fps, *arguments.FPS)
    start = arguments.real("start", start, *arguments.START_S)
    arguments.choice("fit", fit, arguments.FITS)
    limits = {"max_pixels": max_pixels, "timeout_s": timeout_s, "max_memory": max_memory}
    limits = {name: arguments.whole(name, value, 1) for name, value in limits.items()}
    limits["max_frames"] = arguments.whole("max_frames", max_frames, *arguments.FRAMES)
    masks = None if masks is None else arguments.path("masks", masks)
    rembg = None if rembg is None else arguments.path("rembg", rembg)
    cutter = None if rembg is None else cutout.load(rembg)
    frames, info = decode(
        path,
        start=start,
        fps=fps,
        folder_fps=folder_fps,
        timesteps=timesteps,
        counted=masks is not None,
        **limits,
    )
    numbers, found = info.pop("numbers", []), None
    if masks is not None:
        (alphas, gap), found = _read_masks(masks, path, frames, numbers, limits), "mask"
        if doubt := _doubt(alphas) or (None if "gap" in info else gap):
            info["masks_doubt"] = doubt
        seen = np.minimum(alphas, frames[..., 3])
        frames = np.concatenate([frames[..., :3], seen[..., None]], axis=-1)
    elif cutter is not None and rembg is not None and frames[..., 3].min() == 255:
        frames, found = cutter(frames), f"mask by {rembg.name}"
    try:
        images, framing = frame_object(frames, resolution=resolution, fit=fit)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if found is not None:
        framing |= {"object": found if fit == "object" else None, "background": "masked"}
    return images, {**info, **framing, "start": start, "fps": fps, "timesteps": len(images)}


def _read_masks(
    masks: Path,
    path: Path,
    frames: UInt8[np.ndarray, "T h w 4"],
    numbers: list[int],
    limits: dict[str, Any],
) -> tuple[UInt8[np.ndarray, "T h w"], str | None]:
    """The masks of the frames of these numbers, of the frames' size; which is missing, if any."""
    if not masks.exists():
        raise ValueError(f"masks {masks} do not exist")
    found, info = decode(
        masks, start=0.0, fps=None, folder_fps=FPS, timesteps=1, numbers=numbers, **limits
    )
    alphas = found[..., 3] if found[..., 3].min() < 255 else found[..., :3].max(axis=-1)
    size, wanted = alphas.shape[2:0:-1], frames.shape[2:0:-1]
    if abs(size[0] * wanted[1] - size[1] * wanted[0]) > max(*size, *wanted):
        raise ValueError(
            f"masks {masks} are {size[0]}x{size[1]} pixels, the frames of {path} {wanted[0]}x"
            f"{wanted[1]}: the same shape is needed"
        )
    if size != wanted:
        resized = [Image.fromarray(a).resize(wanted, Image.Resampling.BILINEAR) for a in alphas]
        alphas = np.stack([np.asarray(a) for a in resized])
    gap = info.get("gap")
    return alphas, None if gap is None else f"of the masks {gap}: they go by order, not by number"


def _doubt(masks: UInt8[np.ndarray, "T h w"]) -> str | None:
    """What speaks against masks that are white where the object is, if anything does."""
    grey = np.mean((masks > 31) & (masks < 224))
    if grey > 0.2:
        return f"{grey:.0%} of the masks is neither black nor white: are they masks?"
    edges = [masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]]
    white = np.mean(np.concatenate(edges, axis=1) > 127)
    if white > 0.5:
        return f"{white:.0%} of the masks' edge is white: the object must be white, not black"
    return None


def read_frames(
    path: str | os.PathLike[str],
    *,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
    timeout_s: int = 120,
    max_memory: int = 4 << 30,
) -> UInt8[np.ndarray, "T h w 4"]:
    """Every frame of a file or folder as it is, RGBA with straight alpha, for measuring.

    Raises ValueError as `read_video` does, for a number that is missing among a folder's pictures,
    and for frames of more than 1,024 pixels a side, which would have to be shrunk, or with pixels
    that are not square.
    """
    path = arguments.there(Path(path))
    frames, info = decode(
        path,
        start=0.0,
        fps=None,
        folder_fps=FPS,
        timesteps=max_frames,
        max_frames=max_frames,
        max_pixels=max_pixels,
        timeout_s=timeout_s,
        max_memory=max_memory,
    )
    if (gap := info.get("gap")) is not None:
        raise ValueError(f"{path}: {gap}")
    (width, height), read = info["file_size"], frames.shape[2:0:-1]
    if sorted((width, height)) != sorted(read):
        raise ValueError(
            f"{path}: frames of {width}x{height} pixels would be resized to {read[0]}x{read[1]}: "
            "at most 1024 a side are measured, and square pixels"
        )
    return frames


def described(info: dict[str, Any], *, fit: str) -> list[str]:
    """Lines that say what of a clip is used, how its object was found and how unusual it is.

    `info` is of `read_video`, and of `generate.Model.read` for the last.
    """
    lines = _described(info, fit)
    if (reach := info.get("reach")) is not None:
        error, usual = reach["error"], reach["usual"]
        told = (
            f"the tokenizer gives it back with an error of {error:.3f}; 99 % of the pictures that "
        )
        told += f"it learnt from are under {usual:.3f}"
        lines.append(told if error <= usual else f"warning: far from the training data: {told}")
    return lines


def _described(info: dict[str, Any], fit: str) -> list[str]:
    count, size = info["timesteps"], "{}x{} pixels".format(*info["file_size"])
    if sorted(info["source_size"]) != sorted(info["file_size"]):
        size += " (read as {}x{})".format(*info["source_size"])
    if info["kind"] == "picture":
        lines = [f"a picture of {size}"]
    else:
        whole = f"{info['seconds']:.2f}" if info["seconds"] is not None else "an unknown number of"
        lines = [
            f"{info['kind']} of {size}: {info['seconds_read']:.2f} of {whole} s, from "
            f"{info['start']:.2f} s on at {info['fps']:g} frames a second, "
            + arguments.counted(count, "timesteps")
        ]
    if (gap := info.get("gap")) is not None:
        lines.append(f"warning: {gap}: what there is counts as evenly spaced")
    found = info["object"]
    if fit != "object":
        by = FOUND_BY.get(info["background"], "mask")
        told = f"; its object, by {by}, is not cut out" if by else ""
        return [*lines, f"the whole frame is used (fit={fit}){told}"]
    if found is None:
        return [
            *lines,
            "warning: no object was found, for lack of transparency or a plain background: "
            "the whole frame counts as the object (--masks or --rembg cut it out)",
        ]
    lines.append(f"object found by its {found}, {100 * info['object_area']:.1f} % of the frame")
    doubt = info.get("masks_doubt")
    return [*lines, f"warning: {doubt}"] if doubt else lines


def frame_object(
    frames: UInt8[np.ndarray, "T h w c"], *, resolution: int, fit: str = "object"
) -> tuple[Float[np.ndarray, "T r r 3"], dict[str, Any]]:
    """RGB or RGBA frames as square float images on white, the object centred and scaled.

    Without transparency the background is told by the colour along the border of the pictures:
    a plain one that is not white is replaced by white, one that is not plain stays as it is and
    the whole picture counts as the object.
    """
    arguments.choice("fit", fit, arguments.FITS)
    if frames.shape[-1] not in (3, 4):
        raise ValueError(f"frames have {frames.shape[-1]} channels; 3 or 4 are needed")
    images = frames[..., :3]
    if frames.shape[-1] == 4 and frames[..., 3].min() < 255:
        alphas = frames[..., 3:].astype(np.float32) / 255
        images = np.rint(images * alphas + 255 * (1 - alphas)).astype(np.uint8)
    if frames.shape[-1] == 4 and frames[..., 3].min() <= 127:
        mask, background = frames[..., 3] > 127, "transparent"
    else:  # a little noise in alpha hides nothing
        images, mask, background = _on_white(images)
    if not mask.any() and fit == "object":
        raise ValueError("no object to be seen: every frame is nothing but background")
    height, width = mask.shape[1:]
    side = min(width, height) / CROP if fit == "crop" else float(max(width, height))
    path = np.zeros((len(images), 2))
    left, top = (width - side) / 2, (height - side) / 2
    if fit == "object" and background != "not plain":
        (left, top, side), path = _object_box(mask)
    resample = Image.Resampling.BILINEAR if fit == "crop" else Image.Resampling.BICUBIC
    squares = np.stack(
        [
            _crop(image, (left + x, top + y, side), resolution, resample)
            for image, (x, y) in zip(images, path, strict=True)
        ]
    )
    info: dict[str, Any] = {
        "background": background,
        "fit": fit,
        "object": FOUND_BY[background] if fit == "object" else None,
        "object_area": float(mask.mean()),
        "source_size": [width, height],
        "crop": [left, top, side],
        "followed": bool(path.any()),
    }
    return squares.astype(np.float32) / 255, info


def _on_white(
    images: UInt8[np.ndarray, "T h w 3"],
) -> tuple[UInt8[np.ndarray, "T h w 3"], Bool[np.ndarray, "T h w"], str]:
    """Images on white, object mask, and what the background was."""
    border = np.concatenate(
        [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1
    ).reshape(-1, 3)
    colour = np.median(border, axis=0)
    tolerance = 255 * BACKGROUND_TOLERANCE
    # an object may touch the border, but not most of it
    if (np.abs(border - colour).max(axis=1) > tolerance).mean() > 0.4:
        return images, np.ones(images.shape[:3], bool), "not plain"
    mask = np.abs(images - colour.astype(np.float32)).max(axis=-1) > tolerance
    if colour.min() >= 255 - tolerance:
        return images, mask, "white"
    return np.where(mask[..., None], images, np.uint8(255)), mask, "plain"


def _object_box(
    masks: Bool[np.ndarray, "T h w"],
) -> tuple[tuple[float, float, float], Float[np.ndarray, "T 2"]]:
    """The square (left, top, side) of the first frame, and where it is from there in the others.

    It has the object in its middle at the size that it has in training (`posing.placing`).
    """
    seen = np.flatnonzero(masks.any(axis=(1, 2)))
    boxes = np.array([[_extent(masks[t], axis) for axis in (0, 1)] for t in seen])  # [F, xy, ends]
    centers = np.array([np.argwhere(masks[t]).mean(axis=0)[::-1] for t in seen])  # [F, xy]
    size = float(np.median((boxes[..., 1] - boxes[..., 0]).max(axis=1)))
    path = np.stack([root_motion(centers[:, i : i + 1], size)[:, 0] for i in (0, 1)], axis=1)
    low = (boxes[..., 0] - path).min(axis=0)
    high = (boxes[..., 1] - path).max(axis=0)
    side = apparent_size(*map(float, high - low)) / OCCUPANCY
    left, top = (low + high - side) / 2
    nearest = np.abs(np.arange(len(masks))[:, None] - seen).argmin(axis=1)  # a frame that sees it
    return (float(left), float(top), side), path[nearest]


def _extent(mask: Bool[np.ndarray, "h w"], axis: int) -> tuple[float, float]:
    """First and last + 1 column (axis 0) or row (axis 1) of the mask, specks ignored."""
    counts = mask.sum(axis=axis)
    hits = np.flatnonzero(counts >= min(counts.max(), 2 + mask.shape[axis] // 200))
    return float(hits[0]), float(hits[-1] + 1)


def _crop(
    image: UInt8[np.ndarray, "h w 3"],
    box: tuple[float, float, float],
    resolution: int,
    resample: Image.Resampling,
) -> UInt8[np.ndarray, "r r 3"]:
    """The square (left, top, side), white outside the picture, resized with antialiasing."""
    left, top, side = box
    pad = math.ceil(max(0.0, -left, -top, left + side - image.shape[1], top + side - len(image)))
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
    region = (left + pad, top + pad, left + pad + side, top + pad + side)
    picture = Image.fromarray(padded).resize((resolution, resolution), resample, box=region)
    return np.asarray(picture)
