"""Which samples show again what was sent last, so that they need not be sent.

The test looks at 32 x 32 colour thumbnails. Its thresholds were set on 760 samples of real clips:
what it takes for a duplicate comes nearly always from static cameras, while a perceptual hash of
equal strictness merged a dark fade with a pink sky.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from workers.footage.picture import Picture
from workers.footage.sample import DUPLICATE_WINDOW

_SIDE, _BLOCK = 32, 8
"""Pixels of a thumbnail's side and of its blocks' sides."""
_MEAN_BELOW, _BLOCK_BELOW = 3.0, 10.0
"""Mean absolute differences, in levels of 255, of the whole thumbnail and of its worst block."""

Thumbnail = NDArray[np.int16]
"""32 x 32 x 3."""


def thumbnail(picture: Picture) -> Thumbnail:
    """The picture as the comparison sees it; any size and shape."""
    # Sixteen megabytes of a worker's memory, for those jobs alone that skip duplicates.
    import cv2  # noqa: PLC0415

    small = cv2.resize(picture, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.int16)


def is_duplicate(one: Thumbnail, other: Thumbnail) -> bool:
    """True where two pictures differ little, on the whole and in every part."""
    difference = np.abs(one - other)
    if difference.mean() >= _MEAN_BELOW:
        return False
    blocks = _SIDE // _BLOCK
    parts = difference.reshape(blocks, _BLOCK, blocks, _BLOCK, 3).mean(axis=(1, 3, 4))
    return bool(parts.max() < _BLOCK_BELOW)


def is_audited(bucket: int, picture: Picture, share: Fraction) -> bool:
    """True for about `share` of all samples, of every video others and always the same: duplicates
    that are sent all the same, to learn how often skipping is wrong."""
    shown = b"%d:" % bucket + thumbnail(picture).tobytes()
    digest = hashlib.blake2b(shown, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(slots=True)
class Duplicates:
    """Compares the samples of one range, which come in order, with the one sent last."""

    _bucket: int | None = None
    _seen: Thumbnail | None = None

    def source(self, bucket: int, picture: Picture) -> int | None:
        """The bucket of the sample that this one is a duplicate of; None where it must be sent, and
        then the next are compared with it."""
        seen = thumbnail(picture)
        if (
            self._bucket is not None
            and self._seen is not None
            and self._bucket // DUPLICATE_WINDOW == bucket // DUPLICATE_WINDOW
            and is_duplicate(self._seen, seen)
        ):
            return self._bucket
        self._bucket, self._seen = bucket, seen
        return None
