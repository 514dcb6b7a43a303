"""What colour alone says about an outdoor scene: snow, autumn foliage, green, blue sky, darkness.

An ImageNet classifier is trained to see past season and light, which are what scene labels often
ask for. Five shares of the picture's pixels, matched to what a prompt speaks of, add them back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CONCEPTS: tuple[tuple[str, str, str], ...] = (
    ("snow", "winter", "a snowy landscape"),
    ("autumn leaves", "autumn", "fall foliage"),
    ("green grass", "summer", "lush green trees"),
    ("blue sky", "clear sky", "a sunny sky"),
    ("night", "darkness", "a dark scene"),
)
"""Words that ask for each colour, in the order of `shares`."""

_STEP = 4  # every fourth pixel of every fourth row: shares of a picture need no more
_FULL = 0.4  # of the pixels: from here on a colour rules the picture
_USUAL = 0.25  # of a full share: what an ordinary picture has of a colour


def shares(pictures: NDArray[np.uint8]) -> Floats:
    """N x 5: how much of each colour, from -0.25 (none) over 0 (an ordinary picture) to 0.75.

    `pictures` are N x H x W x 3 RGB. Snow is sought below the upper third and sky in the upper
    half, since an overcast sky is as white as snow.
    """
    rgb: Floats = pictures[:, ::_STEP, ::_STEP].astype(np.float32) / np.float32(255)
    value = rgb.max(axis=-1)
    chroma = value - rgb.min(axis=-1)
    saturation = chroma / np.maximum(value, 1e-6)
    hue = _hue_degrees(rgb, value, chroma)
    height = rgb.shape[1]
    lower, upper = slice(height // 3, None), slice(0, height // 2)
    masks = (
        ((value > 0.7) & (saturation < 0.18))[:, lower],
        (hue > 10) & (hue < 50) & (saturation > 0.35) & (value > 0.25),
        (hue > 65) & (hue < 170) & (saturation > 0.2) & (value > 0.15),
        ((hue > 190) & (hue < 250) & (saturation > 0.15) & (value > 0.5))[:, upper],
        value < 0.2,
    )
    share = np.stack([mask.mean(axis=(1, 2), dtype=np.float32) for mask in masks], axis=1)
    centred: Floats = np.minimum(share / np.float32(_FULL), 1) - np.float32(_USUAL)
    return centred


def _hue_degrees(rgb: Floats, value: Floats, chroma: Floats) -> Floats:
    """Hue in degrees [0, 360), 0 for grey. The hexagon of A. R. Smith, "Color Gamut Transform
    Pairs" (1978)."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    safe = np.maximum(chroma, np.float32(1e-6))
    sector = np.select(
        [value == red, value == green],
        [((green - blue) / safe) % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    degrees: Floats = np.where(chroma > 0, sector * 60, 0).astype(np.float32)
    return degrees
