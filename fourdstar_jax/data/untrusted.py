"""Decodes untrusted pictures and videos, in a process of its own: `untrusted.py REQUEST_JSON`.

`data/video.py` starts this file with a time limit; the process takes away its own right to much
memory, processor time and large files before it opens anything. It imports nothing of the
package. Results: `frames.npy` (uint8 RGBA) and `info.json` in the request's folder; a refusal is
one line on stderr and exit code 3.
"""

import json
import os
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import av
import av.error
import av.logging
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
# Demuxers that read one file and nothing that the file points at (no playlists, no protocols).
VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,ogg"
WORKING_SIDE = 1024  # larger pictures are shrunk to this as soon as they are decoded


def refuse(message: str) -> NoReturn:
    sys.stderr.write(message + "\n")
    sys.exit(3)


def check_size(width: int, height: int, request: dict[str, Any], name: str) -> None:
    least, most = request["min_side"], request["max_pixels"]
    if min(width, height) < least:
        refuse(f"{name} is {width}x{height} pixels; at least {least}x{least} are needed")
    if width * height > most:
        refuse(f"{name} is {width}x{height} pixels; at most {most} in all are read (max_pixels)")


def shrink(picture: Image.Image) -> np.ndarray:
    """RGBA uint8 `[h, w, 4]`, longer side at most WORKING_SIDE (Pillow weighs colour by alpha)."""
    picture = picture.convert("RGBA")
    factor = WORKING_SIDE / max(picture.size)
    if factor < 1:
        size = [max(1, round(side * factor)) for side in picture.size]
        picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(picture)


def natural(name: str) -> list[Any]:
    """Sort key under which 2.png comes before 10.png."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name.lower())]


def open_picture(path: Path, request: dict[str, Any], name: str) -> Image.Image:
    try:
        picture = Image.open(path, formats=PICTURE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        refuse(f"{name} has more than max_pixels = {request['max_pixels']} pixels")
    check_size(*picture.size, request, name)
    return picture


def folder_frames(folder: Path, request: dict[str, Any]) -> Iterator[tuple[float, float, Any]]:
    names = [f.name for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")]
    names = sorted((n for n in names if Path(n).suffix.lower() in PICTURES), key=natural)
    if not names:
        refuse(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    if len(names) > request["max_frames"]:
        refuse(f"{folder} holds {len(names)} frames; at most max_frames = {request['max_frames']}")
    size = None
    for index, name in enumerate(names):

        def decode(name=name):
            nonlocal size
            try:
                picture = ImageOps.exif_transpose(open_picture(folder / name, request, name))
                picture.load()
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
                refuse(f"{folder / name} is not a readable picture")
            if size is not None and picture.size != size:
                refuse(f"{name} is {picture.size} pixels, the pictures before it {size}")
            size = picture.size
            return shrink(picture)

        yield index / request["folder_fps"], 1 / request["folder_fps"], decode


def picture_frames(picture: Image.Image, request: dict[str, Any]) -> Iterator:
    """A single picture, or the frames of an animated one at the times it gives them."""
    count = getattr(picture, "n_frames", 1)
    if count > request["max_frames"]:
        refuse(f"the animation has {count} frames; at most max_frames = {request['max_frames']}")
    if count == 1:
        yield 0.0, 0.0, lambda: shrink(ImageOps.exif_transpose(picture))
        return
    time = 0.0
    for index in range(count):
        picture.seek(index)
        picture.load()
        duration = float(picture.info.get("duration", 100) or 0) / 1000
        duration = duration if duration > 0.01 else 0.1  # as browsers do
        array = shrink(picture)
        yield time, duration, lambda array=array: array
        time += duration


def video_frames(path: Path, request: dict[str, Any]) -> Iterator:
    with path.open("rb") as file:
        options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "none"}
        try:
            container = av.open(file, "r", options=options)
        except (av.error.FFmpegError, ValueError, OSError):
            refuse(f"{path} is not a video or picture that can be read")
        if not container.streams.video:
            refuse(f"{path} has no video stream")
        stream = container.streams.video[0]
        check_size(stream.width, stream.height, request, str(path))
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        count = stream.frames
        if not count and container.duration:
            count = round(container.duration / av.time_base * rate)
        if count > request["max_frames"]:
            refuse(f"{path} has {count} frames; at most max_frames = {request['max_frames']}")
        decoder: Any = stream.codec_context
        alpha = stream.metadata.get("alpha_mode") == "1"
        if alpha and stream.codec_context.name in ("vp8", "vp9"):
            # FFmpeg's own VP8 and VP9 decoders drop the alpha channel; libvpx keeps it.
            name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[stream.codec_context.name]
            decoder = av.CodecContext.create(name, "r")
            decoder.extradata = stream.codec_context.extradata
        decoder.thread_count = 1
        decoder.options = {"max_pixels": str(request["max_pixels"])}
        first, previous = None, 0.0
        decoded = 0
        try:
            for packet in container.demux(stream):
                for frame in decoder.decode(packet):
                    decoded += 1
                    if decoded > request["max_frames"]:
                        refuse(f"{path} has more than max_frames = {request['max_frames']} frames")
                    check_size(frame.width, frame.height, request, str(path))
                    pts = frame.pts if frame.pts is not None else frame.dts
                    time = float(pts * stream.time_base) if pts is not None else previous + 1 / rate
                    first = time if first is None else first
                    previous = time

                    def decode(frame=frame):
                        array = frame.to_ndarray(format="rgba")
                        array = np.rot90(array, round(frame.rotation / 90) % 4)
                        return shrink(Image.fromarray(np.ascontiguousarray(array)))

                    yield time - first, 1 / rate, decode
        except av.error.FFmpegError:
            refuse(f"{path} is damaged: decoding stopped after {decoded} frames")
        if not decoded:
            refuse(f"{path} has zero frames")


def sample(source: Iterator, fps: float, most: int) -> tuple[list[np.ndarray], float]:
    """The frames nearest to the times 0, 1/fps, 2/fps, ... within the clip, at most `most`.

    Stops reading as soon as it has them. Also returns the length seen, in seconds.
    """
    chosen: list[np.ndarray] = []
    held: tuple[float, Any] | None = None  # the frame before the current one
    end = 0.0
    for time, duration, decode in source:
        while held is not None and len(chosen) < most and len(chosen) / fps <= time:
            wanted = len(chosen) / fps
            if time - wanted < wanted - held[0]:
                break
            chosen.append(held[1]())
        end = max(end, time + duration)
        if len(chosen) == most:
            break
        held = (time, decode)
    # the last frame lasts until `end`; the first is there however short the clip
    while held and len(chosen) < most and (not chosen or len(chosen) / fps < end - 1e-6):
        chosen.append(held[1]())
    return chosen, end


def main() -> None:
    request = json.loads(sys.argv[1])
    memory, seconds = request["max_memory"], request["timeout_s"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = request["max_pixels"]
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    av.logging.set_level(None)

    path = Path(request["path"])
    kind = "video"
    if path.is_dir():
        source, kind = folder_frames(path, request), "folder"
    else:
        if os.path.getsize(path) == 0:
            refuse(f"{path} is empty")
        try:
            picture = open_picture(path, request, str(path))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
            source = video_frames(path, request)
        else:
            source = picture_frames(picture, request)
            kind = "animation" if getattr(picture, "n_frames", 1) > 1 else "picture"
    try:
        frames, duration = sample(source, request["fps"], request["timesteps"])
    except MemoryError:
        refuse(f"{path} needs more than {memory >> 20} MiB of memory to decode")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        refuse(f"{path} is damaged: {error}")
    if any(frame.shape != frames[0].shape for frame in frames):
        refuse(f"the frames of {path} differ in size")
    out = Path(request["out"])
    np.save(out / "frames.npy", np.stack(frames), allow_pickle=False)
    (out / "info.json").write_text(json.dumps({"kind": kind, "seconds_read": duration}))


if __name__ == "__main__":
    main()
