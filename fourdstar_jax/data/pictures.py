"""Pictures of every pixel format that Pillow opens, as 8-bit RGBA: greys of 16 bits, CMYK, ICC."""

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
WHITE_IS_ZERO = 0


def to_rgba(picture: Image.Image) -> Image.Image:
    """The picture in mode RGBA, opaque unless the file has transparency.

    Pillow's own `convert` cuts greys of more than 8 bits off at 255; here 65,535 (4,095 of 12 bits)
    is white, as is 1.0 of floats. Raises ValueError for greys outside these ranges.
    """
    if picture.mode == "LAB":
        picture = picture.convert("RGB")
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _deep_grey(picture)
    return picture.convert("RGBA")


def upright_srgb(picture: Image.Image) -> Image.Image:
    """A photograph as viewers show it, mode RGBA: EXIF's orientation and the ICC profile applied.

    Textures of glTF are not to be treated so: its specification says to ignore both.
    """
    upright = ImageOps.exif_transpose(picture)
    data = upright.info.get("icc_profile")
    if not data or upright.mode not in ("CMYK", "RGB", "RGBA", "P"):
        return to_rgba(upright)
    if upright.mode == "P" or "transparency" in upright.info:
        upright = upright.convert("RGBA")
    try:
        converted = ImageCms.profileToProfile(
            upright,
            ImageCms.ImageCmsProfile(io.BytesIO(data)),
            ImageCms.createProfile("sRGB"),
            outputMode="RGBA" if upright.mode == "RGBA" else "RGB",
        )
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one of another colour space
        converted = None
    return to_rgba(converted or upright)


def _deep_grey(picture: Image.Image) -> Image.Image:
    tags = getattr(picture, "tag_v2", {})
    values = np.asarray(picture).astype(np.float64)
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    white = 1.0 if picture.mode == "F" else float(2 ** min(bits, 16) - 1)
    # written so that NaN is refused as well
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(
            f"grey values from {values.min():g} to {values.max():g}; 0 to {white:g} are read"
        )
    grey = np.rint(values * (255 / white)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    alpha = np.full_like(grey, 255)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):  # the grey of PNG's tRNS
        alpha[values == clear] = 0
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).convert("RGBA")
