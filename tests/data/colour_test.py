"""HDR and wide gamut against values of the standards."""

import numpy as np
import pytest

from fourdstar_jax.data import colour

BT709 = 1


def shown(values, transfer, primaries):
    pixels = np.rint(np.asarray(values, np.float64) * 65535).astype(np.uint16)
    return colour.to_srgb(pixels, transfer, primaries)


@pytest.mark.parametrize(
    "transfer, white", [(colour.PQ, 0.58), (colour.HLG, 0.75)], ids=["PQ", "HLG"]
)
def test_reference_white_is_white(transfer, white):
    """ITU-R BT.2408, table 1: white paper stands at 58 % of PQ and 75 % of HLG."""
    assert shown([white] * 3, transfer, colour.BT2020).min() >= 254
    assert (shown([[1.0] * 3, [white * 1.1] * 3], transfer, colour.BT2020) == 255).all()
    assert (shown([0.0] * 3, transfer, colour.BT2020) == 0).all()


@pytest.mark.parametrize(
    "transfer, grey", [(colour.PQ, 0.38), (colour.HLG, 0.38)], ids=["PQ", "HLG"]
)
def test_grey_card(transfer, grey):
    """The same table: an 18 % card (26 cd/m^2) stands at 38 % in both. sRGB: 0.128 is 101."""
    np.testing.assert_allclose(shown([grey] * 3, transfer, colour.BT2020), 101, atol=5)


def test_wide_gamuts_meet_at_white_and_greys():
    for primaries in colour.TO_BT709:
        np.testing.assert_allclose(
            shown([[1.0] * 3, [0.5] * 3], BT709, primaries), [[255] * 3, [128] * 3], atol=1
        )


def test_display_p3_red_as_a_screen_shows_it():
    """(234, 51, 35) of Display P3 is sRGB's red, as every colour calculator says."""
    found = shown(np.array([234, 51, 35]) / 255, BT709, colour.DISPLAY_P3)
    np.testing.assert_allclose(found, [255, 0, 0], atol=6)


def test_bright_colours_keep_their_hue():
    """A lamp of 900 cd/m^2 is no brighter than white, and orange stays orange."""
    light = np.array([0.9, 0.45, 0.09])  # of 1000 cd/m^2
    power = (light / 10) ** 0.1593017578125
    values = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    red, green, blue = shown(values, colour.PQ, BT709).astype(int)
    assert red == 255
    np.testing.assert_allclose([green, blue], [188, 89], atol=2)  # sRGB of 0.5 and 0.1


def test_what_is_taken_as_it_is():
    assert colour.is_srgb(1, 1) and colour.is_srgb(2, 2) and colour.is_srgb(6, 6)
    assert not colour.is_srgb(16, 9) and not colour.is_srgb(18, 1) and not colour.is_srgb(1, 9)
