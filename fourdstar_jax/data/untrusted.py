"""Decodes untrusted pictures and videos, in a process of its own: `untrusted.py REQUEST_JSON`.

`data/video.py` starts this file with a time limit; the process takes away its own right to much
memory, processor time and large files before it opens anything. Results: `frames.npy` (uint8 RGBA,
upright, square pixels, sRGB) and `info.json` in the request's folder; a refusal is one line on
stderr and exit code 3.
"""

import fractions
import itertools
import json
import os
import re
import resource
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import av
import av.error
import av.logging
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from PIL import Image, UnidentifiedImageError

from fourdstar_jax.data import colour, pictures

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
PICTURES |= {".heic", ".heif"}
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
ANIMATED = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")  # a JPEG's second picture is no second frame
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Demuxers that read one file and nothing that the file points at (no playlists, no protocols).
VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,ogg"
INDEXED_FORMATS = {"mov", "matroska"}  # that find the key frame before a time
WORKING_SIDE = 1024  # larger pictures are shrunk to this as soon as they are decoded
UNSPECIFIED = 2  # of H.273, for curve, primaries and matrix alike
WIDEST_PIXEL = 16  # width to height, and the other way round


def refuse(message: str) -> NoReturn:
    sys.stderr.write(message + "\n")
    sys.exit(3)


def refuse_damaged(path: Path, error: Exception) -> NoReturn:
    """Pillow meets damage with exceptions of every kind, IndexError and struct.error among them."""
    found = " ".join(str(error).split()) or type(error).__name__
    refuse(f"{path} cannot be read: {found}")


def check_size(width: int, height: int, request: dict[str, Any], name: str) -> None:
    least, most = request["min_side"], request["max_pixels"]
    if min(width, height) < least:
        refuse(f"{name} is {width}x{height} pixels; at least {least}x{least} are needed")
    if width * height > most:
        refuse(f"{name} is {width}x{height} pixels; at most {most} in all are read (max_pixels)")


def shown_size(width: int, height: int, aspect: fractions.Fraction) -> tuple[int, int]:
    """Square pixels of what has pixels `aspect` times as wide as high: at most WORKING_SIDE."""
    wide, high = width * max(aspect, 1), height * max(1 / aspect, 1)
    factor = min(1, WORKING_SIDE / max(wide, high))
    return max(1, round(wide * factor)), max(1, round(high * factor))


def shrink(picture: Image.Image, aspect: fractions.Fraction = fractions.Fraction(1)) -> np.ndarray:
    """uint8 `[h, w, 4]` of a picture in mode RGBA (Pillow weighs colour by alpha)."""
    size = shown_size(*picture.size, aspect)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(picture)


def lighter(picture: Image.Image) -> Image.Image:
    """A picture far larger than WORKING_SIDE at a fraction of its size, for speed.

    JPEG is decoded so; other pictures without transparency are averaged over whole pixels.
    """
    enough = 2 * WORKING_SIDE
    if picture.format == "JPEG":
        picture.draft(None, (enough, enough))
    factor = max(picture.size) // enough
    kinds = picture.format in ("JPEG", "PNG", "WEBP") and picture.mode in ("L", "RGB", "CMYK")
    if factor < 2 or not kinds or "transparency" in picture.info:
        return picture
    return picture.reduce(factor)


def natural(name: str) -> list[Any]:
    """Sort key under which 2.png comes before 10.png."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name.lower())]


def gaps(names: list[str]) -> dict[int, str]:
    """What is wrong with the numbers of these names, in order, by the place where it is seen.

    Numbers may begin anywhere and go in steps: missing is what makes a step twice as large as
    others, and the first such is named. No two names have one number, whatever their suffixes are.
    Names that differ in more than their last number are not numbered.
    """
    found = [re.fullmatch(r"(.*?)(\d+)(\D*)", Path(name).stem) for name in names]
    if len({m and (m[1], m[3].lower()) for m in found}) != 1 or found[0] is None:
        return {}
    numbers = [int(m[2]) for m in found if m]
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    usual = max(1, int(statistics.median([s for s in steps if s] or [1])))
    wrong = {}
    for i, (m, step) in enumerate(zip(found, steps, strict=False)):
        before, name = names[i : i + 2]
        if step == 0:
            wrong[i + 1] = f"{before} and {name} have the same number"
        elif m and step >= 2 * usual:
            first = f"{m[1]}{numbers[i] + usual:0{len(m[2])}}{m[3]}{Path(before).suffix}"
            wrong[i + 1] = f"{first} is missing between {before} and {name}"
    return wrong


def is_heic(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64)
    # mif1 and msf1 are AVIF's as well, which then names itself among the compatible brands
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS and b"avi" not in head


def open_picture(path: Path, request: dict[str, Any]) -> Image.Image:
    formats = PICTURE_FORMATS
    if is_heic(path):
        try:
            import pillow_heif
        except ImportError:
            refuse(f"{path} is HEIC, read after: pip install 'fourdstar-jax[heic]'")
        pillow_heif.register_heif_opener()
        formats = ("HEIF",)
    try:
        picture = Image.open(path, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        refuse(f"{path} has more than max_pixels = {request['max_pixels']} pixels")
    check_size(*picture.size, request, str(path))
    return picture


def folder_frames(folder: Path, request: dict[str, Any], info: dict[str, Any]) -> Iterator:
    """Every picture of a folder in natural order, `folder_fps` a second."""
    names = [f.name for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")]
    names = sorted((n for n in names if Path(n).suffix.lower() in PICTURES), key=natural)
    if not names:
        refuse(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    if len(names) > request["max_frames"]:
        refuse(f"{folder} holds {len(names)} frames; at most max_frames = {request['max_frames']}")
    info |= {"kind": "folder", "seconds": len(names) / request["folder_fps"]}
    size, wrong = None, gaps(names)
    for index, name in enumerate(names):
        if index in wrong and "gap" not in info:
            info["gap"] = wrong[index]

        def decode(name=name):
            nonlocal size
            try:
                picture = open_picture(folder / name, request)
                found_size, picture = picture.size, pictures.upright_srgb(lighter(picture))
            except UnidentifiedImageError:
                refuse(f"{folder / name} is not a picture that can be read")
            except Exception as error:
                refuse_damaged(folder / name, error)
            if (picture.width > picture.height) != (found_size[0] > found_size[1]):
                found_size = found_size[::-1]  # it was turned
            if size is not None and found_size != size:
                found, before = ("{}x{}".format(*x) for x in (found_size, size))
                refuse(f"{folder / name} is {found} pixels, the pictures before it {before}")
            info["file_size"] = size = found_size
            return shrink(picture)

        yield index / request["folder_fps"], 1 / request["folder_fps"], decode


def picture_frames(
    picture: Image.Image, path: Path, request: dict[str, Any], info: dict[str, Any]
) -> Iterator:
    """A single picture, or the frames of an animated one at the times it gives them.

    Pages of a TIFF are `folder_fps` a second.
    """
    count = getattr(picture, "n_frames", 1) if picture.format in ANIMATED else 1
    if count > request["max_frames"]:
        refuse(f"{path} has {count} frames; at most max_frames = {request['max_frames']}")
    info |= {"kind": "animation" if count > 1 else "picture", "seconds": 0.0}
    if count == 1:
        yield 0.0, 0.0, lambda: shrink(pictures.upright_srgb(lighter(picture)))
        return
    time = 0.0
    # an APNG's picture for viewers that only know PNG is not part of the animation
    for index in range(1 if getattr(picture, "default_image", False) else 0, count):
        picture.seek(index)
        picture.load()
        duration = float(picture.info.get("duration", 100) or 0) / 1000
        duration = duration if duration > 0.01 else 0.1  # as browsers do
        if picture.format == "TIFF":
            duration = 1 / request["folder_fps"]
        copy = picture.copy()
        copy.format = picture.format
        info["seconds"] = time + duration
        yield time, duration, lambda copy=copy: shrink(pictures.upright_srgb(copy))
        time += duration


def video_stream(container: Any, path: Path) -> Any:
    """The stream to watch: not the cover of a song, and the default one of several."""
    streams = container.streams.video
    if not streams:
        refuse(f"{path} has no video stream")
    moving = [s for s in streams if not s.disposition & Disposition.attached_pic]
    if not moving:
        refuse(f"{path} has no video stream: the only picture in it is a cover")
    return max(moving, key=lambda stream: bool(stream.disposition & Disposition.default))


def turned(array: np.ndarray, frame: Any) -> np.ndarray:
    """Turned and mirrored as the container's display matrix says, to the nearest right angle.

    The matrix [a b u; c d v; x y w] moves a pixel (p, q) to (a p + c q, b p + d q).
    """
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return array
    a, b, _, c, d = (int(x) for x in np.frombuffer(bytes(data), np.int32, 5))
    if abs(b) + abs(c) > abs(a) + abs(d):
        array, a, d = array.swapaxes(0, 1), c, b
    return array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def video_pixels(
    frame: Any, colours: tuple[int, int, int], aspect: fractions.Fraction
) -> np.ndarray:
    """A frame as uint8 RGBA; what it does not say of its colours, the container's do.

    They are transfer, primaries and matrix, as H.273 numbers them.
    """
    # Planar RGB, and alpha only where the stream has it: on the way to packed formats swscale
    # leaves columns undefined at some widths.
    form = frame.format
    alpha = form.has_palette or any(component.is_alpha for component in form.components)
    own = (int(frame.color_trc), int(frame.color_primaries), int(frame.colorspace))
    transfer, primaries, matrix = (
        said if found == UNSPECIFIED else found for found, said in zip(own, colours, strict=True)
    )
    if own[2] != matrix:
        frame.colorspace = matrix
    if colour.is_srgb(transfer, primaries):
        array = frame.to_ndarray(format="gbrap" if alpha else "gbrp")
    else:
        width, height = shown_size(frame.width, frame.height, aspect)
        deep = frame.reformat(width, height, "gbrap16le" if alpha else "gbrp16le").to_ndarray()
        array = colour.to_srgb(deep[..., :3], transfer, primaries)
        if alpha:
            array = np.concatenate([array, (deep[..., 3:] >> 8).astype(np.uint8)], axis=-1)
        aspect = fractions.Fraction(1)
    return shrink(Image.fromarray(array).convert("RGBA"), aspect)


def video_frames(path: Path, request: dict[str, Any], info: dict[str, Any]) -> Iterator:
    with path.open("rb") as file:
        options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "none"}
        try:
            container = av.open(file, "r", options=options)
        except (av.error.FFmpegError, ValueError, OSError):
            refuse(f"{path} is not a video or picture that can be read")
        stream = video_stream(container, path)
        base = float(stream.time_base)
        check_size(stream.width, stream.height, request, str(path))
        info["file_size"] = stream.width, stream.height
        aspect = fractions.Fraction(1)
        if stream.sample_aspect_ratio:  # neither None nor zero
            ratio = stream.sample_aspect_ratio
            aspect = fractions.Fraction(ratio.numerator, ratio.denominator)
        if not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
            refuse(f"{path} has pixels {aspect} times as wide as high; at most {WIDEST_PIXEL}")
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        if stream.frames > request["max_frames"]:
            most = request["max_frames"]
            refuse(f"{path} has {stream.frames} frames; at most max_frames = {most}")
        seconds = container.duration / av.time_base if container.duration else None
        if stream.duration:
            seconds = stream.duration * base
        info |= {"kind": "video", "seconds": seconds}
        decoder: Any = stream.codec_context
        colours = (decoder.color_trc, decoder.color_primaries, decoder.colorspace)
        separate = stream.metadata.get("alpha_mode") == "1" and decoder.name in ("vp8", "vp9")
        if separate:
            # FFmpeg's own VP8 and VP9 decoders drop the alpha channel; libvpx keeps it.
            name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.name]
            decoder = av.CodecContext.create(name, "r")
            decoder.extradata = stream.codec_context.extradata
        for context in (decoder, stream.codec_context):
            context.thread_count = 1
            context.options = {"max_pixels": str(request["max_pixels"])}
        first, previous, decoded, described = None, 0.0, 0, None
        indexed = INDEXED_FORMATS & set(container.format.name.split(","))
        if (
            request["start"] > 1
            and not request.get("counted")
            and stream.start_time is not None
            and indexed
        ):
            container.seek(stream.start_time + int((request["start"] - 1) / base), stream=stream)
            first = stream.start_time * base
        try:
            for packet in container.demux(stream):
                if separate and described is None:  # only its own decoder knows the orientation
                    described = next(iter(stream.codec_context.decode(packet)), None)
                for frame in decoder.decode(packet):
                    decoded += 1
                    if decoded > request["max_frames"]:
                        refuse(f"{path} has more than max_frames = {request['max_frames']} frames")
                    check_size(frame.width, frame.height, request, str(path))
                    pts = frame.pts if frame.pts is not None else frame.dts
                    time = pts * base if pts is not None else previous + 1 / rate
                    first = time if first is None else first
                    previous = time

                    def decode(frame=frame, described=described):
                        pixels = video_pixels(frame, colours, aspect)
                        return np.ascontiguousarray(turned(pixels, described or frame))

                    yield time - first, 1 / rate, decode
        except av.error.FFmpegError:
            refuse(f"{path} is damaged: decoding stopped after frame {decoded}")
        if not decoded:
            refuse(f"{path} has zero frames")


def sample(
    source: Iterator, fps: float, most: int, start: float
) -> tuple[list[np.ndarray], list[int], float]:
    """The frames nearest to the times start, start + 1/fps, ... within the clip, at most `most`.

    Stops reading as soon as it has them. Also returns their numbers among the frames that were
    read, and the end of what it saw, in seconds.
    """
    chosen: list[np.ndarray] = []
    numbers: list[int] = []
    held: tuple[float, Any, int] | None = None  # the frame before the current one
    end = 0.0

    def choose() -> None:
        assert held is not None
        chosen.append(held[1]())
        numbers.append(held[2])

    def wanted() -> float:
        return start + len(chosen) / fps

    for number, (time, duration, decode) in enumerate(source):
        while held is not None and len(chosen) < most and wanted() <= time:
            if time - wanted() < wanted() - held[0]:
                break
            choose()
        end = max(end, time + duration)
        if len(chosen) == most:
            break
        held = (time, decode, number)
    # the last frame lasts until `end`; the first is there however short the clip
    while held and len(chosen) < most:
        if wanted() >= end - 1e-6 and (chosen or start > 0):
            break
        choose()
    return chosen, numbers, end


def read(path: Path, request: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames and what was read.

    That is the kind, the pixels of the file's frames (the first two axes of `frames` are what is
    left of them), the clip's seconds (None if unknown) and those of the frames.
    """
    info: dict[str, Any] = {}
    if path.is_dir():
        source = folder_frames(path, request, info)
    else:
        if os.path.getsize(path) == 0:
            refuse(f"{path} is empty")
        try:
            picture = open_picture(path, request)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
            source = video_frames(path, request, info)
        else:
            info["file_size"] = picture.size
            source = picture_frames(picture, path, request, info)
    fps, start = request["fps"], request["start"]
    if (wanted := request.get("numbers")) is not None:  # these frames, in this order
        kept = {n: decode() for n, (_, _, decode) in enumerate(source) if n in wanted}
        if missing := sorted(set(wanted) - set(kept)):
            refuse(f"{path} has no frame {missing[0] + 1}, which is wanted")
        info["frames"] = len(kept)
        return _stacked([kept[n] for n in wanted], path, info), info
    if fps is None:  # every frame, whatever its time
        frames = [decode() for _, _, decode in source]
        info["frames"] = len(frames)
        return _stacked(frames, path, info), info
    frames, numbers, end = sample(source, fps, request["timesteps"], start)
    if request.get("counted"):
        info["numbers"] = numbers
    if info["kind"] == "animation":  # which tells its length only frame by frame
        for _ in source:
            pass
    if not frames:
        refuse(f"{path} ends after {end:g} s, before start = {start:g}")
    if info["seconds"] is None and len(frames) < request["timesteps"]:
        info["seconds"] = end
    length = np.inf if info["seconds"] is None else max(info["seconds"], end)
    info["seconds_read"] = min(len(frames) / fps, length - start)
    return _stacked(frames, path, info), info


def _stacked(frames: list[np.ndarray], path: Path, info: dict[str, Any]) -> np.ndarray:
    if any(frame.shape != frames[0].shape for frame in frames):
        refuse(f"the frames of {path} differ in size")
    stacked = np.stack(frames)
    if info["kind"] == "video" and stacked[..., 3].max() == 0:
        stacked[..., 3] = 255  # the fourth byte of an uncompressed AVI, which nothing fills
    return stacked


def main() -> None:
    request = json.loads(sys.argv[1])
    memory, seconds = request["max_memory"], request["timeout_s"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = request["max_pixels"]
    warnings.simplefilter("ignore")  # stderr is for the one line
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    av.logging.set_level(None)
    path = Path(request["path"])
    try:
        frames, info = read(path, request)
    except MemoryError:
        refuse(f"{path} needs more than {memory >> 20} MiB of memory to decode")
    except Exception as error:
        refuse_damaged(path, error)
    out = Path(request["out"])
    try:
        np.save(out / "frames.npy", frames, allow_pickle=False)
        (out / "info.json").write_text(json.dumps(info))
    except OSError as error:  # NumPy's own say how much it could not write, and no errno
        size = f"{frames.nbytes / 1e6:.0f} MB"
        refuse(f"{path} is read, but {out.parent} does not hold its frames, {size}: {error}")


if __name__ == "__main__":
    main()
