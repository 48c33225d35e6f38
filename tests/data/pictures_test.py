"""Pixel formats that Pillow's own conversion cuts off or turns round."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from fourdstar_jax.data import pictures


def opened(picture, form, **options):
    data = io.BytesIO()
    picture.save(data, form, **options)
    return Image.open(io.BytesIO(data.getvalue()))


def tiff(values, *, white_is_zero=False, sample_format=1, bits=None, width=None):
    """A TIFF of one strip, in the byte order of `values`."""
    order = "<" if values.dtype.str[0] in "<|" else ">"
    data = values.tobytes()
    bits = bits or values.dtype.itemsize * 8
    tags = [(256, width or values.shape[1]), (257, len(values)), (258, bits), (259, 1)]
    tags += [(262, 0 if white_is_zero else 1), (273, 8), (277, 1), (278, len(values))]
    tags += [(279, len(data)), (339, sample_format)]
    out = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data)) + data
    out += struct.pack(order + "H", len(tags))
    for tag, value in tags:
        out += struct.pack(order + "HHII", tag, 4, 1, value)
    return Image.open(io.BytesIO(out + bytes(4)))


GREY = np.full((16, 20), 65535, "<u2")
GREY[4:8, 5:10] = 30_000
SHADES = np.where(GREY == 65535, 255, 117)


@pytest.mark.parametrize(
    "make",
    [
        lambda: opened(Image.fromarray(GREY), "PNG"),
        lambda: opened(Image.fromarray(GREY), "TIFF"),
        lambda: opened(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
        lambda: tiff(GREY),
        lambda: tiff(GREY.astype(">u2")),
        lambda: tiff(65535 - GREY, white_is_zero=True),
        lambda: tiff(GREY.astype("<i4"), sample_format=2),
        lambda: tiff((GREY / 65535).astype("<f4"), sample_format=3),
    ],
    ids=["PNG", "TIFF", "lzw", "little", "big", "white is 0", "int32", "float32"],
)
def test_deep_greys(make):
    rgba = np.asarray(pictures.to_rgba(make()))
    assert (rgba[..., :3] == SHADES[..., None]).all() and (rgba[..., 3] == 255).all()


def test_twelve_bits():
    values = (GREY.astype(int) * 4095 // 65535).reshape(-1, 2)
    first, second = values.T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    picture = tiff(packed.astype(np.uint8).reshape(16, 30), bits=12, width=20)
    rgba = np.asarray(pictures.to_rgba(picture))
    np.testing.assert_allclose(rgba[..., 0], SHADES, atol=1)


def test_a_grey_that_stands_for_nothing():
    """PNG's tRNS: one of the 65,536 greys is transparent, its neighbours are not."""
    values = GREY.copy()
    values[0, 0] = 65534
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG", transparency=65535)
    picture = Image.open(io.BytesIO(data.getvalue()))
    if picture.info.get("transparency") != 65535:
        pytest.skip("this Pillow does not write tRNS of 16 bits")
    alpha = np.asarray(pictures.to_rgba(picture))[..., 3]
    assert (alpha == np.where(values == 65535, 0, 255)).all()


@pytest.mark.parametrize("values", [GREY.astype("<i4") * 2, -GREY.astype("<i4")])
def test_greys_of_no_known_range_are_refused(values):
    with pytest.raises(ValueError, match="grey values from"):
        pictures.to_rgba(tiff(values, sample_format=2))
    with pytest.raises(ValueError, match="0 to 1 are read"):
        pictures.to_rgba(tiff((values / 1000).astype("<f4"), sample_format=3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_becomes_rgba(mode):
    source = Image.new("RGB", (8, 8), (255, 255, 255))
    if mode == "LAB":
        source = Image.new("LAB", (8, 8), (255, 128, 128))
    elif mode == "PA":
        source = source.convert("P").convert("PA")
    else:
        source = source.convert(mode)
    rgba = np.asarray(pictures.to_rgba(source))
    assert rgba.shape == (8, 8, 4) and rgba.min() >= 240


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(form):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[4:8, 4:8] = [0, 255, 255, 0]
    picture = opened(Image.fromarray(ink, "CMYK"), form)
    rgba = np.asarray(pictures.upright_srgb(picture))
    assert rgba[12, 12].min() >= 250
    np.testing.assert_allclose(rgba[5, 5].astype(int), [255, 0, 0, 255], atol=15)


def wide_profile():
    """An ICC profile whose red, green and blue are those of sRGB in another order."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    places = {}
    for index in range(count):
        name, offset, _ = struct.unpack(">4sII", data[132 + 12 * index : 144 + 12 * index])
        places[name] = offset
    red, green = (data[places[x] : places[x] + 20] for x in (b"rXYZ", b"gXYZ"))
    data[places[b"rXYZ"] : places[b"rXYZ"] + 20] = green
    data[places[b"gXYZ"] : places[b"gXYZ"] + 20] = red
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles(mode):
    picture = Image.new("RGBA", (8, 8), (200, 30, 30, 255))
    if mode == "RGBA":
        picture.putalpha(77)
    with_profile = opened(picture.convert(mode), "PNG", icc_profile=wide_profile())
    rgba = np.asarray(pictures.upright_srgb(with_profile))[0, 0]
    # (red and green change places; a palette of 216 colours is coarse)
    assert np.abs(rgba[:3].astype(int) - [30, 200, 30]).max() <= 30
    assert rgba[3] == (77 if mode == "RGBA" else 255)
    # textures of glTF are read without it
    assert np.asarray(pictures.to_rgba(with_profile))[0, 0, 0] > 150


def test_a_broken_profile_is_no_obstacle():
    picture = opened(Image.new("RGB", (8, 8), (200, 30, 30)), "PNG", icc_profile=b"nonsense")
    rgba = np.asarray(pictures.upright_srgb(picture))
    assert rgba[0, 0].tolist() == [200, 30, 30, 255]
