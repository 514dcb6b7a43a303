"""What follows in a fragmented MP4 behind the place where its fragments no longer line up.

Demuxers go from one box to the next, so where bytes are missing they find nothing any more, be
there hours of fragments behind. (Box layout: ISO/IEC 14496-12, 8.8.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

_PIECE_BYTES = 2**20
_LARGEST_HEAD = 2**24
"""Bytes of a fragment's tables at most."""
_HEAD_BYTES = 8


def last_fragment(path: str, at: int, track: int, beat: Callable[[], None]) -> int | None:
    """The decoding timestamp at which the last fragment behind a byte offset begins, in ticks of
    the track; None where there is none. Reads all that is behind it, and calls `beat` for every
    mebibyte. Raises OSError.
    """
    last = None
    with open(path, "rb", buffering=0) as file:
        for begin in _found(file.fileno(), b"moof", at, beat):
            size = int.from_bytes(os.pread(file.fileno(), 4, begin - 4), "big")
            if size <= _LARGEST_HEAD:
                head = os.pread(file.fileno(), size - _HEAD_BYTES, begin + 4)
                last = max(filter(None, (last, _start(head, track))), default=last)
    return last


def _found(descriptor: int, kind: bytes, at: int, beat: Callable[[], None]) -> Iterator[int]:
    """Offsets of these four bytes."""
    while piece := os.pread(descriptor, _PIECE_BYTES, at):
        beat()
        found = piece.find(kind)
        while found >= 0:
            yield at + found
            found = piece.find(kind, found + 1)
        at += max(1, len(piece) - len(kind) + 1)


def _start(head: bytes, track: int) -> int | None:
    """Where a fragment's samples of a track begin, by the content of its `moof` box."""
    for kind, content in _boxes(head):
        if kind != b"traf":
            continue
        inside = dict(_boxes(content))
        if int.from_bytes(inside.get(b"tfhd", b"")[4:8], "big") == track:
            told = inside.get(b"tfdt", b"")
            return int.from_bytes(told[4:12] if told[:1] == b"\1" else told[4:8], "big")
    return None


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + _HEAD_BYTES <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        if size < _HEAD_BYTES:
            return
        yield content[at + 4 : at + 8], content[at + _HEAD_BYTES : at + size]
        at += size
