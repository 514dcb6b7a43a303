"""From a request's picture to the square that the engine reads.

Resizing follows CLIP's own preprocessing: shorter side to n, bicubic, centre cut out.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clipserver.contract import Picture, PictureRefusal, Refusal, TooLarge
from clipserver.fetch import fetch

_FORMATS = ("JPEG", "PNG", "WEBP")
_DATA_PREFIX = re.compile(r"\s*data:image/[\w.+-]+;base64,")
_LONGEST = 16  # times the shorter side
_BLANK = re.compile(r"\s+")
_LARGEST_A_REQUEST = 8  # the contract's batch, each picture as large as one may be

# Pillow's own bound would refuse what a larger `max_pixels` allows.
Image.MAX_IMAGE_PIXELS = None


class Allowance:
    """What the pictures of one request may cost together. Shared by the threads that read them."""

    def __init__(self, pixels: int) -> None:
        self._pixels = self._left = pixels
        self._lock = threading.Lock()

    def spend(self, pixels: int) -> None:
        """TooLarge from the first picture on that is too much."""
        with self._lock:
            self._left -= pixels
            if self._left < 0:
                raise TooLarge(f"{self._pixels} pixels")


class PictureReader:
    """Reads pictures to one size.

    `side` is in pixels; a picture of more than `max_pixels`, or of more than `max_bytes` where it
    is fetched, is refused, and an address is followed only where `allow_url`.
    """

    def __init__(self, side: int, *, max_pixels: int, max_bytes: int, allow_url: bool) -> None:
        self._side = side
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._allow_url = allow_url

    def allowance(self, pictures: int) -> Allowance:
        """For so many pictures of one request, 8 times the largest that is read. Each costs its
        pixels, and no less than the square that it becomes, which is spent beforehand: TooLarge
        where that alone is too much."""
        square_pixels = self._side**2
        allowance = Allowance(_LARGEST_A_REQUEST * max(self._max_pixels, square_pixels))
        allowance.spend(pictures * square_pixels)
        return allowance

    def read(self, picture: Picture | str, allowance: Allowance) -> NDArray[np.uint8]:
        """side x side x 3 RGB; a string is a picture's bare base64. PictureRefusal with the cause
        for what cannot be read, TooLarge beyond the `allowance`."""
        if isinstance(picture, str):
            data = decode_base64(picture)
        elif picture.type == "base64":
            data = decode_base64(picture.value)
        elif picture.type == "url":
            if not self._allow_url:
                raise PictureRefusal("pictures by URL are not served here: send base64.")
            data = fetch(picture.value, self._max_bytes)
        else:
            raise PictureRefusal("unknown type of picture: send base64.")
        return np.asarray(square(self._open(data, allowance), self._side))

    def _open(self, data: bytes, allowance: Allowance) -> Image.Image:
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                pixels = image.width * image.height
                if pixels > self._max_pixels:
                    raise PictureRefusal(
                        f"{image.width} x {image.height} is more than the "
                        f"{self._max_pixels} pixels allowed."
                    )
                allowance.spend(max(0, pixels - self._side**2))
                # Sixteen bits of grey are scaled; converting would clip them.
                if image.mode.startswith("I"):
                    grey = np.asarray(image).astype(np.uint32) >> 8
                    return Image.fromarray(np.minimum(grey, 255).astype(np.uint8)).convert("RGB")
                return ImageOps.exif_transpose(image).convert("RGB")
        except Refusal:
            raise
        # Decoders meet damage in many ways; whatever they raise, the picture is unreadable.
        except Exception as error:
            raise PictureRefusal("not a readable JPEG, PNG or WEBP.") from error


def decode_base64(text: str) -> bytes:
    """The bytes of standard base64, with or without a data prefix and line breaks. PictureRefusal
    for anything else, and for nothing at all."""
    body = _BLANK.sub("", _DATA_PREFIX.sub("", text, count=1))
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureRefusal("malformed base64.") from error
    if not data:
        raise PictureRefusal("empty picture.")
    return data


def square(image: Image.Image, side: int) -> Image.Image:
    """The centre square after the shorter side was brought to `side`."""
    image = _without_far_ends(image)
    width, height = image.size
    if (width, height) == (side, side):
        return image
    shorter = min(width, height)
    width, height = int(side * width / shorter), int(side * height / shorter)
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))


def _without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of a picture that is very long. Nothing of its ends reaches the centre square, and
    a picture one pixel wide and thousands high would take gigabytes once it is `side` wide."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    x, y = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((x, y, width - x, height - y)) if x or y else image
