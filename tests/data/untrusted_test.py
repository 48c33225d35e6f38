"""Frames come out as a player shows them: colours, orientation, shape of pixels, transparency."""

import itertools
import json
import os
import struct
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from fourdstar_jax.data import untrusted, video

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "video"
RED, WHITE = (200, 30, 30), (255, 255, 255)
REQUEST = dict(start=0.0, fps=8, folder_fps=8, timesteps=24, max_frames=1000, min_side=16)
REQUEST |= dict(max_pixels=10_000_000)


def decode(path, **request):
    """uint8 RGBA frames, and what was read; in this process, as starting another takes a second."""
    return untrusted.read(path, REQUEST | request)


def refusal(path, capsys, **request):
    with pytest.raises(SystemExit) as ended:
        decode(path, **request)
    assert ended.value.code == 3
    return capsys.readouterr().err


def square(width=64, height=64, *, channels=3, colour=RED):
    """A red square, a quarter from the top left, on white (with four channels: on nothing)."""
    frame = np.full((height, width, channels), 255, np.uint8)
    if channels == 4:
        frame[:] = 0
    box = np.s_[height // 4 : height // 2, width // 4 : width // 2]
    frame[box] = [*colour, 255][:channels]
    return frame


def write(path, frames, codec="libx264", pix_fmt="yuv420p", *, fps=8, set_up=None, **options):
    layout = {2: "gray16le", 3: "rgb24", 4: "rgba"}[frames[0].shape[-1]]
    if frames[0].dtype == np.uint16:
        layout = "rgb48le"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = frames[0].shape[1], frames[0].shape[0]
        stream.pix_fmt = pix_fmt
        if set_up is not None:
            set_up(stream.codec_context)
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=layout)))
        out.mux(stream.encode(None))


def close(found, wanted, tolerance=12):
    return np.abs(np.asarray(found, int)[..., :3] - np.asarray(wanted)).max() <= tolerance


@pytest.mark.parametrize("width", [500, 404, 450, 180, 130, 512, 18, 20, 501])
def test_a_video_without_alpha_is_opaque_at_every_width(tmp_path, width):
    pix_fmt = "yuv444p" if width % 2 else "yuv420p"
    for height in (width - 1, width) if width % 2 else (width, width + 2):
        write(tmp_path / "a.mp4", [square(width, height)], pix_fmt=pix_fmt, crf="5")
        frames, _ = decode(tmp_path / "a.mp4")
        assert frames.shape == (1, height, width, 4)
        assert frames[..., 3].min() == 255
        assert close(frames[0, :, -3:], WHITE) and close(
            frames[0, height * 3 // 8, width // 3], RED
        )


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("vp8.webm", "libvpx", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "png", "rgba"),
        ("a.mkv", "ffv1", "yuva420p"),
        ("a.avi", "utvideo", "gbrap"),
    ],
)
@pytest.mark.parametrize("width", [500, 66])
def test_alpha_of_streams_that_have_it(tmp_path, name, codec, pix_fmt, width):
    options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}
    write(tmp_path / name, [square(width, 50, channels=4)] * 3, codec, pix_fmt, **options)
    frames, _ = decode(tmp_path / name)
    assert len(frames) == 3
    assert frames[:, :10, :, 3].max() <= 3 and frames[:, :, -10:, 3].max() <= 3
    assert frames[0, 18, width * 3 // 8, 3] >= 250 and close(frames[0, 18, width * 3 // 8], RED)
    area = (frames[0, ..., 3] > 127).mean()
    assert abs(area - 1 / 16) < 0.01


def test_a_fourth_byte_that_nothing_fills_is_no_alpha(tmp_path):
    frame = np.concatenate([square(), np.zeros((64, 64, 1), np.uint8)], axis=-1)
    write(tmp_path / "a.avi", [frame] * 3, "rawvideo", "bgra")
    frames, _ = decode(tmp_path / "a.avi")
    assert frames[..., 3].min() == 255
    assert close(frames[0, 0, 0], WHITE) and close(frames[0, 20, 20], RED)


@pytest.mark.parametrize("save", [dict(), dict(lossless=True)], ids=["APNG", "WEBP"])
def test_alpha_of_animated_pictures(tmp_path, save):
    path = tmp_path / ("a.webp" if save else "a.png")
    pictures = [Image.fromarray(square(66, 50, channels=4)) for _ in range(3)]
    pictures[1].putpixel((0, 0), (0, 0, 255, 255))  # equal frames would be joined
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=125, **save)
    frames, info = decode(path)
    seconds = {"seconds": 0.375, "seconds_read": 0.375}
    assert info == {"kind": "animation", "file_size": (66, 50), **seconds}
    assert (frames[0] == square(66, 50, channels=4)).all() and frames.shape[0] == 3


def test_the_picture_for_viewers_without_apng_is_no_frame(tmp_path):
    pictures = [Image.fromarray(square(colour=(0, 0, blue))) for blue in (0, 100, 200)]
    pictures[0].save(
        tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=125,
        default_image=True,
    )  # fmt: skip
    frames, _ = decode(tmp_path / "a.png")
    assert frames[:, 20, 20, 2].tolist() == [100, 200]


def colours(context, primaries, transfer, matrix, limited=1):
    context.color_primaries, context.color_trc = primaries, transfer
    context.colorspace, context.color_range = matrix, limited


def pq(nits):
    power = (np.asarray(nits) / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(nits):
    """Of greys on a screen of 1000 cd/m^2."""
    scene = (np.asarray(nits) / 1000) ** (1 / 1.2)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


HDR = {
    "pq.mkv": ("libx265", "yuv420p10le", 16, pq),
    "hlg.mp4": ("libx265", "yuv420p10le", 18, hlg),
    "pq.webm": ("libsvtav1", "yuv420p10le", 16, pq),
    "hlg.mov": ("prores_ks", "yuv422p10le", 18, hlg),  # known to the container alone
    "hlg.mkv": ("libx265", "yuv444p12le", 18, hlg),
}


@pytest.mark.parametrize("name", HDR)
def test_hdr_greys_are_those_of_an_ordinary_screen(tmp_path, name):
    """White paper (203 cd/m^2) is white, 18 % of it sRGB's 118, a lamp no brighter than white."""
    codec, pix_fmt, transfer, curve = HDR[name]
    light = np.full((64, 64), 203.0)
    light[:32, :32], light[32:, :32] = 0.18 * 203, 900
    frame = np.rint(np.repeat(curve(light)[..., None], 3, axis=-1) * 65535).astype(np.uint16)
    write(
        tmp_path / name, [frame] * 2, codec, pix_fmt,  # one alone has no length: mp4 refuses it
        bf="0",  # x265 takes the times of frames fewer than it may reorder from unset memory
        set_up=lambda context: colours(context, 9, transfer, 9),
    )  # fmt: skip
    frames, _ = decode(tmp_path / name)
    assert close(frames[0, 16, 50], WHITE, 4)
    assert close(frames[0, 16, 16], (118,) * 3, 4)
    assert close(frames[0, 50, 16], WHITE, 4)


@pytest.mark.parametrize("matrix, size", [(1, (1280, 720)), (6, (320, 240)), (6, (1280, 720))])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_matrix_and_range_as_the_file_says(tmp_path, matrix, size, full):
    r, g, b = np.float64(RED) / 255
    kr, kb = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}[matrix]
    luma = kr * r + (1 - kr - kb) * g + kb * b
    blue, red = (b - luma) / (2 - 2 * kb), (r - luma) / (2 - 2 * kr)
    scale = np.array([255, 255, 255] if full else [219, 224, 224])
    values = np.rint(np.array([luma, blue, red]) * scale + [0 if full else 16, 128, 128])
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=8, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        colours(stream.codec_context, matrix, matrix, matrix, 2 if full else 1)
        frame = av.VideoFrame(*size, "yuv420p")
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        for plane, value in zip(frame.planes, values, strict=True):
            plane.update(bytes([int(value)]) * plane.buffer_size)
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    frames, _ = decode(tmp_path / "a.mp4")
    assert close(frames[0], RED, 4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(64, 45)])
def test_pixels_that_are_not_square(tmp_path, suffix, aspect):
    def set_up(context):
        context.sample_aspect_ratio = aspect

    write(tmp_path / f"a.{suffix}", [square(90, 64)], set_up=set_up)
    frames, _ = decode(tmp_path / f"a.{suffix}")
    wide, high = 90 * max(aspect, 1), 64 * max(1 / aspect, 1)
    assert frames.shape[1:3] == (round(high), round(wide))
    assert close(frames[0, round(high * 3 / 8), round(wide * 3 / 8)], RED)


ORIENTATIONS = [
    (sx * (1 - turn), sy * turn, sx * turn, sy * (1 - turn))
    for turn, sx, sy in itertools.product((0, 1), (1, -1), (1, -1))
]


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_display_matrix(tmp_path, matrix):
    """Turned and mirrored in all eight ways, with pixels that are not square."""
    a, b, c, d = matrix

    def set_up(context):
        context.sample_aspect_ratio = Fraction(3, 2)

    write(tmp_path / "a.mp4", [square(96, 64)], set_up=set_up)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    place = data.index(b"tkhd") + 44
    one = 1 << 16
    numbers = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", *numbers)
    (tmp_path / "a.mp4").write_bytes(data)
    frames, _ = decode(tmp_path / "a.mp4")
    height, width = frames.shape[1:3]
    assert (height, width) == ((64, 144) if a else (144, 64))
    # the square's centre, an eighth of the picture left of and above the middle
    x, y = (-a - c) / 8 + 0.5, (-b - d) / 8 + 0.5
    dark = frames[0, ..., 1] < 128
    rows, columns = np.nonzero(dark)
    np.testing.assert_allclose(
        [(columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height], [x, y], atol=0.02
    )


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_pictures(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(square(96, 64)).save(tmp_path / f"a.{suffix}", exif=exif)
    frames, info = decode(tmp_path / f"a.{suffix}")
    assert info["kind"] == "picture"
    assert frames.shape[1:3] == ((64, 96) if orientation < 5 else (96, 64))
    # where EXIF 2.3 puts the row 0 and column 0 of the file
    left = orientation in (1, 4, 5, 8)
    top = orientation in (1, 2, 5, 6)
    rows, columns = np.nonzero(frames[0, ..., 1] < 128)
    assert (columns.mean() < frames.shape[2] / 2, rows.mean() < frames.shape[1] / 2) == (left, top)


def test_variable_frame_rate(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.codec_context.time_base = Fraction(1, 1000)
        for blue, milliseconds in ((0, 0), (100, 40), (200, 500)):
            frame = av.VideoFrame.from_ndarray(square(colour=(0, 0, blue)), format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    frames, _ = decode(tmp_path / "a.mp4")
    wanted = [0, 100, 100, 200, 200]  # the nearest to 0, 125, 250, 375, 500 ms
    np.testing.assert_allclose(frames[:5, 20, 20, 2], wanted, atol=12)


def counting(path, seconds, fps=10, **options):
    """A clip whose blue counts its tenths of a second, with few key frames."""
    frames = [square(colour=(0, 0, i * 2)) for i in range(seconds * fps)]
    codec = "libvpx-vp9" if path.suffix == ".webm" else "libx264"
    write(path, frames, codec, fps=fps, crf="5", **options)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv", "a.avi", "a.ts"])
@pytest.mark.parametrize("start", [0.5, 6.0])
def test_the_start_chooses_the_part(tmp_path, name, start):
    counting(tmp_path / name, 8, g="50")
    frames, info = decode(tmp_path / name, start=start, fps=5, timesteps=4)
    wanted = 20 * (start + np.arange(4) / 5)
    np.testing.assert_allclose(frames[:, 20, 20, 2], wanted, atol=6)
    assert info["seconds_read"] == pytest.approx(0.8) and info["seconds"] == pytest.approx(
        8, abs=0.2
    )


def test_a_start_behind_the_end(tmp_path, capsys):
    counting(tmp_path / "a.mp4", 2)
    assert "a.mp4 ends after 2 s" in refusal(tmp_path / "a.mp4", capsys, start=5.0)
    Image.fromarray(square()).save(tmp_path / "a.png")
    assert "a.png ends after 0 s" in refusal(tmp_path / "a.png", capsys, start=1.0)


@pytest.mark.parametrize("name", ["song.mp4", "song.mka", "song.mov"])
def test_a_song_with_a_cover_is_no_video(tmp_path, capsys, name):
    picture = av.VideoFrame.from_ndarray(square(), format="rgb24").reformat(format="yuvj420p")
    with av.open(str(tmp_path / name), "w") as out:
        sound = out.add_stream("aac", rate=44100)
        if name.endswith("mka"):
            Image.fromarray(square()).save(tmp_path / "cover.jpg")
            out.add_attachment("cover.jpg", "image/jpeg", (tmp_path / "cover.jpg").read_bytes())
        else:
            cover = out.add_stream("mjpeg", rate=25)
            cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            for packet in [*cover.encode(picture), *cover.encode(None)]:
                out.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        for index in range(50):
            silence.pts = index * 1024
            out.mux(sound.encode(silence))
        out.mux(sound.encode(None))
    words = refusal(tmp_path / name, capsys)
    assert f"{name} has no video" in words and "cover" in words


def test_pictures_of_16_bits_and_tiff(tmp_path):
    values = np.full((64, 64), 65535, np.uint16)
    values[16:32, 16:32] = 30_000
    for index, suffix in enumerate(("png", "tif")):
        Image.fromarray(values).save(tmp_path / f"{index}.{suffix}")
    frames, _ = decode(tmp_path)
    assert close(frames[:, 0, 0], WHITE, 0) and close(frames[:, 20, 20], (117,) * 3, 0)


def test_pages_of_a_tiff_are_frames(tmp_path):
    pages = [Image.fromarray(square(colour=(0, 0, blue))) for blue in (0, 100, 200)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    frames, info = decode(tmp_path / "a.tif", folder_fps=4)
    assert frames[:, 20, 20, 2].tolist() == [0, 0, 100, 100, 200, 200][: len(frames)]
    assert info["seconds"] == 0.75


def test_a_second_picture_in_a_jpeg_is_no_frame(tmp_path):
    """Phones put a map of the highlights or a depth map there (MPO)."""
    main, extra = Image.fromarray(square()), Image.fromarray(square(32, 32))
    main.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[extra])
    frames, info = decode(tmp_path / "a.jpg")
    assert info["kind"] == "picture" and frames.shape == (1, 64, 64, 4)


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(square(96, 64)).save(
        tmp_path / "a.heic", format="HEIF", exif=exif.tobytes(), quality=90
    )
    frames, info = decode(tmp_path / "a.heic")
    assert info["kind"] == "picture" and frames.shape == (1, 96, 64, 4)
    assert close(frames[0, 30, 40], RED, 20) and close(frames[0, 60, 10], WHITE, 10)


def test_heic_without_the_extra_says_what_to_install(tmp_path):
    (tmp_path / "pillow_heif.py").write_text("raise ImportError('not here')\n")
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    code = (
        f"from fourdstar_jax import read_video as r; r({str(path)!r}, resolution=16, timesteps=1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "a.heic is HEIC" in last and "fourdstar-jax[heic]" in last


PIECES = {
    "a.gif": dict(duration=125),
    "b.png": dict(duration=125),
    "c.webp": dict(duration=125, lossless=True),
    "d.tif": dict(compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", [*PIECES, "e.jpg", "f.mp4", "g.webm"])
def test_damaged_files_are_told_in_one_line(tmp_path, monkeypatch, capsys, name):
    """Cut short, or with bytes changed: frames, or a line that names the file."""
    path = tmp_path / name
    frames = [square(64, 48, colour=(0, 0, blue)) for blue in (0, 100, 200)]
    if name in PIECES:
        first, *rest = map(Image.fromarray, frames)
        first.save(path, save_all=True, append_images=rest, **PIECES[name])
    elif name == "e.jpg":
        Image.fromarray(frames[0]).save(path)
    else:
        write(path, frames, "libvpx-vp9" if name == "g.webm" else "libx264")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[: round(len(whole) * part)] for part in np.linspace(0.02, 1, 15)]
    for _ in range(15):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(len(data), size=4)] = rng.integers(256, size=4)
        damaged.append(data.tobytes())
    monkeypatch.setattr(untrusted.resource, "setrlimit", lambda *limits: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000_000)
    request = REQUEST | {"path": str(path), "out": str(tmp_path), "timeout_s": 9}
    monkeypatch.setattr(sys, "argv", ["", json.dumps(request | {"max_memory": 1 << 30})])
    outcomes = set()
    for data in damaged:
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                untrusted.main()
            outcomes.add("read")
        except SystemExit as ended:
            assert ended.code == 3
            assert str(path) in capsys.readouterr().err.strip().splitlines()[-1]
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
    assert {file.name for file in tmp_path.iterdir()} == {name, "frames.npy", "info.json"}


@pytest.mark.parametrize("name", ["width500.mp4", "width512_control.mp4"])
def test_case_of_uninitialised_alpha(name):
    images, info = case(name)
    assert info["background"] == "white"
    control, _ = case("width512_control.mp4")
    area, wanted = ((x.min(axis=-1) < 0.5).mean() for x in (images, control))
    assert abs(area - wanted) < 0.02


def case(name):
    if not CASES.is_dir():
        pytest.skip("the shared cases are not here")
    return video.read_video(CASES / name, resolution=64, timesteps=24)


SHOWN = {
    "hdr_pq.mp4": (255, 0, 30),
    "gray16": (117, 117, 117),
    "tiff": (255, 0, 0),
    "cmyk": (255, 0, 0),
    "cover_art.mp4": (255, 0, 0),
    "edit_list_cut.mp4": (0, 0, 255),
    "bt601_sd.mp4": RED,
    "bt709_hd.mp4": RED,
}


@pytest.mark.parametrize("name", SHOWN)
def test_case(name):
    images, info = case(name)
    assert info["background"] == "white"
    assert close(np.rint(images[:, 2, 2] * 255), WHITE, 1)
    assert close(np.rint(images[:, 32, 32] * 255), SHOWN[name], 6)


def test_case_of_a_mirror():
    """Red on the right above, blue on the left below: mirrored, not turned by half a turn."""
    images, _ = case("mirrored_matrix.mp4")
    red, blue = images[0, ..., 2] < 0.5, images[0, ..., 0] < 0.5
    assert np.nonzero(red)[1].mean() > 32 > np.nonzero(blue)[1].mean()
    assert np.nonzero(red)[0].mean() < 32 < np.nonzero(blue)[0].mean()
