"""Everything users bring is read, framed as the training data, or refused in one line."""

import shutil

import av
import numpy as np
import pytest
from PIL import Image

from fourdstar_jax.data import untrusted, video

FPS = 24


def disc(center, *, size=96, radius=14, background=(255, 255, 255)):
    """A red disc on a background: RGB uint8, its centre (x, y) in pixels."""
    y, x = np.mgrid[:size, :size] + 0.5
    inside = (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2
    return np.where(inside[..., None], np.uint8([200, 30, 30]), np.uint8(background))


def moving(count):
    """The disc walks 24 pixels a second to the right."""
    return [disc((24 + 24 * i / FPS, 40)) for i in range(count)]


def write_mp4(path, frames, *, codec="libx264", pix_fmt="yuv420p", format="rgb24", fps=FPS):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height = frames[0].shape[1], frames[0].shape[0]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=format)))
        out.mux(stream.encode(None))


def centers(images):
    """Mean column of what is not white, as a fraction of the width."""
    weights = 1 - images.min(axis=-1)
    columns = (np.arange(images.shape[2]) + 0.5) / images.shape[2]
    return (weights.sum(axis=1) * columns).sum(axis=1) / weights.sum(axis=(1, 2))


def extents(images):
    mask = (images.min(axis=-1) < 0.5).any(axis=0)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.ptp(columns) + 1, np.ptp(rows) + 1


def test_mp4_is_sampled_at_eight_a_second(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(24))
    images, info = video.read_video(tmp_path / "a.mp4", resolution=96, timesteps=24, fit="none")
    assert images.shape == (8, 96, 96, 3) and images.dtype == np.float32
    assert info["kind"] == "video" and info["background"] == "white"
    expected = (24 + 24 * np.arange(8) / 8) / 96  # seconds 0, 1/8, ..., 7/8
    np.testing.assert_allclose(centers(images), expected, atol=0.01)


def test_no_more_timesteps_than_asked_for(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(24))
    images, _ = video.read_video(tmp_path / "a.mp4", resolution=32, timesteps=3)
    assert images.shape == (3, 32, 32, 3)


def test_object_fills_the_picture_as_in_training(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(24))
    images, _ = video.read_video(tmp_path / "a.mp4", resolution=100, timesteps=8)
    width, height = extents(images)  # the disc's way is longer than half of it: it is followed
    assert abs(width - 100 * video.OCCUPANCY) <= 3 and abs(height - width) <= 3
    near = [disc((40 + i, 40)) for i in range(8)]
    write_mp4(tmp_path / "near.mp4", near)
    images, info = video.read_video(tmp_path / "near.mp4", resolution=100, timesteps=8)
    width, height = extents(images)
    assert not info["followed"] and height < width < 1.5 * height
    assert abs(height - 100 * video.OCCUPANCY) <= 3
    rows = np.flatnonzero((images.min(axis=-1) < 0.5).any(axis=(0, 2)))
    assert abs((rows[0] + rows[-1] + 1) / 2 - 50) <= 1.5


def test_every_frame_as_it_is(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(5))
    frames = video.read_frames(tmp_path / "a.mp4")
    assert frames.shape == (5, 96, 96, 4) and frames[..., 3].min() == 255
    (tmp_path / "folder").mkdir()
    rgba = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 4)).astype(np.uint8)
    for name, picture in zip(("10.png", "2.png"), rgba, strict=True):
        Image.fromarray(picture).save(tmp_path / "folder" / name)
    np.testing.assert_array_equal(video.read_frames(tmp_path / "folder"), rgba[::-1])
    for number in (1, 3):
        Image.fromarray(rgba[0]).save(tmp_path / "folder" / f"{number}.png")
    with pytest.raises(ValueError, match="folder: 4.png is missing between 3.png and 10.png"):
        video.read_frames(tmp_path / "folder")
    Image.fromarray(rgba[0, ..., :3]).save(tmp_path / "folder" / "2.jpg")
    with pytest.raises(ValueError, match="folder: 2.jpg and 2.png have the same number"):
        video.read_frames(tmp_path / "folder")
    Image.new("RGB", (1100, 20)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="wide.png: frames of 1100x20 pixels would be resized"):
        video.read_frames(tmp_path / "wide.png")


def test_gif_durations(tmp_path):
    frames = [Image.fromarray(disc((30 + 20 * i, 48))) for i in range(3)]
    frames[0].save(
        tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[250, 500, 250]
    )
    images, info = video.read_video(tmp_path / "a.gif", resolution=96, timesteps=24, fit="none")
    assert info["kind"] == "animation"
    # frames start at 0, 0.25 and 0.75 s; each time k/8 takes the nearest start
    expected = np.array([30, 30, 50, 50, 50, 70, 70, 70]) / 96
    np.testing.assert_allclose(centers(images), expected, atol=0.01)


def test_webm_with_alpha(tmp_path):
    frames = []
    for frame in moving(6):
        alpha = np.where(frame[..., 1:2] < 128, 255, 0).astype(np.uint8)
        frames.append(np.concatenate([frame * (alpha > 0), alpha], axis=-1))
    write_mp4(tmp_path / "a.webm", frames, codec="libvpx-vp9", pix_fmt="yuva420p", format="rgba")
    images, info = video.read_video(tmp_path / "a.webm", resolution=64, timesteps=4)
    assert info["background"] == "transparent"
    assert images[:, 0, 0].min() > 0.98  # black where transparent, if alpha were lost
    assert abs(extents(images)[0] - 64 * video.OCCUPANCY) <= 3


def test_folder_in_natural_order_with_alpha(tmp_path):
    for i in range(11):
        rgb = disc((20 + 5 * i, 48), background=(0, 90, 0))
        alpha = np.where(rgb[..., :1] == 200, 255, 0).astype(np.uint8)
        Image.fromarray(np.concatenate([rgb, alpha], axis=-1)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    images, info = video.read_video(tmp_path, resolution=96, timesteps=24, fit="none")
    assert len(images) == 11 and info["kind"] == "folder"
    np.testing.assert_allclose(centers(images), (20 + 5 * np.arange(11)) / 96, atol=0.01)
    fast, _ = video.read_video(tmp_path, resolution=96, timesteps=24, folder_fps=16)
    assert len(fast) == 6


@pytest.mark.parametrize(
    "names, wrong",
    [
        (["f_1.png", "f_2.png", "f_3.png", "f_5.png", "f_8.png"], {3: "f_4.png", 4: "f_6.png"}),
        (["8.png", "9.png", "11.png"], {2: "10.png"}),
        (["f_010.png", "f_020.png", "f_050.png", "f_060.png"], {2: "f_030.png"}),  # every tenth
        (["0.png", "1.jpg", "2.png", "4.JPG", "5.png"], {3: "3.png"}),
        (["0.png", "1.jpg", "1.png", "2.png"], {2: ("1.jpg", "1.png")}),
        (["0.jpg", "0.png", "1.jpg", "1.png"], {1: ("0.jpg", "0.png"), 3: ("1.jpg", "1.png")}),
        (["1.png", "01.png", "1" + 80 * "0" + ".png"], {1: ("1.png", "01.png")}),
        (["t33.png", "t66.png", "t100.png", "t133.png"], {}),  # milliseconds
        (["a1.png", "b5.png", "c6.png"], {}),
        (["front.png", "side.png"], {}),
        (["7.png"], {}),
    ],
)
def test_gaps_in_the_numbers_of_pictures(names, wrong):
    found = untrusted.gaps(names)
    assert found.keys() == wrong.keys()
    for place, what in wrong.items():
        if isinstance(what, tuple):
            assert found[place] == "{} and {} have the same number".format(*what)
        else:
            between = f"between {names[place - 1]} and {names[place]}"
            assert found[place] == f"{what} is missing {between}"


def test_a_gap_in_what_is_read_is_told(tmp_path):
    for i in (0, 1, 2, 4, 5, 6, 8):
        Image.fromarray(disc((30 + 5 * i, 48))).save(tmp_path / f"frame_{i:03}.png")

    def warnings(timesteps):
        _, info = video.read_video(tmp_path, resolution=32, timesteps=timesteps)
        return [x for x in video.described(info, fit="object") if x.startswith("warning")]

    (line,) = warnings(7)
    assert line == (
        "warning: frame_003.png is missing between frame_002.png and frame_004.png: what there is "
        "counts as evenly spaced"
    )
    assert warnings(2) == []


def test_picture_is_one_timestep(tmp_path):
    Image.fromarray(disc((40, 40))).save(tmp_path / "a.jpg")
    images, info = video.read_video(tmp_path / "a.jpg", resolution=64, timesteps=4)
    assert images.shape == (1, 64, 64, 3) and info["kind"] == "picture"
    assert images.max() <= 1 and images[0, 32, 32, 1] < 0.3


def test_plain_background_becomes_white(tmp_path):
    Image.fromarray(disc((40, 40), background=(20, 40, 90))).save(tmp_path / "a.png")
    images, info = video.read_video(tmp_path / "a.png", resolution=64, timesteps=1)
    assert info["background"] == "plain"
    assert images[0, 0, 0].min() == 1 and abs(extents(images)[0] - 64 * video.OCCUPANCY) <= 2


def test_real_background_stays(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    images, info = video.read_video(tmp_path / "a.png", resolution=60, timesteps=1)
    assert info["background"] == "not plain"
    assert images[0, 0].min() == 1 and images[0, 30].min() < 0.2  # padded, not cropped


def test_a_little_noise_in_alpha_hides_nothing():
    frame = np.concatenate([disc((40, 40)), np.full((96, 96, 1), 250, np.uint8)], axis=-1)
    _, info = video.frame_object(frame[None], resolution=64)
    assert info["background"] == "white" and info["object"] == "plain background"
    assert abs(info["object_area"] - np.pi * 14**2 / 96**2) < 0.01


def test_what_was_read_in_words(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(24))
    path = tmp_path / "a.mp4"
    _, info = video.read_video(path, resolution=32, timesteps=3, start=0.25)
    first, second = video.described(info, fit="object")
    assert "0.38 of 1.00 s, from 0.25 s on at 8 frames a second, 3 timesteps" in first
    assert abs(info["object_area"] - np.pi * 14**2 / 96**2) < 0.01
    share = f"{100 * info['object_area']:.1f} % of the frame"
    assert second == f"object found by its plain background, {share}"
    assert "whole frame is used" in video.described(info, fit="none")[1]
    large = info | {"file_size": [3840, 2160], "source_size": [1024, 576]}
    assert "of 3840x2160 pixels (read as 1024x576): " in video.described(large, fit="object")[0]
    lines = video.described(info | {"object": None, "seconds": None}, fit="object")
    assert "of an unknown number of s" in lines[0] and lines[1].startswith("warning: no object")
    for error, warned in ((0.1, False), (0.3, True)):
        known = info | {"reach": {"error": error, "usual": 0.2}}
        line = video.described(known, fit="object")[2]
        assert f"error of {error:.3f}" in line and "under 0.200" in line
        assert line.startswith("warning: far from the training data") is warned
    for start in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="start="):
            video.read_video(path, resolution=32, timesteps=3, start=start)


def test_kept_aspect(tmp_path):
    """A wide picture is padded, not squeezed."""
    wide = np.full((50, 200, 3), 255, np.uint8)
    wide[10:40, 85:115] = 0
    images, _ = video.frame_object(wide[None], resolution=64)
    width, height = extents(images)
    assert abs(width - height) <= 1


def save_picture(path, size):
    Image.new("1", size, "white").save(path)


def make_text(path):
    path.write_text("this is no video\n" * 100)


def make_truncated(path):
    write_mp4(path, moving(24))
    path.write_bytes(path.read_bytes()[:2000])


def make_audio(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


BAD = {
    "text.mp4": (make_text, "not a video"),
    "empty.mp4": (lambda p: p.write_bytes(b""), "empty"),
    "truncated.mp4": (make_truncated, "truncated.mp4"),
    "sound.mp4": (make_audio, "no video stream"),
    "dot.png": (lambda p: save_picture(p, (1, 1)), "1x1"),
    "huge.png": (lambda p: save_picture(p, (20_000, 20_000)), "max_pixels"),
    "white.png": (lambda p: save_picture(p, (64, 64)), "background"),
    "folder": (lambda p: p.mkdir(), "no pictures"),
    "missing.mp4": (lambda p: None, "does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(tmp_path, name):
    make, words = BAD[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=words) as error:
        video.read_video(tmp_path / name, resolution=64, timesteps=4)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_frame_caps(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(24))
    with pytest.raises(ValueError, match="24 frames.*max_frames = 10"):
        video.read_video(tmp_path / "a.mp4", resolution=64, timesteps=4, max_frames=10)
    for i in range(3):
        Image.fromarray(disc((40, 40))).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="max_frames = 2"):
        video.read_video(tmp_path, resolution=64, timesteps=4, max_frames=2)


def test_frames_of_two_sizes(tmp_path):
    Image.fromarray(disc((40, 40))).save(tmp_path / "0.png")
    Image.fromarray(disc((40, 40), size=80)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="1.png is 80x80 pixels") as error:
        video.read_video(tmp_path, resolution=64, timesteps=4)
    assert str(tmp_path) in str(error.value)


def test_a_decoder_that_takes_too_long_is_stopped(tmp_path):
    shutil.copy(__file__, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="timeout_s"):
        video.read_video(tmp_path / "a.mp4", resolution=64, timesteps=4, timeout_s=0)


def test_playlists_do_not_open_other_files(tmp_path):
    write_mp4(tmp_path / "secret.ts", moving(8))
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(playlist)
    with pytest.raises(ValueError, match="not a video"):
        video.read_video(tmp_path / "a.mp4", resolution=64, timesteps=4)


def test_decoding_limits_hold(tmp_path):
    """The decoder's memory limit is real; what it holds already would do for a small picture."""
    Image.new("RGB", (2000, 2000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png (needs more than 1 MiB|could not be decoded)"):
        video.read_video(tmp_path / "a.png", resolution=64, timesteps=1, max_memory=1 << 20)


BUSY = np.random.default_rng(0).integers(150, 255, (96, 96, 1), np.uint8).repeat(3, -1)


def on_busy(frames):
    """The discs before a background that tells them by nothing but their colour."""
    red = [frame[..., 1:2] < 100 for frame in frames]
    return [np.where(r, f, BUSY) for r, f in zip(red, frames, strict=True)], red


def lossless(path, frames):
    write_mp4(path, frames, codec="libx264rgb", pix_fmt="rgb24")


def test_masks_tell_the_object_of_each_frame_that_is_used(tmp_path):
    """The frames that are used have numbers 12, 15, 18: their masks, and no others, fit."""
    plain = moving(30)
    frames, red = on_busy(plain)
    lossless(tmp_path / "a.mkv", frames)
    (tmp_path / "masks").mkdir()
    for i, mask in enumerate(red):
        half = Image.fromarray(np.uint8(mask[..., 0] * 255)).resize((48, 48))
        half.save(tmp_path / "masks" / f"{i}.png")
    options = dict(resolution=96, timesteps=3, start=0.5)
    found, info = video.read_video(tmp_path / "a.mkv", masks=tmp_path / "masks", **options)
    assert info["object"] == "mask"
    assert "found by its mask" in video.described(info, fit="object")[1]
    lossless(tmp_path / "b.mkv", plain)
    wanted, _ = video.read_video(tmp_path / "b.mkv", **options)
    assert np.abs(found - wanted).mean() < 0.02
    assert np.abs(centers(found) - centers(wanted)).max() < 0.01
    late = dict(resolution=96, timesteps=1, start=1.1)  # it may not be sought by time alone
    found, _ = video.read_video(tmp_path / "a.mkv", masks=tmp_path / "masks", **late)
    assert np.abs(found - video.read_video(tmp_path / "b.mkv", **late)[0]).mean() < 0.02


def test_masks_that_do_not_fit_are_told(tmp_path):
    Image.fromarray(disc((40, 40))).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    Image.new("L", (96, 48)).save(tmp_path / "masks" / "a.png")
    options = dict(resolution=32, timesteps=1, masks=tmp_path / "masks")
    with pytest.raises(ValueError, match="are 96x48 pixels, the frames of .*a.png 96x96"):
        video.read_video(tmp_path / "a.png", **options)
    Image.new("L", (96, 96)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(ValueError, match="nothing but background"):
        video.read_video(tmp_path / "a.png", **options)
    write_mp4(tmp_path / "a.mp4", moving(12))
    with pytest.raises(ValueError, match="masks has no frame 4, which is wanted"):
        video.read_video(tmp_path / "a.mp4", **options | {"timesteps": 2})
    with pytest.raises(ValueError, match="nowhere do not exist"):
        video.read_video(tmp_path / "a.png", **options | {"masks": tmp_path / "nowhere"})


def test_masks_that_are_turned_round_or_none_are_doubted(tmp_path):
    picture = disc((40, 40))
    Image.fromarray(picture).save(tmp_path / "a.png")
    object_ = picture.min(axis=-1) < 128
    greys = np.linspace(0, 255, object_.size).reshape(object_.shape)
    words = []
    for name, mask in (("right", 255 * object_), ("turned", 255 * ~object_), ("grey", greys)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.uint8(mask)).save(tmp_path / name / "a.png")
        _, info = video.read_video(
            tmp_path / "a.png", resolution=32, timesteps=1, masks=tmp_path / name
        )
        words.append("\n".join(video.described(info, fit="object")))
    right, turned, grey = words
    assert "warning" not in right
    assert "warning: 100% of the masks' edge is white" in turned
    assert "of the masks is neither black nor white" in grey


def test_a_gap_in_masks_is_doubted_where_the_frames_have_none(tmp_path):
    for name, numbers in (("a", (1, 2, 3)), ("b", (1, 2, 4)), ("masks", (1, 2, 4))):
        (tmp_path / name).mkdir()
        for i in numbers:
            picture = disc((40, 40))
            mask = np.uint8(255 * (picture.min(axis=-1) < 128))
            Image.fromarray(mask if name == "masks" else picture).save(tmp_path / name / f"{i}.png")
    found = []
    for name in ("a", "b"):
        masks = tmp_path / "masks"
        _, info = video.read_video(tmp_path / name, resolution=32, timesteps=3, masks=masks)
        found.append([x for x in video.described(info, fit="object") if "missing" in x])
    (first,), (second,) = found
    assert first.startswith("warning: of the masks 3.png is missing between 2.png and 4.png: they")
    assert second.startswith("warning: 3.png is missing")


# y = -(r + g + b) as one Conv of [1, 3, 32, 32], made with onnx 1.23
NETWORK = bytes.fromhex(
    "08083a6b0a0f0a01780a01771201792204436f6e761201672a1b080108030801080110014201774a0c000080bf"
    "000080bf000080bf5a1b0a017812160a14080112100a0208010a0208030a0208200a020820621b0a017912160a"
    "14080112100a0208010a0208010a0208200a02082042040a00100d"
)


def test_a_network_cuts_the_object_out(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra rembg is not installed")
    (tmp_path / "u2net.onnx").write_bytes(NETWORK)
    frames, _ = on_busy([disc((40, 40), radius=20)])
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    options = dict(resolution=96, timesteps=1, rembg=tmp_path / "u2net.onnx")
    found, info = video.read_video(tmp_path / "a.png", **options)
    assert info["object"] == "mask by u2net.onnx"
    assert abs(info["object_area"] - np.pi * 20**2 / 96**2) < 0.03
    assert np.abs(np.array(extents(found)) / 96 - 0.58).max() < 0.06  # as large as in training
    clear = np.dstack([frames[0], np.uint8(255 * (np.indices((96, 96))[0] > 50))])
    Image.fromarray(clear).save(tmp_path / "b.png")
    _, info = video.read_video(tmp_path / "b.png", **options)
    assert info["object"] == "alpha"  # which is surer


def test_what_is_no_network_is_told(tmp_path):
    Image.fromarray(disc((40, 40))).save(tmp_path / "a.png")
    (tmp_path / "u2net.onnx").write_bytes(NETWORK[:60])
    with pytest.raises(ValueError, match="none.onnx is no file"):
        video.read_video(
            tmp_path / "a.png", resolution=32, timesteps=1, rembg=tmp_path / "none.onnx"
        )
    words = "u2net.onnx cannot be run|pip install 'fourdstar-jax.rembg.'"
    with pytest.raises(ValueError, match=words):
        video.read_video(
            tmp_path / "a.png", resolution=32, timesteps=1, rembg=tmp_path / "u2net.onnx"
        )


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_large_pictures_are_read_at_a_fraction(tmp_path, name):
    """They look the same as when all is read, and their size is told."""
    picture = Image.fromarray(disc((40, 30))).resize((5000, 4500), Image.Resampling.BILINEAR)
    picture.save(
        tmp_path / name, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    )
    found, info = video.read_video(tmp_path / name, resolution=64, timesteps=1)
    small = (
        Image.fromarray(disc((40, 30))).resize((1024, 922)).transpose(Image.Transpose.ROTATE_270)
    )
    wanted, _ = video.frame_object(np.asarray(small)[None], resolution=64)
    assert np.abs(found - wanted).mean() < 0.01
    assert list(info["file_size"]) == [5000, 4500] and info["source_size"] == [922, 1024]
