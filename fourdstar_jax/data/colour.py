"""Video in HDR or wide gamut to the sRGB of ordinary screens, in numpy.

Sources: ITU-R BT.2100 (PQ and HLG), BT.2408 (reference white), H.273 (the numbers of curves and
primaries in files).
"""

import numpy as np

# H.273
PQ, HLG = 16, 18
BT2020, DISPLAY_P3 = 9, 12
TO_BT709 = {  # linear RGB to linear RGB of BT.709 and sRGB, both with D65
    BT2020: [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    DISPLAY_P3: [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]],
}
REFERENCE_WHITE = 203.0  # cd/m^2 of white paper in HDR
HLG_PEAK = 1000.0  # cd/m^2 of the screen that HLG is defined for


def is_srgb(transfer: int, primaries: int) -> bool:
    """Whether pixels are to be taken as they are: neither HDR nor of a wide gamut."""
    return transfer not in (PQ, HLG) and primaries not in TO_BT709


def to_srgb(pixels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """uint16 RGB `[..., 3]` of a curve and primaries as uint8 sRGB.

    HDR's reference white becomes 255; what is brighter is dimmed to that with its hue kept.
    """
    values = pixels.astype(np.float32) / 65535
    if transfer == PQ:
        light = _pq(values) / REFERENCE_WHITE
    elif transfer == HLG:
        light = _hlg(values) / REFERENCE_WHITE
    else:
        light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    if primaries in TO_BT709:
        light = light @ np.array(TO_BT709[primaries], np.float32).T
    light = np.maximum(light, 0) / np.maximum(light.max(axis=-1, keepdims=True), 1)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(srgb * 255).astype(np.uint8)


def _pq(values: np.ndarray) -> np.ndarray:
    """cd/m^2 of PQ's values (SMPTE ST 2084)."""
    power = values ** (1 / 78.84375)
    base = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
    return 10_000 * base ** (1 / 0.1593017578125)


def _hlg(values: np.ndarray) -> np.ndarray:
    """cd/m^2 of HLG's values on its screen: the scene's light, brightened by the system's gamma."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    return HLG_PEAK * scene * luminance[..., None] ** 0.2
